//! The network between the pool and the servers: byte streams in memory that are late, cut at any byte, reset, half
//! open, or dead in one direction.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio::time::{Instant, Sleep, sleep_until};

use crate::rng::Rng;

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The way between the pool and one server.
#[derive(Debug, Default)]
pub(crate) struct Net {
    ways: Mutex<Ways>,
    /// Woken when a way is open again.
    pub(crate) opened: Notify,
}

#[derive(Debug, Default)]
struct Ways {
    to_server: Way,
    to_pool: Way,
    /// Each new connection is cut before the pool has received so many bytes.
    cuts_new: Option<u64>,
    links: Vec<Weak<Link>>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Way {
    blocked: bool,
    /// Added to each message's time.
    late: Duration,
}

/// A direction of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    ToServer,
    ToPool,
}

impl Net {
    /// Blocks or opens a direction. What was sent meanwhile arrives when it is open again, as TCP repeats it.
    pub(crate) fn block(&self, direction: Direction, blocked: bool) {
        let mut ways = lock(&self.ways);
        match direction {
            Direction::ToServer => ways.to_server.blocked = blocked,
            Direction::ToPool => ways.to_pool.blocked = blocked,
        }
        let links: Vec<_> = ways.links.iter().filter_map(Weak::upgrade).collect();
        drop(ways);
        if !blocked {
            for link in links {
                link.wake();
            }
            self.opened.notify_waiters();
        }
    }

    pub(crate) fn delay(&self, late: Duration) {
        let mut ways = lock(&self.ways);
        (ways.to_server.late, ways.to_pool.late) = (late, late);
    }

    pub(crate) fn cut_new(&self, within: Option<u64>) {
        lock(&self.ways).cuts_new = within;
    }

    pub(crate) fn is_open(&self) -> bool {
        let ways = lock(&self.ways);
        !ways.to_server.blocked && !ways.to_pool.blocked
    }

    pub(crate) fn late(&self) -> Duration {
        lock(&self.ways).to_pool.late
    }

    fn way(&self, direction: Direction) -> Way {
        let ways = lock(&self.ways);
        if direction == Direction::ToServer { ways.to_server } else { ways.to_pool }
    }

    /// The open connections, the oldest first. One that the server has ended stays known: its last bytes may still have
    /// to arrive, once the way is open.
    pub(crate) fn links(&self) -> Vec<Arc<Link>> {
        lock(&self.ways).links.iter().filter_map(Weak::upgrade).filter(|link| !link.is_over()).collect()
    }
}

/// One connection.
#[derive(Debug)]
pub(crate) struct Link {
    net: Arc<Net>,
    state: Mutex<State>,
}

#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fault of its own, and they combine")]
struct State {
    to_server: Half,
    to_pool: Half,
    /// Both ends get an error.
    reset: bool,
    /// The server's machine has forgotten the connection: what the pool sends is answered by a reset.
    forgotten: bool,
    pool_left: bool,
    /// What is sent disappears, as behind a router that has forgotten the connection.
    deaf: bool,
    delays: Rng,
}

#[derive(Debug, Default)]
struct Half {
    queue: VecDeque<(Instant, Vec<u8>)>,
    read_from_first: usize,
    last_at: Option<Instant>,
    /// No more comes behind the queue.
    end: Option<Instant>,
    reader: Option<Waker>,
    /// After so many more bytes, the connection is reset.
    cut_after: Option<usize>,
}

impl State {
    fn half(&mut self, direction: Direction) -> &mut Half {
        if direction == Direction::ToServer { &mut self.to_server } else { &mut self.to_pool }
    }
}

impl Link {
    fn is_over(&self) -> bool {
        let state = lock(&self.state);
        state.reset || state.pool_left || state.to_pool.end.is_some()
    }

    fn wake(&self) {
        let mut state = lock(&self.state);
        let wakers = [state.to_server.reader.take(), state.to_pool.reader.take()];
        drop(state);
        wakers.into_iter().flatten().for_each(Waker::wake);
    }

    pub(crate) fn reset(&self) {
        lock(&self.state).reset = true;
        self.wake();
    }

    /// Resets the connection after so many more bytes in this direction: within a message, or between two.
    pub(crate) fn cut_after(&self, direction: Direction, bytes: usize) {
        lock(&self.state).half(direction).cut_after = Some(bytes);
    }

    pub(crate) fn forget(&self) {
        lock(&self.state).forgotten = true;
    }

    pub(crate) fn die_without_a_sign(&self) {
        lock(&self.state).deaf = true;
    }

