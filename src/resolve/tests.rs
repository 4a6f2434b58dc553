use std::error::Error;
use std::net::IpAddr;
use std::time::Duration;

use super::*;

fn ip(last: u8) -> IpAddr {
    IpAddr::from([10, 0, 0, last])
}

#[allow(clippy::unnecessary_wraps, reason = "stands for the answer of a family")]
fn ok(last: &[u8]) -> Result<Addresses, ResolveError> {
    Ok(last.iter().copied().map(ip).collect())
}

fn name() -> String {
    "pg.internal".to_owned()
}

fn every_error() -> [ResolveError; 7] {
    let source = || Arc::new(std::io::Error::other("a reason")) as Arc<_>;
    [
        ResolveError::NotFound { name: name() },
        ResolveError::NoAddresses { name: name() },
        ResolveError::TimedOut { name: name(), after: Duration::from_millis(2034) },
        ResolveError::Other { name: name(), source: source() },
        ResolveError::ServerFailure { name: name(), code: "SERVFAIL".to_owned() },
        ResolveError::NoNameServers { name: name() },
        ResolveError::NoConfiguration { file: "/etc/resolv.conf".to_owned(), source: source() },
    ]
}

#[test]
fn addresses_keep_their_order_and_lose_their_doubles() {
    let addresses = Addresses::new([ip(3), ip(1), ip(3), ip(2), ip(1)]);
    assert_eq!(addresses.iter().collect::<Vec<_>>(), [ip(3), ip(1), ip(2)]);
    assert_eq!((&addresses).into_iter().collect::<Vec<_>>(), [ip(3), ip(1), ip(2)]);
    assert_eq!(addresses.len(), 3);
    assert_eq!(addresses.into_iter().collect::<Vec<_>>(), [ip(3), ip(1), ip(2)]);
}

#[test]
fn an_ipv4_address_is_the_same_in_the_form_of_ipv6() {
    let mapped = |n: u8| IpAddr::from([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, n]);
    let plain = |n: u8| IpAddr::from([10, 0, 0, n]);
    let addresses = Addresses::new([mapped(1), plain(1), plain(2), mapped(2)]);
    assert_eq!(addresses.iter().collect::<Vec<_>>(), [plain(1), plain(2)]);
    let literal = Addresses::literal("::ffff:10.0.0.1").unwrap();
    assert_eq!(literal.iter().collect::<Vec<_>>(), [plain(1)]);
}

#[test]
fn both_families_are_merged() {
    let merged = Addresses::merge(ok(&[1, 2]), ok(&[2, 3])).unwrap();
    assert_eq!(merged.iter().collect::<Vec<_>>(), [ip(1), ip(2), ip(3)]);
    assert!(merged.partial().is_none());
}

#[test]
fn a_family_without_addresses_is_no_failure_of_the_other() {
    for error in every_error() {
        let answer = error.is_answer();
        assert_eq!(answer, matches!(error, ResolveError::NotFound { .. } | ResolveError::NoAddresses { .. }));
        let text = error.to_string();
        for merged in
            [Addresses::merge(ok(&[1]), Err(error.clone())).unwrap(), Addresses::merge(Err(error), ok(&[1])).unwrap()]
        {
            assert_eq!(merged.len(), 1);
            assert_eq!(merged.partial().map(ToString::to_string), (!answer).then(|| text.clone()));
        }
    }
}

/// The order of `every_error` is the order of weight.
#[test]
fn of_two_failures_the_more_telling_one_is_reported() {
    let errors = every_error();
    for (i, one) in errors.iter().enumerate() {
        for (j, other) in errors.iter().enumerate() {
            let reported = Addresses::merge(Err(one.clone()), Err(other.clone())).unwrap_err();
            if one.weight() != other.weight() {
                assert_eq!(reported.to_string(), errors[i.max(j)].to_string());
            }
        }
    }
}

#[test]
fn every_error_names_what_was_asked_and_what_to_check() {
    for error in every_error() {
        let text = error.to_string();
        assert!(text.contains(error.name()), "{text}");
        assert!(text.contains("check") || text.contains("a reason"), "{text}");
        assert_eq!(error.source().is_some(), text.contains("a reason"), "{text}");
    }
}

#[test]
fn the_source_of_a_custom_error_can_be_downcast() {
    let error = ResolveError::custom(name(), std::io::Error::other("a reason"));
    assert!(error.source().is_some_and(<dyn Error>::is::<std::io::Error>));
}

#[test]
fn a_fixed_resolver_knows_its_names_only() {
    let resolver = FixedResolver::new([("PG.internal.", vec![ip(1)]), ("pg.internal", vec![ip(2)]), ("none", vec![])]);
    assert_eq!(resolver.look_up("pg.INTERNAL").unwrap().len(), 2);
    assert_eq!(resolver.look_up("10.9.9.9").unwrap().iter().collect::<Vec<_>>(), [IpAddr::from([10, 9, 9, 9])]);
    assert!(matches!(resolver.look_up("none"), Err(ResolveError::NoAddresses { .. })));
    assert!(matches!(resolver.look_up("internal"), Err(ResolveError::NotFound { .. })));
}

#[tokio::test]
async fn a_shared_resolver_is_a_resolver() {
    let shared: Arc<dyn Resolve> = Arc::new(FixedResolver::new([("pg.internal", [ip(1)])]));
    assert_eq!(Resolve::resolve(&shared, "pg.internal").await.unwrap().len(), 1);
}
