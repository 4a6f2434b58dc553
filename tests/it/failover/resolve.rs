//! The resolver against a real DNS server with faults. Rows D1 to D8 of the scenario list; D5 is the pool's, and D7
//! stands beside the code, since it needs files in the place of `/etc/resolv.conf`.

#![allow(clippy::expect_used, reason = "helpers of tests may fail as tests do")]

use std::{
    net::{IpAddr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use testbed::{Answer, Dns};
use tokio::{net::UdpSocket, task::JoinSet};
use tokio_postgres_failover::resolve::{HickoryResolver, Resolve, ResolveError};

use crate::support::{split, stalls};

const HOST: &str = "pg.internal";
const LOOPBACK: [u8; 4] = [127, 0, 0, 1];

/// Far above what an answer on loopback takes, so that a lost race fails a test and a busy machine does not.
const TIMEOUT: Duration = Duration::from_secs(5);
/// For tests that wait for it to pass.
const SHORT: Duration = Duration::from_millis(300);

async fn dns() -> (Dns, HickoryResolver) {
    let dns = Dns::start((LOOPBACK, 0).into()).await;
    let resolver = HickoryResolver::with_name_servers([dns.addr()]).timeout(TIMEOUT);
    (dns, resolver)
}

fn v4(last: u8) -> IpAddr {
    IpAddr::from([10, 0, 0, last])
}

fn v6(last: u16) -> IpAddr {
    IpAddr::V6(Ipv6Addr::new(0xfdaa, 0, 0, 0, 0, 0, 0, last))
}

/// All that is found, and that nothing fails along the way.
async fn whole(resolver: &impl Resolve, host: &str) -> Vec<IpAddr> {
    // Behind the other family's answer a family has 100 ms for its own, which a stall of the machine may exceed.
    let found = stalls::unless_stalled(async || {
        let found = resolver.resolve(host).await.expect("the name resolves");
        let late = matches!(found.partial(), Some(ResolveError::TimedOut { .. }));
        if late { Err(format!("half an answer: {found:?}")) } else { Ok(found) }
    })
    .await;
    assert!(found.partial().is_none(), "{found:?}");
    found.into_iter().collect()
}

#[tokio::test]
async fn d1_each_failure_has_its_name_and_ends_at_once() {
    type Check = fn(&ResolveError) -> bool;
    let (dns, resolver) = dns().await;
    let table: [(Answer, Check); 4] = [
        (Answer::NxDomain, |error| matches!(error, ResolveError::NotFound { .. })),
        (Answer::Empty, |error| matches!(error, ResolveError::NoAddresses { .. })),
        (Answer::ServFail, |error| matches!(error, ResolveError::ServerFailure { code, .. } if code == "SERVFAIL")),
        (Answer::Refused, |error| matches!(error, ResolveError::ServerFailure { code, .. } if code == "REFUSED")),
    ];
    for (answer, is_right) in table {
        dns.answer(answer.clone());
        let error = resolver.resolve(HOST).await.unwrap_err();
        assert!(is_right(&error), "{answer:?} became {error:?}");
        assert_eq!(error.name(), HOST);

        // No failure is kept: the next question already gets the new answer.
        dns.set(&[v4(1)]);
        assert_eq!(whole(&resolver, HOST).await, [v4(1)]);
    }
}

#[tokio::test]
async fn d1_an_unknown_name_is_not_found() {
    let (_dns, resolver) = dns().await;
    let error = resolver.resolve("elsewhere.internal").await.unwrap_err();
    assert!(matches!(error, ResolveError::NotFound { .. }), "{error:?}");
}

#[tokio::test]
async fn d2_silence_ends_after_two_attempts() {
    let (dns, resolver) = dns().await;
    let resolver = resolver.timeout(SHORT);
    dns.answer(Answer::Silent);
    let started = stalls::now();
    let error = resolver.resolve(HOST).await.unwrap_err();
    let ResolveError::TimedOut { after, .. } = &error else {
        panic!("{error:?}");
    };
    assert!(*after + Duration::from_millis(20) >= SHORT * 2, "{after:?}");
    assert!(started.elapsed() < SHORT * 5 + stalls::slack_since(started), "{:?}", started.elapsed());
}

#[tokio::test]
async fn d2_a_slow_answer_is_an_answer() {
    let (dns, resolver) = dns().await;
    dns.set(&[v4(1), v6(1)]);
    dns.delay(Duration::from_millis(700));
    assert_eq!(whole(&resolver, HOST).await, [v4(1), v6(1)]);
}

#[tokio::test]
async fn d2_a_family_that_is_never_answered_does_not_hold_up_the_other() {
    let (dns, resolver) = dns().await;
    for (answer, address) in [
        (split(Answer::Addresses(vec![v4(1)]), Answer::Silent), v4(1)),
        (split(Answer::Silent, Answer::Addresses(vec![v6(1)])), v6(1)),
    ] {
        dns.answer(answer);
        let started = stalls::now();
        let found = resolver.resolve(HOST).await.unwrap();
        assert!(started.elapsed() < TIMEOUT / 2 + stalls::slack_since(started), "{:?}", started.elapsed());
        assert_eq!(found.iter().collect::<Vec<_>>(), [address]);
        let partial = found.partial();
        assert!(matches!(partial, Some(ResolveError::TimedOut { .. })), "{partial:?}");
    }
}

/// One family comes from a cache at once, and the other one takes longer than the usual wait for it, each time.
#[tokio::test]
async fn d2_a_family_that_is_always_late_is_waited_for_at_last() {
    let (dns, resolver) = dns().await;
    let late = Answer::Late(Duration::from_millis(200), Box::new(Answer::Addresses(vec![v4(1)])));
    dns.answer(split(late, Answer::Addresses(vec![v6(1)])));
    for _ in 0..8 {
        let found = resolver.resolve(HOST).await.unwrap();
        if found.partial().is_none() {
            assert_eq!(found.iter().collect::<Vec<_>>(), [v4(1), v6(1)]);
            return;
        }
    }
    panic!("eight look-ups have not found the address of the late family");
}

/// The same, and the resolver is asked for other names in between, which are whole, or late as well.
#[tokio::test]
async fn d2_other_names_do_not_hide_a_family_that_is_always_late() {
    let (dns, resolver) = dns().await;
    let late = || Answer::Late(Duration::from_millis(200), Box::new(Answer::Addresses(vec![v4(1)])));
    dns.answer(split(late(), Answer::Addresses(vec![v6(1)])));
    for other in [split(late(), Answer::Addresses(vec![v6(1)])), Answer::Addresses(vec![v4(2), v6(2)])] {
        dns.answer_name("other.internal", other.clone());
        let mut whole = 0;
        for _ in 0..8 {
            let (found, _) = tokio::join!(resolver.resolve(HOST), resolver.resolve("other.internal"));
            whole += usize::from(found.unwrap().partial().is_none());
        }
        assert!(whole > 0, "{other:?}: eight look-ups have not found the address of the late family");
    }
}

#[tokio::test]
async fn d2_an_empty_family_is_no_reason_to_give_up_on_the_silent_one() {
    let (dns, resolver) = dns().await;
    dns.answer(split(Answer::Silent, Answer::Empty));
    let error = resolver.timeout(SHORT).resolve(HOST).await.unwrap_err();
    assert!(matches!(error, ResolveError::TimedOut { .. }), "{error:?}");
}

#[tokio::test]
async fn d3_aaaa_only() {
    let (dns, resolver) = dns().await;
    dns.set(&[v6(2), v6(1)]);
    assert_eq!(whole(&resolver, HOST).await, [v6(2), v6(1)]);
    // Some servers deny the whole name to those who ask for the wrong family.
    dns.answer(split(Answer::NxDomain, Answer::Addresses(vec![v6(3)])));
    assert_eq!(whole(&resolver, HOST).await, [v6(3)]);
}

#[tokio::test]
async fn d3_a_only() {
    let (dns, resolver) = dns().await;
    dns.set(&[v4(2), v4(1)]);
    assert_eq!(whole(&resolver, HOST).await, [v4(2), v4(1)]);
}

#[tokio::test]
async fn d3_both_families_are_merged_in_a_steady_order() {
    let (dns, resolver) = dns().await;
    dns.set(&[v6(1), v4(2), v6(2), v4(1)]);
    for _ in 0..10 {
        assert_eq!(whole(&resolver, HOST).await, [v4(2), v4(1), v6(1), v6(2)]);
    }
}

#[tokio::test]
async fn d3_a_failure_is_not_hidden_by_the_other_familys_none() {
    let (dns, resolver) = dns().await;
    for none in [Answer::Empty, Answer::NxDomain] {
        for answer in [split(Answer::ServFail, none.clone()), split(none, Answer::ServFail)] {
            dns.answer(answer);
            let error = resolver.resolve(HOST).await.unwrap_err();
            assert!(matches!(error, ResolveError::ServerFailure { .. }), "{error:?}");
        }
    }
}

#[tokio::test]
async fn d3_half_an_answer_says_that_it_is_half() {
    let (dns, resolver) = dns().await;
    dns.answer(split(Answer::ServFail, Answer::Addresses(vec![v6(1)])));
    let found = resolver.resolve(HOST).await.unwrap();
    assert_eq!(found.iter().collect::<Vec<_>>(), [v6(1)]);
    let partial = found.partial();
    assert!(matches!(partial, Some(ResolveError::ServerFailure { .. })), "{partial:?}");
}

#[tokio::test]
async fn d4_thirty_addresses_of_each_family() {
    let (dns, resolver) = dns().await;
    // More than a UDP answer holds, so this takes the way by TCP.
    let members: Vec<IpAddr> = (1..=30).map(v4).chain((1..=30).map(v6)).collect();
    dns.set(&members);
    assert_eq!(whole(&resolver, HOST).await, members);
}

#[tokio::test]
async fn d6_a_truncated_answer_is_asked_for_by_tcp() {
    let (dns, resolver) = dns().await;
    dns.answer(Answer::Truncated(vec![v4(1), v6(1)]));
    assert_eq!(whole(&resolver, HOST).await, [v4(1), v6(1)]);
}

#[tokio::test]
async fn d6_aliases_are_followed() {
    let (dns, resolver) = dns().await;
    // The answer holds the address.
    dns.answer(Answer::Cname("leader.internal".to_owned(), vec![v4(1)]));
    assert_eq!(whole(&resolver, HOST).await, [v4(1)]);
    // It has to be asked for, over two links.
    dns.answer(Answer::Cname("leader.internal".to_owned(), vec![]));
    dns.answer_name("leader.internal", Answer::Cname("node-2.internal.".to_owned(), vec![]));
    dns.answer_name("node-2.internal", Answer::Addresses(vec![v4(2)]));
    assert_eq!(whole(&resolver, HOST).await, [v4(2)]);
    // It leads to nothing.
    dns.answer_name("node-2.internal", Answer::Empty);
    let error = resolver.resolve(HOST).await.unwrap_err();
    assert!(matches!(error, ResolveError::NoAddresses { .. }), "{error:?}");
    // It leads in a circle.
    dns.answer_name("leader.internal", Answer::Cname(HOST.to_owned(), vec![]));
    resolver.resolve(HOST).await.unwrap_err();
}

#[tokio::test]
async fn d6_spellings_of_a_name() {
    let (dns, resolver) = dns().await;
    dns.set(&[v4(1)]);
    dns.answer_name("pg_master.service.consul", Answer::Addresses(vec![v4(2)]));
    for (host, address) in
        [("pg.internal", v4(1)), ("pg.internal.", v4(1)), ("PG.Internal", v4(1)), ("pg_master.service.consul", v4(2))]
    {
        assert_eq!(whole(&resolver, host).await, [address], "{host}");
    }
    // Three spellings of it, A and AAAA each; more when a stall had one asked again.
    assert!(dns.queries_for(HOST) >= 6, "{}", dns.queries_for(HOST));
}

#[tokio::test]
async fn d6_what_is_no_name_is_not_asked_for() {
    let (dns, resolver) = dns().await;
    for host in ["", "pg..internal", &"x".repeat(64), &"x.".repeat(200)] {
        let error = resolver.resolve(host).await.unwrap_err();
        assert_eq!(error.name(), host);
    }
    assert_eq!(dns.queries_for(HOST), 0);
}

#[tokio::test]
async fn d8_a_long_time_to_live_is_not_trusted() {
    let (dns, resolver) = dns().await;
    dns.ttl(3600);
    for last in 1..=20 {
        dns.set(&[v4(last)]);
        assert_eq!(whole(&resolver, HOST).await, [v4(last)]);
    }
    // A and AAAA each; more when a stall had one asked again.
    assert!(dns.queries() >= 40, "{}", dns.queries());
}

/// A question that begins after a failover must not be given the answer to one that began before.
#[tokio::test]
async fn questions_under_way_are_not_shared() {
    let (dns, resolver) = dns().await;
    let resolver = std::sync::Arc::new(resolver);
    dns.set(&[v4(1)]);
    dns.delay(Duration::from_millis(100));
    let mut asking = JoinSet::new();
    for _ in 0..10 {
        let resolver = std::sync::Arc::clone(&resolver);
        asking.spawn(async move { resolver.resolve(HOST).await });
    }
    for found in asking.join_all().await {
        assert_eq!(found.expect("the name resolves").into_iter().collect::<Vec<_>>(), [v4(1)]);
    }
    // A and AAAA each; more when the machine is so slow that packets are sent again.
    assert!(dns.queries() >= 20, "{}", dns.queries());
}

#[tokio::test]
async fn an_address_stands_for_itself() {
    let (dns, resolver) = dns().await;
    for address in [v4(1), v6(1)] {
        assert_eq!(whole(&resolver, &address.to_string()).await, [address]);
    }
    assert_eq!(dns.queries(), 0);
}

#[tokio::test]
async fn garbage_is_no_answer() {
    let socket = UdpSocket::bind(SocketAddr::from((LOOPBACK, 0))).await.unwrap();
    let resolver = HickoryResolver::with_name_servers([socket.local_addr().unwrap()]).timeout(SHORT);
    tokio::spawn(async move {
        let mut packet = [0; 512];
        while let Ok((len, from)) = socket.recv_from(&mut packet).await {
            // The right id, and then noise.
            packet[2..len].fill(0xff);
            socket.send_to(&packet[..len], from).await.unwrap();
        }
    });
    let started = stalls::now();
    let error = resolver.resolve(HOST).await.unwrap_err();
    assert_eq!(error.name(), HOST);
    assert!(started.elapsed() < SHORT * 5 + stalls::slack_since(started), "{error:?}");
}

#[tokio::test]
async fn a_dead_name_server_is_passed_over() {
    let (dns, _) = dns().await;
    dns.set(&[v4(1)]);
    let silent = UdpSocket::bind(SocketAddr::from((LOOPBACK, 0))).await.unwrap();
    let servers = [silent.local_addr().unwrap(), dns.addr()];
    let started = stalls::now();
    let resolver = HickoryResolver::with_name_servers(servers).timeout(TIMEOUT);
    assert_eq!(whole(&resolver, HOST).await, [v4(1)]);
    assert!(started.elapsed() < TIMEOUT / 2 + stalls::slack_since(started), "{:?}", started.elapsed());
}

#[tokio::test]
async fn without_a_name_server_the_error_says_so() {
    let resolver = HickoryResolver::with_name_servers([]);
    let error = resolver.resolve(HOST).await.unwrap_err();
    assert!(matches!(error, ResolveError::NoNameServers { .. }), "{error:?}");
}

#[tokio::test]
async fn a_time_out_may_be_as_long_as_one_likes() {
    let (dns, resolver) = dns().await;
    dns.set(&[v4(1)]);
    assert_eq!(whole(&resolver.timeout(Duration::MAX), HOST).await, [v4(1)]);
}

#[tokio::test]
async fn a_resolver_is_an_object() {
    let (dns, resolver) = dns().await;
    dns.set(&[v4(1)]);
    let resolver: Box<dyn Resolve> = Box::new(resolver);
    let found = tokio::spawn(async move { resolver.resolve(HOST).await }).await.unwrap();
    assert_eq!(found.expect("the name resolves").into_iter().collect::<Vec<_>>(), [v4(1)]);
}
