//! Splits the bytes of one direction into messages, and reads from each one what the counts need. The bytes may come in
//! chunks of any size.

use super::commits::{Ends, Statements};
use super::names::Names;

/// The text that the driver sends by itself when a transaction is dropped.
pub(super) const ROLLBACK: &[u8] = b"ROLLBACK\0";

/// How the message of the pool's own COMMIT begins. No closure has a reason to send this. So the pool tells its own
/// COMMIT from a closure's, even if both are under way.
pub(crate) const POOLS_COMMIT: &str = "SET LOCAL client_min_messages = warning; ";

/// What the body of a message says, as far as it is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Says {
    /// `Query`: the ROLLBACK that the driver sends by itself.
    DriversRollback,
    /// `Query`: the pool's own COMMIT.
    PoolsCommit,
    /// `ReadyForQuery`: no transaction is open.
    Idle,
    /// `CommandComplete`: a statement has committed.
    Committed,
    /// `CommandComplete`: a transaction is prepared.
    Prepared,
    /// `CommandComplete`: a ROLLBACK, also one to a savepoint, or a COMMIT that has rolled back.
    RolledBack,
    /// `ParameterStatus`: whether the session's new transactions are read-only by default.
    ReadOnly(bool),
}

/// A text that bodies are compared with.
struct Text {
    letter: u8,
    bytes: &'static [u8],
    /// The whole body must be equal. Otherwise its beginning must be.
    whole: bool,
    says: Says,
}

impl Text {
    /// Returns whether a body with these bytes at this place may still be equal to the text, or begin with it.
    fn goes_on(&self, at: usize, body: &[u8]) -> bool {
        let rest = self.bytes.get(at..).unwrap_or_default();
        // Nearly always the first byte differs.
        rest.iter().zip(body).all(|(expected, byte)| expected == byte) && !(self.whole && body.len() > rest.len())
    }
}

/// Returns a bit for each text that messages with this letter are compared with.
const fn texts_of(letter: u8) -> u8 {
    let (mut index, mut bits) = (0, 0);
    while index < TEXTS.len() {
        if TEXTS[index].letter == letter {
            bits |= 1 << index;
        }
        index += 1;
    }
    bits
}

const TEXTS: [Text; 8] = [
    Text { letter: b'Q', bytes: ROLLBACK, whole: true, says: Says::DriversRollback },
    Text { letter: b'Q', bytes: POOLS_COMMIT.as_bytes(), whole: false, says: Says::PoolsCommit },
    Text { letter: b'Z', bytes: b"I", whole: true, says: Says::Idle },
    Text { letter: b'C', bytes: b"COMMIT\0", whole: true, says: Says::Committed },
    Text { letter: b'C', bytes: b"PREPARE TRANSACTION\0", whole: true, says: Says::Prepared },
    Text { letter: b'C', bytes: b"ROLLBACK\0", whole: true, says: Says::RolledBack },
    // PostgreSQL 14 and later report this parameter.
    Text { letter: b'S', bytes: b"default_transaction_read_only\0on\0", whole: true, says: Says::ReadOnly(true) },
    Text { letter: b'S', bytes: b"default_transaction_read_only\0off\0", whole: true, says: Says::ReadOnly(false) },
];

const QUERY: u8 = texts_of(b'Q');
const READY: u8 = texts_of(b'Z');
const COMPLETE: u8 = texts_of(b'C');
const STATUS: u8 = texts_of(b'S');

/// Compares the body of one message with [`TEXTS`].
#[derive(Debug, Default)]
struct Comparison {
    /// A bit for each text that still matches.
    matches: u8,
    /// How many bytes were compared.
    at: usize,
}

impl Comparison {
    fn begin(&mut self, letter: u8) {
        self.at = 0;
        self.matches = match letter {
            b'Q' => QUERY,
            b'Z' => READY,
            b'C' => COMPLETE,
            b'S' => STATUS,
            _ => 0,
        };
    }

    fn feed(&mut self, body: &[u8]) {
        for (index, text) in self.matching() {
            if !text.goes_on(self.at, body) {
                self.matches &= !(1 << index);
            }
        }
        self.at += body.len();
    }

    /// The texts that still match, with their places in [`TEXTS`].
    fn matching(&self) -> impl Iterator<Item = (u32, &'static Text)> + use<> {
        let mut left = self.matches;
        std::iter::from_fn(move || {
            let index = left.trailing_zeros();
            let text = TEXTS.get(index as usize)?;
            left &= !(1 << index);
            Some((index, text))
        })
    }

    fn end(&self) -> Option<Says> {
        let is_complete =
            |text: &Text| if text.whole { self.at == text.bytes.len() } else { self.at >= text.bytes.len() };
        self.matching().find(|(_, text)| is_complete(text)).map(|(_, text)| text.says)
    }
}

/// One message that has passed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Message {
    pub(super) letter: u8,
    pub(super) says: Option<Says>,
    /// What the statements of `Query`, or the prepared statement of `Bind`, do to the session's transaction.
    pub(super) ends: Ends,
    /// `Query`, `Parse`: a statement drops all prepared statements.
    pub(super) deallocates: bool,
    /// The first number in the body of `BackendKeyData`: the server process of the session.
    pub(super) pid: i32,
}