    fn send(&self, direction: Direction, bytes: &[u8]) -> io::Result<usize> {
        let way = self.net.way(direction);
        let mut state = lock(&self.state);
        if state.forgotten && direction == Direction::ToServer && !way.blocked {
            state.reset = true;
        }
        if state.reset {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        if state.deaf {
            return Ok(bytes.len());
        }
        let at = Instant::now() + Duration::from_millis(state.delays.between(1, 2)) + way.late;
        let half = state.half(direction);
        let at = half.last_at.map_or(at, |last| last.max(at));
        half.last_at = Some(at);
        half.queue.push_back((at, bytes.to_vec()));
        let reader = half.reader.take();
        drop(state);
        if let Some(reader) = reader {
            reader.wake();
        }
        Ok(bytes.len())
    }

    fn end(&self, direction: Direction) {
        let mut state = lock(&self.state);
        if state.deaf {
            return;
        }
        let half = state.half(direction);
        half.end = Some(half.last_at.unwrap_or_else(Instant::now).max(Instant::now() + Duration::from_millis(1)));
        let reader = half.reader.take();
        drop(state);
        if let Some(reader) = reader {
            reader.wake();
        }
    }

    /// Reads what has arrived. `Err(None)`: nothing yet. `Err(Some(at))`: something arrives then.
    fn receive(
        &self,
        direction: Direction,
        limit: usize,
        waker: &Waker,
        mut take: impl FnMut(&[u8]),
    ) -> io::Result<Result<usize, Option<Instant>>> {
        let way = self.net.way(direction);
        let mut state = lock(&self.state);
        if state.reset {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        let now = Instant::now();
        let half = state.half(direction);
        let mut taken = 0;
        while let Some((at, bytes)) = half.queue.front().filter(|_| !way.blocked) {
            if *at > now || taken == limit || half.cut_after == Some(0) {
                break;
            }
            let rest = bytes.get(half.read_from_first..).unwrap_or_default();
            let most = rest.len().min(limit - taken).min(half.cut_after.unwrap_or(usize::MAX));
            take(rest.get(..most).unwrap_or_default());
            taken += most;
            half.cut_after = half.cut_after.map(|left| left - most);
            if most == rest.len() {
                half.queue.pop_front();
                half.read_from_first = 0;
            } else {
                half.read_from_first += most;
            }
        }
        if taken > 0 {
            return Ok(Ok(taken));
        }
        half.reader = Some(waker.clone());
        if way.blocked {
            return Ok(Err(None));
        }
        if half.cut_after == Some(0) && half.queue.front().is_some_and(|(at, _)| *at <= now) {
            drop(state);
            self.reset();
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        match (half.queue.front(), half.end) {
            (Some((at, _)), _) => Ok(Err(Some(*at))),
            (None, Some(end)) if end <= now => Ok(Ok(0)),
            (None, end) => Ok(Err(end)),
        }
    }
}

/// One end of a connection. Dropping it closes the connection.
pub(crate) struct End {
    link: Arc<Link>,
    reads: Direction,
    timer: Option<Pin<Box<Sleep>>>,
    /// Whether a drop is seen by the other end.
    pub(crate) says_goodbye: bool,
}

/// Opens a connection: the pool's end, and the server's.
pub(crate) fn connection(net: &Arc<Net>, seed: u64) -> (End, End) {
    let mut delays = Rng::new(seed);
    let cut_after = lock(&net.ways).cuts_new.and_then(|within| usize::try_from(delays.below(within)).ok());
    let state = State {
        to_server: Half::default(),
        to_pool: Half { cut_after, ..Half::default() },
        reset: false,
        forgotten: false,
        pool_left: false,
        deaf: false,
        delays,
    };
    let link = Arc::new(Link { net: Arc::clone(net), state: Mutex::new(state) });
    let mut ways = lock(&net.ways);
    if ways.links.len() > 256 {
        ways.links.retain(|link| link.strong_count() > 0);
    }
    ways.links.push(Arc::downgrade(&link));
    let end = |reads| End { link: Arc::clone(&link), reads, timer: None, says_goodbye: true };
    (end(Direction::ToPool), end(Direction::ToServer))
}

impl End {
    fn writes(&self) -> Direction {
        if self.reads == Direction::ToPool { Direction::ToServer } else { Direction::ToPool }
    }

    pub(crate) fn send(&self, bytes: &[u8]) -> io::Result<()> {
        self.link.send(self.writes(), bytes).map(drop)
    }

    fn poll(&mut self, cx: &mut Context<'_>, limit: usize, mut take: impl FnMut(&[u8])) -> Poll<io::Result<usize>> {
        loop {
            match self.link.receive(self.reads, limit, cx.waker(), &mut take)? {
                Ok(taken) => return Poll::Ready(Ok(taken)),
                Err(None) => return Poll::Pending,
                Err(Some(at)) => {
                    let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(at)));
                    timer.as_mut().reset(at);
                    if timer.as_mut().poll(cx).is_pending() {
                        return Poll::Pending;
                    }
                }
            }
        }
    }

    /// Reads more into the buffer. `Ok(0)`: the other end has closed the connection.
    pub(crate) async fn read(&mut self, into: &mut Vec<u8>) -> io::Result<usize> {
        std::future::poll_fn(|cx| self.poll(cx, 64 * 1024, |bytes| into.extend_from_slice(bytes))).await
    }
}

impl Drop for End {
    fn drop(&mut self) {
        if self.writes() == Direction::ToServer {
            lock(&self.link.state).pool_left = true;
        }
        if self.says_goodbye {
            self.link.end(self.writes());
        }
    }
}

impl AsyncRead for End {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let limit = buf.remaining();
        if limit == 0 {
            return Poll::Ready(Ok(()));
        }
        self.poll(cx, limit, |bytes| buf.put_slice(bytes)).map_ok(drop)
    }
}

impl AsyncWrite for End {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(self.link.send(self.writes(), buf))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.link.end(self.writes());
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;
    use tokio::time::timeout;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn last_words_arrive_when_the_way_is_open_again() {
        let net = Arc::new(Net::default());
        let (mut pool, server) = connection(&net, 1);
        net.block(Direction::ToPool, true);
        server.send(b"farewell").expect("the server does not notice");
        drop(server);
        let reads = tokio::spawn(async move {
            let mut received = Vec::new();
            pool.read_to_end(&mut received).await.map(|_| received)
        });
        tokio::task::yield_now().await;
        // Another fault looks for open connections meanwhile.
        assert!(net.links().is_empty());
        net.block(Direction::ToPool, false);
        let received = timeout(Duration::from_secs(10), reads).await.expect("the reader is woken");
        assert_eq!(received.expect("no panic").expect("no reset"), b"farewell");
    }
}
