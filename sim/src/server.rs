//! Accepts connections for one server, and speaks the protocol on each.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::listen::Mail;
use crate::net::End;
use crate::node::{Backend, Doing, Goodbye, Process};
use crate::proto::{Answer, First, Request, first, next};
use crate::session::Session;
use crate::sql::{SqlError, Statement};
use crate::world::Sim;

/// Serves one connection until its end, or the end of the server's `life`, in which it was accepted.
pub(crate) async fn serve(sim: Arc<Sim>, node: usize, life: CancellationToken, mut end: End) {
    let mut answer = Answer::default();
    tokio::select! {
        // First, so that no session does anything after its server's life.
        biased;
        () = life.cancelled() => {}
        _ = session(&sim, node, &mut end, &mut answer) => return,
    }
    let goodbye = sim.lock().nodes[node].goodbye;
    // What was answered before comes first, unless the process is gone with its buffer.
    match goodbye {
        Goodbye::Closed => return,
        Goodbye::Silence => {
            end.says_goodbye = false;
            return;
        }
        Goodbye::Shutdown => answer.terminated(),
        Goodbye::BackendCrash => {
            let message = "terminating connection because of crash of another server process";
            answer.notice(&SqlError::new("57P02", message).by("quickdie"));
        }
    }
    // If this fails, the client has gone.
    let _ = end.send(&answer.bytes);
}

async fn session(sim: &Arc<Sim>, node: usize, end: &mut End, answer: &mut Answer) -> io::Result<()> {
    let mut buffer = Vec::new();
    loop {
        let asked = loop {
            if let Some(asked) = first(&mut buffer) {
                break asked;
            }
            if end.read(&mut buffer).await? == 0 {
                return Ok(());
            }
        };
        match asked {
            First::Encryption => end.send(b"N")?,
            First::Cancel { pid, secret } => {
                cancel(sim, node, pid, secret).await;
                return Ok(());
            }
            First::Session => break,
        }
    }
    if let Some(refusal) = refusal(sim, node).await {
        answer.error("FATAL", &refusal);
        return end.send(&std::mem::take(&mut answer.bytes));
    }
    let (pid, secret, cancel, terminate, mail) = {
        let mut world = sim.lock();
        let pid = world.next_pid();
        let mail = Arc::<Mail>::default();
        let (secret, cancel, terminate) = (pid ^ 0x5EED, Arc::<Notify>::default(), CancellationToken::new());
        let backend = Backend {
            secret,
            doing: Doing::Idle,
            since: Instant::now(),
            xid: None,
            xact_start: None,
            ends: false,
            cancel: Arc::clone(&cancel),
            terminate: terminate.clone(),
            listens: false,
            mail: Arc::clone(&mail),
        };
        world.nodes[node].backends.insert(pid, backend);
        (pid, secret, cancel, terminate, mail)
    };
    let mut session = Session::new(sim, node, pid, cancel);
    answer.authenticated();
    for (name, value) in [
        ("server_version", "15.8"),
        ("server_encoding", "UTF8"),
        ("client_encoding", "UTF8"),
        ("standard_conforming_strings", "on"),
        ("DateStyle", "ISO, MDY"),
    ] {
        answer.parameter(name, value);
    }
    session.reload();
    session.reports().into_iter().for_each(|value| answer.parameter("default_transaction_read_only", value));
    answer.key(sim.lock().setup.named(pid), secret);
    answer.ready(b'I');
    end.send(&std::mem::take(&mut answer.bytes))?;
    let ended = terminate.run_until_cancelled(messages(&mut session, end, &mut buffer, answer, &mail)).await;
    session.abort();
    sim.lock().nodes[node].backends.remove(&pid);
    if ended.is_none() {
        answer.terminated();
        return end.send(&std::mem::take(&mut answer.bytes));
    }
    Ok(())
}

