//! TLS by the feature `rustls`, against servers that have it: which certificates pass, and what is said of those that
//! do not.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use testbed::{Authority, Cluster, ClusterBuilder, Impostor, Node, Tap, eventually};
use tokio::time::{sleep, timeout};
use tokio_postgres::config::SslMode;
use tokio_postgres_failover::error::FailureKind;
use tokio_postgres_failover::tls::Tls;
use tokio_postgres_failover::view::Answer;
use tokio_postgres_failover::{Client, Error, Pool, PoolBuilder};
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::support::PATIENCE;
use crate::support::load::{Load, Write, by_url, create_table, generation};

/// The name that the test bed's DNS knows, and that the certificates are for. None is for an address.
const NAME: &str = "pg.internal";
/// The role may come by TLS alone.
const TLS_ONLY: &str = "hostssl all app 127.0.0.0/8 trust\nhost all app 127.0.0.0/8 reject";

fn with_tls(authority: &Authority) -> ClusterBuilder {
    Cluster::builder().nodes(1).tls(&authority.issue(&[NAME]))
}

/// The authority's certificate in a file of the cluster's.
fn trusted(cluster: &Cluster, authority: &Authority) -> PathBuf {
    let path = cluster.folder().join("trusted.pem");
    fs::write(&path, authority.pem()).unwrap();
    path
}

fn builder(cluster: &Cluster, options: &str) -> PoolBuilder {
    let separator = if options.is_empty() { "" } else { "?" };
    Pool::builder(format!("{}{separator}{options}", cluster.url())).unwrap().dns_servers([cluster.dns().addr()])
}

fn pool(cluster: &Cluster, options: &str) -> Pool {
    builder(cluster, options).build().unwrap()
}

/// `sslmode=… sslrootcert=…`
fn trusting(cluster: &Cluster, mode: &str, authority: &Authority) -> Pool {
    pool(cluster, &format!("sslmode={mode}&sslrootcert={}", trusted(cluster, authority).display()))
}

async fn is_encrypted(client: &Client) -> bool {
    client.query_one("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()", &[]).await.unwrap().get(0)
}

async fn works_encrypted(pool: &Pool) {
    let client = pool.get().await.unwrap();
    assert!(is_encrypted(&client).await);
}

/// Fails before its deadline, and says all of these.
async fn refused(pool: &Pool, words: &[&str]) -> Error {
    let error = timeout(PATIENCE, pool.get()).await.expect("it waited for its deadline").unwrap_err();
    let Error::Refused(refused) = &error else { panic!("{error:?}") };
    assert_eq!(refused.failure().kind, FailureKind::Refused);
    let text = error.to_string();
    for word in words {
        assert!(text.contains(word), "{text:?} lacks {word:?}");
    }
    assert!(!text.contains("(UNIX)"), "{text}");
    error
}

/// T1: the address is looked up, and the certificate is for the name.
#[tokio::test]
async fn t1_verify_full_checks_the_name_and_connects_to_the_address() {
    let authority = Authority::new();
    let cluster = with_tls(&authority).hba(TLS_ONLY).start().await;
    let root = trusted(&cluster, &authority);
    works_encrypted(&trusting(&cluster, "verify-full", &authority)).await;
    works_encrypted(&builder(&cluster, "").rustls(Tls::verify_full().root_certificates_file(&root)).build().unwrap())
        .await;
    // A name that ends in a dot, and one beside its address.
    let (ip, port, root) = (cluster.addr(Node(0)), cluster.port(), root.display());
    let url = format!("postgres://app@{NAME}.:{port}/app?sslmode=verify-full&sslrootcert={root}");
    let dotted = Pool::builder(url).unwrap().dns_servers([cluster.dns().addr()]).build().unwrap();
    works_encrypted(&dotted).await;
    let pairs =
        format!("host={NAME} hostaddr={ip} port={port} user=app dbname=app sslmode=verify-full sslrootcert={root}");
    works_encrypted(&Pool::builder(pairs).unwrap().build().unwrap()).await;
    // By its address alone it is another one.
    for pairs in [format!("host={ip}"), format!("hostaddr={ip}")] {
        let pairs = format!("{pairs} port={port} user=app dbname=app sslmode=verify-full sslrootcert={root}");
        let by_address = Pool::builder(pairs).unwrap().build().unwrap();
        refused(&by_address, &["not valid for name", &ip.to_string(), NAME, "subjectAltName"]).await;
    }
}

