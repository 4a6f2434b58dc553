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
                let Some(whose) = whose(self.mark.as_ref(), self.session, client) else { return Ok(()) };
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

/// How the server of this session knows the session of an attempt: by its mark, or else by what the server calls the
/// session, and when the closure began. `None`: it does not know it, or nobody can tell.
pub(super) fn whose<C: SessionClient>(
    mark: Option<&SettleKey>,
    session: Option<(ServerSession, Instant)>,
    client: &Client<C>,
) -> Option<Whose> {
    match (mark, session) {
        (Some(mark), _) => mark.is_life_of(client).then_some(Whose::Marked(mark.backend)),
        (None, session) => session.map(|(session, began)| Whose::Unmarked(session, began.elapsed())),
    }
}

/// Ends all these sessions, as far as this session's server has them.
pub(super) async fn end_all<C: SessionClient>(client: &Client<C>, abandoned: &mut Vec<Abandoned>) {
    for attempt in std::mem::take(abandoned) {
        attempt.end(client).await;
    }
}
