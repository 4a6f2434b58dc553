//! The pool's own SQL means the same whatever a role, a database, a connection string or an object in the database
//! sets.
//!
//! A row of the matrix is a role with settings of its own. Each is put through everything that the pool says to a
//! server; what the closure of a transaction runs stays under the role's settings.

mod ledger;
mod rows;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use futures_util::future::join_all;
use futures_util::{FutureExt as _, StreamExt as _, stream};
use testbed::{Cluster, Cut, Cutter, Node, eventually};
use tokio::sync::watch;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Config, NoTls, SimpleQueryMessage};
use tokio_postgres_failover::ledger::Ledger;
use tokio_postgres_failover::listen::{Listener, Message};
use tokio_postgres_failover::view::{Answer, Evidence, Refusal, State};
use tokio_postgres_failover::{Error, Guarantee, Pool, deadpool_postgres};

use crate::support::bench::settlers;
use crate::support::load::{LONG, generation};
use crate::support::{Runs, stalls};
use rows::{Row, SHADOWS, rows};

/// Rows that run at the same time.
const AT_ONCE: usize = 4;
const HEARTBEAT: Duration = Duration::from_millis(100);
/// What every role of the matrix finds in its database.
const TABLES: &str = "CREATE TABLE public.entries (name text, id bigint); CREATE TABLE public.ready ();
                      GRANT ALL ON public.entries TO PUBLIC;
                      GRANT USAGE ON SCHEMA failover TO PUBLIC;
                      GRANT EXECUTE ON FUNCTION failover.wal_history TO PUBLIC;
                      GRANT SELECT, INSERT, UPDATE, DELETE ON failover.ledger TO PUBLIC";
/// Differ between two sessions by themselves.
const OWN: [&str; 3] = ["application_name", "transaction_isolation", "transaction_deferrable"];

/// A cluster with the roles and databases of these rows.
async fn with_databases_of(rows: &[Row]) -> Arc<Cluster> {
    let cluster = Cluster::builder().nodes(2).setting("max_connections", "400").setting("max_worker_processes", "32");
    let cluster = Arc::new(cluster.start().await);
    let admin = cluster.direct(Node(0)).await;
    admin.batch_execute(SHADOWS).await.unwrap();
    let mut databases = vec!["app"];
    admin.batch_execute("CREATE DATABASE template0 TEMPLATE template1").await.unwrap();
    for row in rows {
        if !databases.contains(&row.database) {
            databases.push(row.database);
            let encoding = row.encoding.map(|encoding| format!("ENCODING '{encoding}'")).unwrap_or_default();
            let sql = format!("CREATE DATABASE {} TEMPLATE template0 {encoding}", row.database);
            admin.batch_execute(&sql).await.unwrap();
        }
    }
    for database in &databases {
        let admin = session(cluster.socket_addr(Node(0)), "postgres", database).await;
        Ledger::default().install(&admin).await.unwrap();
        Evidence::install(&admin).await.unwrap();
        admin.batch_execute(&format!("{TABLES}; GRANT CREATE ON DATABASE {database} TO PUBLIC")).await.unwrap();
    }
    for row in rows {
        let admin = session(cluster.socket_addr(Node(0)), "postgres", row.database).await;
        let role = &row.role;
        admin
            .batch_execute(&format!(
                "CREATE ROLE {role} LOGIN; GRANT app TO {role}; {}",
                row.setup.replace("{role}", role)
            ))
            .await
            .unwrap();
        for (name, value) in &row.settings {
            if !known(&admin, name).await {
                continue;
            }
            // Lists are not to be quoted as one.
            let value = if name == "search_path" { value.clone() } else { format!("'{value}'") };
            admin.batch_execute(&format!("ALTER ROLE {role} SET {name} = {value}")).await.unwrap();
        }
    }
    cluster.wait_replayed(Node(1)).await;
    cluster
}

/// Some settings are newer than the server, or were given up. What is not listed is known nevertheless.
async fn known(admin: &Client, name: &str) -> bool {
    let sql = "SELECT FROM pg_settings WHERE lower(name) = lower($1)";
    name == "role" || !admin.query(sql, &[&name]).await.unwrap().is_empty()
}

