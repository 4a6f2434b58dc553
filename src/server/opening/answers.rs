//! Finds the end of the first request in what is sent, and the opening's answers in what is received. The bytes may
//! come in pieces of any size. Pure.

use postgres_protocol::message::backend::Message;
use tokio_postgres::fallible_iterator::FallibleIterator;
use tokio_util::bytes::BytesMut;

/// The message that the last byte belongs to.
#[derive(Clone, Copy, Debug, Default)]
struct Frame {
    /// The letter, and the length.
    header: [u8; 5],
    have: usize,
    /// The number of bytes of the body that have not come yet.
    left: usize,
}

impl Frame {
    /// Takes bytes up to the end of the message. Returns how many, and whether the message has ended.
    fn take(&mut self, bytes: &[u8]) -> (usize, bool) {
        let mut taken = 0;
        while self.have < self.header.len() {
            let Some(byte) = bytes.get(taken) else { return (taken, false) };
            self.header[self.have] = *byte;
            self.have += 1;
            taken += 1;
            let [_, length @ ..] = self.header;
            self.left = (u32::from_be_bytes(length) as usize).saturating_sub(4);
        }
        let body = self.left.min(bytes.len() - taken);
        self.left -= body;
        let ended = self.left == 0;
        if ended {
            self.have = 0;
        }
        (taken + body, ended)
    }

    /// The letter of the message that this byte begins or continues.
    fn letter(&self, byte: u8) -> u8 {
        if self.have == 0 { byte } else { self.header[0] }
    }
}

/// Finds the end of the first request.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct FirstRequest {
    frame: Frame,
    over: bool,
}

impl FirstRequest {
    /// Takes the bytes that belong to the first request, and returns how many these are.
    pub(super) fn take(&mut self, bytes: &[u8]) -> usize {
        let mut taken = 0;
        while !self.over
            && let Some(rest) = bytes.get(taken..).filter(|rest| !rest.is_empty())
        {
            let letter = self.frame.letter(rest[0]);
            let (length, ended) = self.frame.take(rest);
            taken += length;
            self.over = ended && matches!(letter, b'S' | b'Q');
        }
        taken
    }

    pub(super) fn is_over(&self) -> bool {
        self.over
    }
}

/// What the bytes that were received mean for the opening.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// There are more answers to come.
    GoesOn,
    /// Everything is answered.
    Done,
    /// The server has answered with an error.
    Failed,
    /// This is no answer to the opening.
    Strange,
}

/// What becomes of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// The server sends it unasked: the driver gets it.
    Passes,
    /// An error. The driver gets it, too, as the answer to the first request.
    Fails,
    Answers,
    Strange,
}

/// Takes the opening's answers out of what is received.
#[derive(Debug, Default)]
pub(super) struct Answers {
    /// The letters of the answers that have not come yet. A row may be missing.
    expected: &'static [u8],
    frame: Frame,
    /// The message that has the row.
    row: BytesMut,
}

impl Answers {
    pub(super) fn begin(&mut self, expected: &'static [u8]) {
        (self.expected, self.frame) = (expected, Frame::default());
        self.row.clear();
    }

    /// Takes the answers out of these bytes. Returns the number of bytes at the beginning that are for the driver.
    /// Behind an error, the driver gets nothing.
    pub(super) fn take(&mut self, bytes: &mut [u8]) -> (usize, Verdict) {
        let (mut kept, mut from) = (0, 0);
        while let Some(rest) = bytes.get(from..).filter(|rest| !rest.is_empty()) {
            let letter = self.frame.letter(rest[0]);
            let fate = self.fate(letter);
            if fate == Fate::Strange {
                return (kept, Verdict::Strange);
            }
            let (length, ended) = self.frame.take(rest);
            if fate == Fate::Answers && letter == b'D' {
                self.row.extend_from_slice(&rest[..length]);
            }
            if matches!(fate, Fate::Passes | Fate::Fails) {
                bytes.copy_within(from..from + length, kept);
                kept += length;
            }
            from += length;
            match fate {
                Fate::Fails if ended => return (kept, Verdict::Failed),
                Fate::Answers if ended => self.answered(letter),
                _ => {}
            }
            if self.expected.is_empty() {
                bytes.copy_within(from.., kept);
                return (kept + bytes.len() - from, Verdict::Done);
            }
        }
        (kept, Verdict::GoesOn)
    }

    fn fate(&self, letter: u8) -> Fate {
        match letter {
            b'N' | b'S' | b'A' => Fate::Passes,
            b'E' => Fate::Fails,
            _ if self.behind(letter).is_some() => Fate::Answers,
            _ => Fate::Strange,
        }
    }

    /// Returns what is expected behind this answer, if it is expected.
    fn behind(&self, letter: u8) -> Option<&'static [u8]> {
        match self.expected {
            [next, rest @ ..] if *next == letter => Some(rest),
            [b'D', next, rest @ ..] if *next == letter => Some(rest),
            _ => None,
        }
    }

    fn answered(&mut self, letter: u8) {
        self.expected = self.behind(letter).unwrap_or_default();
    }

    /// Returns the values of the row. It is empty if there is none, or if it cannot be read.
    pub(super) fn take_row(&mut self) -> Vec<Option<String>> {
        let Ok(Some(Message::DataRow(row))) = Message::parse(&mut self.row) else { return Vec::new() };
        let text = |range: std::ops::Range<usize>| {
            String::from_utf8_lossy(row.buffer().get(range).unwrap_or_default()).into_owned()
        };
        row.ranges().map(|range| Ok(range.map(text))).collect().unwrap_or_default()
    }
}