/// T1: of several names for one address, the certificate need only be for one, as in libpq.
#[tokio::test]
async fn t1_each_name_of_an_address_is_tried() {
    let authority = Authority::new();
    let cluster = with_tls(&authority).hba(TLS_ONLY).start().await;
    let root = trusted(&cluster, &authority);
    let (ip, port, root) = (cluster.addr(Node(0)), cluster.port(), root.display());
    let options = format!("port={port} user=app dbname=app sslmode=verify-full sslrootcert={root}");
    cluster.dns().answer_name("alias.internal", testbed::Answer::Addresses(vec![ip]));
    for hosts in [format!("{ip},{NAME}"), format!("alias.internal,{NAME}")] {
        let pool = Pool::builder(format!("host={hosts} {options}")).unwrap().dns_servers([cluster.dns().addr()]);
        works_encrypted(&pool.build().unwrap()).await;
    }
}

/// T1: an address in the certificate is as good as a name.
#[tokio::test]
async fn t1_verify_full_by_address() {
    let authority = Authority::new();
    let cluster = with_tls(&authority).start().await;
    let ip = cluster.addr(Node(0));
    cluster.set_certificate(Node(0), &authority.issue(&[&ip.to_string()]));
    let (port, root) = (cluster.port(), trusted(&cluster, &authority));
    let pairs = format!("hostaddr={ip} port={port} user=app dbname=app sslmode=verify-full");
    let pool = Pool::builder(format!("{pairs} sslrootcert={}", root.display())).unwrap().build().unwrap();
    eventually("the new certificate is used", PATIENCE, async || pool.get().await.is_ok()).await;
    works_encrypted(&pool).await;
}

/// T2: the primary is killed under load; not a caller notices, and nobody goes without TLS.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t2_a_failover_over_tls() {
    let authority = Authority::new();
    let cluster = with_tls(&authority).nodes(3).hba(TLS_ONLY).start().await;
    create_table(&cluster).await;
    let root = trusted(&cluster, &authority);
    let url = format!("{}?sslmode=verify-full&sslrootcert={}", cluster.url(), root.display());
    let pool = by_url(url).dns_servers([cluster.dns().addr()]).build().unwrap();
    let load = Load::warm(&pool, 8, Write::Transaction).await;
    cluster.kill(cluster.primary()).await;
    let promotion = cluster.promote_timed(cluster.most_advanced_standby().await).await;
    load.all_written_since(Instant::now()).await;
    let outcome = load.stop(&cluster).await;
    let (first, all) = outcome.recovery(promotion.accepted_at);
    println!("first write after {first:?}, all writers after {all:?}; {} acknowledged", outcome.verdict.acknowledged);
    outcome.assert_flawless();
    assert_eq!(generation(&pool), 2);
    works_encrypted(&pool).await;
}