async fn session(address: SocketAddr, user: &str, database: &str) -> Client {
    let mut config = Config::new();
    config.hostaddr(address.ip()).port(address.port()).user(user).dbname(database);
    let (client, connection) = config.connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// One row, and a pool of its role. The primary is behind a cutter of its own.
struct Bench<'a> {
    cluster: &'a Cluster,
    row: &'a Row,
    cutter: Cutter,
    pool: Pool,
    admin: Client,
}

impl<'a> Bench<'a> {
    async fn new(cluster: &'a Cluster, row: &'a Row, heartbeat: Duration) -> Self {
        let cutter = Cutter::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
        let (first, second) = (cutter.addr(), cluster.socket_addr(Node(1)));
        let url = format!("postgres://{}@{first},{second}/{}", row.role, row.database);
        let pool = Pool::builder(format!("{url}{}", row.options)).unwrap();
        let pool = pool.max_size(2).heartbeat_interval(heartbeat).patrol_interval(3 * heartbeat);
        let pool = pool.probe_timeout(Duration::from_secs(10)).heartbeat_timeout(Duration::from_secs(10));
        let pool = pool.dead_after(Duration::from_secs(20)).build().unwrap();
        let admin = session(cluster.socket_addr(Node(0)), "postgres", row.database).await;
        Self { cluster, row, cutter, pool, admin }
    }

    /// Through everything, on servers to which nothing happens.
    async fn all(self) {
        self.connects().await;
        self.standby_is_seen().await;
        self.writes_under_the_roles_settings().await;
        self.nobody_elses_transaction_is_committed().await;
        self.own_read_only_is_the_callers().await;
        self.savepoints().await;
        let (listener, heard) = (self.listens().await, Instant::now());
        self.commits_are_settled().await;
        self.ledger_is_kept().await;
        self.wrapped().await;
        hears_nothing_else(listener, heard).await;
        assert_eq!(generation(&self.pool), 1, "a healthy primary was left");
        assert_eq!(self.pool.status().evidence, Some(Evidence::Function));
        self.fence_is_noticed().await;
    }

    async fn connects(&self) {
        let connected = self.pool.connect().await;
        connected.unwrap_or_else(|error| panic!("{}: {error}", self.row.name));
        let State::Primary { report, .. } = self.pool.status().view.state else { panic!("no primary") };
        assert_eq!((report.in_recovery, report.read_only, report.default_read_only), (false, false, false));
        assert!(report.timeline.is_some() && report.wal.is_some(), "{report:?}");
        let version = self.cluster.version().await;
        // Not public, but shown by `Debug`.
        let shown = format!("{report:?}");
        let statistics = if version >= 15 { "stats_reset: Some" } else { "stats_reset: None" };
        assert!(shown.contains("fence_pending: false") && shown.contains(statistics), "{shown}");
        // What the superuser is told, to the microsecond; up to 13 as a number of fifteen digits, to ten of them.
        let sql = "SELECT pg_postmaster_start_time(),
                          (SELECT system_identifier FROM pg_control_system())";
        let row = self.admin.query_one(sql, &[]).await.unwrap();
        let (told, true_one) = (report.started_at().unwrap(), row.get::<_, SystemTime>(0));
        let off = told.duration_since(true_one).unwrap_or_else(|before| before.duration());
        assert!(off < Duration::from_micros(if version >= 14 { 1 } else { 10 }), "{off:?}");
        assert_eq!(report.system_identifier.map(u64::cast_signed), Some(row.get(1)));
    }

    async fn standby_is_seen(&self) {
        let standby = self.cluster.socket_addr(Node(1)).to_string();
        let answer = || {
            let report = self.pool.candidates().into_iter().find(|it| it.endpoint.to_string().contains(&standby));
            report.and_then(|report| report.answer)
        };
        eventually("the standby is seen as one, and whole", LONG, async || match answer() {
            Some(Answer::Refused(report, Refusal::Standby)) => {
                report.system_identifier.is_some() && report.started_at().is_some() && report.wal.is_some()
            }
            Some(answer) => {
                println!("{}: {answer}", self.row.name);
                false
            }
            None => false,
        })
        .await;
    }

