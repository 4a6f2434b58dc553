//! What one may type, and what it does. Each fault is undone when the cluster has another primary, so each can be
//! repeated.

use std::str::FromStr;

use testbed::{Node, Part, Patroni};

use crate::load::{Load, Window};

pub(crate) const COMMANDS: &str = "Type one of these, and look at the page:
  switchover  Patroni hands over to a standby
  kill        the leader's machine is gone: SIGKILL to its Patroni and its PostgreSQL
  freeze      the leader's machine hangs: SIGSTOP to both
  cut         the leader is cut off from etcd and from the standbys, and the service still sees it
  quit        ends all, as Ctrl-C does";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    Switchover,
    Kill,
    Freeze,
    Cut,
    Quit,
}

impl FromStr for Command {
    type Err = ();

    fn from_str(line: &str) -> Result<Self, ()> {
        match line.trim() {
            "switchover" => Ok(Self::Switchover),
            "kill" => Ok(Self::Kill),
            "freeze" => Ok(Self::Freeze),
            "cut" => Ok(Self::Cut),
            "quit" | "exit" => Ok(Self::Quit),
            _ => Err(()),
        }
    }
}

impl Command {
    /// Returns when the cluster is whole again, and has told what the clients saw.
    pub(crate) async fn run(self, patroni: &Patroni, load: &Load) {
        let leader = patroni.leader().await;
        let n = format!("n{}", leader.0);
        load.watch();
        match self {
            Self::Switchover => {
                let to = patroni.candidate(leader).await;
                println!("{n} hands over to n{}.", to.0);
                patroni.switchover(to).await;
                succeeded(patroni, leader).await;
            }
            Self::Kill => {
                patroni.kill(leader, Part::Both).await;
                println!("{n} is gone. Patroni waits for the end of its lease.");
                succeeded(patroni, leader).await;
                patroni.start_node(leader).await;
            }
            Self::Freeze => {
                patroni.freeze(leader, Part::Both).await;
                println!("{n} hangs. Patroni waits for the end of its lease.");
                succeeded(patroni, leader).await;
                patroni.thaw(leader, Part::Both).await;
            }
            Self::Cut => {
                patroni.cut(leader);
                println!("{n} is cut off. Without synchronous mode, what it acknowledges from now on is lost.");
                succeeded(patroni, leader).await;
                patroni.heal(leader);
            }
            Self::Quit => return,
        }
        patroni.wait_healthy().await;
        println!("{n} is a standby now.");
        let window = load.watched().await;
        tell(&window, patroni).await;
    }
}

async fn succeeded(patroni: &Patroni, leader: Node) {
    let successor = patroni.successor(leader).await;
    println!("n{} is the leader now.", successor.0);
}

/// What the clients saw, held against what is stored.
async fn tell(window: &Window, patroni: &Patroni) {
    let Window { acknowledged, failed, longest } = window;
    println!(
        "Orders acknowledged meanwhile: {}. Requests that failed: {}. The longest took {:.1} s.",
        acknowledged.len(),
        failed.len(),
        longest.as_secs_f64()
    );
    if let Some(first) = failed.first() {
        println!("The first failure: {first}");
    }
    let leader = patroni.direct(patroni.leader().await).await;
    let count = "
        SELECT count(*) FILTER (WHERE stored = 0), count(*) FILTER (WHERE stored > 1)
        FROM (SELECT count(orders.sku) AS stored FROM unnest($1::text[]) AS told (sku) LEFT JOIN orders USING (sku)
              GROUP BY told.sku) AS each";
    match leader.query_one(count, &[acknowledged]).await {
        Ok(row) => println!("Of these orders lost: {}, stored twice: {}.", row.get::<_, i64>(0), row.get::<_, i64>(1)),
        Err(error) => println!("What is stored could not be read: {error}"),
    }
}