/// T3: each with its own reason, at once, whether the connection string, the builder or the user's connector asks for
/// it.
#[tokio::test]
async fn t3_a_bad_certificate_is_refused_at_once() {
    let (authority, other) = (Authority::new(), Authority::new());
    let expired = ["certificate expired: not valid after 2020-01-01 00:00 UTC", "renew it on the server"];
    let wrong_name = ["not valid for name \"pg.internal\"", "db.example", "subjectAltName", "sslmode=verify-ca"];
    let unknown = ["invalid peer certificate", "trust the authority that signed the certificate", "sslrootcert=<file"];
    let rows: [(_, &[&str]); 3] = [
        (authority.issue_expired(&[NAME]), &expired),
        (authority.issue(&["db.example", "*.pg.internal"]), &wrong_name),
        (other.issue(&[NAME]), &unknown),
    ];
    for (certificate, words) in rows {
        let cluster = Cluster::builder().nodes(1).tls(&certificate).start().await;
        let tls = Tls::verify_full().root_certificates_pem(authority.pem());
        for pool in [
            trusting(&cluster, "verify-full", &authority),
            builder(&cluster, "").rustls(tls).build().unwrap(),
            builder(&cluster, "sslmode=verify-full").tls(own_connector(&authority)).build().unwrap(),
        ] {
            let error = refused(&pool, words).await;
            let (text, addr) = (error.to_string(), cluster.socket_addr(Node(0)));
            assert!(text.starts_with(&format!("the certificate of {addr} ({NAME}) is not accepted")), "{text}");
            let transaction = timeout(PATIENCE, pool.transaction(async |_| Ok(()))).await.unwrap();
            assert!(matches!(transaction, Err(Error::Refused(_))), "{transaction:?}");
        }
    }
}

/// A connector made by the user's own hand.
fn own_connector(authority: &Authority) -> MakeRustlsConnect {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(authority.pem().as_bytes()).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    MakeRustlsConnect::new(builder.with_root_certificates(roots).with_no_client_auth())
}

/// T3: an authority of another name than any that is trusted.
#[tokio::test]
async fn t3_a_certificate_that_the_platform_does_not_know() {
    let cluster = with_tls(&Authority::new()).start().await;
    let words = ["UnknownIssuer", "trust the authority that signed the certificate"];
    refused(&pool(&cluster, "sslmode=verify-full"), &words).await;
    refused(&pool(&cluster, "sslmode=verify-full&sslrootcert=system"), &words).await;
    refused(&builder(&cluster, "").rustls(Tls::verify_full().platform_roots()).build().unwrap(), &words).await;
}

/// T4: a member with a bad certificate is none of the pool's business as long as it is not the primary.
#[tokio::test]
async fn t4_a_bad_certificate_refuses_its_server_only() {
    let authority = Authority::new();
    let cluster = with_tls(&authority).nodes(2).start().await;
    let root = trusted(&cluster, &authority);
    // Open sessions go on: this one is to see when the server has read its new certificate.
    cluster.set_certificate(Node(1), &authority.issue_expired(&[NAME]));
    let pairs = |node| {
        let (ip, port, root) = (cluster.addr(node), cluster.port(), root.display());
        format!("host={NAME} hostaddr={ip} port={port} user=app dbname=app sslmode=verify-full sslrootcert={root}")
    };
    let standby = Pool::builder(pairs(Node(1))).unwrap().checkout_timeout(Duration::from_millis(200)).build().unwrap();
    let is_refused = async || matches!(standby.get().await, Err(Error::Refused(_)));
    eventually("the standby shows its new certificate", PATIENCE, is_refused).await;
    let pool = trusting(&cluster, "verify-full", &authority);
    works_encrypted(&pool).await;
    eventually("the standby's certificate is told", PATIENCE, async || {
        pool.candidates().iter().any(|candidate| {
            candidate.endpoint.address.to_string() == cluster.socket_addr(Node(1)).to_string()
                && matches!(&candidate.answer, Some(Answer::Failed(failure))
                    if failure.kind == FailureKind::Refused && failure.message.contains("certificate expired"))
        })
    })
    .await;
    // A primary that shows it is waited for, as another may be promoted; the error says what is wrong with this one.
    cluster.set_certificate(Node(1), &authority.issue(&[NAME]));
    cluster.set_certificate(Node(0), &authority.issue_expired(&[NAME]));
    // In a call that is too short for an answer it is not refused either: its own word counts.
    eventually("the standby is well again", PATIENCE, async || {
        let is_refused = is_refused().await;
        let told = |answer: &Answer| matches!(answer, Answer::Refused(..));
        !is_refused && standby.candidates().iter().any(|candidate| candidate.answer.as_ref().is_some_and(told))
    })
    .await;
    let first = Pool::builder(pairs(Node(0))).unwrap().build().unwrap();
    eventually("the primary shows its new certificate", PATIENCE, async || first.get().await.is_err()).await;
    let options = format!("sslmode=verify-full&sslrootcert={}", root.display());
    let pool = builder(&cluster, &options).checkout_timeout(Duration::from_secs(1)).build().unwrap();
    // A slow machine may not get to the primary's answer within the first of these times.
    eventually("the error says what is wrong with the primary", PATIENCE, async || {
        let error = pool.get().await.unwrap_err();
        assert!(matches!(error, Error::Unavailable(_)), "{error:?}");
        println!("{error}");
        error.to_string().contains("certificate expired: not valid after 2020-01-01")
    })
    .await;
}

