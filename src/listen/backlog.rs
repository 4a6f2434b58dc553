//! Decides what the reader of a listener gets, in which order, and what is dropped when the reader is slow.
//!
//! It is pure: it knows neither sessions nor tasks. Invariants: where something is missing, a gap mark stands in its
//! place. The backlog never grows beyond its capacity. Tests: at the end of this file, by property.

use std::collections::VecDeque;
use std::task::Poll;

use crate::error::Error;

/// The most notifications that wait for a reader. PostgreSQL's payloads are below 8,000 bytes, so this is at most 8 MB.
const CAPACITY: usize = 1024;

/// What waits for the reader, in order.
#[derive(Debug)]
pub(super) struct Backlog<N> {
    pub(super) queue: VecDeque<BacklogEntry<N>>,
    /// Why there is no subscription now. It is set after there has been none for a while, so it is newer than the
    /// queue.
    pub(super) trouble: Option<Error>,
    pub(super) closed: bool,
}

#[derive(Debug, PartialEq)]
pub(super) enum BacklogEntry<N> {
    Told(N),
    Gap,
}

impl<N> Default for Backlog<N> {
    fn default() -> Self {
        Self { queue: VecDeque::new(), trouble: None, closed: false }
    }
}

impl<N> Backlog<N> {
    pub(super) fn push(&mut self, notification: N) {
        if self.queue.len() < CAPACITY {
            self.queue.push_back(BacklogEntry::Told(notification));
        } else {
            self.gap();
        }
    }

    /// Adds a gap mark, unless the last entry is one. One mark stands for everything that is missing in its place.
    fn gap(&mut self) {
        if !matches!(self.queue.back(), Some(BacklogEntry::Gap)) {
            self.queue.push_back(BacklogEntry::Gap);
        }
    }

    /// Notes a new subscription. The trouble is over, and notifications may be missing before it.
    pub(super) fn subscribed(&mut self) {
        self.trouble = None;
        self.gap();
    }

    pub(super) fn next(&mut self) -> Poll<Option<Result<BacklogEntry<N>, Error>>> {
        if let Some(entry) = self.queue.pop_front() {
            return Poll::Ready(Some(Ok(entry)));
        }
        match self.trouble.take() {
            Some(error) => Poll::Ready(Some(Err(error))),
            None if self.closed => Poll::Ready(None),
            None => Poll::Pending,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Notify(u16),
        Resubscribe,
        Trouble,
        Read(u16),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            (0..600_u16).prop_map(Step::Notify),
            Just(Step::Resubscribe),
            Just(Step::Trouble),
            (0..900_u16).prop_map(Step::Read),
        ];
        proptest::collection::vec(step, 1..30)
    }

    proptest! {
        /// Notifications are numbered. If any are missing between two that were read, there is a mark between those.
        #[test]
        fn nothing_is_missing_without_a_mark(steps in steps()) {
            let mut backlog = Backlog::default();
            let (mut told, mut read, mut marked, mut resubscribed) = (0_u32, 0_u32, false, false);
            let mut steps = steps;
            steps.push(Step::Read(u16::MAX));
            for step in steps {
                match step {
                    Step::Notify(count) => for _ in 0..count {
                        told += 1;
                        backlog.push(told);
                    },
                    Step::Resubscribe => {
                        backlog.subscribed();
                        prop_assert!(backlog.trouble.is_none());
                        prop_assert!(matches!(backlog.queue.back(), Some(BacklogEntry::Gap)));
                        resubscribed = true;
                    }
                    Step::Trouble => backlog.trouble = Some(Error::Closed),
                    Step::Read(count) => for _ in 0..count {
                        match backlog.next() {
                            Poll::Ready(Some(Ok(BacklogEntry::Told(number)))) => {
                                prop_assert!(number > read);
                                prop_assert!(number == read + 1 || marked, "{read}, then {number}");
                                (read, marked) = (number, false);
                            }
                            Poll::Ready(Some(Ok(BacklogEntry::Gap))) => {
                                prop_assert!(!marked || resubscribed, "two marks in a row");
                                marked = true;
                            }
                            Poll::Ready(Some(Err(_))) => prop_assert!(backlog.queue.is_empty()),
                            Poll::Ready(None) => prop_assert!(false, "nobody closed it"),
                            Poll::Pending => break,
                        }
                    },
                }
                // There is at least one notification between two marks, so marks cannot pile up either.
                prop_assert!(backlog.queue.len() <= CAPACITY + 1, "{}", backlog.queue.len());
            }
            prop_assert!(read == told || marked, "{told} told, {read} read");
        }
    }

    #[test]
    fn a_closed_backlog_is_read_to_its_end() {
        let mut backlog = Backlog::default();
        backlog.push(1);
        backlog.closed = true;
        assert!(matches!(backlog.next(), Poll::Ready(Some(Ok(BacklogEntry::Told(1))))));
        assert!(matches!(backlog.next(), Poll::Ready(None)));
    }
}
