//! A primary that answers a settler's question with an error.

use std::time::Duration;

use testbed::Cut;
use tokio_postgres_failover::Guarantee;
use tokio_postgres_failover::error::Unsettled;
use tokio_postgres_failover::ledger::Ledger;

use crate::support::bench::{Bench, single};
use crate::support::sql;

/// The primary has answered, so the reason is not that there was none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unknown_where_the_question_fails_each_time() {
    let bench = Bench::new(single(), Guarantee::Ledger(Ledger::default())).await;
    sql(
        &bench.cluster,
        "CREATE FUNCTION is_full() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN RAISE EXCEPTION 'the disk is full' USING ERRCODE = '53100'; END $$;
         CREATE TRIGGER is_full BEFORE INSERT ON failover.ledger FOR EACH ROW
             WHEN (NEW.fence) EXECUTE FUNCTION is_full()",
    )
    .await;
    bench.cut(Cut::CommitAnswerDropped);
    bench.assert_unknown(bench.call().deadline(Duration::from_secs(4)), Unsettled::Failed).await;
}