/// T5: what each mode asks for, on servers with TLS and without.
#[tokio::test]
async fn t5_each_sslmode() {
    let (authority, other) = (Authority::new(), Authority::new());
    let expired = Cluster::builder().nodes(1).tls(&authority.issue_expired(&[NAME])).start().await;
    for (options, encrypted) in
        [("", false), ("sslmode=disable", false), ("sslmode=prefer", true), ("sslmode=require", true)]
    {
        let client = pool(&expired, options).get().await.unwrap();
        assert_eq!(is_encrypted(&client).await, encrypted, "{options:?}");
    }
    works_encrypted(&builder(&expired, "").rustls(Tls::unverified()).build().unwrap()).await;
    let mut config: tokio_postgres::Config = expired.url_hosts().parse().unwrap();
    config.ssl_mode(SslMode::Require);
    works_encrypted(&Pool::builder(config).unwrap().build().unwrap()).await;
    // By the host's address alone, and nothing to check.
    let pairs =
        format!("hostaddr={} port={} user=app dbname=app sslmode=require", expired.addr(Node(0)), expired.port());
    works_encrypted(&Pool::builder(pairs).unwrap().build().unwrap()).await;
    for mode in ["require", "verify-ca", "verify-full"] {
        refused(&trusting(&expired, mode, &authority), &["certificate expired"]).await;
    }
    drop(expired);

    let misnamed = Cluster::builder().nodes(1).tls(&authority.issue(&["db.example"])).start().await;
    for mode in ["require", "verify-ca"] {
        works_encrypted(&trusting(&misnamed, mode, &authority)).await;
        refused(&trusting(&misnamed, mode, &other), &["trust the authority that signed the certificate"]).await;
    }
    let by_ca = Tls::verify_ca().root_certificates_pem(authority.pem());
    works_encrypted(&builder(&misnamed, "").rustls(by_ca.clone()).build().unwrap()).await;
    // The stricter one of the two counts.
    refused(&builder(&misnamed, "sslmode=verify-full").rustls(by_ca).build().unwrap(), &["not valid for name"]).await;
    drop(misnamed);

    let plain = Cluster::builder().nodes(1).start().await;
    for options in ["", "sslmode=disable", "sslmode=prefer"] {
        assert!(!is_encrypted(&pool(&plain, options).get().await.unwrap()).await, "{options:?}");
    }
    let words = ["server does not support TLS", "ssl = on", "a weaker sslmode"];
    refused(&pool(&plain, "sslmode=require"), &words).await;
    refused(&trusting(&plain, "verify-full", &authority), &words).await;
    refused(&builder(&plain, "").rustls(Tls::unverified()).build().unwrap(), &words).await;
}

/// T5: a server that takes nothing but TLS.
#[tokio::test]
async fn t5_a_server_that_wants_tls() {
    let cluster = with_tls(&Authority::new()).hba(TLS_ONLY).start().await;
    let plain = if cluster.version().await >= 14 { "no encryption" } else { "SSL off" };
    for options in ["", "sslmode=disable"] {
        refused(&pool(&cluster, options), &["28000", plain, "without TLS", "sslmode=verify-full"]).await;
    }
    works_encrypted(&pool(&cluster, "sslmode=prefer")).await;
}

