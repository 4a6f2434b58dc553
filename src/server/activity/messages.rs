//! Splits the bytes of one direction into messages.

use super::commits::Commits;
use super::names::Names;

/// The text that the driver sends by itself when a transaction is dropped.
pub(super) const ROLLBACK: &[u8] = b"ROLLBACK\0";

/// Splits the bytes of one direction into messages. The bytes may come in chunks of any size.
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
    /// How many bytes of the body match the text that is looked for. `None` if they do not match.
    matched: Option<usize>,
    /// Looks for a commit in the text of a query. `named`: the name of a prepared statement comes first, as in `Parse`.
    commits: Commits,
    named: bool,
    names: Names,
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

    /// Calls `tell` at the end of each message, with its letter and two flags. The first flag of `Query` says whether
    /// it is a ROLLBACK, and that of `ReadyForQuery` whether a transaction is open. The second flag of `Query` says
    /// whether one of its statements commits, and that of `Bind` whether its prepared statement does.
    pub(super) fn feed(&mut self, mut bytes: &[u8], mut tell: impl FnMut(u8, bool, bool)) {
        while !bytes.is_empty() {
            if self.bare > 0 {
                self.bare -= 1;
                bytes = &bytes[1..];
                continue;
            }
            let from = usize::from(self.untyped > 0);
            if self.have + from < 5 {
                self.header[self.have + from] = bytes[0];
                self.have += 1;
                bytes = &bytes[1..];
                if self.have + from == 5 {
                    let [_, length @ ..] = self.header;
                    self.left = (u32::from_be_bytes(length) as usize).saturating_sub(4);
                    self.matched = Some(0);
                    self.named = self.header[0] == b'P';
                    self.names.begin(self.header[0]);
                    if matches!(self.header[0], b'Q' | b'P') {
                        self.commits = Commits::default();
                    }
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
                    let found = match self.header[0] {
                        b'Z' => self.matched == Some(1),
                        _ => self.matched == Some(ROLLBACK.len()),
                    };
                    let commits = matches!(self.header[0], b'Q' | b'P') && self.commits.found();
                    let binds = self.names.end(self.header[0], commits);
                    tell(self.header[0], found, commits || binds);
                }
                self.have = 0;
            }
        }
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
        self.names.feed(body);
        if matches!(self.header[0], b'Q' | b'P') {
            let text = self.text_of(body);
            self.commits.feed(text);
        }
        self.matched = match (self.header[0], self.matched) {
            // `T` and `E` mean an open transaction, `I` means none.
            (b'Z', Some(at)) if body.first().is_some_and(|state| *state != b'I') => Some(at + 1),
            (b'Q', Some(at)) if ROLLBACK.get(at..).is_some_and(|rest| rest.starts_with(body)) => Some(at + body.len()),
            (b'Z', before) => before,
            _ => None,
        };
    }
}
