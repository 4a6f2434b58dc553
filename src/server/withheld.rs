//! Finds out which part of a question a server refuses, and remembers it. Tests: `tests/it/revoked.rs`.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};

use futures_util::future::join_all;
use tokio::time::Instant;
use tokio_postgres::Client;

use super::{MOST_REFUSALS, REFUSED_FOR, rows};
use crate::classify::{about_a_part, explain, for_primaries_only};
use crate::sync::lock;
use crate::topology::{Address, Question, Refused};

/// What servers do not let this role ask for.
#[derive(Default)]
pub(super) struct Withheld(Mutex<HashMap<Address, (Instant, Refused)>>);

impl Withheld {
    /// What this server refused lately, and is not asked for.
    pub(super) fn of(&self, address: &Address) -> Refused {
        let held = self.held();
        held.get(address).filter(|(since, _)| is_recent(*since)).map_or(Refused::default(), |(_, refused)| *refused)
    }

    pub(super) fn note(&self, address: &Address, refused: Refused) {
        let mut held = self.held();
        held.retain(|_, (since, _)| is_recent(*since));
        // One that is forgotten is asked once more than need be.
        if held.len() < MOST_REFUSALS || held.contains_key(address) {
            let (_, all) = held.entry(address.clone()).or_insert_with(|| (Instant::now(), refused));
            *all = all.and(refused);
        }
    }

    pub(super) fn forget(&self, address: &Address) {
        self.held().remove(address);
    }

    fn held(&self) -> MutexGuard<'_, HashMap<Address, (Instant, Refused)>> {
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
