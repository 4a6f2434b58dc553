//! One client of a [`Cutter`](super::Cutter) and its server: what passes between them, up to the point of a cut.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::watch;

use super::{Cut, Done, Order, Shared};
use crate::bed::frames::{self, Frame, Frames, Head};
use crate::bed::port::{connect, drain};
use crate::bed::sync::lock;

pub(super) async fn serve(client: TcpStream, shared: Arc<Shared>) {
    let upstream = *lock(&shared.upstream);
    let Some(server) = connect(&client, upstream).await else { return };
    let link = Link {
        client: Side::new(client, Frames::of_client()),
        server: Side::new(server, Frames::of_server()),
        shared,
        waiting: None,
        pending: None,
        copying: false,
        transaction: None,
        withheld: None,
    };
    link.run().await;
}

/// One of a connection's two ends.
struct Side {
    reads: OwnedReadHalf,
    writes: OwnedWriteHalf,
    buffer: Vec<u8>,
    frames: Frames,
    /// What is still to be sent.
    out: Vec<u8>,
    /// Nothing more comes from it.
    ended: bool,
    /// Nothing more can be sent to it.
    gone: bool,
}

impl Side {
    fn new(stream: TcpStream, frames: Frames) -> Self {
        let (reads, writes) = stream.into_split();
        Self { reads, writes, buffer: vec![0; 16 * 1024], frames, out: Vec::new(), ended: false, gone: false }
    }

    fn send(&mut self, bytes: &[u8]) {
        if !self.gone {
            self.out.extend_from_slice(bytes);
        }
    }

    fn was_read(&mut self, read: usize) {
        self.ended = read == 0;
        self.frames.feed(self.buffer.get(..read).unwrap_or_default());
    }

    fn was_written(&mut self, written: Option<usize>) {
        if let Some(written) = written {
            self.out.drain(..written);
        } else {
            self.gone = true;
            self.out.clear();
        }
    }

    async fn flush(&mut self) {
        let _ = self.writes.write_all(&self.out).await;
        self.out.clear();
    }

    /// Sends a FIN, once.
    async fn finish(&mut self) {
        let _ = self.writes.shutdown().await;
        self.gone = true;
    }

    /// Reads to the end.
    async fn drain(&mut self) {
        drain(&mut self.reads).await;
    }
}

/// What the server's next ReadyForQuery answers.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pending {
    /// The log-in, a COMMIT, or what comes outside of transactions.
    Other,
    Begin,
    Statement,
}

struct Transaction {
    number: Option<u64>,
    planned: Option<Cut>,
    statements: u32,
    /// BEGIN came in one round trip with the first statement.
    together: bool,
}

/// An answer that is not passed on.
struct Withheld {
    order: Order,
    answer: Vec<u8>,
    committed: bool,
}

/// One client and its server.
struct Link {
    client: Side,
    server: Side,
    shared: Arc<Shared>,
    /// A client's message that may not pass before an answer.
    waiting: Option<Frame>,
    pending: Option<Pending>,
    /// The server reads COPY data, and ignores the Sync of the message that began it.
    copying: bool,
    transaction: Option<Transaction>,
    withheld: Option<Withheld>,
}

impl Link {
    async fn run(mut self) {
        loop {
            if let Some((order, committed)) = self.pass() {
                return self.cut(order, committed).await;
            }
            if self.server.ended && self.client.out.is_empty() {
                break;
            }
            if self.client.ended && self.waiting.is_none() && self.server.out.is_empty() && !self.server.gone {
                self.server.finish().await;
            }
            self.transfer().await;
        }
        self.client.finish().await;
        drop(self.server);
        self.client.drain().await;
    }

    /// Reads or writes something, wherever this is possible next.
    async fn transfer(&mut self) {
        let Self { client, server, .. } = self;
        tokio::select! {
            read = client.reads.read(&mut client.buffer), if !client.ended && server.out.is_empty() => {
                client.was_read(read.unwrap_or(0));
            }
            read = server.reads.read(&mut server.buffer), if !server.ended && client.out.is_empty() => {
                server.was_read(read.unwrap_or(0));
            }
            written = client.writes.write(&client.out), if !client.out.is_empty() => client.was_written(written.ok()),
            written = server.writes.write(&server.out), if !server.out.is_empty() => server.was_written(written.ok()),
        }
    }

    /// Moves frames from one side to the other until a cut's point is reached or there is nothing left that may pass.
    /// Gives the cut, and whether the server has committed.
    fn pass(&mut self) -> Option<(Order, Option<bool>)> {
        while let Some(frame) = self.server.frames.next() {
            if let Some(cut) = self.server_says(&frame) {
                return Some(cut);
            }
        }
        if self.server.ended
            && let Some(withheld) = self.withheld.take()
        {
            // It died with its answer unsaid. Nothing of that is passed on either.
            let committed = if withheld.order.cut.at_commit() { None } else { Some(false) };
            return Some(self.end_answer(withheld, committed));
        }
        while let Some(frame) = self.waiting.take().or_else(|| self.client.frames.next()) {
            if !self.may_pass(frame.head) {
                self.waiting = Some(frame);
                break;
            }
            if let Some(cut) = self.client_says(&frame) {
                return Some(cut);
            }
        }
        None
    }