/// T5: `sslnegotiation=direct` is known to PostgreSQL 17 and newer. Older ones hang up, and so does one without TLS.
#[tokio::test]
async fn t5_tls_without_asking_for_it_first() {
    let authority = Authority::new();
    let cluster = with_tls(&authority).hba(TLS_ONLY).start().await;
    let (direct, root) = ("sslnegotiation=direct", trusted(&cluster, &authority));
    let full = format!("sslmode=verify-full&sslrootcert={}&{direct}", root.display());
    let by_the_users_own =
        || builder(&cluster, &format!("sslmode=verify-full&{direct}")).tls(own_connector(&authority));
    let too_old = ["hangs up", "sslnegotiation=direct needs PostgreSQL 17", "leave it out"];
    if cluster.version().await >= 17 {
        works_encrypted(&pool(&cluster, &full)).await;
        works_encrypted(&pool(&cluster, &format!("sslmode=require&{direct}"))).await;
    } else {
        refused(&pool(&cluster, &full), &too_old).await;
        refused(&pool(&cluster, &format!("sslmode=require&{direct}")), &too_old).await;
    }
    // Wants the name of its protocol in the handshake, which this connector does not give.
    refused(&by_the_users_own().build().unwrap(), &["needs PostgreSQL 17", "ALPN"]).await;
    drop(cluster);

    let plain = Cluster::builder().nodes(1).start().await;
    refused(&pool(&plain, &format!("sslmode=require&{direct}")), &["server does not support TLS", "ssl = on"]).await;
}

/// T6: the password's proof is bound to the certificate: who ends the TLS in between learns nothing and gets nowhere.
#[tokio::test]
async fn t6_channel_binding() {
    let authority = Authority::new();
    let cluster = with_tls(&authority).password("secret").start().await;
    let impostor = Impostor::start(
        (cluster.spare_addr(0), cluster.port()).into(),
        cluster.socket_addr(Node(0)),
        &authority.issue(&["impostor"]),
        &authority,
    )
    .await;
    works_encrypted(&pool(&cluster, "sslmode=require&channel_binding=require")).await;
    works_encrypted(&pool(&cluster, "channel_binding=require")).await;
    let through = |options: &str| {
        let url = format!("postgres://app:secret@{}/app?{options}", impostor.addr());
        Pool::builder(url).unwrap().build().unwrap()
    };
    works_encrypted(&through("sslmode=require&channel_binding=disable")).await;
    for binding in ["prefer", "require"] {
        let pool = through(&format!("sslmode=require&channel_binding={binding}"));
        refused(&pool, &["SCRAM channel binding check failed"]).await;
    }
    drop(cluster);

    let plain = Cluster::builder().nodes(1).password("secret").start().await;
    refused(&pool(&plain, "channel_binding=require"), &["channel binding"]).await;
}

/// T7: another authority signs from now on. Who learns of it later fails at once, and needs no new pool.
#[tokio::test]
async fn t7_another_authority_signs_while_the_pool_lives() {
    let (old, new) = (Authority::new(), Authority::new());
    let cluster = with_tls(&old).hba(TLS_ONLY).start().await;
    // As many sessions as the server may need looks, until it has read its new certificate.
    let options = format!("sslmode=verify-full&sslrootcert={}", trusted(&cluster, &old).display());
    let late = builder(&cluster, &options).max_size(60).build().unwrap();
    let early_file = cluster.folder().join("both.pem");
    fs::write(&early_file, old.pem()).unwrap();
    let early = builder(&cluster, "").rustls(Tls::verify_full().root_certificates_file(&early_file)).build().unwrap();
    let held = late.get().await.unwrap();
    // Nobody gives one back: each is a new session.
    let mut early_ones = vec![early.get().await.unwrap()];
    // Both authorities in one file, by a new file in its place: nobody notices anything.
    let beside = cluster.folder().join("both.new");
    fs::write(&beside, old.pem() + &new.pem()).unwrap();
    fs::rename(&beside, &early_file).unwrap();
    early_ones.push(early.get().await.unwrap());

    cluster.set_certificate(Node(0), &new.issue(&[NAME]));
    let mut taken = Vec::new();
    eventually("the server shows its new certificate", PATIENCE, async || match late.get().await {
        Ok(client) => {
            taken.push(client);
            sleep(Duration::from_millis(20)).await;
            false
        }
        Err(error) => matches!(error, Error::Refused(_)),
    })
    .await;
    refused(&late, &["invalid peer certificate", "trust the authority that signed the certificate"]).await;
    early_ones.push(early.get().await.unwrap());
    // Half a file is no reason to lose what was known before.
    let whole = new.pem();
    fs::write(&early_file, &whole[..whole.len() / 2]).unwrap();
    early_ones.push(early.get().await.unwrap());
    for open in early_ones.iter().chain([&held]) {
        assert!(is_encrypted(open).await);
    }

    trusted(&cluster, &new);
    let another = late.get().await.unwrap();
    assert!(is_encrypted(&another).await);
    assert_eq!(another.generation(), held.generation());
}

