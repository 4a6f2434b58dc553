//! Ends the sessions of attempts whose COMMIT is in doubt, before the work runs again all the same.
//!
//! If COMMIT has not reached the server, such a session is idle in its transaction. It holds its locks until the server
//! learns that the client is gone, and the next run would wait for them.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use super::settle::SettleKey;
use crate::classify::explain;
use crate::pool::Client;
use crate::server::SessionClient;
use crate::settle::lost::{LATE, Whose, end_in_doubt};
use crate::sync::log_safely;
use crate::topology::ServerSession;

/// The pause between two looks at a session whose COMMIT may still arrive.
const PAUSE: Duration = Duration::from_millis(50);
/// A session that has not ended after this time is left alone.
const ENDED_WITHIN: Duration = Duration::from_millis(750);

/// The session of an attempt whose COMMIT is in doubt.
pub(super) struct Abandoned {
    mark: Option<SettleKey>,
    /// The session, and when its closure began.
    session: Option<(ServerSession, Instant)>,
    /// When the attempt has ended.
    since: Instant,
}

impl Abandoned {
    pub(super) fn new(mark: Option<SettleKey>, session: Option<(ServerSession, Instant)>) -> Self {
        Self { mark, session, since: Instant::now() }
    }

    /// Ends the session if COMMIT has not arrived there. Waits for as long as COMMIT may be under way.
    async fn end<C: SessionClient>(self, client: &Client<C>) {
        let ending = async {
            loop {
                let whose = match (&self.mark, self.session) {
                    (Some(mark), _) if mark.is_life_of(client) => Whose::Marked(mark.backend),
                    (None, Some((session, began))) => Whose::Unmarked(session, began.elapsed()),
                    _ => return Ok(()),
                };
                if !end_in_doubt(client, whose, self.since.elapsed() > LATE).await? {
                    return Ok(());
                }
                sleep(PAUSE).await;
            }
        };
        let ended: Result<Result<(), tokio_postgres::Error>, _> = timeout(ENDED_WITHIN, ending).await;
        if let Ok(Err(error)) = ended {
            log_safely(|| tracing::debug!("an abandoned session could not be ended: {}", explain(&error)));
        }
    }
}

/// Ends all these sessions, as far as this session's server has them.
pub(super) async fn end_all<C: SessionClient>(client: &Client<C>, abandoned: &mut Vec<Abandoned>) {
    for attempt in std::mem::take(abandoned) {
        attempt.end(client).await;
    }
}