    fn may_pass(&self, head: Head) -> bool {
        match head {
            _ if self.pending.is_none() => true,
            // The log-in's further messages, COPY data, Terminate.
            Head::Message(b'p' | b'd' | b'c' | b'f' | b'X') | Head::Opaque => true,
            Head::Message(b'S' | b'H') => self.copying,
            _ => false,
        }
    }

    fn client_says(&mut self, frame: &Frame) -> Option<(Order, Option<bool>)> {
        match frame.head {
            Head::Request(frames::TLS | frames::GSS) => self.server.frames.expect_byte(),
            Head::Request(frames::CANCEL) => {}
            Head::Request(_) => self.pending = Some(Pending::Other),
            Head::Message(b'Q') => {
                let text = String::from_utf8_lossy(frame.body().strip_suffix(b"\0").unwrap_or(frame.body()));
                return self.query(&text, frame);
            }
            Head::Message(b'P') if self.transaction.is_none() && begins(&parsed_text(frame)) => {
                return self.begin_together(frame);
            }
            Head::Message(b'S' | b'F') if self.pending.is_none() => self.expect_answer(Pending::Statement),
            Head::Message(_) | Head::Byte(_) | Head::Opaque => {}
        }
        self.server.send(&frame.bytes);
        None
    }

    /// BEGIN is parsed. What carries it out, and the first statement, are behind it.
    fn begin_together(&mut self, frame: &Frame) -> Option<(Order, Option<bool>)> {
        let transaction = self.begin(&parsed_text(frame));
        self.transaction = Some(Transaction { together: true, ..transaction });
        let order = self.reached(Cut::at_begin);
        if order.as_ref().is_some_and(|order| order.cut == Cut::BeginUndelivered) {
            return order.map(|order| (order, Some(false)));
        }
        self.withheld = order.map(|order| Withheld { order, answer: Vec::new(), committed: false });
        self.server.send(&frame.bytes);
        None
    }

    fn expect_answer(&mut self, pending: Pending) {
        let inside = self.transaction.is_some();
        self.pending = Some(if inside { pending } else { Pending::Other });
    }

    fn query(&mut self, text: &str, frame: &Frame) -> Option<(Order, Option<bool>)> {
        let begins = self.transaction.is_none() && begins(text);
        if begins {
            self.transaction = Some(self.begin(text));
        }
        let commits = self.transaction.is_some() && commits(text);
        let order =
            self.reached(|cut| cut.at_begin() && begins).or_else(|| self.reached(|cut| cut.at_commit() && commits));
        self.expect_answer(match (begins, commits) {
            (_, true) => Pending::Other,
            (true, _) => Pending::Begin,
            _ => Pending::Statement,
        });
        let Some(order) = order else {
            self.server.send(&frame.bytes);
            return None;
        };
        if matches!(order.cut, Cut::BeginUndelivered | Cut::CommitUndelivered { .. }) {
            return Some((order, Some(false)));
        }
        self.server.send(&frame.bytes);
        if order.cut.awaits_answer() {
            self.withheld = Some(Withheld { order, answer: Vec::new(), committed: false });
            return None;
        }
        Some((order, None))
    }

    fn begin(&self, text: &str) -> Transaction {
        let mut book = self.shared.book();
        if text.to_ascii_uppercase().contains("READ ONLY") {
            return Transaction { number: None, planned: None, statements: 0, together: false };
        }
        book.begun += 1;
        let number = book.begun;
        let planned = book.plan.as_mut().and_then(|plan| plan(number, text));
        Transaction { number: Some(number), planned, statements: 0, together: false }
    }

    /// The cut for this point: the plan's, or else the first one armed.
    fn reached(&mut self, here: impl Fn(Cut) -> bool) -> Option<Order> {
        let planned = self.transaction.as_mut().and_then(|transaction| transaction.planned.take_if(|cut| here(*cut)));
        if let Some(cut) = planned {
            return Some(Order { cut, hook: None, done: watch::Sender::new(None) });
        }
        let mut book = self.shared.book();
        let first = book.armed.iter().position(|order| here(order.cut))?;
        book.armed.remove(first)
    }

