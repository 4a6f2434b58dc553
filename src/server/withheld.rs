//! Finds out which part of a question a server refuses, and remembers it. Tests: `tests/it/revoked.rs`.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::Instant;
use tokio_postgres::Client;

use super::rows;
use crate::classify::{about_a_part, explain, for_primaries_only};
use crate::sync::lock;
use crate::topology::{Address, Question, Refused};

/// So many servers that refused something are remembered.
const MOST_REFUSALS: usize = 256;
/// What a server refused is asked for again after this: the right may have been granted since.
const REFUSED_FOR: Duration = Duration::from_secs(60);

/// What servers refused lately, and are not asked for.
pub(super) struct Withheld<T>(Mutex<HashMap<Address, (Instant, T)>>);

impl<T> Default for Withheld<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T: Copy> Withheld<T> {
    /// What this server refused lately. `None`: nothing.
    pub(super) fn of(&self, address: &Address) -> Option<T> {
        let held = self.held();
        held.get(address).filter(|(since, _)| is_recent(*since)).map(|(_, refused)| *refused)
    }

    /// Remembers it, `and` what the server refused before.
    pub(super) fn note(&self, address: &Address, refused: T, and: impl Fn(T, T) -> T) {
        let mut held = self.held();
        held.retain(|_, (since, _)| is_recent(*since));
        // One that is forgotten is asked once more than need be.
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

/// Asks for each piece of the question alone, all within about one round trip.
pub(super) async fn look_for(client: &Client, question: Question, known: Refused) -> Refused {
    let asking = question.pieces().filter(|piece| !known.holds(*piece)).map(|piece| async move {
        let error = rows(client, &piece.alone()).await.err()?;
        let refused = about_a_part(&error) && !for_primaries_only(&error);
        tracing::debug!(?piece, refused, "{}", explain(&error));
        refused.then_some(piece)
    });
    join_all(asking).await.into_iter().flatten().collect::<Refused>()
}
