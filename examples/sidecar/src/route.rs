//! Where connections lead to at the moment.

use std::sync::Arc;

use tokio::sync::watch;
use tokio_postgres_failover::view::{Endpoint, GenerationId, State};
use tokio_postgres_failover::{Event, Events, Pool};
use tokio_util::sync::{CancellationToken, DropGuard};

/// One primary, for as long as it is the primary.
#[derive(Debug)]
pub(crate) struct Route {
    pub(crate) endpoint: Endpoint,
    generation: GenerationId,
    /// Cancelled when the generation has ended.
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
        // Events that come before the first look at the pool are read after it.
        let follower = Follower { events: pool.subscribe(), pool: pool.clone(), sender, open: None };
        tokio::spawn(stopped.clone().run_until_cancelled_owned(follower.run()));
        Self { newest, _task: Arc::new(stopped.drop_guard()) }
    }

    /// Waits for a primary. `None`: the pool was closed. Cancel-safe.
    pub(crate) async fn current(&mut self) -> Option<Arc<Route>> {
        self.newest.wait_for(Option::is_some).await.ok()?.clone()
    }
}

struct Follower {
    pool: Pool,
    events: Events,
    sender: watch::Sender<Option<Arc<Route>>>,
    /// The generation whose connections are open. It may be suspended, and then it is no route.
    open: Option<Arc<Route>>,
}

impl Follower {
    async fn run(mut self) {
        self.look();
        while let Some(event) = self.events.next().await {
            if let Event::Evicted { generation, .. } = event {
                self.end(|route| route.generation <= generation);
            }
            // An event may have been missed by a slow reader, and the state never is.
            self.look();
        }
        self.end(|_| true);
    }

    /// Makes the primary of the moment the route of new connections.
    fn look(&mut self) {
        let view = self.pool.status().view;
        let State::Primary { endpoint, .. } = view.state else {
            self.sender.send_replace(None);
            return;
        };
        self.end(|route| route.generation != view.generation);
        let (generation, ended) = (view.generation, CancellationToken::new());
        let route = self.open.get_or_insert_with(|| Arc::new(Route { endpoint, generation, ended }));
        self.sender.send_replace(Some(Arc::clone(route)));
    }

    /// Ends the open generation and its connections, if it is one of these.
    fn end(&mut self, is_over: impl FnOnce(&Route) -> bool) {
        if let Some(route) = self.open.take_if(|route| is_over(route)) {
            self.sender.send_replace(None);
            route.ended.cancel();
            tracing::info!("connections to {} have been ended", route.endpoint);
        }
    }
}
