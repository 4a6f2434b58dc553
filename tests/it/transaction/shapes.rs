//! What a closure makes of a lost connection or a conflict does not decide whether its work is run again: how the
//! session ended does.

use std::error::Error as StdError;
use std::io;

use anyhow::Context as _;
use testbed::{Cluster, Node, eventually};
use tokio_postgres_failover::error::RolledBack;
use tokio_postgres_failover::tokio_postgres::error::DbError;
use tokio_postgres_failover::{
    CommitOutcome, Error, Guarantee, Pool, PoolBuilder, RetryPolicy, Transaction, deadpool_postgres,
};

use crate::support::{CONFLICT, PATIENCE, Runs, insert, server, sql, stored};

type Driver = tokio_postgres::Error;
type Boxed = Box<dyn StdError + Send + Sync>;

#[derive(Debug, thiserror::Error)]
enum Thiserror {
    #[error(transparent)]
    Transparent(Driver),
    #[error("from")]
    From(#[from] Driver),
    #[error("source: {0}")]
    Source(#[source] Driver),
    #[error(transparent)]
    Nested(Box<Thiserror>),
    #[error("the pool's own error")]
    Pool(#[source] Error),
    #[error(transparent)]
    PoolTransparent(Error),
    #[error("what the server said")]
    Report(#[source] Box<DbError>),
    #[error("lost: {0}")]
    Text(String),
}

/// Its `source` is the default one: none.
#[derive(Debug)]
enum ByHand {
    Db(Driver),
}

impl std::fmt::Display for ByHand {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self::Db(error) = self;
        write!(f, "by hand: {error}")
    }
}

impl StdError for ByHand {}

impl From<Driver> for ByHand {
    fn from(error: Driver) -> Self {
        Self::Db(error)
    }
}

#[derive(Debug, PartialEq, thiserror::Error)]
#[error("sold out: {left} left")]
struct SoldOut {
    left: i32,
}

type Maker = fn(SoldOut) -> Error;

/// Takes what the driver said, and gives what the closure fails with.
type Shape = fn(Driver) -> Error;

fn shapes() -> Vec<(&'static str, Shape)> {
    vec![
        ("as it is", |error| error.into()),
        ("thiserror transparent", |error| Error::abort(Thiserror::Transparent(error))),
        ("thiserror from", |error| Error::abort(Thiserror::from(error))),
        ("thiserror source", |error| Error::abort(Thiserror::Source(error))),
        ("thiserror transparent, twice", |error| {
            Error::abort(Thiserror::Nested(Box::new(Thiserror::Transparent(error))))
        }),
        ("thiserror around the pool's", |error| Error::abort(Thiserror::Pool(error.into()))),
        ("thiserror transparent around the pool's", |error| Error::abort(Thiserror::PoolTransparent(error.into()))),
        ("the server's report alone", |error| match error.as_db_error() {
            Some(report) => Error::abort(Thiserror::Report(Box::new(report.clone()))),
            None => Error::abort(Thiserror::Text(error.to_string())),
        }),
        ("a report, bare", |error| match error.as_db_error() {
            Some(report) => Error::abort(report.clone()),
            None => Error::abort(error.to_string()),
        }),
        ("anyhow", |error| Error::abort(anyhow::Error::from(error))),
        ("anyhow, kept whole", |error| Error::abort_report(anyhow::Error::from(error))),
        ("anyhow with context", |error| {
            Error::abort(Err::<(), _>(error).context("the order").with_context(|| "of today").unwrap_err())
        }),
        ("anyhow around the pool's", |error| Error::abort(anyhow::Error::from(Error::from(error)))),
        ("anyhow of a text", |error| Error::abort(anyhow::anyhow!("it failed: {error}"))),
        ("eyre", |error| Error::abort(eyre::Report::from(error))),
        ("eyre, kept whole", |error| Error::abort_report(eyre::Report::from(error))),
        ("eyre with context", |error| Error::abort(eyre::Report::from(error).wrap_err("the order"))),
        ("boxed", |error| Error::abort(Box::new(error) as Boxed)),
        ("boxed twice", |error| Error::abort(Box::new(Thiserror::Source(error)) as Boxed)),
        ("a text", |error| Error::abort(error.to_string())),
        ("own, without a source", |error| Error::abort(ByHand::from(error))),
        ("within an io error", |error| Error::abort(io::Error::other(error))),
        ("an io error of a text", |error| Error::abort(io::Error::other(error.to_string()))),
        ("swallowed", |_| Error::abort(SoldOut { left: 0 })),
        ("formatted", |_| Error::abort(std::fmt::Error)),
    ]
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// The session ends while nothing runs on it: the next statement finds it closed.
    LostIdle,
    /// The server's last word is the answer to the statement.
    LostInAStatement,
    Serialization,
    Deadlock,
}

const FAULTS: [Fault; 4] = [Fault::LostIdle, Fault::LostInAStatement, Fault::Serialization, Fault::Deadlock];

fn builder(cluster: &Cluster) -> PoolBuilder {
    Pool::builder(format!("postgres://app@{}/app", cluster.socket_addr(Node(0)))).unwrap().max_size(2)
}

/// What the driver says of the fault.
async fn befall(tx: &Transaction, fault: Fault) -> Driver {
    let statement = match fault {
        Fault::LostIdle => {
            // The answer is lost on purpose: the session may end before it.
            let _ = tx.batch_execute("SELECT pg_terminate_backend(pg_backend_pid())").await;
            eventually("the session is closed", PATIENCE, async || tx.is_closed()).await;
            "SELECT 1"
        }
        Fault::LostInAStatement => "SELECT pg_terminate_backend(pg_backend_pid())",
        Fault::Serialization => CONFLICT,
        Fault::Deadlock => "DO $$ BEGIN RAISE EXCEPTION 'made up' USING ERRCODE = '40P01'; END $$",
    };
    tx.execute(statement, &[]).await.unwrap_err()
}

async fn runs_again(pool: &Pool, cluster: &Cluster, id: i64, name: &str, fault: Fault, shape: Shape) {
    let runs = Runs::default();
    let result = pool
        .transaction(async |tx| {
            insert(&tx, id).await?;
            if runs.begin() > 1 {
                return Ok(());
            }
            Err(shape(befall(&tx, fault).await))
        })
        .await;
    assert!(result.is_ok(), "{name}, {fault:?}: {result:?} after {} runs", runs.count());
    assert_eq!(runs.count(), 2, "{name}, {fault:?}");
    assert_eq!(stored(cluster).await.iter().filter(|stored| **stored == id).count(), 1, "{name}, {fault:?}");
}

/// Every shape in which an application's error holds the driver's, hides it or swallows it.
#[tokio::test]
async fn whatever_the_closure_makes_of_the_error_its_work_is_run_again() {
    let cluster = server().await;
    let pool = builder(&cluster).build().unwrap();
    let mut id = 0;
    for fault in FAULTS {
        for (name, shape) in shapes() {
            id += 1;
            runs_again(&pool, &cluster, id, name, fault, shape).await;
        }
    }
}

/// The driver of a wrapped pool's session tells nothing, its handle does.
#[tokio::test]
async fn so_it_is_in_a_wrapped_pool() {
    let cluster = server().await;
    let mut config = deadpool_postgres::Config::new();
    config.url = Some(format!("postgres://app@{}/app", cluster.socket_addr(Node(0))));
    let existing = config.create_pool(Some(deadpool_postgres::Runtime::Tokio1), tokio_postgres::NoTls).unwrap();
    let pool: Pool = Pool::wrap(existing).build().unwrap();
    let mut id = 0;
    for fault in FAULTS {
        for (name, shape) in shapes() {
            id += 1;
            runs_again(&pool, &cluster, id, name, fault, shape).await;
        }
    }
}

const CALL: &str = "SELECT conflict()";

/// Whichever method ran the statement, the session knows its error; on a savepoint, too.
#[tokio::test]
async fn each_method_of_the_handle_notes_what_failed() {
    let cluster = server().await;
    sql(
        &cluster,
        "CREATE FUNCTION conflict() RETURNS bigint LANGUAGE plpgsql AS $$ BEGIN
         RAISE EXCEPTION 'made up' USING ERRCODE = '40001'; END $$",
    )
    .await;
    let pool = builder(&cluster).build().unwrap();
    for method in 0..14 {
        let runs = Runs::default();
        let result = pool
            .transaction(async |mut tx| {
                if runs.begin() > 1 {
                    return Ok(());
                }
                let nothing =
                    <[(&(dyn tokio_postgres::types::ToSql + Sync), tokio_postgres::types::Type); 0]>::default();
                let failed = match method {
                    0 => tx.query(CALL, &[]).await.is_err(),
                    1 => tx.query_one(CALL, &[]).await.is_err(),
                    2 => tx.query_opt(CALL, &[]).await.is_err(),
                    3 => tx.execute(CALL, &[]).await.is_err(),
                    4 => tx.execute_raw(CALL, std::iter::empty::<i32>()).await.is_err(),
                    5 => tx.batch_execute(CALL).await.is_err(),
                    6 => tx.simple_query(CALL).await.is_err(),
                    7 => tx.query_typed(CALL, &nothing).await.is_err(),
                    8 => tx.query_typed_one(CALL, &nothing).await.is_err(),
                    9 => tx.query_typed_opt(CALL, &nothing).await.is_err(),
                    10 => tx.execute_typed(CALL, &nothing).await.is_err(),
                    11 => tx.query_one_scalar::<i64, _>(CALL, &[]).await.is_err(),
                    12 => tx.query_scalar::<i64, _>(CALL, &[]).await.is_err(),
                    _ => {
                        let mut outer = tx.savepoint().await?;
                        let inner = outer.savepoint().await?;
                        let statement = inner.prepare_cached(CALL).await?;
                        let failed = inner.query(&statement, &[]).await.is_err();
                        // Neither is rolled back to: the transaction stays aborted.
                        std::mem::forget(inner);
                        std::mem::forget(outer);
                        failed
                    }
                };
                assert!(failed, "{method}");
                Err(Error::abort("it did not work out"))
            })
            .await;
        assert!(result.is_ok(), "method {method}: {result:?}");
        assert_eq!(runs.count(), 2, "method {method}");
    }
}

/// What comes after the error that counts: the server's refusal of all further statements, and a COMMIT.
#[tokio::test]
async fn what_follows_an_abort_does_not_hide_it() {
    let cluster = server().await;
    let pool = builder(&cluster).build().unwrap();
    // 25P02 by `?`.
    let runs = Runs::default();
    pool.transaction(async |tx| {
        insert(&tx, 1).await?;
        if runs.begin() == 1 {
            let _ = tx.batch_execute(CONFLICT).await;
            insert(&tx, 2).await?;
        }
        Ok(())
    })
    .await
    .unwrap();
    assert_eq!(runs.count(), 2);
    // And an `Ok`.
    let runs = Runs::default();
    pool.transaction(async |tx| {
        insert(&tx, 3).await?;
        if runs.begin() == 1 {
            let _ = tx.batch_execute(CONFLICT).await;
        }
        Ok(())
    })
    .await
    .unwrap();
    assert_eq!(runs.count(), 2);
    assert_eq!(stored(&cluster).await, [1, 3]);
}

/// A conflict that the closure undid is over: what it fails with later is its own.
#[tokio::test]
async fn a_conflict_that_was_undone_runs_nothing_again() {
    let cluster = server().await;
    let pool = builder(&cluster).max_size(1).build().unwrap();
    for by_hand in [false, true] {
        let runs = Runs::default();
        let error = pool
            .transaction(async |mut tx| -> Result<(), Error> {
                runs.begin();
                if by_hand {
                    tx.batch_execute("SAVEPOINT step").await?;
                    let _ = tx.batch_execute(CONFLICT).await;
                    tx.batch_execute("ROLLBACK TO SAVEPOINT step").await?;
                } else {
                    let step = tx.savepoint().await?;
                    let _ = step.batch_execute(CONFLICT).await;
                    step.rollback().await?;
                }
                insert(&tx, 1).await?;
                Err(Error::abort(SoldOut { left: 3 }))
            })
            .await
            .unwrap_err();
        assert_eq!(error.downcast_ref::<SoldOut>(), Some(&SoldOut { left: 3 }));
        assert_eq!(runs.count(), 1);
    }
    assert_eq!(stored(&cluster).await, [0_i64; 0]);
}

/// An error that no re-run would mend stays the application's, in whatever it is wrapped.
#[tokio::test]
async fn an_application_error_is_returned_once_in_every_shape() {
    let cluster = server().await;
    let pool = builder(&cluster).build().unwrap();
    for (name, shape) in shapes() {
        let runs = Runs::default();
        let error = pool
            .transaction(async |tx| -> Result<(), Error> {
                runs.begin();
                Err(shape(tx.execute("SELECT 1 / 0", &[]).await.unwrap_err()))
            })
            .await
            .unwrap_err();
        assert_eq!(runs.count(), 1, "{name}: {error:?}");
    }
}

/// The user's word counts for what the closure swallowed, too.
#[tokio::test]
async fn the_users_word_is_asked_about_what_was_swallowed() {
    let cluster = server().await;
    let policy = RetryPolicy::new().classify(|report| match report.code().code() {
        "40001" => Some(false),
        "22012" => Some(true),
        _ => None,
    });
    let pool = builder(&cluster).retry(policy).build().unwrap();
    for (statement, expected) in [(CONFLICT, 1), ("SELECT 1 / 0", 2)] {
        let runs = Runs::default();
        let result = pool
            .transaction(async |tx| {
                if runs.begin() > 1 {
                    return Ok(());
                }
                let _ = tx.batch_execute(statement).await;
                Err(Error::abort("gone"))
            })
            .await;
        assert_eq!(runs.count(), expected, "{statement}: {result:?}");
        assert_eq!(result.is_ok(), expected == 2, "{result:?}");
    }
}

/// The word of another call of a pool stands, whatever became of this one's session and whatever was made of the word.
#[tokio::test]
async fn the_doubt_of_another_call_is_not_run_again() {
    let cluster = server().await;
    sql(
        &cluster,
        "CREATE FUNCTION dies() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
         PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END $$;
         CREATE TABLE doomed (id bigint);
         CREATE CONSTRAINT TRIGGER dies AFTER INSERT ON doomed DEFERRABLE INITIALLY DEFERRED
         FOR EACH ROW EXECUTE FUNCTION dies(); GRANT ALL ON doomed TO app",
    )
    .await;
    let pool = builder(&cluster).build().unwrap();
    for swallow in [false, true] {
        let runs = Runs::default();
        let error = pool
            .transaction(async |tx| -> Result<(), Error> {
                runs.begin();
                let inner = pool
                    .build_transaction()
                    .guarantee(Guarantee::AtMostOnce)
                    .run(async |inner| Ok(inner.batch_execute("INSERT INTO doomed VALUES (1)").await?))
                    .await
                    .unwrap_err();
                assert_eq!(inner.commit_outcome(), CommitOutcome::Unknown, "{inner:?}");
                let _ = befall(&tx, Fault::LostIdle).await;
                Err(if swallow {
                    Error::abort("both are gone")
                } else {
                    Error::abort(Thiserror::PoolTransparent(inner))
                })
            })
            .await
            .unwrap_err();
        assert_eq!(runs.count(), 1, "{error:?}");
    }
}

/// The closure's own error is found again where a report of anyhow or eyre holds it.
#[tokio::test]
async fn an_own_error_is_found_within_a_report() {
    let cluster = server().await;
    let pool = builder(&cluster).build().unwrap();
    let own = || SoldOut { left: 2 };
    let makers: [(&str, Maker); 7] = [
        ("itself", |own| Error::abort(own)),
        ("anyhow", |own| Error::abort_report(anyhow::Error::from(own))),
        ("anyhow with context", |own| Error::abort(anyhow::Error::from(own).context("buying"))),
        ("anyhow with context, kept whole", |own| Error::abort_report(anyhow::Error::from(own).context("buying"))),
        ("eyre", |own| Error::abort_report(eyre::Report::from(own))),
        ("eyre with context", |own| Error::abort(eyre::Report::from(own).wrap_err("buying"))),
        ("boxed", |own| Error::abort(Box::new(own) as Boxed)),
    ];
    for (name, make) in makers {
        let error = pool.transaction(async |_| -> Result<(), Error> { Err(make(own())) }).await.unwrap_err();
        assert_eq!(error.downcast_ref::<SoldOut>(), Some(&own()), "{name}: {error:?}");
        assert!(error.downcast_ref::<RolledBack>().is_none(), "{name}");
    }
}
