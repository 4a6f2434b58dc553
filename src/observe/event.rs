//! The words for what happens to a pool, and the stream of them.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_util::Stream;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio_util::sync::ReusableBoxFuture;

use crate::commit::Unsettled;
use crate::topology::{Address, CandidateReport, Endpoint, Eviction, GenerationId};

/// Something that happened to a pool, from [`Pool::subscribe`](crate::Pool::subscribe).
///
/// By the time an event about the primary arrives, [`Pool::status`](crate::Pool::status) shows it, or what came later.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Event {
    /// There is no verified primary any more: checkouts wait, a search begins. Connections live on until
    /// [`Event::Evicted`].
    #[non_exhaustive]
    PrimaryLost {
        /// Of the primary that was lost.
        generation: GenerationId,
        /// Where it was.
        endpoint: Endpoint,
        /// What was seen, in a few words.
        why: String,
    },
    /// A primary was found and verified.
    #[non_exhaustive]
    PrimaryFound {
        /// Its generation.
        generation: GenerationId,
        /// Where it is.
        endpoint: Endpoint,
        /// How long the search took.
        took: Duration,
        /// It is the server that was lost, in the same life: its generation and its connections go on.
        same_server: bool,
    },
    /// A generation ended: its connections are closed, also those in use.
    #[non_exhaustive]
    Evicted {
        /// The generation that ended.
        generation: GenerationId,
        /// What proved that they are of no use.
        cause: Eviction,
        /// How many of them were still open.
        connections: usize,
        /// The proof, in a few words.
        why: String,
    },
    /// A search has lasted for two seconds. Once for each search.
    #[non_exhaustive]
    SearchSlow {
        /// How long it has lasted.
        lasted: Duration,
        /// What each candidate said last.
        candidates: Vec<CandidateReport>,
        /// What DNS failed with when it was asked last, if it did.
        dns_failure: Option<String>,
    },
    /// A primary refuses writes: `default_transaction_read_only` is on, which is how Fly and others fence one. Once for each
    /// server, until the next generation begins.
    #[non_exhaustive]
    Fenced {
        /// The server.
        address: Address,
    },
    /// An old primary came back, writable, and was refused. Once for each server, until the next generation begins.
    #[non_exhaustive]
    ZombieRefused {
        /// The server.
        address: Address,
        /// Its timeline.
        timeline: u32,
        /// The newest timeline of the cluster.
        newest: u32,
    },
    /// A server of another cluster answered at one of the addresses, and was refused. Once for each server, until the next
    /// generation begins.
    #[non_exhaustive]
    StrangerRefused {
        /// The server.
        address: Address,
        /// The system identifier of this pool's cluster.
        expected: u64,
        /// That of the server.
        found: u64,
    },
    /// Another cluster is this pool's own from now on: by [`Pool::accept_cluster`](crate::Pool::accept_cluster),
    /// [`Pool::forget_cluster`](crate::Pool::forget_cluster) or
    /// [`PoolBuilder::accept_new_cluster_after`](crate::PoolBuilder::accept_new_cluster_after).
    #[non_exhaustive]
    ClusterAccepted {
        /// The system identifier of the cluster so far, if it was known.
        before: Option<u64>,
        /// That of the new one; `None` where the next search decides.
        accepted: Option<u64>,
    },
    /// A second server is writable on the timeline of the primary, which stays in use: somebody has to look into it. Once
    /// for each server, until the next generation begins.
    #[non_exhaustive]
    SecondPrimary {
        /// The other server.
        address: Address,
    },
    /// What became of a COMMIT whose answer was lost. Not of idempotent and read-only work, which runs again without asking.
    #[non_exhaustive]
    CommitSettled {
        /// The generation that the COMMIT was sent in.
        generation: GenerationId,
        /// What became of it.
        outcome: Settlement,
        /// How long it took to find out.
        took: Duration,
    },
    /// The reader was too slow: so many events were dropped before the next one.
    #[non_exhaustive]
    Missed {
        /// How many.
        events: u64,
    },
}

/// What became of a COMMIT without an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Settlement {
    /// It was committed: the call returns `Ok`.
    Committed,
    /// It was not, and never will be: the work runs again.
    NotCommitted,
    /// It cannot be told: the call fails with [`Error::CommitUnknown`](crate::Error::CommitUnknown).
    Unknown(Unsettled),
}

/// The events of a pool from the moment of [`Pool::subscribe`](crate::Pool::subscribe) on: a [`Stream`] that ends when the
/// pool is closed.
///
/// It never holds up the pool: of a reader that falls behind, the oldest events are dropped (it may be 256 behind), and it
/// is told of them by [`Event::Missed`].
#[must_use = "events are lost unless they are read"]
pub struct Events {
    /// The receiver travels through the future and back.
    next: ReusableBoxFuture<'static, (Result<Event, RecvError>, Receiver<Event>)>,
}

impl Events {
    pub(super) fn new(receiver: Receiver<Event>) -> Self {
        Self { next: ReusableBoxFuture::new(receive(receiver)) }
    }

    /// The next event; `None` once the pool is closed. Cancel-safe.
    pub async fn next(&mut self) -> Option<Event> {
        std::future::poll_fn(|cx| Pin::new(&mut *self).poll_next(cx)).await
    }
}

async fn receive(mut receiver: Receiver<Event>) -> (Result<Event, RecvError>, Receiver<Event>) {
    (receiver.recv().await, receiver)
}

impl Stream for Events {
    type Item = Event;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        let (next, receiver) = ready!(self.next.poll(cx));
        self.next.set(receive(receiver));
        Poll::Ready(match next {
            Ok(event) => Some(event),
            Err(RecvError::Lagged(events)) => Some(Event::Missed { events }),
            Err(RecvError::Closed) => None,
        })
    }
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Events").finish_non_exhaustive()
    }
}
