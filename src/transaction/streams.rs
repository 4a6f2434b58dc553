//! The driver's calls that return before their answer is complete: COPY and row streams.
//!
//! Their results borrow nothing, so user code can keep them after the closure has returned. As long as it does, the
//! session cannot answer COMMIT. So a transaction that has made such a call checks before COMMIT whether the session is
//! free.

use std::pin::pin;
use std::time::Duration;

use tokio::time::timeout;

use crate::pool::Client;
use crate::server::SessionClient;

/// How long a session may be silent during this check.
const SILENT: Duration = Duration::from_secs(2);
/// The limit for the whole check on a wrapped pool's session, because this crate does not see what such a session
/// receives.
const UNSEEN: Duration = Duration::from_secs(5);

/// Returns whether the session answers a request. The pool checks this if the driver got an unexpected answer to a
/// statement. For example, after `COPY … FROM STDIN` through a method that is not meant for it, the server waits for
/// data, and ends the session at any other request.
pub(super) async fn answers<C: SessionClient>(client: &Client<C>) -> bool {
    let answer = timeout(UNSEEN, client.driver().batch_execute(""));
    tokio::select! {
        biased;
        answer = answer => matches!(answer, Ok(Ok(()))),
        () = client.evicted() => true,
    }
}

/// Returns whether the session of an open transaction still answers a request. Its future must have been dropped,
/// because the closure has ended.
pub(super) async fn is_answering<C: SessionClient>(client: &Client<C>) -> bool {
    let notices = client.notices();
    notices.requests_are_seen().await;
    notices.are_driven() && !notices.activity.in_transaction()
}

/// Waits until the session has answered all requests. `false`: a stream that is not read on holds the answers back. The
/// answer itself does not matter: if the session has ended, COMMIT will find that out.
///
/// If nobody holds the answers back, a silent session only means that the server is still busy with a statement. This
/// cannot be seen on a wrapped pool's session, so its silence counts as a stream that is kept.
pub(super) async fn is_free<C: SessionClient>(client: &Client<C>) -> bool {
    let mut answer = pin!(client.driver().batch_execute(""));
    let silent = if client.notices().are_driven() { SILENT } else { UNSEEN };
    loop {
        let before = client.notices().traffic();
        let waited = tokio::select! {
            biased;
            waited = timeout(silent, answer.as_mut()) => waited,
            () = client.evicted() => return true,
        };
        if waited.is_ok() {
            return true;
        }
        let (notices, silent) = (client.notices(), client.notices().traffic() == before);
        if silent && (!notices.are_driven() || notices.activity.is_held_up()) {
            return false;
        }
    }
}

/// Waits until the session has answered everything that was sent, and this crate has seen that. `false`: that cannot
/// be, because a stream that is not read on holds the answers back.
pub(super) async fn all_is_answered<C: SessionClient>(client: &Client<C>) -> bool {
    let (notices, activity) = (client.notices(), &client.notices().activity);
    if !activity.is_settled() {
        notices.requests_are_seen().await;
    }
    if activity.is_quiet_in_transaction() {
        return true;
    }
    // The closure has dropped a future, or has ended the transaction. The answer comes after all others.
    if !is_free(client).await {
        return false;
    }
    notices.requests_are_seen().await;
    true
}
