//! One dial: a task that opens a session for the pool.

use std::sync::{Arc, Weak};

use tokio::sync::SemaphorePermit;
use tokio::time::{Instant, sleep};

use super::CountedDial;
use super::after_connect::after_connect;
use crate::cluster::Generation;
use crate::error::Error;
use crate::pool::dialer::{Dialer, Turn, take_turn};
use crate::server::SessionClient;

/// What a dial holds until the pause after its failure is over.
#[derive(Default)]
struct DialPermits<'a> {
    _greeting: Option<SemaphorePermit<'a>>,
    _permit: Option<SemaphorePermit<'a>>,
    _turn: Turn,
}

impl<'a> DialPermits<'a> {
    fn greeting(greeting: Option<SemaphorePermit<'a>>) -> Self {
        Self { _greeting: greeting, ..Self::default() }
    }
}

/// Opens one connection through the generation's gate. Ends with the generation, and with the pool.
pub(super) async fn dial<C: SessionClient>(
    dialer: Weak<Dialer<C>>,
    generation: Arc<Generation<C>>,
    dialing: CountedDial<C>,
) {
    let Some((opener, within)) = dialer.upgrade().map(|it| (Arc::clone(&it.opener), it.open_timeout)) else { return };
    let scope = generation.scope.clone();
    let started = Instant::now();
    // From when the session is: one that was opened before an eviction is closed.
    let mut evictions = dialing.0.room.evictions();
    // While the user's hook runs, other sessions than the pool's connections must get through the gate.
    let greets = dialer.upgrade().is_some_and(|dialer| dialer.has_after_connect());
    let dialled = scope.run_until_cancelled(async {
        // Neither gate is ever closed, so waiting for it cannot fail.
        let greeting = if greets { generation.greetings.acquire().await.ok() } else { None };
        let permit = generation.gate.acquire().await;
        // The session that proved the primary may be free by now.
        if let Some(spare) = generation.take_spare() {
            drop(permit);
            return Some((DialPermits::greeting(greeting), None, after_connect(&dialer, &generation, spare).await));
        }
        // Connections that were doubted may have come back while this waited.
        if dialer.upgrade()?.queue.is_full() {
            return None;
        }
        let turn = match take_turn(&dialer, &generation, started).await? {
            Ok(turn) => turn,
            Err(refused) => return Some((DialPermits::greeting(greeting), None, Err(refused))),
        };
        evictions = dialing.0.room.evictions();
        let began = Instant::now();
        match Dialer::open(&*opener, within, &generation).await {
            // Another dial may log in while a hook runs.
            Ok(session) => {
                drop((permit, turn));
                let held = DialPermits::greeting(greeting);
                Some((held, Some(began), after_connect(&dialer, &generation, session).await))
            }
            Err(failure) => {
                let held = DialPermits { _greeting: greeting, _permit: permit.ok(), _turn: turn };
                Some((held, Some(began), Err(failure)))
            }
        }
    });
    let Some(Some((held, began, outcome))) = dialled.await else { return };
    let Some(strong) = dialer.upgrade() else { return };
    let failure = match outcome {
        Ok(session) => {
            if let Some(began) = began {
                generation.opened();
                strong.let_in();
                strong.cluster.observer().opened(began.elapsed());
            }
            return strong.arrived(session, &generation, dialing, evictions);
        }
        Err(failure) => failure,
    };
    // If this task has not dialled, the failure is another dial's refusal, which that dial has noted already.
    if let Some(began) = began {
        strong.note_refused(began, &failure);
    }
    let began = began.unwrap_or(started);
    let (error, pause) = strong.failed(&generation, failure.clone());
    if matches!(error, Error::Refused(_)) {
        strong.refused(&generation, &failure, began);
        drop(dialing);
        // Callers that have asked since then need another log-in.
        return strong.balance(0);
    }
    drop(strong);
    // They are held during the pause, so that not every task asks a server that accepts no sessions.
    let paused = scope.run_until_cancelled(sleep(pause)).await;
    drop(held);
    if let (Some(()), Some(dialer)) = (paused, dialer.upgrade()) {
        dialer.not_arrived(&generation);
        drop(dialing);
        dialer.balance(0);
    }
}
