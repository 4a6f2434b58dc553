//! Connections cut at every point of a transaction: most while the server lives on, some while it crashes or restarts.
//!
//! One outage at a time: the next one comes when all that had begun before the last has ended. More than one is what
//! the settler from the WAL does not promise to know.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use testbed::{Cluster, Cut, Cutter, Done, Node, eventually};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use crate::dice::Dice;
use crate::failovers::in_front_of;
use crate::writers::{Outcome, Settler, Writers, create_tables};

const WRITERS: usize = 8;
/// One transaction of so many is cut.
const CUT: usize = 3;
/// One outage to so many cuts of a commit.
const OUTAGE: usize = 12;
/// More than the answer to COMMIT has bytes.
const ANSWER: usize = 100;
/// For the next cuts, or for an outage and the way back.
const PATIENCE: Duration = Duration::from_secs(60);
/// For the first commit that is to stand still. Shorter than the time after which a standby that is not sent anything
/// gives up its connection.
const COMES: Duration = Duration::from_millis(500);

/// In a settler's BEGIN, and in no writer's.
const SETTLES: &str = "SET LOCAL";

/// What came of some cuts.
pub(crate) struct Cuts {
    /// Between a writer's COMMIT and its answer.
    pub(crate) of_commits: usize,
    /// Anywhere in the transaction of somebody who settles another.
    pub(crate) of_settlers: usize,
    /// Those of both, and those in writers' transactions before COMMIT.
    pub(crate) by_kind: BTreeMap<&'static str, u64>,
    pub(crate) outages: BTreeMap<Outage, u64>,
    pub(crate) outcome: Outcome,
}

/// What happens to the server while a transaction stands at the point of its cut.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Outage {
    /// One backend is killed: the server ends all sessions and recovers.
    CrashOfBackend,
    /// The whole server is killed, and started again.
    Crash,
    /// The server is shut down, which ends all sessions, and started again. A settler from the WAL knows of commits
    /// before that from PostgreSQL 15 on.
    Restart,
}

pub(crate) async fn run(settler: Settler, wanted: usize, history: bool, seed: u64) -> Result<Cuts, String> {
    let mut dice = Dice::new(seed);
    // Commits wait for a standby: so there is a time in which a commit is neither done nor undone.
    let cluster = Arc::new(Cluster::builder().nodes(2).start().await);
    create_tables(&cluster, history).await;
    let cutter = in_front_of(&cluster, Node(0)).await;
    let writers = Writers::start(&format!("postgres://app@{}/app", cutter.addr()), settler, WRITERS, seed);
    let of_settlers = Arc::new(Mutex::new(BTreeSet::new()));
    cutter.arm_every({
        let (of_settlers, mut dice) = (Arc::clone(&of_settlers), Dice::new(seed.rotate_left(32)));
        move |transaction, begin| {
            if begin.contains(SETTLES) {
                of_settlers.lock().unwrap().insert(transaction);
            }
            dice.one_in(CUT).then(|| any_cut(&mut dice))
        }
    });
    let at_commit = |cut: &Done| cut.cut.kind().starts_with("Commit");
    let is_settlers = |cut: &Done| cut.transaction.is_some_and(|number| of_settlers.lock().unwrap().contains(&number));
    let of_commits = || count(&cutter, |cut| at_commit(cut) && !is_settlers(cut));
    let (mut bag, mut outages, mut goal) = (Vec::new(), BTreeMap::new(), 0);
    loop {
        goal = wanted.min(goal + OUTAGE);
        eventually("the writers come to the next cuts", PATIENCE, async || of_commits() >= goal).await;
        // Sessions that nobody uses any more. One that still holds something is ended by this, or was by its settler.
        cutter.release();
        if goal == wanted {
            break;
        }
        let outage = dice.draw(&mut bag, &[Outage::CrashOfBackend, Outage::Crash, Outage::Restart]);
        let at = commit_cut(&mut dice);
        outage_at(&cluster, &cutter, at, outage).await?;
        *outages.entry(outage).or_default() += 1;
        cluster.wait_streaming(Node(0), 1).await;
        writers.recovered(Instant::now()).await?;
    }
    cutter.disarm();
    writers.recovered(Instant::now()).await?;
    cutter.release();
    let (of_commits, of_settlers, by_kind) = (of_commits(), count(&cutter, is_settlers), cutter.cuts());
    Ok(Cuts { of_commits, of_settlers, by_kind, outages, outcome: writers.stop(&cluster, &[]).await })
}

/// The server is away while a transaction stands at the point, and is back when its client finds the connection closed.
async fn outage_at(cluster: &Arc<Cluster>, cutter: &Cutter, at: Cut, outage: Outage) -> Result<(), String> {
    let armed = cutter.arm_with(at, {
        let cluster = Arc::clone(cluster);
        async move || match outage {
            Outage::CrashOfBackend => cluster.crash_backend(Node(0), PATIENCE).await,
            Outage::Crash => {
                cluster.kill(Node(0)).await;
                cluster.start_node(Node(0)).await;
            }
            Outage::Restart => {
                cluster.stop_fast(Node(0)).await;
                cluster.start_node(Node(0)).await;
            }
        }
    });
    let over = timeout(PATIENCE, armed.happened()).await;
    over.map(drop).map_err(|_| format!("{outage:?} at {at:?} did not happen"))
}

/// Anywhere between BEGIN and the answer to COMMIT. The server lives on.
fn any_cut(dice: &mut Dice) -> Cut {
    match dice.below(9) {
        0 => Cut::BeginUndelivered,
        1 => Cut::BeforeBeginAnswer,
        2 => Cut::AfterStatement(dice.pick(&[0, 1, 2])),
        _ => commit_cut(dice),
    }
}

/// Anywhere between COMMIT and its answer.
fn commit_cut(dice: &mut Dice) -> Cut {
    match dice.below(6) {
        0 => Cut::CommitUndelivered { server_stays: false },
        1 => Cut::CommitUndelivered { server_stays: true },
        2 => Cut::CommitDelivered,
        3 => Cut::CommitAnswerDropped,
        4 => Cut::CommitAnswerHalf(dice.below(ANSWER)),
        _ => Cut::CommitHeld,
    }
}

/// Commits that stand still, some on their way to the server and some on the way back, until it is gone.
pub(crate) struct Withheld {
    gone: watch::Sender<bool>,
    stands: mpsc::UnboundedReceiver<()>,
}

impl Withheld {
    /// So many at most.
    pub(crate) fn arm(cutter: &Cutter, dice: &mut Dice, most: usize) -> Self {
        let (gone, is_gone) = watch::channel(false);
        let (standing, stands) = mpsc::unbounded_channel();
        for _ in 0..dice.below(most + 1) {
            let (mut is_gone, standing) = (is_gone.clone(), standing.clone());
            cutter.arm_with(commit_cut(dice), async move || {
                // Errors: nobody waits for the first one any more, and the end of the run.
                let _told = standing.send(());
                let _ended = is_gone.wait_for(|gone| *gone).await;
            });
        }
        Self { gone, stands }
    }

    /// Waits until one stands still, if there is to be any, as a slow machine may not have come to a COMMIT before. Not
    /// for long: a server that waits for its standbys answers nobody.
    pub(crate) async fn first(&mut self) {
        let _late = timeout(COMES, self.stands.recv()).await;
    }

    /// The server is gone.
    pub(crate) fn end(self) {
        self.gone.send_replace(true);
    }
}

fn count(cutter: &Cutter, counts: impl Fn(&Done) -> bool) -> usize {
    cutter.done().iter().filter(|cut| counts(cut)).count()
}
