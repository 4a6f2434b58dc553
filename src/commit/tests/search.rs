//! Tests the rule with random histories: no answer is wrong as long as its assumptions hold.

use super::*;

/// What the rule assumes if the server does not show its log.
fn is_assumed(world: &World, begun: &Begun) -> bool {
    let since = world.since(begun);
    since.recoveries + since.unseen <= 1 && world.since(begun).unfed == 0 && !begun.split_brain
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    /// This holds even if the pool has seen nothing of the crash or promotion, and whichever primary it asks, even an
    /// old one.
    #[test]
    fn after_one_crash_or_promotion_every_answer_is_true((servers, history) in histories()) {
        ask_always(servers, &history, |world, begun, asked| {
            if is_assumed(world, begun) {
                for evidence in EACH {
                    is_answered_truly(evidence, world, begun, asked, 0)?;
                }
            }
            Ok(())
        })?;
    }

    /// The pool counts each life of a server as a new primary. If it has seen each of them, every answer is true,
    /// however many there were.
    #[test]
    fn of_any_number_of_failovers_seen_every_answer_is_true((servers, history) in histories()) {
        ask_always(servers, &history, |world, begun, asked| {
            if misses_nothing(world, begun, asked) {
                for evidence in EACH {
                    is_answered_truly(evidence, world, begun, asked, world.since(begun).primaries)?;
                }
            }
            Ok(())
        })?;
    }

    /// This needs no assumption: there may be crashes that nobody saw, two timelines with one number, and any server
    /// may be asked. As long as the mark's segment is there, no outcome is left open, either.
    #[test]
    fn a_server_that_shows_its_log_is_answered_truly_whatever_happened((servers, history) in histories()) {
        ask_always(servers, &history, |world, begun, asked| {
            if !world.node(asked).has_recycled(&begun.mark) {
                let answer = is_answered_truly(Kind::Of(Evidence::Function), world, begun, asked, 0)?;
                let open = matches!(answer, SettleVerdict::Unknown(why) if why != Unsettled::InProgress);
                prop_assert!(!open, "{answer:?} of {begun:?} on server {asked}, {:?}", world.node(asked));
            }
            Ok(())
        })?;
    }

    #[test]
    fn one_failover_or_clean_restart_leaves_no_answer_open((servers, history) in histories()) {
        ask_always(servers, &history, |world, begun, asked| {
            let since = world.since(begun);
            let restarted = since.clean_starts >= 1 && since.recoveries == 0;
            let seen = since.unseen == 0 && (since.clean_starts == 0 || restarted);
            // A standby that has replayed its primary's recovery shows that recovery as if it were its own.
            let stopped_before = asked != begun.node && world.node(asked).shows_stop();
            let plain = seen && !stopped_before && world.is_plain_failover(begun, asked);
            if world.newest() == Some(asked) && is_assumed(world, begun) && plain {
                let node = world.node(asked);
                for evidence in EACH {
                    let answer = settled_by(evidence, begun, node, since.primaries);
                    let shown = node.shows_parent(begun, evidence);
                    prop_assert!(
                        !shown || !matches!(answer, SettleVerdict::Unknown(_)),
                        "{answer:?} by {evidence:?} of {begun:?} on server {asked}, {node:?}"
                    );
                }
            }
            Ok(())
        })?;
    }

    /// The transaction waits for a synchronous standby, or its COMMIT is under way. Whatever else happened, it counts
    /// as in progress.
    #[test]
    fn a_transaction_that_runs_is_in_progress((servers, history) in histories()) {
        ask_always(servers, &history, |world, begun, asked| {
            if world.node(asked).truth(begun.token) == Truth::Running {
                for evidence in EACH {
                    prop_assert_eq!(settled_by(evidence, begun, world.node(asked), 0), SettleVerdict::InProgress);
                }
            }
            Ok(())
        })?;
    }
}

/// Returns whether all of this holds: the pool asks the newest primary, and has seen each one before it. Only one
/// server was promoted to the mark's timeline. Each promoted server had streamed before. If there was a recovery in
/// single-user mode, the server still shows it.
fn misses_nothing(world: &World, begun: &Begun, asked: usize) -> bool {
    let one_history = world.since(begun).unfed == 0 && !world.is_split_brain(begun.mark.life.server.timeline);
    let unseen = world.since(begun).unseen > 0 && !world.node(asked).shows_stop();
    begun.on_newest && world.newest() == Some(asked) && one_history && !unseen
}