/// T8: a dropped transaction's statement is stopped by a request that goes over TLS too.
#[tokio::test]
async fn t8_cancel_requests_are_encrypted() {
    let authority = Authority::new();
    let cluster = with_tls(&authority).hba(TLS_ONLY).start().await;
    let tap = Tap::start((cluster.spare_addr(0), cluster.port()).into(), cluster.socket_addr(Node(0))).await;
    let root = trusted(&cluster, &authority);
    let (ip, port) = (tap.addr().ip(), tap.addr().port());
    let pairs = format!("host={NAME} hostaddr={ip} port={port} user=app dbname=app sslmode=verify-full");
    let pool = Pool::builder(format!("{pairs} sslrootcert={}", root.display())).unwrap().build().unwrap();
    works_encrypted(&pool).await;
    let observer = cluster.direct(Node(0)).await;
    let running = async || {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(600)' AND state = 'active'";
        observer.query_one(sql, &[]).await.unwrap().get::<_, i64>(0)
    };
    let slow = tokio::spawn({
        let pool = pool.clone();
        async move { pool.transaction(async |tx| Ok(tx.batch_execute("SELECT pg_sleep(600)").await?)).await }
    });
    eventually("the statement runs", PATIENCE, async || running().await == 1).await;
    slow.abort();
    assert!(slow.await.unwrap_err().is_cancelled());
    eventually("the statement was stopped", PATIENCE, async || running().await == 0).await;
    let log = cluster.log(Node(0)).await;
    assert!(log.contains("canceling statement due to user request"), "{log}");
    let counts = tap.counts();
    assert_eq!((counts.cancels, counts.startups), (0, 0), "something went unencrypted: {counts:?}");
}

/// T9: a certificate of ours instead of a password.
#[tokio::test]
async fn t9_a_client_certificate() {
    let authority = Authority::new();
    let hba = "hostssl all app 127.0.0.0/8 cert";
    let cluster = with_tls(&authority).tls_clients(&authority.pem()).hba(hba).start().await;
    let (app, stranger) = (authority.issue_client("app"), Authority::new().issue_client("app"));
    let root = trusted(&cluster, &authority);
    let (certificate, key) = (cluster.folder().join("app.crt"), cluster.folder().join("app.key"));
    fs::write(&certificate, &app.certificate).unwrap();
    fs::write(&key, &app.key).unwrap();
    let (root, certificate, key) = (root.display(), certificate.display(), key.display());
    let options = format!("sslmode=verify-full&sslrootcert={root}&sslcert={certificate}&sslkey={key}");
    works_encrypted(&pool(&cluster, &options)).await;
    let tls = || Tls::verify_full().root_certificates_pem(authority.pem());
    let ours = tls().client_certificate_pem(&app.certificate, &app.key);
    assert!(!format!("{ours:?}").contains("PRIVATE"), "{ours:?}");
    works_encrypted(&builder(&cluster, "").rustls(ours).build().unwrap()).await;
    let none = builder(&cluster, "").rustls(tls()).build().unwrap();
    refused(&none, &["requires a valid client certificate"]).await;
    let unknown = tls().client_certificate_pem(&stranger.certificate, &stranger.key);
    refused(&builder(&cluster, "").rustls(unknown).build().unwrap(), &["alert"]).await;
}

