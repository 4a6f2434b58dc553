//! The events of a pool, and the stream of them.

use std::fmt;
use std::panic::Location;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_util::Stream;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio_util::sync::ReusableBoxFuture;

use crate::commit::Unsettled;
use crate::topology::{Address, CandidateReport, Endpoint, Eviction, GenerationId};

/// Something that has happened in a pool. [`Pool::subscribe`](crate::Pool::subscribe) returns the stream of these
/// events.
///
/// When an event about the primary arrives, [`Pool::status`](crate::Pool::status) already shows that state or a later
/// one.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// There is no verified primary any more. Checkouts wait, and a search begins. Connections stay open until
    /// [`Event::Evicted`].
    #[non_exhaustive]
    PrimaryLost {
        /// The generation of the primary that was lost.
        generation: GenerationId,
        /// The address of the primary that was lost.
        endpoint: Endpoint,
        /// What was seen, in a few words.
        why: String,
    },
    /// A primary was found and verified.
    #[non_exhaustive]
    PrimaryFound {
        /// The generation of the primary.
        generation: GenerationId,
        /// The address of the primary.
        endpoint: Endpoint,
        /// How long the search took.
        took: Duration,
        /// True if this is the server that was lost, and it has not restarted. Then its generation goes on, and its
        /// connections stay open.
        same_server: bool,
    },
    /// A generation ended. Its connections are closed, including those in use.
    #[non_exhaustive]
    Evicted {
        /// The generation that ended.
        generation: GenerationId,
        /// What proved that its connections are useless.
        cause: Eviction,
        /// How many of its connections were still open.
        connections: usize,
        /// The proof, in a few words.
        why: String,
    },
    /// A search has lasted for two seconds. It is reported once for each search.
    #[non_exhaustive]
    SearchSlow {
        /// How long it has lasted.
        lasted: Duration,
        /// What each candidate said last.
        candidates: Vec<CandidateReport>,
        /// The failure of the last question to DNS, if it failed.
        dns_failure: Option<String>,
    },
    /// A primary refuses writes, because `default_transaction_read_only` is on. Fly and others fence a primary in this
    /// way. It is reported once for each server, until the next generation begins.
    #[non_exhaustive]
    Fenced {
        /// The server.
        address: Address,
    },
    /// An old primary came back writable, and the pool refused it. It is reported once for each server, until the next
    /// generation begins.
    #[non_exhaustive]
    ZombieRefused {
        /// The server.
        address: Address,
        /// Its timeline.
        timeline: u32,
        /// The newest timeline of the cluster.
        newest: u32,
    },
    /// A server of another cluster answered at one of the addresses, and the pool refused it. It is reported once for
    /// each server, until the next generation begins.
    #[non_exhaustive]
    StrangerRefused {
        /// The server.
        address: Address,
        /// The system identifier of this pool's cluster.
        expected: u64,
        /// The system identifier of the server.
        found: u64,
    },
    /// The pool belongs to another cluster from now on. The reason is
    /// [`Pool::accept_cluster`](crate::Pool::accept_cluster), [`Pool::forget_cluster`](crate::Pool::forget_cluster) or
    /// [`PoolBuilder::accept_new_cluster_after`](crate::PoolBuilder::accept_new_cluster_after).
    #[non_exhaustive]
    ClusterAccepted {
        /// The system identifier of the pool's cluster before the change, if it was known.
        before: Option<u64>,
        /// The system identifier of the new cluster. `None` if the next search decides it.
        accepted: Option<u64>,
    },
    /// A second server is writable on the timeline of the primary. The primary stays in use, and an operator has to
    /// look into it. It is reported once for each server, until the next generation begins.
    #[non_exhaustive]
    SecondPrimary {
        /// The other server.
        address: Address,
    },
    /// What became of a COMMIT whose answer was lost. It is not reported for idempotent and read-only work, which runs
    /// again without a question to the server.
    #[non_exhaustive]
    CommitSettled {
        /// The generation that the COMMIT was sent in.
        generation: GenerationId,
        /// What became of it.
        outcome: SettledOutcome,
        /// How long it took to find out.
        took: Duration,
    },
    /// A caller waited for long until it got a connection, or until its deadline: see
    /// [`PoolBuilder::slow_checkout_after`](crate::PoolBuilder::slow_checkout_after). Reported at most once a second.
    #[non_exhaustive]
    SlowCheckout {
        /// How long it waited.
        waited: Duration,
        /// Where it asked for the connection.
        place: &'static Location<'static>,
    },
    /// A connection is checked out for long: see [`PoolBuilder::leak_after`](crate::PoolBuilder::leak_after). Reported
    /// once for each checkout.
    #[non_exhaustive]
    LongCheckout {
        /// How long it has been checked out.
        held: Duration,
        /// Where it was taken.
        place: &'static Location<'static>,
    },
    /// The reader was too slow, and this many events were dropped before the next one.
    #[non_exhaustive]
    Missed {
        /// The number of dropped events.
        events: u64,
    },
}

/// What became of a COMMIT without an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SettledOutcome {
    /// It was committed, so the call returns `Ok`.
    Committed,
    /// It was not committed and never will be, so the work runs again.
    NotCommitted,
    /// The pool could not find out, so the call fails with [`Error::CommitUnknown`](crate::Error::CommitUnknown).
    Unknown(Unsettled),
}

/// The events of a pool since [`Pool::subscribe`](crate::Pool::subscribe) was called. It is a [`Stream`] that ends when
/// the pool is closed.
///
/// It never holds up the pool. A reader may be 256 events behind. If it falls further behind, the oldest events are
/// dropped, and [`Event::Missed`] tells the reader how many.
#[must_use = "events are lost unless they are read"]
pub struct Events {
    /// The future that waits for the next event. It owns the receiver meanwhile, and returns it with the event, so that
    /// the next future can have it.
    next: ReusableBoxFuture<'static, (Result<Event, RecvError>, Receiver<Event>)>,
}

impl Events {
    pub(super) fn new(receiver: Receiver<Event>) -> Self {
        Self { next: ReusableBoxFuture::new(receive(receiver)) }
    }

    /// The next event, or `None` after the pool was closed. Cancel-safe.
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