fn is_answered_truly(
    evidence: Kind,
    world: &World,
    begun: &Begun,
    asked: usize,
    primaries_since: u64,
) -> Result<SettleVerdict, TestCaseError> {
    let (node, truth) = (world.node(asked), world.node(asked).truth(begun.token));
    let answer = settled_by(evidence, begun, node, primaries_since);
    prop_assert!(
        is_true(answer, truth),
        "{answer:?} by {evidence:?} of {begun:?}, but {truth:?} on server {asked}, {node:?}"
    );
    Ok(answer)
}

/// What a search found for one kind of evidence.
#[derive(Debug, Default)]
struct Found {
    questions: u64,
    wrong: u64,
    committed: u64,
    not_committed: u64,
    in_progress: u64,
    /// The log is not on the disk yet, so the pool asks again.
    not_yet: u64,
    unknown: u64,
}

impl Found {
    fn count(&mut self, answer: SettleVerdict, truth: Truth) {
        self.questions += 1;
        self.wrong += u64::from(!is_true(answer, truth));
        *match answer {
            SettleVerdict::Committed => &mut self.committed,
            SettleVerdict::NotCommitted => &mut self.not_committed,
            SettleVerdict::InProgress => &mut self.in_progress,
            SettleVerdict::Unknown(Unsettled::InProgress) => &mut self.not_yet,
            SettleVerdict::Unknown(_) => &mut self.unknown,
        } += 1;
    }

    fn shown(&self, what: &str) -> String {
        #[expect(clippy::cast_precision_loss, reason = "a share, printed with two decimals")]
        let share = 100.0 * self.unknown as f64 / self.questions.max(1) as f64;
        let Self { questions, wrong, committed, not_committed, .. } = self;
        format!(
            "{what}: questions={questions} wrong={wrong} committed={committed} not={not_committed} unknown={share:.2} %"
        )
    }
}

/// `HISTORIES=1000000` plays that many histories, and prints how many outcomes each kind of evidence leaves open.
///
/// The pool in this test asks the newest primary, and has seen each one before it. It asks only after a crash or a
/// promotion since the transaction began.
#[test]
fn a_search_finds_naive_rules_wrong_and_this_one_never() {
    let seed = *b"one transaction, one outcome ...";
    let histories_wanted = std::env::var("HISTORIES").map_or(2000, |wanted| wanted.parse().expect("a number"));
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
    let mut runner = TestRunner::new_with_rng(ProptestConfig::default(), rng);
    let (mut by_status, mut numbers, mut once) = (Found::default(), Found::default(), EACH.map(|_| Found::default()));
    let mut often = EACH.map(|_| Found::default());
    for _ in 0..histories_wanted {
        let (servers, history) = histories().new_tree(&mut runner).expect("nothing is filtered").current();
        ask_always(servers, &history, |world, begun, asked| {
            let (node, since) = (world.node(asked), world.since(begun));
            if since.recoveries == 0 || !misses_nothing(world, begun, asked) {
                return Ok(());
            }
            let truth = node.truth(begun.token);
            by_status.count(naive(begun, node), truth);
            numbers.count(by_number(begun, node, since.primaries), truth);
            let found = if since.recoveries == 1 { &mut once } else { &mut often };
            for (evidence, found) in EACH.into_iter().zip(found) {
                found.count(settled_by(evidence, begun, node, since.primaries), truth);
            }
            Ok(())
        })
        .expect("it only counts");
    }
    println!("{histories_wanted} histories, seed {seed:?}");
    println!("{}", by_status.shown("pg_xact_status alone"));
    println!("{}", numbers.shown("the next number is the child"));
    for (times, found) in [("one crash or failover", &once), ("several", &often)] {
        for (evidence, found) in EACH.into_iter().zip(found) {
            println!("{}", found.shown(&format!("{times}, {evidence:?}")));
            assert_eq!(found.wrong, 0, "{evidence:?} {found:?}, seed {seed:?}");
            let each = [found.committed, found.not_committed];
            assert!(each.iter().all(|count| *count > 0), "{evidence:?} {found:?}, seed {seed:?}");
        }
    }
    assert!(by_status.wrong > 0 && numbers.wrong > 0, "{by_status:?} {numbers:?}, seed {seed:?}");
}