/// The error that a new session gets instead of a greeting.
async fn refusal(sim: &Arc<Sim>, node: usize) -> Option<SqlError> {
    loop {
        let thawed = Arc::clone(&sim.lock().nodes[node].thawed);
        let thawed = thawed.notified();
        let (process, waits) = {
            let world = sim.lock();
            let node = &world.nodes[node];
            (node.process, node.frozen || node.troubles.log_ins_hang)
        };
        if process == Process::Starting {
            return Some(SqlError::new("57P03", "the database system is starting up"));
        }
        if !waits {
            break;
        }
        thawed.await;
    }
    let troubles = sim.lock().nodes[node].troubles;
    if troubles.slots_full {
        return Some(SqlError::new("53300", "sorry, too many clients already"));
    }
    if troubles.log_ins_refused {
        return Some(SqlError::new("28P01", "password authentication failed for user \"app\""));
    }
    None
}

/// Carries out a cancel request. Like the postmaster, it does not say whether there was anything to cancel.
async fn cancel(sim: &Arc<Sim>, node: usize, pid: i32, secret: i32) {
    sleep(Duration::from_millis(1)).await;
    let mut world = sim.lock();
    world.counts.note("seen", "cancel requests");
    let pid = world.setup.named(pid);
    let found = world.nodes[node].backends.get(&pid).filter(|backend| backend.secret == secret);
    let found = found.map(|backend| (Arc::clone(&backend.cancel), backend.doing, backend.ends));
    let Some((notify, doing, commits)) = found else { return };
    // A statement that is its own transaction may be cancelled, and then its wait ends: docs/exactly-once.md.
    if doing == Doing::Committing && commits {
        world.oracle.violation("a cancel request met a COMMIT that waits for its standby");
    }
    drop(world);
    notify.notify_waiters();
}

async fn messages(
    session: &mut Session,
    end: &mut End,
    buffer: &mut Vec<u8>,
    answer: &mut Answer,
    mail: &Mail,
) -> io::Result<()> {
    let (mut bound, mut skips) = (None, false);
    loop {
        let Some(request) = next(buffer) else {
            // Between transactions, the server tells what others have sent.
            if session.status() == b'I' {
                let mut told = Answer::default();
                mail.take().iter().for_each(|call| told.notification(session.pid, &call.to_string()));
                if !told.bytes.is_empty() {
                    end.send(&told.bytes)?;
                }
            }
            tokio::select! {
                biased;
                read = end.read(buffer) => if read? == 0 { return Ok(()) },
                () = mail.arrived.notified() => session.thaw().await,
            }
            continue;
        };
        session.thaw().await;
        session.reload();
        set_doing(session, Doing::Active);
        let is_whole = matches!(request, Request::Query(_) | Request::Sync);
        let failed = match request {
            Request::Terminate => return Ok(()),
            Request::Sync => {
                skips = false;
                None
            }
            // After an error of the extended protocol, everything until the next Sync, a simple query, too.
            _ if skips => continue,
            Request::Query(text) => {
                session.query(&text, answer).await;
                None
            }
            Request::Parse { name, sql } => session.keep(name, &sql).map(|()| answer.parsed()).err(),
            Request::Describe { portal, name } => {
                if !portal {
                    answer.parameters(if session.kept(&name) == Statement::Insert(None) { 2 } else { 0 });
                }
                answer.no_data();
                None
            }
            Request::Bind { statement, values } => match session.bind(&statement, &values) {
                Ok(values) => {
                    bound = Some(values);
                    answer.bound();
                    None
                }
                Err(error) => Some(error),
            },
            Request::Execute => match bound.take() {
                Some(bound) => session.execute(bound, answer).await.err(),
                None => Some(session.unknown("a bound statement")),
            },
            Request::Close { name } => {
                session.close(&name);
                answer.closed();
                None
            }
            Request::Other => None,
        };
        if let Some(error) = failed {
            answer.error(if error.fatal { "FATAL" } else { "ERROR" }, &error);
            skips = true;
            // A server sends an error at once.
            end.send(&std::mem::take(&mut answer.bytes))?;
        }
        if session.ended {
            return end.send(&std::mem::take(&mut answer.bytes));
        }
        if is_whole {
            session.reports().into_iter().for_each(|value| answer.parameter("default_transaction_read_only", value));
            answer.ready(session.status());
            let doing = if session.status() == b'I' { Doing::Idle } else { Doing::IdleInTransaction };
            set_doing(session, doing);
            end.send(&std::mem::take(&mut answer.bytes))?;
        }
    }
}

fn set_doing(session: &Session, doing: Doing) {
    session.sim.lock().set_doing(session.node, session.pid, doing);
}