impl Message {
    /// A message of which only the letter counts.
    fn unread(letter: u8) -> Self {
        Self { letter, says: None, ends: Ends::default(), deallocates: false, pid: 0 }
    }
}

/// Returns whether the body of messages with this letter is looked at, in either direction.
fn is_read(letter: u8) -> bool {
    matches!(letter, b'B' | b'C' | b'K' | b'P' | b'Q' | b'S' | b'Z')
}

#[derive(Debug, Default)]
pub(super) struct Messages {
    /// The number of leading bytes without a message header.
    bare: u8,
    /// The number of leading messages without a type letter.
    untyped: u8,
    header: [u8; 5],
    have: usize,
    /// The number of bytes of the current body that have not come yet.
    left: usize,
    comparison: Comparison,
    /// Reads the text of a query. `named`: the name of a prepared statement comes first, as in `Parse`.
    statements: Statements,
    named: bool,
    names: Names,
    pid: i32,
    /// The number of bytes of `pid` that have not come yet.
    pid_left: u8,
}

impl Messages {
    /// Messages behind so many bytes and messages of another form.
    pub(super) fn behind(bare: u8, untyped: u8) -> Self {
        Self { bare, untyped, ..Self::default() }
    }

    /// Returns whether a message is incomplete.
    pub(super) fn within(&self) -> bool {
        self.have > 0
    }

    /// The letter of the last message, complete or not.
    pub(super) fn last(&self) -> u8 {
        self.header[0]
    }

    /// Calls `tell` at the end of each message.
    pub(super) fn feed(&mut self, mut bytes: &[u8], mut tell: impl FnMut(Message)) {
        while !bytes.is_empty() {
            if self.bare > 0 {
                self.bare -= 1;
                bytes = &bytes[1..];
                continue;
            }
            if let Some((letter, rest)) = self.skips(bytes) {
                self.header[0] = letter;
                tell(Message::unread(letter));
                bytes = rest;
                continue;
            }
            let from = usize::from(self.untyped > 0);
            if self.have + from == 0
                && let Some((header, rest)) = bytes.split_first_chunk()
            {
                // The whole header is there, as nearly always.
                self.header = *header;
                self.have = header.len();
                bytes = rest;
                self.begin();
            } else if self.have + from < 5 {
                self.header[self.have + from] = bytes[0];
                self.have += 1;
                bytes = &bytes[1..];
                if self.have + from == 5 {
                    self.begin();
                }
            } else {
                let (body, rest) = bytes.split_at(self.left.min(bytes.len()));
                self.look_at(body);
                self.left -= body.len();
                bytes = rest;
            }
            if self.have + from == 5 && self.left == 0 {
                if self.untyped > 0 {
                    self.untyped -= 1;
                } else {
                    tell(self.end());
                }
                self.have = 0;
            }
        }
    }

    /// Returns the letter of the next message, and what follows the message, if it has come whole and only its letter
    /// counts.
    fn skips<'a>(&self, bytes: &'a [u8]) -> Option<(u8, &'a [u8])> {
        let ([letter, length @ ..], rest) = bytes.split_first_chunk::<5>()?;
        if self.have > 0 || self.untyped > 0 || is_read(*letter) {
            return None;
        }
        let body = (u32::from_be_bytes(*length) as usize).saturating_sub(4);
        Some((*letter, rest.get(body..)?))
    }

    /// The header is complete.
    fn begin(&mut self) {
        let [letter, length @ ..] = self.header;
        self.left = (u32::from_be_bytes(length) as usize).saturating_sub(4);
        self.comparison.begin(letter);
        self.named = letter == b'P';
        self.names.begin(letter);
        if matches!(letter, b'Q' | b'P') {
            self.statements.begin();
        }
        self.pid_left = if letter == b'K' { 4 } else { 0 };
    }

    /// The body is complete.
    fn end(&mut self) -> Message {
        let letter = self.header[0];
        let has_text = matches!(letter, b'Q' | b'P');
        let ends = if has_text { self.statements.ends() } else { Ends::default() };
        let deallocates = has_text && self.statements.deallocates();
        let bound = self.names.end(letter, ends);
        let ends = if letter == b'Q' { ends } else { bound };
        Message { letter, says: self.comparison.end(), ends, deallocates, pid: self.pid }
    }

    /// Returns the part of a body that belongs to the text of a query.
    fn text_of<'a>(&mut self, body: &'a [u8]) -> &'a [u8] {
        if !self.named {
            return body;
        }
        let Some(end) = body.iter().position(|byte| *byte == 0) else { return &[] };
        self.named = false;
        body.get(end + 1..).unwrap_or_default()
    }

    fn look_at(&mut self, body: &[u8]) {
        let letter = self.header[0];
        self.names.feed(body);
        if matches!(letter, b'Q' | b'P') {
            let text = self.text_of(body);
            self.statements.feed(text);
        }
        self.comparison.feed(body);
        for byte in body.iter().take(usize::from(self.pid_left)) {
            self.pid = self.pid << 8 | i32::from(*byte);
            self.pid_left -= 1;
        }
    }
}
