//! Plays a script on one side.

use std::fmt;
use std::time::Duration;

use tokio::time::sleep;

use super::canon::Canon;
use super::plan::{Act, Plan, Step};
use super::sides::Side;
use super::texts::fill;
use super::wire::{Said, Talk};

/// An answer that takes longer does not come.
const PATIENCE: Duration = Duration::from_secs(5);
/// So long a connection is watched for what the server says unasked.
const UNASKED: Duration = Duration::from_millis(5);
/// The pool looks for abandoned sessions that have been idle for a quarter of a second.
const ABANDONED: Duration = Duration::from_millis(400);

/// A step, and what came of it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Told {
    step: String,
    said: Vec<String>,
}

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n           => {}", self.step, self.said.join("; "))
    }
}

struct Session<S> {
    talk: Talk<S>,
    node: usize,
    backend_start: String,
    /// The number of its own mark.
    mark: Option<usize>,
}

struct Player<S: Side> {
    side: S,
    canon: Canon,
    sessions: Vec<Option<Session<S::Stream>>>,
    /// The timeline of each server.
    timelines: Vec<u32>,
    leader: usize,
    nonces: u128,
    told: Vec<Told>,
}

pub(super) async fn play<S: Side>(side: S, plan: &Plan) -> Vec<Told> {
    let mut player = Player {
        side,
        canon: Canon::default(),
        sessions: (0..8).map(|_| None).collect(),
        timelines: vec![1; plan.servers],
        leader: 0,
        nonces: 0,
        told: Vec::new(),
    };
    for (number, step) in plan.steps.iter().enumerate() {
        player.step(number, step).await;
    }
    player.told
}

impl<S: Side> Player<S> {
    fn tell(&mut self, number: usize, step: &str, said: Vec<String>) {
        self.told.push(Told { step: format!("{number:>3} {step}"), said });
    }

    async fn step(&mut self, number: usize, step: &Step) {
        match step {
            Step::Open { session, node } => self.open(number, *session, *node).await,
            Step::Ask { session, text, mark, cut } => self.ask(number, *session, text, *mark, *cut).await,
            Step::Close { session, cut } => {
                let Some(mut open) = self.sessions[*session].take() else { return };
                if !*cut {
                    open.talk.terminate().await;
                }
                let (node, pid) = (open.node, open.talk.pid);
                drop(open);
                self.side.gone(node, pid).await;
            }
            Step::Act(act) => self.act(number, *act).await,
        }
    }

    async fn open(&mut self, number: usize, session: usize, node: usize) {
        let Some(stream) = self.side.connect(node).await else {
            return self.tell(number, &format!("session {session} of server {node}"), vec!["refused".to_owned()]);
        };
        let (talk, said) = Talk::open(stream, PATIENCE).await;
        let said = self.canon.of(node, talk.pid, "", &said);
        self.tell(number, &format!("session {session} of server {node}"), said);
        if talk.closed {
            return;
        }
        let backend_start = self.side.backend_start(node, talk.pid).await;
        self.sessions[session] = Some(Session { talk, node, backend_start, mark: None });
    }

    async fn ask(&mut self, number: usize, session: usize, text: &str, mark: Option<usize>, cut: bool) {
        let Some(mut open) = self.sessions[session].take() else { return };
        let marks = self.canon.marks.len();
        let chosen = match mark {
            None => open.mark,
            Some(back) => marks.checked_sub(1 + back),
        };
        let is_mark = text.contains("tokio_postgres_failover_mark") || text.contains("_failover_direct_mark");
        self.nonces += u128::from(is_mark);
        let fresh = is_mark.then(|| format!("{:032x}", 0xF00D_u128 << 64 | self.nonces));
        let mut values = self.canon.values(chosen);
        if let Some(fresh) = &fresh {
            values.nonce.clone_from(fresh);
        }
        if text.contains("pg_terminate_backend") {
            sleep(ABANDONED).await;
        }
        let mut said = open.talk.unasked(UNASKED).await;
        open.talk.query(&fill(text, &values)).await;
        let (node, pid) = (open.node, open.talk.pid);
        let short: String = text.chars().take(3000).collect();
        let step = format!("session {session} of server {node}, mark {chosen:?}: {short}");
        if cut {
            drop(open);
            self.side.gone(node, pid).await;
            return self.tell(number, &format!("{step}, and is cut"), Vec::new());
        }
        said.extend(open.talk.answer(PATIENCE).await);
        let process = (node, pid, open.backend_start.as_str());
        let learned = self.canon.learn(fresh.as_deref(), process, self.timelines[node], &said);
        open.mark = learned.or(open.mark);
        let ends = open.talk.closed || said.last() == Some(&Said::Silent);
        let said = self.canon.of(node, pid, text, &said);
        self.tell(number, &step, said);
        self.sessions[session] = Some(open).filter(|_| !ends);
    }

    async fn act(&mut self, number: usize, act: Act) {
        self.side.act(act).await;
        match act {
            Act::Promote(on) => {
                self.timelines[on] = self.timelines[self.leader] + 1;
                self.leader = on;
            }
            Act::Rejoin(on) => self.timelines[on] = self.timelines[self.leader],
            Act::Checkpoint(on) => self.canon.checkpointed(on),
            _ => {}
        }
        self.canon.happened();
        let mut all = Vec::new();
        for (number, place) in self.sessions.iter_mut().enumerate() {
            let Some(mut session) = place.take() else { continue };
            if act.ends() == Some(session.node) {
                let mut said = session.talk.unasked(PATIENCE).await;
                // The test bed kills the processes one after the other, and some notice that before their turn.
                if matches!(act, Act::Kill(_)) {
                    said.retain(|said| !matches!(said, Said::Error { .. }));
                }
                let said = self.canon.of(session.node, session.talk.pid, "", &said);
                all.extend(said.into_iter().map(|said| format!("session {number}: {said}")));
            } else {
                *place = Some(session);
            }
        }
        self.tell(number, &format!("{act:?}"), all);
    }
}