type Set = fn(PoolBuilder, &Authority) -> PoolBuilder;

/// T10: what makes no sense is told when the pool is built.
#[tokio::test]
async fn t10_contradictions_are_refused() {
    let authority = Authority::new();
    let folder = std::env::temp_dir().join(format!("failover-tls-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let file = |name: &str, text: &str| {
        let path = folder.join(name);
        fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let client = authority.issue_client("app");
    let (root, empty) = (file("root.pem", &authority.pem()), file("empty.pem", "nothing"));
    let (certificate, key) = (file("app.crt", &client.certificate), file("app.key", &client.key));
    let other_key = file("other.key", &authority.issue_client("app").key);
    let full = format!("sslmode=verify-full&sslrootcert={root}");
    let text: [(String, &str); 15] = [
        ("sslmode=verify-ca".into(), "sslmode: `verify-ca` needs sslrootcert"),
        ("sslmode=allow".into(), "sslmode: `allow` is not offered"),
        (format!("sslrootcert={root}"), "sslrootcert: needs sslmode=verify-full"),
        (format!("sslmode=prefer&sslrootcert={root}"), "sslrootcert: needs sslmode=verify-full"),
        (format!("sslmode=disable&sslcert={root}&sslkey={root}"), "sslcert: needs sslmode=verify-full"),
        ("sslmode=verify-ca&sslrootcert=system".into(), "sslrootcert: `system` needs sslmode=verify-full"),
        ("sslmode=verify-full&sslrootcert=/no/such/file".into(), "sslrootcert: there is no file /no/such/file"),
        ("sslmode=verify-full&sslrootcert=/".into(), "sslrootcert: / cannot be read"),
        (format!("sslmode=verify-full&sslrootcert={empty}"), "holds no certificate"),
        (format!("{full}&sslcert={certificate}"), "sslkey: is missing"),
        (format!("{full}&sslkey={key}"), "sslcert: is missing"),
        (format!("{full}&sslcert={certificate}&sslkey={certificate}"), "holds no private key"),
        (format!("{full}&sslcert={certificate}&sslkey={other_key}"), "cannot be used with its key"),
        (format!("{full}&sslcert=/no/such&sslkey={key}"), "sslcert: there is no file"),
        ("sslmode=verify-full&sslcrl=a.pem".into(), "sslcrl: is not honoured"),
    ];
    let url = |options: &str| format!("postgres://app@{NAME}/app?{options}");
    for (options, words) in &text {
        let error = Pool::builder(url(options)).and_then(PoolBuilder::build).map(drop).unwrap_err().to_string();
        assert!(error.contains(words), "{options}: {error:?} lacks {words:?}");
    }
    let builders: [(String, Set, &str); 6] = [
        ("sslmode=disable".into(), |b, _| b.rustls(Tls::verify_full()), "sslmode: contradicts"),
        ("sslmode=prefer".into(), |b, _| b.rustls(Tls::verify_full()), "sslmode: contradicts"),
        (full.clone(), |b, a| b.rustls(Tls::verify_full().root_certificates_pem(a.pem())), "sslrootcert: `PoolBuilder"),
        (full.clone(), |b, a| b.tls(own_connector(a)), "sslrootcert: a connector given"),
        (String::new(), |b, _| b.rustls(Tls::verify_ca()), "sslmode: `verify-ca` needs"),
        (String::new(), |b, _| b.rustls(Tls::verify_full().root_certificates_pem("none")), "sslrootcert: the bytes"),
    ];
    for (options, set, words) in builders {
        let builder = Pool::builder(url(&options)).unwrap();
        let error = set(builder, &authority).build().map(drop).unwrap_err().to_string();
        assert!(error.contains(words), "{options}: {error:?} lacks {words:?}");
    }
    fs::remove_dir_all(folder).unwrap();
}
