//! Where connections lead to at the moment.

use std::sync::Arc;

use tokio::sync::watch;
use tokio_postgres_failover::view::{Endpoint, GenerationId, State, View};
use tokio_postgres_failover::{Event, Events, Pool};
use tokio_util::sync::{CancellationToken, DropGuard};

/// One primary at one address.
#[derive(Debug)]
pub(crate) struct Route {
    pub(crate) endpoint: Endpoint,
    generation: GenerationId,
    /// Cancelled when the generation has ended. All routes of a generation share it.
    pub(crate) ended: CancellationToken,
}

/// The route of new connections. `None` while there is no verified primary.
#[derive(Clone)]
pub(crate) struct Routes {
    newest: watch::Receiver<Option<Arc<Route>>>,
    _task: Arc<DropGuard>,
}

impl Routes {
    /// Follows a pool until the last clone of this is dropped.
    pub(crate) fn follow(pool: &Pool) -> Self {
        let (sender, newest) = watch::channel(None);
        let stopped = CancellationToken::new();
        // The events are subscribed to first, so none is missed that comes after the first look.
        let follower = Follower { events: pool.subscribe(), views: pool.watch(), sender, open: None };
        tokio::spawn(stopped.clone().run_until_cancelled_owned(follower.run()));
        Self { newest, _task: Arc::new(stopped.drop_guard()) }
    }

    /// Waits for a primary. `None`: the pool was closed. Cancel-safe.
    pub(crate) async fn current(&mut self) -> Option<Arc<Route>> {
        self.newest.wait_for(Option::is_some).await.ok()?.clone()
    }
}

struct Follower {
    events: Events,
    views: watch::Receiver<View>,
    sender: watch::Sender<Option<Arc<Route>>>,
    /// The generation whose connections are open. It may be suspended, and then it is no route.
    open: Option<Arc<Route>>,
}

/// However this task ends, no connection stays on a server that nobody watches.
impl Drop for Follower {
    fn drop(&mut self) {
        self.end(|_| true);
    }
}

impl Follower {
    async fn run(mut self) {
        loop {
            self.look();
            tokio::select! {
                event = self.events.next() => match event {
                    Some(Event::Evicted { generation, .. }) => self.end(|route| route.generation <= generation),
                    // The end of a generation may be among the missed ones, and no state tells of it until the next
                    // primary is found.
                    Some(Event::Missed { .. }) if self.sender.borrow().is_none() => self.end(|_| true),
                    Some(_) => {}
                    None => return,
                },
                // The primary's address may change without an event.
                changed = self.views.changed() => if changed.is_err() { return },
            }
        }
    }

    /// Makes the primary of the moment the route of new connections.
    fn look(&mut self) {
        let view = self.views.borrow_and_update().clone();
        let State::Primary { endpoint, .. } = view.state else {
            self.sender.send_replace(None);
            return;
        };
        self.end(|route| route.generation != view.generation);
        if self.open.as_ref().is_none_or(|route| route.endpoint != endpoint) {
            let ended = self.open.take().map_or_else(CancellationToken::new, |route| route.ended.clone());
            self.open = Some(Arc::new(Route { endpoint, generation: view.generation, ended }));
        }
        self.sender.send_replace(self.open.clone());
    }

    /// Ends the open generation and its connections, if it is one of these.
    fn end(&mut self, is_over: impl FnOnce(&Route) -> bool) {
        if let Some(route) = self.open.take_if(|route| is_over(route)) {
            self.sender.send_replace(None);
            route.ended.cancel();
            tracing::info!("{} is not the primary any more: connections to it have ended", route.endpoint);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "these are tests")]

    use std::time::Duration;

    use super::*;

    /// The view of a pool whose primary is at this address.
    async fn view(address: &str) -> View {
        let cluster = testbed::Cluster::builder().nodes(1).start().await;
        let pool = Pool::builder(cluster.url_hosts()).unwrap().build().unwrap();
        tokio::time::timeout(Duration::from_secs(60), pool.connect()).await.unwrap().unwrap();
        let mut view = pool.status().view;
        if let State::Primary { endpoint, .. } = &mut view.state {
            endpoint.address = tokio_postgres_failover::view::Address::Tcp(address.parse().unwrap());
        }
        view
    }

    /// The same primary at another address: new connections go there, and the old ones stay.
    #[tokio::test]
    async fn a_primary_that_moves_keeps_its_connections() {
        let view = view("127.0.0.1:1").await;
        let (views, seen) = watch::channel(view.clone());
        let pool = Pool::builder("postgres://app@127.0.0.1:1/app").unwrap().build().unwrap();
        let (sender, newest) = watch::channel(None);
        let mut follower = Follower { events: pool.subscribe(), views: seen, sender, open: None };
        follower.look();
        let first = newest.borrow().clone().unwrap();
        let mut moved = view;
        if let State::Primary { endpoint, .. } = &mut moved.state {
            endpoint.address = tokio_postgres_failover::view::Address::Tcp("127.0.0.1:2".parse().unwrap());
        }
        views.send_replace(moved);
        follower.look();
        let second = newest.borrow().clone().unwrap();
        assert_eq!(second.endpoint.address.to_string(), "127.0.0.1:2");
        assert!(!first.ended.is_cancelled());
        drop(follower);
        assert!(first.ended.is_cancelled() && second.ended.is_cancelled());
    }
}
