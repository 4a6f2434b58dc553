//! Each fault is what its method says.

use tokio::time::timeout;
use tokio_postgres::error::SqlState;
use tokio_postgres_failover_testkit::{Cluster, Cut, Error, Node};

use crate::{PATIENCE, connect};

#[tokio::test]
async fn a_killed_primary_is_replaced_and_rejoins() -> Result<(), Error> {
    let cluster = Cluster::start().await?;
    let client = connect(&cluster.url_of(Node(0))?).await.unwrap();
    client.batch_execute("CREATE TABLE t (n int); INSERT INTO t VALUES (7)").await.unwrap();

    let next = cluster.fail_over().await?;
    assert_eq!((next, cluster.primary()), (next, next));
    assert_ne!(next, Node(0));
    assert!(client.batch_execute("SELECT 1").await.is_err(), "its server was killed");
    let client = connect(&cluster.url_of(next)?).await.unwrap();
    let kept: i32 = client.query_one("SELECT n FROM t", &[]).await.unwrap().get(0);
    assert_eq!(kept, 7, "a commit waits for a standby");

    cluster.rejoin(Node(0)).await?;
    client.batch_execute("INSERT INTO t VALUES (8)").await.unwrap();
    let old = connect(&cluster.superuser_url(Node(0))?).await.unwrap();
    let standby: bool = old.query_one("SELECT pg_is_in_recovery()", &[]).await.unwrap().get(0);
    assert!(standby);

    cluster.switch_over(Node(0)).await?;
    assert_eq!(cluster.primary(), Node(0));
    assert!(cluster.log(Node(0)).await?.contains("archive recovery complete"));
    Ok(())
}

#[tokio::test]
async fn the_network_is_cut_and_mended() -> Result<(), Error> {
    let cluster = Cluster::builder().standbys(0).start().await?;
    let url = cluster.url_of(Node(0))?;
    let client = connect(&url).await.unwrap();

    cluster.cut(Node(0)).await?;
    let mut question = std::pin::pin!(client.query_one("SELECT 1", &[]));
    assert!(futures_util::poll!(question.as_mut()).is_pending());
    let direct = connect(&cluster.superuser_url(Node(0))?).await.unwrap();
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app' AND query <> ''";
    assert_eq!(direct.query_one(sql, &[]).await.unwrap().get::<_, i64>(0), 0, "nothing has passed");
    cluster.mend(Node(0)).await?;
    let answer = timeout(PATIENCE, question).await.expect("what waited arrives").unwrap();
    assert_eq!(answer.get::<_, i32>(0), 1);

    cluster.drop_connections(Node(0)).await?;
    let closed = timeout(PATIENCE, async { while client.batch_execute("SELECT 1").await.is_ok() {} }).await;
    assert!(closed.is_ok());
    connect(&url).await.unwrap().batch_execute("SELECT 1").await.unwrap();
    direct.batch_execute("SELECT 1").await.unwrap();
    Ok(())
}

#[tokio::test]
async fn a_frozen_server_answers_later_and_a_fenced_one_refuses() -> Result<(), Error> {
    let cluster = Cluster::builder().standbys(0).synchronous(false).password("p'w @:/").start().await?;
    let client = connect(&cluster.url()).await.unwrap();

    cluster.freeze(Node(0)).await?;
    let mut question = std::pin::pin!(client.query_one("SELECT 1", &[]));
    assert!(futures_util::poll!(question.as_mut()).is_pending());
    let refused = cluster.set_read_only(Node(0), true).await.unwrap_err();
    assert_eq!(refused.to_string(), "Node(0) is frozen; thaw it first");
    cluster.thaw(Node(0)).await?;
    timeout(PATIENCE, question).await.expect("it goes on").unwrap();

    cluster.set_read_only(Node(0), true).await?;
    let refused = connect(&cluster.url()).await.unwrap().batch_execute("CREATE TABLE t ()").await.unwrap_err();
    assert_eq!(refused.code(), Some(&SqlState::READ_ONLY_SQL_TRANSACTION));
    cluster.set_read_only(Node(0), false).await?;
    connect(&cluster.url()).await.unwrap().batch_execute("CREATE TABLE t ()").await.unwrap();
    Ok(())
}

#[tokio::test]
async fn a_commit_loses_its_answer_or_never_arrives() -> Result<(), Error> {
    let cluster = Cluster::builder().standbys(1).start().await?;
    let cutter = cluster.cutter(Node(0)).await?;
    let stored = async |url: &str| {
        let row = connect(url).await.unwrap().query_one("SELECT count(*) FROM t", &[]).await.unwrap();
        row.get::<_, i64>(0)
    };
    connect(&cutter.url()).await.unwrap().batch_execute("CREATE TABLE t (n int)").await.unwrap();

    for (cut, committed) in [(Cut::CommitAnswer, true), (Cut::Commit, false), (Cut::Begin, false)] {
        let before = stored(&cutter.url()).await;
        let mut client = connect(&cutter.url()).await.unwrap();
        cutter.cut_next(cut);
        let lost = async {
            let tx = client.transaction().await?;
            tx.execute("INSERT INTO t VALUES (1)", &[]).await?;
            tx.commit().await
        };
        assert!(lost.await.is_err(), "{cut:?}");
        let made = *cutter.cuts().last().expect("the cut was made");
        assert_eq!((made.cut, made.committed), (cut, Some(committed)));
        assert_eq!(stored(&cutter.url()).await - before, i64::from(committed), "{cut:?}");
    }

    let next = cluster.fail_over().await?;
    cutter.point_to(next)?;
    assert_eq!(stored(&cutter.url()).await, 1);
    assert_eq!(cutter.point_to(Node(2)), Err(Error::NoNode(Node(2))));
    Ok(())
}