    /// Nothing of the pool's leaks into what the closure runs.
    async fn writes_under_the_roles_settings(&self) {
        let expected = self.settings_of_a_plain_transaction().await;
        for guarantee in settlers().into_iter().chain([Guarantee::AtMostOnce, Guarantee::AtLeastOnce]) {
            let call = self.pool.build_transaction().guarantee(guarantee.clone());
            let runs = Runs::default();
            let shown = call
                .run(async |tx| {
                    runs.begin();
                    self.insert(&tx, 1).await?;
                    Ok(settings(&tx).await?)
                })
                .await
                .unwrap();
            assert_eq!((runs.count(), self.stored(1).await), (1, 1), "{guarantee:?}");
            assert_same(&shown, &expected);
        }
        let shown = self.pool.read(async |tx| Ok(settings(&tx).await?)).await.unwrap();
        let mut expected = expected;
        expected.insert("transaction_read_only".to_owned(), "on".to_owned());
        assert_same(&shown, &expected);
        assert_eq!(self.pool.status().fallback, None, "commits can be settled");
    }

    async fn settings_of_a_plain_transaction(&self) -> BTreeMap<String, String> {
        let config = self.config(self.cluster.socket_addr(Node(0)));
        let (client, connection) = config.connect(NoTls).await.unwrap();
        tokio::spawn(connection);
        client.batch_execute("BEGIN").await.unwrap();
        settings(&client).await.unwrap()
    }

    fn config(&self, address: SocketAddr) -> Config {
        let Row { role, database, options, .. } = self.row;
        format!("postgres://{role}@{address}/{database}{options}").parse().unwrap()
    }

    /// The pool's own transactions do not join one that somebody left open.
    async fn nobody_elses_transaction_is_committed(&self) {
        for guarantee in settlers().into_iter().map(Some).chain([None, Some(Guarantee::AtMostOnce)]) {
            let mut left_open = Vec::new();
            for _ in 0..2 {
                let client = self.pool.get().await.unwrap();
                let name = self.row.name.replace('\'', "''");
                let insert = format!("BEGIN; INSERT INTO public.entries VALUES ('{name}', 2)");
                client.batch_execute(&insert).await.unwrap();
                left_open.push(client);
            }
            drop(left_open);
            let call = match &guarantee {
                Some(guarantee) => self.pool.build_transaction().guarantee(guarantee.clone()),
                None => self.pool.build_transaction().read_only(true),
            };
            call.run(async |tx| Ok(tx.batch_execute("SHOW work_mem").await?)).await.unwrap();
            assert_eq!(self.stored(2).await, 0, "{guarantee:?}");
        }
    }

    /// A transaction that makes itself read-only says nothing about the server.
    async fn own_read_only_is_the_callers(&self) {
        let runs = Runs::default();
        let work = self.pool.transaction(async |tx| {
            runs.begin();
            tx.batch_execute("SET TRANSACTION READ ONLY").await?;
            self.insert(&tx, 3).await
        });
        let error = timeout(LONG, work).await.expect("it hangs").unwrap_err();
        assert_eq!((error.code(), runs.count()), (Some(&SqlState::READ_ONLY_SQL_TRANSACTION), 1), "{error:?}");
    }

    async fn savepoints(&self) {
        let work = self.pool.transaction(async |mut tx| {
            self.insert(&tx, 4).await?;
            let savepoint = tx.savepoint().await?;
            savepoint.execute("INSERT INTO public.entries VALUES ($1, 4)", &[&self.row.name]).await?;
            savepoint.rollback().await?;
            let savepoint = tx.savepoint().await?;
            savepoint.execute("INSERT INTO public.entries VALUES ($1, 4)", &[&self.row.name]).await?;
            savepoint.release().await
        });
        work.await.unwrap();
        assert_eq!(self.stored(4).await, 2);
    }

    /// COMMIT's answer is lost, or COMMIT itself is, while the server keeps the session and its locks.
    async fn commits_are_settled(&self) {
        for (id, guarantee) in (10..).step_by(10).zip(settlers()) {
            for (id, cut, expected) in
                [(id, Cut::CommitAnswerDropped, 1), (id + 1, Cut::CommitUndelivered { server_stays: true }, 2)]
            {
                println!("{}: {guarantee:?}, {cut:?}", self.row.name);
                let runs = self.in_doubt(id, guarantee.clone(), cut).await;
                assert_eq!((runs, self.stored(id).await), (expected, 1), "{guarantee:?} {cut:?}");
            }
        }
        self.cutter.release();
    }

    async fn in_doubt(&self, id: i64, guarantee: Guarantee, cut: Cut) -> u32 {
        let (armed, runs) = (self.cutter.arm(cut), Runs::default());
        let work = self.pool.build_transaction().guarantee(guarantee).run(async |tx| {
            runs.begin();
            self.insert(&tx, id).await
        });
        timeout(LONG, work).await.expect("the call hangs").unwrap();
        timeout(LONG, armed.happened()).await.expect("nothing was cut");
        runs.count()
    }

