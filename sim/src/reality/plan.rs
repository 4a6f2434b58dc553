//! Random scripts. A script is made before it is played, so that both sides play the same one.

use super::texts::Texts;
use crate::rng::Rng;

const SESSIONS: usize = 4;

/// What happens to a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Act {
    Kill(usize),
    /// It is shut down cleanly.
    Stop(usize),
    BackendCrash(usize),
    /// It comes back on its own log, as the primary that is wanted or as a zombie.
    Start {
        on: usize,
        leads: bool,
    },
    /// No standby receives what is written from now on.
    Lag,
    Promote(usize),
    Checkpoint(usize),
    /// It becomes a standby of the primary, and is rewound if need be.
    Rejoin(usize),
}

impl Act {
    /// The server whose sessions this ends.
    pub(super) fn ends(self) -> Option<usize> {
        match self {
            Self::Kill(on) | Self::Stop(on) | Self::BackendCrash(on) | Self::Rejoin(on) => Some(on),
            Self::Start { .. } | Self::Lag | Self::Promote(_) | Self::Checkpoint(_) => None,
        }
    }
}

#[derive(Clone, Debug)]
pub(super) enum Step {
    Open {
        session: usize,
        node: usize,
    },
    Ask {
        session: usize,
        text: String,
        /// The mark whose values are put into the text, counted from the newest one. `None`: the session's own.
        mark: Option<usize>,
        /// The connection is cut right behind the message.
        cut: bool,
    },
    Close {
        session: usize,
        cut: bool,
    },
    Act(Act),
}

#[derive(Debug)]
pub(super) struct Plan {
    pub(super) servers: usize,
    pub(super) steps: Vec<Step>,
}

/// What a session is probably doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doing {
    Closed,
    Idle,
    Works,
    Settles,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Leader,
    Standby,
    Down,
    Zombie,
}

/// The words of a text, by weight, and what the session does afterwards.
type Choice = (u64, &'static [&'static str], Doing);

const IDLE: [Choice; 12] = [
    (20, &["tokio_postgres_failover_mark"], Doing::Works),
    (20, &["tokio_postgres_failover_direct_mark"], Doing::Works),
    (8, &["\"ledger\" (until)"], Doing::Works),
    (8, &["tokio_postgres_failover_entry"], Doing::Works),
    (8, &["START TRANSACTION", "tokio_postgres_failover.transaction"], Doing::Works),
    (20, &["READ WRITE", "pg_xact_status"], Doing::Settles),
    (10, &["ON CONFLICT"], Doing::Settles),
    (6, &["EXISTS (SELECT FROM \"failover\""], Doing::Settles),
    (12, &["transaction_read_only", "jit = off"], Doing::Idle),
    (4, &["ABORT", "START TRANSACTION"], Doing::Idle),
    (3, &["generate_series"], Doing::Idle),
    (8, &[], Doing::Idle),
];

const WORKS: [Choice; 6] = [
    (30, &["COMMIT", "tokio_postgres_failover"], Doing::Idle),
    (20, &["client_min_messages = warning; COMMIT"], Doing::Idle),
    (10, &["ROLLBACK AND CHAIN"], Doing::Idle),
    (4, &["ROLLBACK"], Doing::Idle),
    (4, &["SHOW"], Doing::Works),
    (5, &[], Doing::Works),
];

const SETTLES: [Choice; 8] = [
    (25, &["wal_history('"], Doing::Settles),
    (10, &["SELECT count(*) > 0"], Doing::Settles),
    (10, &["{signed}"], Doing::Settles),
    (15, &["pg_prepared_xacts"], Doing::Settles),
    (20, &["pg_logical_emit_message(true, 'failover', '')"], Doing::Idle),
    (6, &["pg_terminate_backend"], Doing::Idle),
    (10, &["ROLLBACK"], Doing::Idle),
    (4, &[], Doing::Settles),
];

struct Maker<'a> {
    rng: Rng,
    texts: &'a Texts,
    roles: Vec<Role>,
    sessions: [(Doing, usize); SESSIONS],
    /// Nothing is replicated, so the next that happens is the primary's end.
    lags: bool,
    calls: u32,
    steps: Vec<Step>,
}

impl Plan {
    pub(super) fn random(seed: u64, texts: &Texts) -> Self {
        let mut rng = Rng::new(seed ^ 0xAE_A117);
        let servers = 2 + rng.index(2);
        let length = rng.between(30, 60);
        let roles = (0..servers).map(|on| if on == 0 { Role::Leader } else { Role::Standby }).collect();
        let sessions = [(Doing::Closed, 0); SESSIONS];
        let mut maker = Maker { rng, texts, roles, sessions, lags: false, calls: 0, steps: Vec::new() };
        for _ in 0..length {
            let acts = if maker.lags { 30 } else { 14 };
            if maker.rng.chance(acts) {
                maker.act();
            } else {
                maker.talk();
            }
        }
        Self { servers, steps: maker.steps }
    }
}

