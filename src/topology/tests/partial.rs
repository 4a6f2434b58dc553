//! Answers of DNS in which one address family is missing.

use super::*;

fn v6(n: u16) -> Endpoint {
    let ip = std::net::Ipv6Addr::new(0xfdaa, 0, 0, 0, 0, 0, 0, n);
    Endpoint { host: None, address: Address::Tcp(SocketAddr::from((ip, 5432))) }
}

fn partial(endpoints: impl IntoIterator<Item = Endpoint>) -> NameAnswer {
    let partial = Some("no answer for A".to_owned());
    NameAnswer::Addresses { endpoints: endpoints.into_iter().collect(), partial }
}

fn known(bench: &Bench) -> Vec<String> {
    let mut known: Vec<_> = bench.topology.members.keys().map(ToString::to_string).collect();
    known.sort();
    known
}

/// A partial answer says nothing about the missing family, so none of that family's addresses is forgotten. It does
/// replace the addresses of the other family.
#[test]
fn a_partial_answer_takes_away_no_address_of_the_family_that_is_missing() {
    let now = Instant::now();
    let mut bench = Bench { topology: Topology::new(settings(), Vec::new(), 1, 1, now), now, log: Vec::new() };
    bench.poll();
    bench.topology.resolved(bench.now, 0, named([endpoint(1), v6(1)]));
    for _ in 0..3 {
        bench.wait(ms(200));
        bench.topology.resolved(bench.now, 0, partial([v6(2)]));
    }
    assert_eq!(known(&bench), ["127.0.0.1:5432", "[fdaa::2]:5432"]);
    // First comes a whole answer, and then a partial one of the other family.
    bench.topology.resolved(bench.now, 0, partial([endpoint(3)]));
    assert_eq!(known(&bench), ["127.0.0.3:5432", "[fdaa::2]:5432"]);
    bench.topology.resolved(bench.now, 0, named([v6(2)]));
    assert_eq!(known(&bench), ["[fdaa::2]:5432"]);
}

/// Wrong credentials are told at once, although the name server never tells one of the families, or nothing of another
/// name: they are the same everywhere.
#[test]
fn a_name_that_is_never_told_as_a_whole_hides_no_refusal() {
    for other in [None, Some(NameAnswer::Failed("SERVFAIL".to_owned()))] {
        let now = Instant::now();
        let names = 1 + usize::from(other.is_some());
        let mut bench = Bench { topology: Topology::new(settings(), Vec::new(), names, 1, now), now, log: Vec::new() };
        bench.poll();
        match &other {
            None => bench.topology.resolved(bench.now, 0, partial([endpoint(1)])),
            Some(failed) => {
                bench.topology.resolved(bench.now, 0, named([endpoint(1)]));
                bench.topology.resolved(bench.now, 1, failed.clone());
            }
        }
        bench.poll();
        bench.fail(1, FailureKind::Unreachable);
        assert!(!bench.refused(), "{other:?}: it may be just starting");
        bench.wait(ms(100));
        bench.fail(1, FailureKind::Refused);
        assert!(bench.refused(), "{other:?}");
    }
}