    async fn ledger_is_kept(&self) {
        let ledger = Ledger::named(&format!("ledger {} ü", self.row.role), "l\"edger");
        let ledger = if self.row.encoding.is_some() { Ledger::named(&self.row.role, "ledger") } else { ledger };
        let client = self.pool.get().await.unwrap();
        for _ in 0..2 {
            ledger.install(&client).await.unwrap();
        }
        let call = self.pool.build_transaction().guarantee(Guarantee::Ledger(ledger.clone()));
        call.run(async |tx| self.insert(&tx, 30).await).await.unwrap();
        let path =
            ledger.ddl().lines().find_map(|line| Some(line.strip_prefix("CREATE TABLE IF NOT EXISTS ")?.to_owned()));
        let path = path.unwrap().replace(" (", "").replace("USING heap", "");
        let sql = format!(
            "INSERT INTO {path} (until) SELECT now() - interval '1 s' FROM generate_series(1, 20000);
             SELECT am.amname FROM pg_class c JOIN pg_am am ON am.oid = c.relam WHERE c.oid = '{}'::regclass",
            path.replace('\'', "''")
        );
        let messages = self.admin.simple_query(&sql).await.unwrap();
        let method = messages.iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => row.get(0),
            _ => None,
        });
        assert_eq!(method, Some("heap"));
        // The pool's own pruning takes its time; this one is the user's statement.
        let client = self.pool.get().await.unwrap();
        client.batch_execute("BEGIN; SET LOCAL statement_timeout = 0").await.unwrap();
        assert_eq!(ledger.prune(&client).await.unwrap(), 10_000);
        client.batch_execute("COMMIT").await.unwrap();
    }

    async fn listens(&self) -> Listener {
        let role = &self.row.role;
        let plain = self.row.encoding == Some("SQL_ASCII");
        let names = [format!("{role}: {}", if plain { "Fur" } else { "Für" }), format!("a\"b'\\c {role}")];
        let mut listener = self.pool.listen(&names).await.unwrap();
        for name in &names {
            let sql = format!("NOTIFY \"{}\", 'payload'", name.replace('"', "\"\""));
            self.admin.batch_execute(&sql).await.unwrap();
            match timeout(LONG, listener.recv()).await.expect("nothing is heard") {
                Some(Ok(Message::Notification(heard))) => {
                    assert_eq!((heard.channel(), heard.payload()), (name.as_str(), "payload"));
                }
                other => panic!("{other:?}"),
            }
        }
        listener
    }

    /// The same through a pool of somebody else's.
    async fn wrapped(&self) {
        let manager = deadpool_postgres::Manager::new(self.config(self.cutter.addr()), NoTls);
        let existing = deadpool_postgres::Pool::builder(manager).max_size(2).build().unwrap();
        let pool: Pool = Pool::wrap(existing).heartbeat_interval(HEARTBEAT).build().unwrap();
        let wrapped = Bench { pool, ..Self::new(self.cluster, self.row, HEARTBEAT).await };
        wrapped.connects().await;
        wrapped.nobody_elses_transaction_is_committed().await;
        wrapped.own_read_only_is_the_callers().await;
        let armed = self.cutter.arm(Cut::CommitAnswerDropped);
        timeout(LONG, wrapped.pool.transaction(async |tx| wrapped.insert(&tx, 40).await)).await.unwrap().unwrap();
        timeout(LONG, armed.happened()).await.unwrap();
        assert_eq!(self.stored(40).await, 1);
        assert_eq!(generation(&wrapped.pool), 1, "a healthy primary was left");
        assert_eq!(wrapped.pool.status().fallback, None, "commits can be settled");
    }

    /// On the cluster's own session, which does not feel it.
    async fn fence_is_noticed(&self) {
        let sql = |value| format!("ALTER ROLE {} SET default_transaction_read_only = {value}", self.row.role);
        self.admin.batch_execute(&sql("on")).await.unwrap();
        let fenced =
            || self.pool.candidates().iter().any(|it| matches!(it.answer, Some(Answer::Refused(_, Refusal::Fenced))));
        eventually("the fence is noticed", LONG, async || {
            fenced() && matches!(self.pool.status().view.state, State::Searching { .. })
        })
        .await;
        self.admin.batch_execute(&sql("off")).await.unwrap();
        timeout(LONG, self.pool.transaction(async |tx| self.insert(&tx, 50).await)).await.unwrap().unwrap();
    }

    async fn insert(&self, tx: &Client, id: i64) -> Result<(), Error> {
        tx.execute("INSERT INTO public.entries VALUES ($1, $2)", &[&self.row.name, &id]).await?;
        Ok(())
    }

    /// How often it is stored. It is not there for the next question.
    async fn stored(&self, id: i64) -> u64 {
        let sql = "DELETE FROM public.entries WHERE name = $1 AND id = $2";
        self.admin.execute(sql, &[&self.row.name, &id]).await.unwrap()
    }
}

