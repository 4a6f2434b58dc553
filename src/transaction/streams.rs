//! The driver's calls that return before their answer has come: COPY, and rows one by one.
//!
//! What they return borrows nothing, so it can be kept beyond the closure, and COMMIT then waits behind it for as long as
//! it is kept. So a transaction that has called one of these asks the session, before COMMIT, whether it is free.

use std::pin::pin;
use std::time::Duration;

use tokio::time::timeout;

use crate::pool::Client;
use crate::server::SessionClient;

/// So long a session may be silent while it is waited for: longer than a server pauses within an answer.
const SILENT: Duration = Duration::from_secs(2);
/// The same in all, where the session's driver is not this crate's and nobody sees what comes.
const UNSEEN: Duration = Duration::from_secs(5);

/// Waits until the session has answered all that it was asked. `false`: somebody keeps it from that. The answer itself is
/// COMMIT's to find out about, also where the session has ended.
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
        if client.notices().traffic() == before {
            return false;
        }
    }
}
