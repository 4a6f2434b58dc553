//! The sessions that are kept for the next questions. For each server, the newest session is kept.
//!
//! Two questions to one server may run at the same time, each on a session of its own. They may end in any order.

use std::collections::BTreeMap;

use crate::server::Session;
use crate::topology::Address;

/// What can be kept: a session, as long as it is open.
pub(super) trait Keep {
    fn is_open(&self) -> bool;
}

impl<C: crate::server::SessionClient> Keep for Session<C> {
    fn is_open(&self) -> bool {
        !self.client.is_closed()
    }
}

/// A session's number. A later session has a higher one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Number(u64);

/// The kept sessions, and the numbers of those that are being asked.
pub(super) struct Kept<S> {
    sessions: BTreeMap<Address, (Number, S)>,
    being_asked: Vec<(Address, Number)>,
    numbers: u64,
}

impl<S: Keep> Kept<S> {
    pub(super) fn new() -> Self {
        Self { sessions: BTreeMap::new(), being_asked: Vec::new(), numbers: 0 }
    }

    /// Keeps a session that was just opened. It takes the place of an older one.
    pub(super) fn opened(&mut self, address: &Address, session: S) {
        let number = self.next_number();
        self.sessions.insert(address.clone(), (number, session));
    }

    /// Takes the session to this server, if it is open, for a question.
    pub(super) fn ask(&mut self, address: &Address) -> Option<(Number, S)> {
        let (number, session) = self.sessions.remove(address).filter(|(_, session)| session.is_open())?;
        self.being_asked.push((address.clone(), number));
        Some((number, session))
    }

    /// Notes that a session that was not kept here is about to be asked, and returns its number.
    pub(super) fn ask_other(&mut self, address: &Address) -> Number {
        let number = self.next_number();
        self.being_asked.push((address.clone(), number));
        number
    }

    /// Notes that the question on the session with this number has ended. Keeps the session again, unless there is a
    /// newer one.
    pub(super) fn answered(&mut self, address: &Address, number: Number, session: Option<S>) {
        self.being_asked.retain(|asked| *asked != (address.clone(), number));
        let newest = self.newest(address);
        if let Some(session) = session.filter(|session| session.is_open() && newest.is_none_or(|it| it < number)) {
            self.sessions.insert(address.clone(), (number, session));
        }
    }

    /// The number of the newest session to this server that is open or being asked.
    fn newest(&self, address: &Address) -> Option<Number> {
        let kept = self.sessions.get(address).filter(|(_, session)| session.is_open()).map(|(number, _)| *number);
        let asked = self.being_asked.iter().filter(|(asked, _)| asked == address).map(|(_, number)| *number);
        asked.chain(kept).max()
    }

    /// Returns whether a session to this server is open, or is being asked.
    pub(super) fn is_open(&self, address: &Address) -> bool {
        self.newest(address).is_some()
    }

    /// Takes the session to this server, even if it is closed.
    pub(super) fn remove(&mut self, address: &Address) -> Option<S> {
        self.sessions.remove(address).map(|(_, session)| session)
    }

    /// Keeps the sessions to these servers, and closes all others.
    pub(super) fn retain(&mut self, keeps: impl Fn(&Address) -> bool) {
        self.sessions.retain(|address, _| keeps(address));
    }

    /// Closes all sessions, and forgets the questions under way.
    pub(super) fn clear(&mut self) {
        self.sessions.clear();
        self.being_asked.clear();
    }

    fn next_number(&mut self) -> Number {
        self.numbers += 1;
        Number(self.numbers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Copy, Debug, PartialEq)]
    struct Fake(char, bool);

    impl Keep for Fake {
        fn is_open(&self) -> bool {
            self.1
        }
    }

    fn here() -> Address {
        Address::Tcp(([127, 0, 0, 1], 5432).into())
    }

    /// The heartbeat asks on the older session, while the second question opens a newer session and asks on it. The
    /// newer one is kept, whichever question ends first.
    #[test]
    fn of_two_sessions_that_are_asked_the_newer_one_is_kept() {
        for older_first in [true, false] {
            let mut kept = Kept::new();
            kept.opened(&here(), Fake('a', true));
            let (a, older) = kept.ask(&here()).unwrap();
            kept.opened(&here(), Fake('b', true));
            let (b, newer) = kept.ask(&here()).unwrap();
            if older_first {
                kept.answered(&here(), a, Some(older));
                assert!(kept.is_open(&here()), "the newer one is still being asked");
                assert!(kept.ask(&here()).is_none(), "the older one is not put back");
                kept.answered(&here(), b, Some(newer));
            } else {
                kept.answered(&here(), b, Some(newer));
                kept.answered(&here(), a, Some(older));
            }
            assert_eq!(kept.ask(&here()).map(|it| it.1), Some(newer), "{older_first}");
        }
    }

    #[test]
    fn an_older_session_stays_if_the_newer_one_has_ended() {
        let mut kept = Kept::new();
        kept.opened(&here(), Fake('a', true));
        let (a, older) = kept.ask(&here()).unwrap();
        kept.opened(&here(), Fake('b', true));
        let (b, _) = kept.ask(&here()).unwrap();
        kept.answered(&here(), b, None);
        assert!(kept.is_open(&here()));
        kept.answered(&here(), a, Some(older));
        assert_eq!(kept.ask(&here()).map(|it| it.1), Some(older));
        kept.answered(&here(), a, Some(Fake('a', false)));
        assert!(!kept.is_open(&here()), "it has ended");
    }

    /// The end of one question does not hide that another one is under way.
    #[test]
    fn each_question_under_way_counts() {
        let mut kept = Kept::<Fake>::new();
        let (a, b) = (kept.ask_other(&here()), kept.ask_other(&here()));
        kept.answered(&here(), a, None);
        assert!(kept.is_open(&here()));
        kept.answered(&here(), b, None);
        assert!(!kept.is_open(&here()));
    }
}