    fn server_says(&mut self, frame: &Frame) -> Option<(Order, Option<bool>)> {
        if let Some(withheld) = &mut self.withheld {
            withheld.answer.extend_from_slice(&frame.bytes);
            withheld.committed |= frame.head == Head::Message(b'C') && frame.body() == b"COMMIT\0";
        } else {
            self.client.send(&frame.bytes);
        }
        match frame.head {
            Head::Byte(b'S' | b'G') => {
                self.client.frames.make_opaque();
                self.server.frames.make_opaque();
            }
            Head::Message(b'G') => self.copying = true,
            Head::Message(b'Z') => return self.answered(frame.body().first() == Some(&b'I')),
            _ => {}
        }
        None
    }

    /// The server is ready for the next query.
    fn answered(&mut self, idle: bool) -> Option<(Order, Option<bool>)> {
        self.copying = false;
        let pending = self.pending.take();
        if let Some(withheld) = self.withheld.take() {
            let committed = withheld.committed;
            return Some(self.end_answer(withheld, Some(committed)));
        }
        if idle {
            self.transaction = None;
        }
        let transaction = self.transaction.as_mut()?;
        match pending {
            Some(Pending::Begin) => {}
            Some(Pending::Statement) => transaction.statements += 1,
            _ => return None,
        }
        let statements = transaction.statements;
        // BEGIN's own round trip is that of the first statement.
        let least = if transaction.together && statements == 1 { 0 } else { statements };
        let reached = |cut| match cut {
            Cut::AfterStatement(after) | Cut::AfterStatementHeld(after) => (least..=statements).contains(&after),
            _ => false,
        };
        self.reached(reached).map(|order| (order, Some(false)))
    }

    fn end_answer(&mut self, withheld: Withheld, committed: Option<bool>) -> (Order, Option<bool>) {
        if let Cut::CommitAnswerHalf(bytes) = withheld.order.cut {
            let most = withheld.answer.len().saturating_sub(1);
            self.client.send(withheld.answer.get(..bytes.min(most)).unwrap_or_default());
        }
        (withheld.order, committed)
    }

    async fn cut(mut self, order: Order, committed: Option<bool>) {
        let Order { cut, hook, done } = order;
        tokio::join!(self.server.flush(), self.client.flush());
        if let Some(hook) = hook {
            hook().await;
        }
        let transaction = self.transaction.and_then(|transaction| transaction.number);
        let what = Done { cut, transaction, committed };
        self.shared.book().done.push(what);
        let released = self.shared.released.subscribe();
        // Not kept means dropped here, that is, closed.
        let held = cut.keeps_server().then(|| Held::new(self.server, released, Arc::clone(&self.shared)));
        self.client.finish().await;
        done.send_replace(Some(what));
        let holding = async {
            if let Some(held) = held {
                held.hold().await;
            }
        };
        tokio::join!(self.client.drain(), holding);
    }
}

/// A server that has no client any more.
struct Held {
    server: Side,
    released: watch::Receiver<u64>,
    shared: Arc<Shared>,
}

impl Held {
    fn new(server: Side, released: watch::Receiver<u64>, shared: Arc<Shared>) -> Self {
        shared.held.fetch_add(1, Ordering::SeqCst);
        Self { server, released, shared }
    }

    async fn hold(mut self) {
        tokio::select! {
            () = self.server.drain() => {}
            _ = self.released.changed() => {}
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.shared.held.fetch_sub(1, Ordering::SeqCst);
    }
}

/// `START TRANSACTION` is what tokio-postgres sends.
fn begins(text: &str) -> bool {
    ["BEGIN", "START"].iter().any(|word| first_word(text).eq_ignore_ascii_case(word))
}

/// The text of `Parse`, which follows the statement's name.
fn parsed_text(frame: &Frame) -> String {
    let text = frame.body().split(|byte| *byte == 0).nth(1).unwrap_or_default();
    String::from_utf8_lossy(text).into_owned()
}

/// Not `READ COMMITTED`, `synchronous_commit` or `ON COMMIT DROP`, in which there is one, too.
fn commits(text: &str) -> bool {
    text.split(';').any(|statement| first_word(statement).eq_ignore_ascii_case("COMMIT"))
}

fn first_word(text: &str) -> &str {
    let text = text.trim_start();
    text.split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_').next().unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn begin_and_commit_are_told_from_what_looks_like_them() {
        for text in [
            "BEGIN",
            "begin;",
            "START TRANSACTION READ WRITE",
            " BEGIN ISOLATION LEVEL READ COMMITTED; SELECT pg_current_xact_id()",
        ] {
            assert!(begins(text) && !commits(text), "{text}");
        }
        for text in ["COMMIT", "SELECT 1; COMMIT", "select 1;commit;", "COMMIT AND CHAIN"] {
            assert!(commits(text) && !begins(text), "{text}");
        }
        let others = [
            "",
            "BEGINNING",
            "START_REPLICATION",
            "SET synchronous_commit = local",
            "CREATE TEMP TABLE a () ON COMMIT DROP",
            "ROLLBACK",
        ];
        for text in others {
            assert!(!commits(text) && !begins(text), "{text}");
        }
    }
}
