//! The sessions that are kept for the next questions. For each server, the newest session is kept.
//!
//! Two questions to one server may run at the same time, each on a session of its own. They may end in any order.

use std::collections::BTreeMap;

use crate::server::Session;
use crate::topology::Address;

/// What can be kept: a session, as long as it is open.
pub(super) trait IsOpen {
    fn is_open(&self) -> bool;
}

impl<C: crate::server::SessionClient> IsOpen for Session<C> {
    fn is_open(&self) -> bool {
        !self.client.is_closed()
    }
}

/// A session's number. A later session has a higher one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Number(u64);

/// The kept sessions, and the numbers of those that are being asked.
pub(super) struct SessionCache<S> {
    sessions: BTreeMap<Address, (Number, S)>,
    being_asked: Vec<(Address, Number)>,
    /// The newest session to each server that was ever kept.
    opened: BTreeMap<Address, Number>,
    numbers: u64,
}

impl<S: IsOpen> SessionCache<S> {
    pub(super) fn new() -> Self {
        Self { sessions: BTreeMap::new(), being_asked: Vec::new(), opened: BTreeMap::new(), numbers: 0 }
    }

    /// Keeps a session that was just opened. It takes the place of an older one.
    pub(super) fn opened(&mut self, address: &Address, session: S) {
        let number = self.next_number();
        self.opened.insert(address.clone(), number);
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

    /// Notes that the question on the session with this number has ended, with an answer or without one. Keeps the
    /// session again, unless there is a newer one.
    ///
    /// A session without an answer is not kept either if a newer one was opened since: the server lives, or did so
    /// later, and the session itself is probably dead without a sign. Its next silence would be taken for the server's.
    pub(super) fn ended(&mut self, address: &Address, number: Number, session: Option<S>, answered: bool) {
        self.being_asked.retain(|asked| *asked != (address.clone(), number));
        let opened = self.opened.get(address).copied().filter(|_| !answered);
        let newest = self.newest(address).max(opened);
        if let Some(session) = session.filter(|session| session.is_open() && newest.is_none_or(|it| it <= number)) {
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
        self.opened.retain(|address, _| keeps(address));
    }

    /// Closes all sessions, and forgets the questions under way.
    pub(super) fn clear(&mut self) {
        self.sessions.clear();
        self.being_asked.clear();
        self.opened.clear();
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

    impl IsOpen for Fake {
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
            let mut kept = SessionCache::new();
            kept.opened(&here(), Fake('a', true));
            let (a, older) = kept.ask(&here()).unwrap();
            kept.opened(&here(), Fake('b', true));
            let (b, newer) = kept.ask(&here()).unwrap();
            if older_first {
                kept.ended(&here(), a, Some(older), true);
                assert!(kept.is_open(&here()), "the newer one is still being asked");
                assert!(kept.ask(&here()).is_none(), "the older one is not put back");
                kept.ended(&here(), b, Some(newer), true);
            } else {
                kept.ended(&here(), b, Some(newer), true);
                kept.ended(&here(), a, Some(older), true);
            }
            assert_eq!(kept.ask(&here()).map(|it| it.1), Some(newer), "{older_first}");
        }
    }

    #[test]
    fn an_older_session_stays_if_the_newer_one_has_ended() {
        let mut kept = SessionCache::new();
        kept.opened(&here(), Fake('a', true));
        let (a, older) = kept.ask(&here()).unwrap();
        kept.opened(&here(), Fake('b', true));
        let (b, _) = kept.ask(&here()).unwrap();
        kept.ended(&here(), b, None, true);
        assert!(kept.is_open(&here()));
        kept.ended(&here(), a, Some(older), true);
        assert_eq!(kept.ask(&here()).map(|it| it.1), Some(older));
        kept.ended(&here(), a, Some(Fake('a', false)), true);
        assert!(!kept.is_open(&here()), "it has ended");
    }

    /// The end of one question does not hide that another one is under way.
    #[test]
    fn each_question_under_way_counts() {
        let mut kept = SessionCache::<Fake>::new();
        let (a, b) = (kept.ask_other(&here()), kept.ask_other(&here()));
        kept.ended(&here(), a, None, true);
        assert!(kept.is_open(&here()));
        kept.ended(&here(), b, None, true);
        assert!(!kept.is_open(&here()));
    }

    /// The older session is silent, the newer one has shown that the server lives, and has ended: the older one is
    /// dead.
    #[test]
    fn a_silent_session_does_not_come_back_behind_a_newer_one() {
        let mut kept = SessionCache::new();
        kept.opened(&here(), Fake('a', true));
        let (a, older) = kept.ask(&here()).unwrap();
        kept.opened(&here(), Fake('b', true));
        kept.ended(&here(), a, Some(older), false);
        assert_eq!(kept.ask(&here()).map(|it| it.1), Some(Fake('b', true)));

        let mut kept = SessionCache::new();
        kept.opened(&here(), Fake('a', true));
        let (a, older) = kept.ask(&here()).unwrap();
        kept.opened(&here(), Fake('b', false));
        kept.ended(&here(), a, Some(older), false);
        assert!(!kept.is_open(&here()), "the newer one has ended, and nothing was heard on the older one");

        let mut kept = SessionCache::new();
        kept.opened(&here(), Fake('a', true));
        let (a, only) = kept.ask(&here()).unwrap();
        kept.ended(&here(), a, Some(only), false);
        assert!(kept.is_open(&here()), "a late answer would show that the server lives");
    }
}