/// Over ten heartbeats and a check of the subscription since then, nothing is said to be missing.
async fn hears_nothing_else(mut listener: Listener, heard: Instant) {
    let quiet = timeout_at(heard + HEARTBEAT * 15, listener.recv()).await;
    assert!(quiet.is_err(), "{quiet:?}");
}

async fn settings(client: &Client) -> Result<BTreeMap<String, String>, tokio_postgres::Error> {
    let shown = client.simple_query("SHOW ALL").await?.into_iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some((row.get(0)?.to_owned(), row.get(1).unwrap_or_default().to_owned())),
        _ => None,
    });
    Ok(shown.filter(|(name, _)| !OWN.contains(&name.as_str())).collect())
}

fn assert_same(shown: &BTreeMap<String, String>, expected: &BTreeMap<String, String>) {
    let differ: Vec<_> = expected.iter().filter(|(name, value)| shown.get(*name) != Some(*value)).collect();
    assert!(differ.is_empty(), "the role has {differ:?}, and the closure another value");
}

/// All rows, or those that the environment names a part of: `ROW=search_path`.
fn chosen() -> Vec<Row> {
    let only = std::env::var("ROW").unwrap_or_default();
    rows().into_iter().filter(|row| row.name.contains(&only)).collect()
}

/// Runs each row; a failed one keeps no other from running.
async fn each(rows: &[Row], at_once: usize, check: impl AsyncFn(&Row)) {
    let checks = rows.iter().map(|row| {
        let check = AssertUnwindSafe(check(row)).catch_unwind();
        async move {
            let failed = check.await.err().map(|_| row.name.clone());
            failed.inspect(|name| println!("{name}: FAILED"))
        }
    });
    let failed: Vec<_> =
        stream::iter(checks).buffer_unordered(at_once).filter_map(async |failed| failed).collect().await;
    assert!(failed.is_empty(), "{} of {} rows: {failed:#?}", failed.len(), rows.len());
}

/// Every question, mark, COMMIT, settler, ledger and subscription, under each row of the matrix.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_pools_sql_means_the_same_under_any_setting() {
    let rows = chosen();
    let cluster = with_databases_of(&rows).await;
    each(&rows, AT_ONCE, async |row| {
        println!("{}: begins", row.name);
        let mut tries = if row.is_timed() { 3 } else { 1 };
        loop {
            tries -= 1;
            let began = stalls::now();
            let all = async { Bench::new(&cluster, row, HEARTBEAT).await.all().await };
            let all = timeout(Duration::from_secs(120), AssertUnwindSafe(all).catch_unwind());
            match all.await.unwrap_or_else(|_| panic!("{} hangs", row.name)) {
                Ok(()) => break,
                Err(why) if tries == 0 || !stalls::any_since(began) => resume_unwind(why),
                Err(_) => println!("{}: once more, as the machine stood still", row.name),
            }
            forget(&cluster, row).await;
        }
        println!("{}: well", row.name);
    })
    .await;
}

/// Removes what a row has left behind that was broken off.
async fn forget(cluster: &Cluster, row: &Row) {
    let admin = session(cluster.socket_addr(Node(0)), "postgres", row.database).await;
    let role = &row.role;
    admin.batch_execute(&format!("ALTER ROLE {role} RESET default_transaction_read_only")).await.unwrap();
    let left = "SELECT FROM pg_stat_activity WHERE usename = $1";
    eventually(&format!("{}: its sessions have ended", row.name), LONG, async || {
        admin.query(left, &[role]).await.unwrap().is_empty()
    })
    .await;
    admin.execute("DELETE FROM public.entries WHERE name = $1", &[&row.name]).await.unwrap();
}

