//! Leaders that are back before their lease is over: killed or demoted under load, with commits in all states, started
//! read-only, and promoted to the next timeline. The standbys follow the same leader as before.

use std::time::Instant;

use testbed::{Background, Cluster};
use tokio::time::sleep;

use crate::cuts::Withheld;
use crate::dice::Dice;
use crate::failovers::in_front_of;
use crate::writers::{Outcome, Settler, Writers, create_tables};

const WRITERS: usize = 8;
/// At most so many commits stand still when the leader goes.
const WITHHELD: usize = 6;

/// How a leader goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Exit {
    /// Killed.
    Crash,
    /// Killed, and the end of its log was not written: marks are lost.
    CrashOfUnwritten,
    /// Shut down cleanly, as when a quorum is lost.
    Demotion,
}

pub(crate) async fn run(
    settler: Settler,
    wanted: u64,
    archive: bool,
    history: bool,
    seed: u64,
) -> Result<Outcome, String> {
    let mut dice = Dice::new(seed);
    let builder = Cluster::builder().nodes(2);
    let cluster = if archive { builder.archive() } else { builder }.start().await;
    create_tables(&cluster, history).await;
    let leader = cluster.primary();
    let cutter = in_front_of(&cluster, leader).await;
    let writers = Writers::start(&format!("postgres://app@{}/app", cutter.addr()), settler, WRITERS, seed);
    writers.recovered(Instant::now()).await?;
    let mut bag = Vec::new();
    for _ in 0..wanted {
        cluster.wait_streaming(leader, 1).await;
        let exit = dice.draw(&mut bag, &[Exit::Crash, Exit::CrashOfUnwritten, Exit::Demotion]);
        if exit == Exit::CrashOfUnwritten {
            cluster.stop_background(leader, Background::WalWriter).await;
        }
        let mut withheld = Withheld::arm(&cutter, &mut dice, WITHHELD);
        sleep(dice.milliseconds(0, 20)).await;
        withheld.first().await;
        if exit == Exit::Demotion {
            cluster.stop_fast(leader).await;
        } else {
            cluster.kill(leader).await;
        }
        cutter.disarm();
        withheld.end();
        cluster.start_read_only(leader).await;
        let promotion = cluster.promote_timed(leader).await;
        let session = cluster.direct(leader).await;
        // As Patroni does some time after a promotion.
        session.batch_execute("CHECKPOINT").await.map_err(|error| error.to_string())?;
        writers.recovered(promotion.accepted_at).await?;
        writers.say(&format!("{exit:?}: {leader:?} is back on timeline {}", cluster.timeline(leader).await));
    }
    cutter.release();
    Ok(writers.stop(&cluster, &[]).await)
}
