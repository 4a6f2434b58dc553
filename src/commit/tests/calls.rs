//! Tests calls that run again, in the worlds of `model.rs`. Each attempt is in doubt, and before the next one begins,
//! the primary is asked whether it has the earlier ones. No history may ever contain two attempts of one call.

use super::*;

/// Which of a call's earlier attempts a primary is asked for before the next attempt begins there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asks {
    All,
    /// Only the last attempt.
    Last,
}

/// Plays one call. Whenever the newest primary says that it does not have the attempts, the work runs again there.
/// Returns the number of attempts, and whether a history has ever contained two of them.
fn play(asks: Asks, (servers, archive): (usize, bool), history: &[Op], kind: Kind) -> (usize, bool) {
    let mut world = World::new(servers, archive).signing();
    let mut attempts: Vec<Begun> = Vec::new();
    let mut doubled = false;
    for op in history {
        world.apply(*op);
        if let Some(newest) = world.newest().filter(|newest| runs(asks, &world, &attempts, *newest, kind)) {
            let on = world.primaries().iter().position(|primary| *primary == newest).unwrap();
            world.apply(Op::Begin { on });
            attempts.push(*world.clients().last().unwrap());
        }
        let (world, attempts) = (&world, &attempts);
        let holds =
            |node: usize| attempts.iter().filter(move |begun| world.node(node).truth(begun.token) == Truth::Committed);
        doubled |= (0..servers).any(|node| holds(node).count() > 1);
    }
    (attempts.len(), doubled)
}

fn runs(asks: Asks, world: &World, attempts: &[Begun], newest: usize, kind: Kind) -> bool {
    let asked = if asks == Asks::Last { attempts.len().saturating_sub(1) } else { 0 };
    let node = world.node(newest);
    attempts[asked..].iter().all(|begun| {
        // If the mark's segment was recycled, its attempt cannot be decided, and the call ends.
        !node.has_recycled(&begun.mark)
            && settled_by(kind, begun, node, world.since(begun).primaries) == SettleVerdict::NotCommitted
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    #[test]
    fn no_history_holds_two_attempts_of_a_call((servers, history) in histories()) {
        let (attempts, doubled) = play(Asks::All, servers, &history, Kind::Of(Evidence::Function));
        prop_assert!(!doubled, "{attempts} attempts");
    }
}

#[test]
fn a_search_finds_who_forgets_an_attempt_wrong_and_never_who_asks_for_all() {
    let seed = *b"no call is carried out twice ...";
    let mut runner =
        TestRunner::new_with_rng(ProptestConfig::default(), TestRng::from_seed(RngAlgorithm::ChaCha, &seed));
    let (mut forgetful, mut reruns) = (0, 0);
    for _ in 0..5000 {
        let (servers, history) = histories().new_tree(&mut runner).expect("nothing is filtered").current();
        let kind = Kind::Of(Evidence::Function);
        forgetful += u64::from(play(Asks::Last, servers, &history, kind).1);
        let (attempts, doubled) = play(Asks::All, servers, &history, kind);
        assert!(!doubled, "seed {seed:?}, {history:?}");
        reruns += u64::from(attempts > 2);
    }
    println!("of 5000 calls {reruns} ran more than twice; who forgets attempts doubled {forgetful}");
    assert!(forgetful > 0 && reruns > 0, "seed {seed:?}");
}

/// The lagging server is promoted first, and does not have the first attempt. Then the server that has it is promoted.
#[test]
fn the_standby_that_was_ahead_is_asked_for_the_first_attempt() {
    let history = [
        Op::Write { on: 0, flush: true },
        // The first attempt begins here. Server 2 gets it with its COMMIT, server 1 gets nothing more.
        Op::Commit { client: 0, how: Commit::Flushed },
        Op::Ship { to: 1, records: 9 },
        Op::Crash { on: 0, kept: 0 },
        Op::Promote { on: 0 },
        // The second attempt begins on server 1.
        Op::Commit { client: 1, how: Commit::Held },
        Op::Crash { on: 0, kept: 0 },
        Op::Promote { on: 0 },
        Op::Commit { client: 2, how: Commit::Flushed },
    ];
    for (asks, doubled) in [(Asks::Last, true), (Asks::All, false)] {
        assert_eq!(play(asks, (3, true), &history, Kind::Of(Evidence::Function)).1, doubled, "{asks:?}");
    }
}
