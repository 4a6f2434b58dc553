//! Finds out which parts of a question a server refuses, and remembers them. The tests are in
//! `tests/it/sessions/revoked.rs`.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::Instant;
use tokio_postgres::Client;

use super::rows::rows;
use crate::classify::{about_a_part, explain, for_primaries_only};
use crate::sync::{lock, log_safely};
use crate::topology::{Address, Question, Refused};

/// The most servers whose refusals are remembered.
const MOST_REFUSALS: usize = 256;
/// How long a refused part is left out. Then it is asked for again, because the privilege may have been granted.
const REFUSED_FOR: Duration = Duration::from_secs(60);

/// What servers have refused recently. The pool does not ask them for it.
pub(super) struct Withheld<T>(Mutex<HashMap<Address, (Instant, T)>>);

impl<T> Default for Withheld<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T: Copy> Withheld<T> {
    /// Returns what this server has refused recently. `None`: nothing.
    pub(super) fn of(&self, address: &Address) -> Option<T> {
        let held = self.held();
        held.get(address).filter(|(since, _)| is_recent(*since)).map(|(_, refused)| *refused)
    }

    /// Remembers a refusal. `and` combines it with what the server refused before.
    pub(super) fn note(&self, address: &Address, refused: T, and: impl Fn(T, T) -> T) {
        let mut held = self.held();
        held.retain(|_, (since, _)| is_recent(*since));
        // If the map is full, the refusal is not remembered. That costs one more question the next time.
        if held.len() < MOST_REFUSALS || held.contains_key(address) {
            let (_, all) = held.entry(address.clone()).or_insert_with(|| (Instant::now(), refused));
            *all = and(*all, refused);
        }
    }

    pub(super) fn forget(&self, address: &Address) {
        self.held().remove(address);
    }

    fn held(&self) -> MutexGuard<'_, HashMap<Address, (Instant, T)>> {
        lock(&self.0)
    }
}

fn is_recent(since: Instant) -> bool {
    since.elapsed() <= REFUSED_FOR
}

/// Asks for each piece of the question alone. All these questions together take about one round trip.
pub(super) async fn look_for(client: &Client, question: Question, known: Refused) -> Refused {
    let asking = question.pieces().filter(|piece| !known.holds(*piece)).map(|piece| async move {
        let error = rows(client, &piece.alone()).await.err()?;
        let refused = about_a_part(&error) && !for_primaries_only(&error);
        log_safely(|| tracing::debug!(?piece, refused, "{}", explain(&error)));
        refused.then_some(piece)
    });
    Refused::of(join_all(asking).await.into_iter().flatten())
}
