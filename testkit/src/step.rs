//! One thing that a test does to a cluster: awaited in a test that is `async`, waited for in one that is not.

use std::fmt;
use std::pin::Pin;
use std::sync::{OnceLock, mpsc};
use std::task::{Context, Poll, ready};

use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinHandle;

use crate::Error;

type Work<T> = Pin<Box<dyn Future<Output = Result<T, Error>> + Send>>;

/// Something that is done to a [`Cluster`](crate::Cluster): `.await` it, or call [`Step::wait`] in a test that is not
/// `async`.
///
/// It begins when it is awaited, and ends with the state that its method names. It runs on a thread of the kit's own,
/// so any runtime may await it, and a test that blocks holds up neither the cluster nor its network. A step that is
/// dropped before its end stops where it is: a promotion that has begun goes on in the server.
///
/// ```no_run
/// use tokio_postgres_failover_testkit::{Cluster, Error, Node};
///
/// # async fn asynchronous() -> Result<(), Error> {
/// let cluster = Cluster::start().await?;
/// cluster.kill(Node(0)).await?;
/// # Ok(())
/// # }
/// # fn blocking() -> Result<(), Error> {
/// let cluster = Cluster::start().wait()?;
/// cluster.kill(Node(0)).wait()?;
/// # Ok(())
/// # }
/// ```
#[must_use = "a step begins when it is awaited, or waited for"]
pub struct Step<T> {
    name: String,
    state: State<T>,
}

enum State<T> {
    New(Work<T>),
    Begun(JoinHandle<Result<T, Error>>),
    Ended,
}

impl<T: Send + 'static> Step<T> {
    pub(crate) fn new(name: impl Into<String>, work: impl Future<Output = Result<T, Error>> + Send + 'static) -> Self {
        Self { name: name.into(), state: State::New(Box::pin(work)) }
    }

    /// Blocks until the step has ended. In an `async` test `.await` it instead: this would block the runtime.
    ///
    /// # Errors
    /// The step's.
    pub fn wait(self) -> Result<T, Error> {
        let name = self.name.clone();
        let (tell, told) = mpsc::sync_channel(1);
        runtime()?.spawn(async move { tell.send(self.await) });
        told.recv().unwrap_or_else(|_| Err(Error::failed(&name, "the kit's thread has ended")))
    }
}

impl<T: Send + 'static> Future for Step<T> {
    type Output = Result<T, Error>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if let State::New(_) = self.state
            && let State::New(work) = std::mem::replace(&mut self.state, State::Ended)
        {
            self.state = State::Begun(runtime()?.spawn(work));
        }
        let State::Begun(task) = &mut self.state else {
            return Poll::Ready(Err(Error::failed(&self.name, "it was awaited again after its end")));
        };
        let ended = ready!(Pin::new(task).poll(context));
        self.state = State::Ended;
        Poll::Ready(ended.unwrap_or_else(|error| Err(Error::ended(&self.name, error))))
    }
}

impl<T> Drop for Step<T> {
    fn drop(&mut self) {
        if let State::Begun(task) = &self.state {
            task.abort();
        }
    }
}

impl<T> fmt::Debug for Step<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Step").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Serves all clusters of the process, and outlives the runtimes of its tests.
fn runtime() -> Result<&'static Runtime, Error> {
    static RUNTIME: OnceLock<Result<Runtime, Error>> = OnceLock::new();
    let build = || {
        let mut builder = Builder::new_multi_thread();
        let built = builder.worker_threads(2).thread_name("testkit").enable_all().build();
        built.map_err(|error| Error::failed("starting the kit's threads", error.to_string()))
    };
    RUNTIME.get_or_init(build).as_ref().map_err(Clone::clone)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn panics() -> Step<()> {
        Step::new("jumping", async { panic!("too {}", "high") })
    }

    #[tokio::test]
    async fn a_panic_is_an_error_with_its_words() {
        let expected = Error::failed("jumping", "too high");
        assert_eq!(panics().await, Err(expected.clone()));
        assert_eq!(Step::<()>::new("jumping", async { panic!("too high") }).await, Err(expected));
    }

    #[test]
    fn a_step_needs_no_runtime() {
        assert_eq!(Step::new("adding", async { Ok(1 + 1) }).wait(), Ok(2));
        assert_eq!(panics().wait().map_err(|error| error.to_string()), Err("jumping failed: too high".to_owned()));
    }

    #[tokio::test]
    async fn a_step_that_has_ended_says_so() {
        let mut step = Step::new("adding", async { Ok(2) });
        assert_eq!((&mut step).await, Ok(2));
        let again = (&mut step).await.map_err(|error| error.to_string());
        assert_eq!(again, Err("adding failed: it was awaited again after its end".to_owned()));
    }

    #[tokio::test]
    async fn a_dropped_step_stops() {
        let (tell, told) = tokio::sync::oneshot::channel::<()>();
        let mut step = Box::pin(Step::new("waiting", async move {
            let _held = tell;
            std::future::pending::<Result<(), Error>>().await
        }));
        assert!(futures_util::poll!(step.as_mut()).is_pending());
        drop(step);
        assert!(told.await.is_err(), "what it held is gone");
    }
}