/// A pool waits for the promotion of its standby, and settles there what was in doubt, under each row of the matrix.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_is_settled_under_any_setting() {
    let mut rows = chosen();
    // So many pools at the same time may leave a session idle for longer than this.
    rows.retain(|row| !row.name.starts_with("idle_session_timeout"));
    // As many pools at the same time as a small machine keeps up with.
    for rows in rows.chunks(16) {
        fails_over(rows).await;
    }
}

/// The closure's own statement is under the role's `statement_timeout`, which a busy machine may exceed before COMMIT.
async fn again_if_cancelled(mut work: impl AsyncFnMut() -> (Result<(), Error>, u32)) -> (Result<(), Error>, u32) {
    loop {
        match work().await {
            (Err(error), _) if error.code() == Some(&SqlState::QUERY_CANCELED) => {}
            ended => return ended,
        }
    }
}

/// One failover, with a pool and two transactions in doubt for each row.
async fn fails_over(rows: &[Row]) {
    let cluster = with_databases_of(rows).await;
    let mut benches = Vec::new();
    for row in rows {
        // All at the same time: at the usual pace.
        let bench = Bench::new(&cluster, row, Duration::from_secs(1)).await;
        bench.connects().await;
        bench.standby_is_seen().await;
        benches.push(bench);
    }
    let (committed, failed_over) = (Arc::new(AtomicUsize::new(0)), watch::Sender::new(false));
    let in_doubt = benches.iter().flat_map(|bench| {
        settlers().map(|guarantee| {
            let (committed, mut failed_over) = (Arc::clone(&committed), failed_over.subscribe());
            let armed = bench.cutter.arm_with(Cut::CommitAnswerDropped, async move || {
                committed.fetch_add(1, Ordering::SeqCst);
                failed_over.wait_for(|failed_over| *failed_over).await.unwrap();
            });
            async move {
                let id = i64::from(guarantee == Guarantee::ExactlyOnce);
                let work = async || {
                    let runs = Runs::default();
                    let call = bench.pool.build_transaction().guarantee(guarantee.clone()).deadline(2 * LONG);
                    let insert = call.run(async |tx| {
                        runs.begin();
                        bench.insert(&tx, id).await
                    });
                    (insert.await, runs.count())
                };
                let Ok((result, runs)) = timeout(3 * LONG, again_if_cancelled(work)).await else {
                    return Some(format!("{}: {guarantee:?}: it hangs", bench.row.name));
                };
                timeout(LONG, armed.happened()).await.expect("nothing was cut");
                match result {
                    // A session that is ended before COMMIT, as it was idle for too long in a stall, is a reason to run
                    // again. That nothing is stored twice is checked below.
                    Ok(()) if (runs == 1 || bench.row.is_timed()) && generation(&bench.pool) == 2 => None,
                    result => Some(format!("{}: {guarantee:?}: {runs} runs, {result:?}", bench.row.name)),
                }
            }
        })
    });
    let fails_over = async {
        eventually("all are committed", LONG, async || committed.load(Ordering::SeqCst) == 2 * rows.len()).await;
        cluster.kill(Node(0)).await;
        let standby = session(cluster.socket_addr(Node(1)), "postgres", "app").await;
        for row in rows {
            let waits = "SELECT FROM pg_stat_activity WHERE usename = $1 AND (query LIKE '%generate_series%'
                         OR state = 'disabled')";
            eventually(&format!("{}: it waits for the promotion", row.name), LONG, async || {
                !standby.query(waits, &[&row.role]).await.unwrap().is_empty()
            })
            .await;
        }
        cluster.promote(Node(1)).await;
        failed_over.send_replace(true);
    };
    let (failed, ()) = tokio::join!(join_all(in_doubt), fails_over);
    let failed: Vec<_> = failed.into_iter().flatten().collect();
    assert!(failed.is_empty(), "{failed:#?}");
    for bench in &benches {
        let admin = session(cluster.socket_addr(Node(1)), "postgres", bench.row.database).await;
        let sql = "SELECT count(*) FROM public.entries WHERE name = $1 AND id IN (0, 1)";
        let stored: i64 = admin.query_one(sql, &[&bench.row.name]).await.unwrap().get(0);
        assert_eq!(stored, 2, "{}", bench.row.name);
    }
}