impl Maker<'_> {
    fn act(&mut self) {
        let able = self.able();
        if able.is_empty() {
            return;
        }
        let act = able[self.rng.index(able.len())];
        // Such a transaction lives for two seconds only.
        for session in 0..SESSIONS {
            if self.sessions[session].0 == Doing::Settles {
                self.ask(session, "ROLLBACK".to_owned(), Some(0), false);
                self.sessions[session].0 = Doing::Idle;
            }
        }
        self.steps.push(Step::Act(act));
        self.happen(act);
    }

    /// What may happen now.
    fn able(&self) -> Vec<Act> {
        let all = || self.roles.iter().enumerate();
        let leader = all().find(|(_, role)| **role == Role::Leader).map(|(on, _)| on);
        let standby = all().find(|(_, role)| **role == Role::Standby).map(|(on, _)| on);
        let Some(leader) = leader else {
            // The last leader is down, and its standbys follow nobody.
            let down = all().find(|(_, role)| **role == Role::Down).map(|(on, _)| Act::Start { on, leads: true });
            let down = down.filter(|_| all().filter(|(_, role)| **role == Role::Down).count() == 1);
            return standby.map(Act::Promote).into_iter().chain(down).collect();
        };
        if self.lags {
            return vec![Act::Kill(leader)];
        }
        let mut able = vec![Act::Kill(leader), Act::Stop(leader), Act::BackendCrash(leader), Act::Checkpoint(leader)];
        able.extend(standby.map(|_| Act::Lag));
        for (on, role) in all() {
            match role {
                Role::Down => able.extend([Act::Rejoin(on), Act::Start { on, leads: false }]),
                Role::Zombie => able.extend([Act::Rejoin(on), Act::Kill(on)]),
                Role::Leader | Role::Standby => {}
            }
        }
        able
    }

    fn happen(&mut self, act: Act) {
        match act {
            Act::Kill(on) | Act::Stop(on) => {
                self.roles[on] = Role::Down;
                self.lags = false;
            }
            Act::Start { on, leads } => self.roles[on] = if leads { Role::Leader } else { Role::Zombie },
            Act::Promote(on) => self.roles[on] = Role::Leader,
            Act::Rejoin(on) => self.roles[on] = Role::Standby,
            Act::Lag => self.lags = true,
            Act::BackendCrash(_) | Act::Checkpoint(_) => {}
        }
        for (doing, node) in &mut self.sessions {
            if act.ends() == Some(*node) {
                *doing = Doing::Closed;
            }
        }
    }

    fn talk(&mut self) {
        let session = self.rng.index(SESSIONS);
        let choices: &[Choice] = match self.sessions[session].0 {
            Doing::Closed => return self.open(session),
            Doing::Idle => &IDLE,
            Doing::Works => &WORKS,
            Doing::Settles => &SETTLES,
        };
        if self.sessions[session].0 == Doing::Works && self.rng.chance(30) {
            self.calls += 1;
            let text = format!("INSERT INTO payments VALUES ({}, 1)", self.calls);
            return self.ask(session, text, None, false);
        }
        if self.rng.chance(5) {
            let cut = self.rng.chance(50);
            self.steps.push(Step::Close { session, cut });
            self.sessions[session].0 = Doing::Closed;
            return;
        }
        let (_, words, then) = choices[self.rng.weighted(choices.iter().map(|(weight, ..)| *weight))];
        let texts = self.texts.with(words);
        if texts.is_empty() {
            return;
        }
        let text = texts[self.rng.index(texts.len())].clone();
        let own = self.sessions[session].0 == Doing::Works && self.rng.chance(90);
        let mark = (!own).then(|| self.rng.index(4));
        let cut = self.rng.chance(if text.contains("COMMIT") { 25 } else { 3 });
        self.ask(session, text, mark, cut);
        self.sessions[session].0 = if cut { Doing::Closed } else { then };
    }

    fn open(&mut self, session: usize) {
        let up: Vec<usize> = (0..self.roles.len()).filter(|on| self.roles[*on] != Role::Down).collect();
        let leader = up.iter().copied().find(|on| self.roles[*on] == Role::Leader);
        let any = up.get(self.rng.index(up.len())).copied();
        let Some(node) = leader.filter(|_| self.rng.chance(80)).or(any) else { return };
        self.steps.push(Step::Open { session, node });
        self.sessions[session] = (Doing::Idle, node);
    }

    fn ask(&mut self, session: usize, text: String, mark: Option<usize>, cut: bool) {
        self.steps.push(Step::Ask { session, text, mark, cut });
    }
}
