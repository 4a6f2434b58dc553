//! How a caller waits for a connection and gives it back, and what it is told when there is none.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;
use std::time::Duration;

use deadpool::managed::{self, Object, PoolError};
use tokio::time::{Instant, sleep, timeout_at};

use super::client::Loan;
use super::dials::AT_ONCE;
use super::{Client, Pool, Source};
use crate::cluster::NoPrimary;
use crate::error::{Error, Obstacle, Refused, Unavailable};
use crate::server::SessionClient;

impl<C: SessionClient> Pool<C> {
    pub(super) async fn get_until(&self, deadline: Instant) -> Result<Client<C>, Error> {
        self.get_by(|| deadline, None).await
    }

    /// A connection for a transaction. A primary is waited for until the deadline of its policy, which may be longer than
    /// the checkout timeout so that the call lives through a failover; others who have all connections in use are waited
    /// for no longer than by [`Pool::get`].
    pub(crate) async fn get_for_transaction(&self, deadline: Instant) -> Result<Client<C>, Error> {
        self.get_by(|| deadline, Some(self.shared.checkout_timeout)).await
    }

    /// `in_use`: how long to wait while there is a primary and all connections are in use. Without one, until the deadline.
    pub(super) async fn get_by(
        &self,
        deadline: impl FnOnce() -> Instant,
        in_use: Option<Duration>,
    ) -> Result<Client<C>, Error> {
        let waits = self.observer().waits();
        let mut checkout = pin!(self.checkout());
        // An idle connection is there at once: for it no clock is read and no timer is made.
        if let Poll::Ready(checked_out) = poll_fn(|context| Poll::Ready(checkout.as_mut().poll(context))).await {
            waits.ended(&checked_out);
            return checked_out;
        }
        if self.is_held_by_caller() {
            waits.timed_out();
            let obstacle = Obstacle::HeldByCaller { max_size: self.source.status().max_size };
            let unavailable = Unavailable::new(Duration::ZERO, self.cluster().diagnosis(), obstacle);
            return Err(Error::Unavailable(Box::new(unavailable)));
        }
        let (began, deadline) = (Instant::now(), deadline());
        let checkout = async {
            match in_use {
                Some(longest) if began + longest < deadline => self.free_within(longest, checkout).await,
                _ => Some(checkout.await),
            }
        };
        let Ok(Some(checked_out)) = timeout_at(deadline, checkout).await else {
            waits.timed_out();
            return Err(self.unavailable(began));
        };
        waits.ended(&checked_out);
        checked_out
    }

    /// `None`: for so long there was one primary, and all connections to it were in use.
    async fn free_within<T>(&self, longest: Duration, mut checkout: Pin<&mut impl Future<Output = T>>) -> Option<T> {
        loop {
            let generation = tokio::select! {
                biased;
                checked_out = checkout.as_mut() => return Some(checked_out),
                generation = self.cluster().primary() => generation,
            };
            // Why there is none, the checkout says as well.
            let Ok(generation) = generation else { return Some(checkout.await) };
            tokio::select! {
                biased;
                checked_out = checkout.as_mut() => return Some(checked_out),
                () = self.cluster().left(generation.primary.id) => {}
                () = sleep(longest) => {
                    let managed::Status { size, max_size, .. } = self.source.status();
                    if size >= max_size {
                        return None;
                    }
                }
            }
        }
    }

    async fn checkout(&self) -> Result<Client<C>, Error> {
        loop {
            // Waiting is done here and not in `recycle`: a caller that gives up in there takes a good connection along.
            if !self.cluster().has_primary() {
                self.not_ended()?;
                let _counted = Counted::new(&self.shared.searching);
                if let Err(none) = Box::pin(self.cluster().primary()).await {
                    // Whoever asks again at once, in a loop, must let the task run that might find something better.
                    tokio::task::yield_now().await;
                    return Err(none.into());
                }
            }
            let inner = match &self.source {
                Source::Own(inner) => inner,
                Source::Wrapped(wrapped) => {
                    let loan = Box::pin(wrapped.checkout(&self.dialer)).await?;
                    return Ok(self.lend(loan));
                }
            };
            match inner.get().await {
                Ok(object) => {
                    object.use_it();
                    return Ok(self.lend(Loan::Own(object)));
                }
                // No session could be opened now. Another caller may have given one back meanwhile: look there first.
                Err(PoolError::Backend(Error::Unavailable(_))) => {}
                Err(PoolError::Backend(error)) => return Err(error),
                // The inner pool has no time-outs and no hooks of its own, so all that is left is that it was closed.
                Err(_) => return Err(self.cluster().ended().into()),
            }
        }
    }

    /// A good connection comes back: it goes to whoever waits for one to be opened, and else to the idle ones.
    pub(super) fn give_back(&self, loan: Loan<C>) {
        let Loan::Own(object) = loan else { return };
        let dials = &self.dialer.dials;
        if !dials.wanted() {
            drop(object);
        } else if object.may_be_handed_out(self.cluster()) {
            return dials.hand(Object::take(object));
        }
        // Somebody may have begun to wait since.
        if dials.wanted() {
            dials.offer_idle();
        }
    }

    pub(super) fn lend(&self, loan: Loan<C>) -> Client<C> {
        self.cluster().lend();
        loan.activity().lend();
        Client::new(loan, self.clone())
    }

    /// A new connection where a slot is free: nobody had it before, who may have left anything on it. Waits for a primary
    /// without a limit of its own. Cancel-safe.
    pub(crate) async fn get_new(&self) -> Result<Option<Client<C>>, Error> {
        let Source::Own(inner) = &self.source else { return Ok(None) };
        // Before there is a slot that others could use.
        self.cluster().primary().await?;
        match inner.timeout_get(&AT_ONCE).await {
            Ok(object) if object.use_it() => Ok(Some(self.lend(Loan::Own(object)))),
            Ok(_) | Err(PoolError::Timeout(_)) => Ok(None),
            Err(PoolError::Backend(error)) => Err(error),
            Err(_) => Err(self.cluster().ended().into()),
        }
    }

    pub(crate) fn unavailable(&self, began: Instant) -> Error {
        let managed::Status { size, max_size, .. } = self.source.status();
        let obstacle = match self.cluster().current() {
            None => Obstacle::NoPrimary,
            Some(_) if size >= max_size => Obstacle::NoneFree { max_size },
            Some(generation) => Obstacle::NoSession(generation.trouble()),
        };
        Error::Unavailable(Box::new(Unavailable::new(began.elapsed(), self.cluster().diagnosis(), obstacle)))
    }
}

/// One more in a counter, for as long as it lives.
pub(super) struct Counted<'a>(&'a AtomicUsize);

impl<'a> Counted<'a> {
    pub(super) fn new(counter: &'a AtomicUsize) -> Self {
        counter.fetch_add(1, Ordering::Relaxed);
        Self(counter)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl From<NoPrimary> for Error {
    fn from(none: NoPrimary) -> Self {
        match none {
            NoPrimary::Closed => Self::Closed,
            NoPrimary::RuntimeEnded => Self::RuntimeEnded,
            NoPrimary::Refused(endpoint, failure) => Self::Refused(Box::new(Refused::new(endpoint, failure))),
            NoPrimary::UnknownName(waited, diagnosis) => {
                Self::Unavailable(Box::new(Unavailable::new(waited, diagnosis, Obstacle::NoPrimary)))
            }
        }
    }
}
