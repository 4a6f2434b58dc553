//! The opening of a transaction: BEGIN and the mark. It travels in front of the first request of the closure, so that
//! it costs no round trip of its own.
//!
//! The opening is a list of messages of the extended protocol, without a Sync. If one of them fails, the server skips
//! everything that follows until the next Sync, a simple query, too (`ignore_till_sync` in `postgres.c`). The first
//! request has the next Sync, or is a simple query. So no statement of it can run outside of the transaction. What
//! follows the first request could, so it is held back until the opening is answered.
//!
//! An opening that was armed is sent before anything else on its session, or the session ends. Nobody withdraws it.
//! So it cannot matter when the driver's task sends what the closure has queued.
//!
//! This file has what the holder of the session and the session's stream share. `passage.rs` has the stream's side,
//! and `answers.rs` its pure parts.

mod answers;
mod passage;
#[cfg(test)]
mod tests;

use std::fmt::{Display, Write};
use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, Ordering};

use postgres_protocol::IsNull;
use postgres_protocol::message::frontend;
use tokio_util::bytes::BytesMut;

pub(super) use self::passage::Passage;
use crate::sync::lock;

/// The letters of the answers to BEGIN: it is parsed, bound and carried out.
const BEGUN: &[u8] = b"12C";
/// The same, and of those to the mark. A mark that the server does not write has no row.
const MARKED: &[u8] = b"12C2DC";

/// How far the opening of a session's transaction has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum OpeningState {
    /// There is none, or its end was taken notice of.
    Absent = 0,
    /// It waits for the first request.
    Armed = 1,
    /// It was sent with the first request, and is not answered.
    UnderWay = 2,
    /// The transaction is open.
    Done = 3,
    /// The transaction has not begun, and the session ends.
    Failed = 4,
}

/// What writes a mark, or a row in a ledger: a statement that the session has prepared, and its parameter if it has
/// one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MarkText<'a, N> {
    pub(crate) statement: &'a str,
    pub(crate) nonce: Option<N>,
}

/// The opening of a session's transaction, if it travels with the first request.
#[derive(Debug, Default)]
pub(crate) struct Opening {
    /// An [`OpeningState`]. It is written with the content locked.
    state: AtomicU8,
    content: Mutex<Content>,
}

#[derive(Debug, Default)]
struct Content {
    messages: BytesMut,
    answers: &'static [u8],
    row: Vec<Option<String>>,
}

impl Opening {
    /// Lets this opening travel with the next request. Call this only while the session is idle and has answered
    /// everything. Returns whether that is possible.
    pub(crate) fn arm<N: Display>(&self, begin: &str, mark: Option<MarkText<'_, N>>) -> bool {
        let mut content = lock(&self.content);
        if self.state() != OpeningState::Absent {
            return false;
        }
        content.messages.clear();
        content.answers = if mark.is_some() { MARKED } else { BEGUN };
        content.row.clear();
        let written = write(&mut content.messages, begin, mark).is_ok();
        if written {
            self.set(OpeningState::Armed);
        }
        written
    }

    pub(crate) fn state(&self) -> OpeningState {
        match self.state.load(Ordering::Acquire) {
            0 => OpeningState::Absent,
            1 => OpeningState::Armed,
            2 => OpeningState::UnderWay,
            3 => OpeningState::Done,
            _ => OpeningState::Failed,
        }
    }

    /// Returns the mark's row of an opening that is done, once. The row is empty if there is none.
    pub(crate) fn take_row(&self) -> Option<Vec<Option<String>>> {
        let mut content = lock(&self.content);
        if self.state() != OpeningState::Done {
            return None;
        }
        self.set(OpeningState::Absent);
        Some(std::mem::take(&mut content.row))
    }

    fn set(&self, state: OpeningState) {
        self.state.store(state as u8, Ordering::Release);
    }

    /// Appends the messages of an armed opening, which is sent now. Returns the letters of its answers.
    fn depart(&self, out: &mut BytesMut) -> Option<&'static [u8]> {
        if self.state() != OpeningState::Armed {
            return None;
        }
        let content = lock(&self.content);
        if self.state() != OpeningState::Armed {
            return None;
        }
        out.extend_from_slice(&content.messages);
        self.set(OpeningState::UnderWay);
        Some(content.answers)
    }

    fn done(&self, row: Vec<Option<String>>) {
        let mut content = lock(&self.content);
        content.row = row;
        self.set(OpeningState::Done);
    }

    fn failed(&self) {
        let _content = lock(&self.content);
        self.set(OpeningState::Failed);
    }
}

/// Writes the messages. The driver names its statements, so the unnamed one is free.
fn write<N: Display>(out: &mut BytesMut, begin: &str, mark: Option<MarkText<'_, N>>) -> io::Result<()> {
    frontend::parse("", begin, [], out)?;
    bind(out, "", None::<N>)?;
    frontend::execute("", 0, out)?;
    let Some(MarkText { statement, nonce }) = mark else { return Ok(()) };
    bind(out, statement, nonce)?;
    frontend::execute("", 0, out)
}

/// Binds a statement with this value, if there is one. All values are sent and received as text.
fn bind<N: Display>(out: &mut BytesMut, statement: &str, value: Option<N>) -> io::Result<()> {
    let text = |value: N, out: &mut BytesMut| {
        write!(out, "{value}")?;
        Ok(IsNull::No)
    };
    frontend::bind("", statement, [], value, text, [], out).map_err(|error| match error {
        frontend::BindError::Conversion(error) => io::Error::other(error),
        frontend::BindError::Serialization(error) => error,
    })
}
