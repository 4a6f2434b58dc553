//! Recognises a statement that commits by the text of a query. The text may arrive in pieces.

/// A statement commits if it begins with one of these words.
const WORDS: [&str; 2] = ["COMMIT", "END"];
/// A statement also ends its transaction if it begins with these two words. The first word alone prepares a statement.
const PREPARE: [&str; 2] = ["PREPARE", "TRANSACTION"];
/// The most bytes of a word or a tag that are kept.
const LONGEST: usize = 16;

/// The part of the text that the last byte belongs to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Place {
    /// None of the following.
    #[default]
    Outside,
    /// The first word of a statement.
    Word,
    /// A string, or a quoted name.
    Quoted(u8),
    /// A string behind an E, in which a backslash takes away the meaning of the next byte.
    Escaped,
    Backslash,
    /// The tag that may begin a string between dollar signs.
    Tag,
    Dollars,
    /// The tag that may end such a string. The number says how many of its bytes have matched.
    ClosingTag(usize),
    /// A slash or a dash, which may begin a comment.
    Slash,
    Dash,
    /// A comment. The number says how many other comments it is nested in.
    Comment(u32),
    /// A star in a comment.
    Star(u32),
    /// A slash in a comment, which may begin a nested one.
    Nested(u32),
    LineComment,
}

/// Looks at the first word of each statement in a text. It skips strings, quoted names and comments. It knows a
/// backslash before a quote only in a string that an E precedes, which is all that there is while
/// `standard_conforming_strings` is on.
#[derive(Clone, Debug, Default)]
pub(super) struct Commits {
    place: Place,
    /// The current statement has begun.
    begun: bool,
    /// The current statement has begun with the first word of [`PREPARE`], and its second word is next.
    prepares: bool,
    word: Word,
    tag: Word,
    before: Before,
    found: bool,
}

/// What came immediately before this byte, within no string or comment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Before {
    #[default]
    Other,
    Letter,
    /// If a string follows, it is one with escapes: an E, or the end of such a string.
    Escaping,
}

impl Commits {
    /// Returns whether one of the statements commits. At least one byte after the text's last word must have been fed.
    pub(super) fn found(&self) -> bool {
        self.found
    }

    pub(super) fn feed(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if self.found {
                return;
            }
            self.place = self.step(*byte);
        }
    }

    fn step(&mut self, byte: u8) -> Place {
        match (self.place, byte) {
            (Place::Word, _) if is_letter(byte) => {
                self.word.push(byte);
                Place::Word
            }
            (Place::Word, _) => {
                let [first, second] = PREPARE;
                self.found = WORDS.iter().any(|known| self.word.is(known)) || (self.prepares && self.word.is(second));
                self.prepares = !self.prepares && self.word.is(first);
                self.outside(byte)
            }
            (Place::Slash, b'*') => Place::Comment(0),
            (Place::Nested(depth), b'*') => Place::Comment(depth.saturating_add(1)),
            (Place::Dash, b'-') => Place::LineComment,
            (Place::Slash | Place::Dash, _) => {
                self.begun = true;
                self.outside(byte)
            }
            (Place::Comment(depth) | Place::Star(depth), b'*') => Place::Star(depth),
            (Place::Star(0), b'/') | (Place::LineComment, b'\n' | b'\r') => Place::Outside,
            (Place::Star(depth), b'/') => Place::Comment(depth - 1),
            (Place::Comment(depth) | Place::Nested(depth), b'/') => Place::Nested(depth),
            (Place::Comment(depth) | Place::Star(depth) | Place::Nested(depth), _) => Place::Comment(depth),
            (Place::LineComment, _) => Place::LineComment,
            (Place::Escaped, b'\\') => Place::Backslash,
            (Place::Escaped, b'\'') => {
                // Another quote would belong to the string.
                self.before = Before::Escaping;
                Place::Outside
            }
            (Place::Escaped | Place::Backslash, _) => Place::Escaped,
            (Place::Quoted(quote), _) if byte == quote => Place::Outside,
            (Place::Quoted(quote), _) => Place::Quoted(quote),
            (Place::Tag, b'$') => Place::Dollars,
            (Place::Tag, _) if is_letter(byte) => {
                self.tag.push(byte);
                Place::Tag
            }
            (Place::Outside | Place::Tag, _) => self.outside(byte),
            (Place::ClosingTag(matched), b'$') if matched == self.tag.length => Place::Outside,
            (Place::ClosingTag(matched), _) if self.tag.byte(matched) == Some(byte) => Place::ClosingTag(matched + 1),
            (Place::Dollars | Place::ClosingTag(_), b'$') => Place::ClosingTag(0),
            (Place::Dollars | Place::ClosingTag(_), _) => Place::Dollars,
        }
    }

    /// Returns the place after a byte that does not continue a word, a string or a comment.
    fn outside(&mut self, byte: u8) -> Place {
        let before = self.before;
        self.before = match byte {
            b'e' | b'E' if before == Before::Other => Before::Escaping,
            // A dollar sign behind a letter belongs to a name.
            b'$' if before != Before::Other => Before::Letter,
            _ if is_letter(byte) => Before::Letter,
            _ => Before::Other,
        };
        match byte {
            b';' => {
                (self.begun, self.prepares) = (false, false);
                return Place::Outside;
            }
            b'/' => return Place::Slash,
            b'-' => return Place::Dash,
            // The vertical tab is a space from PostgreSQL 16 on.
            _ if byte.is_ascii_whitespace() || byte == b'\x0B' => return Place::Outside,
            b'$' if self.before == Before::Letter => return Place::Outside,
            _ => {}
        }
        let begins = !std::mem::replace(&mut self.begun, true) || self.prepares;
        match byte {
            b'\'' if before == Before::Escaping => Place::Escaped,
            b'\'' | b'"' => Place::Quoted(byte),
            b'$' => {
                self.tag = Word::default();
                Place::Tag
            }
            _ if begins && is_letter(byte) => {
                self.word = Word::default();
                self.word.push(byte);
                Place::Word
            }
            _ => Place::Outside,
        }
    }
}

fn is_letter(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || !byte.is_ascii()
}

/// The beginning of a word.
#[derive(Clone, Debug, Default)]
struct Word {
    bytes: [u8; LONGEST],
    length: usize,
}

impl Word {
    fn push(&mut self, byte: u8) {
        if let Some(place) = self.bytes.get_mut(self.length) {
            *place = byte;
            self.length += 1;
        }
    }

    fn byte(&self, index: usize) -> Option<u8> {
        self.bytes.get(..self.length)?.get(index).copied()
    }

    fn is(&self, known: &str) -> bool {
        self.bytes.get(..self.length).is_some_and(|word| word.eq_ignore_ascii_case(known.as_bytes()))
    }
}
