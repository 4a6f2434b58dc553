//! Remembers which prepared statements end a transaction, by their names. The text of a statement is sent once, in
//! `Parse`, and later each `Bind` names it.

use super::commits::Ends;

/// The most bytes of a name that are kept. Longer names are compared by their beginning.
const LONGEST: usize = 64;
/// The most names that are kept. The oldest one is forgotten first.
const MOST: usize = 64;

/// Reads the name of the statement in `Parse`, `Bind` and `Close`. The body of a message may arrive in pieces.
#[derive(Debug, Default)]
pub(super) struct Names {
    /// The names of the statements that end a transaction, and how they do.
    known: Vec<(Vec<u8>, Ends)>,
    name: Vec<u8>,
    /// The number of strings that come before the name.
    before: u8,
    /// The most bytes of this name that are kept.
    most: usize,
    /// The name has not ended yet.
    reading: bool,
}

impl Names {
    /// Call this at the beginning of each message.
    pub(super) fn begin(&mut self, letter: u8) {
        self.name.clear();
        // The name of a portal comes first in `Bind`.
        self.before = u8::from(letter == b'B');
        // In `Close`, a letter comes first that says whether a statement or a portal is closed.
        self.most = LONGEST + usize::from(letter == b'C');
        self.reading = letter == b'P' || (matches!(letter, b'B' | b'C') && !self.known.is_empty());
    }

    pub(super) fn feed(&mut self, body: &[u8]) {
        for byte in body {
            match (self.reading, self.before, byte) {
                (false, ..) => return,
                (true, 0, 0) => self.reading = false,
                (true, _, 0) => self.before -= 1,
                (true, 0, _) if self.name.len() < self.most => self.name.push(*byte),
                _ => {}
            }
        }
    }

    /// Returns how the statement ends a transaction that the message, which has ended, binds. `ends`: how a parsed
    /// statement does.
    pub(super) fn end(&mut self, letter: u8, ends: Ends) -> Ends {
        match letter {
            b'P' => {
                self.known.retain(|(known, _)| *known != self.name);
                if ends != Ends::default() {
                    self.known.truncate(MOST - 1);
                    self.known.insert(0, (self.name.clone(), ends));
                }
                Ends::default()
            }
            b'C' => {
                let closed = self.name.strip_prefix(b"S");
                self.known.retain(|(known, _)| Some(known.as_slice()) != closed);
                Ends::default()
            }
            b'B' => self.known.iter().find(|(known, _)| *known == self.name).map_or(Ends::default(), |(_, ends)| *ends),
            _ => Ends::default(),
        }
    }
}
