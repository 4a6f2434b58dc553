//! A fence that the pool's own `options` override: new sessions are writable although the database makes them
//! read-only.

use super::*;

fn pending(n: u8, timeline: u32) -> ServerReport {
    ServerReport { fence_pending: true, ..primary(n, timeline) }
}

impl Bench {
    /// Answers the questions to server 1 immediately for this long, and returns how many new sessions were opened.
    fn answered_for(&mut self, seconds: u64, kept: &ServerReport, new: &ServerReport) -> usize {
        let mut opened = 0;
        for _ in 0..seconds * 100 {
            self.wait(ms(10));
            if self.topology.beside.asking {
                self.answer(1, Ok(new.clone()), true, true);
                opened += 1;
            }
            if self.topology.members[&address(1)].asking {
                self.answer(1, Ok(kept.clone()), false, true);
            }
        }
        opened
    }

    /// A pool whose new sessions have shown that the options override the fence.
    fn lifted() -> Self {
        let mut bench = Self::settled();
        bench.answered_for(3, &pending(1, 1), &primary(1, 1));
        bench.log.clear();
        bench
    }
}

#[test]
fn a_fence_that_new_sessions_do_not_show_is_looked_at_once_in_each_patrol() {
    let mut bench = Bench::settled();
    let opened = bench.answered_for(20, &pending(1, 1), &primary(1, 1));
    assert!((1..=5).contains(&opened), "{opened} new sessions in twenty seconds");
    assert_eq!((bench.primary(), bench.ended()), (Some(1), vec![]));
}

#[test]
fn a_fence_that_begins_is_looked_at_at_once() {
    for (case, bench) in [
        ("at first", Bench::settled()),
        ("after it was removed", {
            let mut bench = Bench::lifted();
            bench.answered_for(2, &primary(1, 1), &primary(1, 1));
            bench
        }),
    ] {
        let mut bench = bench;
        assert_eq!(bench.answered_for(2, &primary(1, 1), &primary(1, 1)), 0, "{case}");
        bench.wait(ms(1000));
        bench.answer(1, Ok(pending(1, 1)), false, true);
        bench.wait(ms(100));
        assert!(bench.topology.beside.asking, "{case}");
        bench.answer(1, Ok(fenced(1, 1)), true, true);
        assert_eq!((bench.primary(), bench.ended()), (None, vec![1]), "{case}");
    }
    // The options turn out to have no effect, for instance behind a pooler.
    let mut bench = Bench::lifted();
    let mut seconds = 0;
    while bench.primary().is_some() {
        bench.answered_for(1, &pending(1, 1), &fenced(1, 1));
        seconds += 1;
        assert!(seconds < 7, "it is looked at in each patrol");
    }
}

/// A session that was opened before the fence was seen may be older than the fence, so it proves nothing.
#[test]
fn only_a_session_that_was_opened_after_the_fence_was_seen_denies_it() {
    let mut bench = Bench::settled();
    bench.suspect(1);
    bench.wait(ms(20));
    bench.answer(1, Ok(primary(1, 1)), true, true);
    bench.wait(ms(1000));
    bench.answer(1, Ok(pending(1, 1)), false, true);
    bench.wait(ms(100));
    assert!(bench.topology.beside.asking);
}

#[test]
fn a_standby_that_is_promoted_under_a_lifted_fence_is_the_primary() {
    let mut bench = Bench::lifted();
    bench.suspect(1);
    bench.wait(ms(20));
    bench.fail(1, FailureKind::Unreachable);
    bench.answer(1, Err(failure(FailureKind::Unreachable)), false, false);
    bench.answer(1, Err(failure(FailureKind::Unreachable)), true, false);
    assert_eq!(bench.primary(), None);
    bench.wait(ms(30));
    bench.answer(2, Ok(pending(2, 2)), false, true);
    assert_eq!(bench.primary(), Some(2));
}

#[test]
fn a_suspended_primary_under_a_lifted_fence_is_resumed_on_its_open_session() {
    let mut bench = Bench::lifted();
    bench.wait(ms(1000));
    bench.answer(1, Err(failure(FailureKind::TimedOut)), false, true);
    assert_eq!(bench.primary(), None);
    bench.wait(ms(100));
    bench.fail(1, FailureKind::Unreachable);
    let answer =
        Probed { address: address(1), result: Ok(pending(1, 1)), fresh: false, still_open: true, beside: true };
    bench.topology.probed(bench.now, &answer);
    bench.poll();
    assert_eq!((bench.primary(), bench.ended()), (Some(1), vec![]));
}
