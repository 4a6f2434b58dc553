//! Recognises by the text of a query whether it ends its transaction. The text may arrive in pieces.

/// What the statements of a text do to the transaction of their session, if all of them succeed.
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Ends {
    /// A statement commits the transaction, or prepares it.
    pub(super) commits: bool,
    /// A statement ends the transaction: it commits, prepares it or rolls it back. `ROLLBACK AND CHAIN` does not count,
    /// because nothing outlasts a lost connection that is sent behind it.
    pub(super) leaves: bool,
    /// Another statement follows one that ends the transaction. It may be carried out outside of a transaction.
    pub(super) goes_on: bool,
    /// A statement rolls back and begins another transaction: `ROLLBACK AND CHAIN`.
    pub(super) chains: bool,
    /// The number of statements that roll back to a savepoint. Their answer is the same as that of a ROLLBACK.
    pub(super) to_savepoints: u16,
}

impl Ends {
    /// Returns what both do.
    pub(super) fn and(self, other: Self) -> Self {
        Self {
            commits: self.commits || other.commits,
            leaves: self.leaves || other.leaves,
            goes_on: self.goes_on || other.goes_on,
            chains: self.chains || other.chains,
            to_savepoints: self.to_savepoints.saturating_add(other.to_savepoints),
        }
    }

    /// Returns whether a statement may be answered as a ROLLBACK is: a COMMIT is, too, in a transaction that has
    /// failed.
    pub(super) fn may_roll_back(self) -> bool {
        self.leaves || self.chains || self.to_savepoints > 0
    }
}

/// The most bytes of a word that are kept. No word that is looked for is as long.
const LONGEST: usize = 16;

/// The part of the text that the last byte belongs to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum ParsePosition {
    /// None of the following.
    #[default]
    Outside,
    /// A word that may tell what the statement does.
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
    /// Behind the end of the text.
    Over,
}

/// What the words of the current statement have told so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Told {
    /// No word has come yet.
    #[default]
    Nothing,
    /// It prepares the transaction, or a statement.
    Prepare,
    /// It rolls back, but further words may say that it only rolls back to a savepoint, or that it chains.
    Rollback,
    /// It drops prepared statements, and a further word may say that it drops all of them.
    Deallocate,
    /// It creates something.
    Create,
    /// It creates a function or a procedure, whose body may be a list of statements.
    Routine,
    /// The same, and the last word may begin that list.
    Begin,
    /// Within that list. The number says how many ENDs are missing.
    Body(u32),
    /// Further words tell nothing.
    All,
}

/// Looks at the words of each statement in a text that tell what it does. It skips strings, quoted names and comments.
/// It knows a backslash before a quote only in a string that an E precedes, which is all that there is while
/// `standard_conforming_strings` is on.
#[derive(Debug, Default)]
pub(super) struct Statements {
    place: ParsePosition,
    told: Told,
    /// The current statement has begun.
    begun: bool,
    /// The current statement rolls back.
    rolls_back: bool,
    /// The number of brackets that are open.
    brackets: u32,
    word: Word,
    /// The tag of a string between dollar signs. PostgreSQL does not limit its length.
    tag: Vec<u8>,
    before: Before,
    ends: Ends,
    /// A statement drops all prepared statements.
    deallocates: bool,
}

/// What came immediately before this byte, within no string or comment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Before {
    #[default]
    Other,
    Letter,
    /// An E. If a string follows, it is one with escapes.
    Escaping,
    /// The end of a string with escapes, and perhaps spaces and comments behind it. If a quote follows, the string goes
    /// on: the quote is doubled, or the string is continued on another line.
    Escaped,
}

impl Statements {
    /// A new text begins.
    pub(super) fn begin(&mut self) {
        let mut tag = std::mem::take(&mut self.tag);
        tag.clear();
        *self = Self { tag, ..Self::default() };
    }

    /// Returns what the text does. The zero byte behind the text must have been fed.
    pub(super) fn ends(&self) -> Ends {
        self.ends
    }

    /// Returns whether a statement drops all prepared statements: `DEALLOCATE ALL` or `DISCARD ALL`.
    pub(super) fn deallocates(&self) -> bool {
        self.deallocates
    }

    pub(super) fn feed(&mut self, bytes: &[u8]) {
        let mut rest = bytes;
        while self.place != ParsePosition::Over {
            rest = rest.get(self.without_meaning(rest)..).unwrap_or_default();
            let Some((byte, behind)) = rest.split_first() else { return };
            self.place = self.step(*byte);
            rest = behind;
        }
    }

    /// Returns how many of the next bytes change nothing. Most of a text is within a string, or behind the first word
    /// of its statement, and every text that is sent passes here.
    fn without_meaning(&self, bytes: &[u8]) -> usize {
        let until = |ends: fn(u8, u8) -> bool, quote| bytes.iter().position(|byte| ends(*byte, quote));
        match self.place {
            ParsePosition::Quoted(quote) => {
                until(|byte, quote| byte == quote || byte == 0, quote).unwrap_or(bytes.len())
            }
            ParsePosition::Outside if self.begun && self.told == Told::All && self.before != Before::Escaped => {
                let has_meaning = |byte, _| matches!(byte, 0 | b'\'' | b'"' | b'$' | b';' | b'/' | b'-' | b'(' | b')');
                // `before` depends on the last two bytes.
                until(has_meaning, 0).unwrap_or(bytes.len()).saturating_sub(2)
            }
            _ => 0,
        }
    }

    fn step(&mut self, byte: u8) -> ParsePosition {
        match (self.place, byte) {
            (ParsePosition::Word, _) if is_letter(byte) => {
                self.word.push(byte);
                self.before = Before::Letter;
                ParsePosition::Word
            }
            (ParsePosition::Word, _) => {
                self.told = self.tells();
                self.outside(byte)
            }
            (_, 0) => self.outside(byte),
            (ParsePosition::Slash, b'*') => ParsePosition::Comment(0),
            (ParsePosition::Nested(depth), b'*') => ParsePosition::Comment(depth.saturating_add(1)),
            (ParsePosition::Dash, b'-') => ParsePosition::LineComment,
            (ParsePosition::Slash | ParsePosition::Dash, _) => {
                self.begins(false);
                self.before = Before::Other;
                self.outside(byte)
            }
            (ParsePosition::Comment(depth) | ParsePosition::Star(depth), b'*') => ParsePosition::Star(depth),
            (ParsePosition::Star(0), b'/') | (ParsePosition::LineComment, b'\n' | b'\r') => ParsePosition::Outside,
            (ParsePosition::Star(depth), b'/') => ParsePosition::Comment(depth - 1),
            (ParsePosition::Comment(depth) | ParsePosition::Nested(depth), b'/') => ParsePosition::Nested(depth),
            (ParsePosition::Comment(depth) | ParsePosition::Star(depth) | ParsePosition::Nested(depth), _) => {
                ParsePosition::Comment(depth)
            }
            (ParsePosition::LineComment, _) => ParsePosition::LineComment,
            (ParsePosition::Escaped, b'\\') => ParsePosition::Backslash,
            (ParsePosition::Escaped, b'\'') => {
                self.before = Before::Escaped;
                ParsePosition::Outside
            }
            (ParsePosition::Escaped | ParsePosition::Backslash, _) => ParsePosition::Escaped,
            (ParsePosition::Quoted(quote), _) if byte == quote => ParsePosition::Outside,
            (ParsePosition::Quoted(quote), _) => ParsePosition::Quoted(quote),
            (ParsePosition::Tag, b'$') => ParsePosition::Dollars,
            (ParsePosition::Tag, _) if is_letter(byte) => {
                self.tag.push(byte);
                ParsePosition::Tag
            }
            (ParsePosition::Outside | ParsePosition::Tag | ParsePosition::Over, _) => self.outside(byte),
            (ParsePosition::ClosingTag(matched), b'$') if matched == self.tag.len() => ParsePosition::Outside,
            (ParsePosition::ClosingTag(matched), _) if self.tag.get(matched) == Some(&byte) => {
                ParsePosition::ClosingTag(matched + 1)
            }
            (ParsePosition::Dollars | ParsePosition::ClosingTag(_), b'$') => ParsePosition::ClosingTag(0),
            (ParsePosition::Dollars | ParsePosition::ClosingTag(_), _) => ParsePosition::Dollars,
        }
    }

    /// Returns the place after a byte that does not continue a word, a string or a comment.
    fn outside(&mut self, byte: u8) -> ParsePosition {
        let before = self.before;
        self.before = match byte {
            b'e' | b'E' if before == Before::Other => Before::Escaping,
            // A dollar sign behind a letter belongs to a name.
            b'$' if before != Before::Other => Before::Letter,
            _ if is_letter(byte) => Before::Letter,
            // The dash may begin a comment.
            _ if before == Before::Escaped && (is_space(byte) || byte == b'-') => Before::Escaped,
            _ => Before::Other,
        };
        match byte {
            0 => {
                self.statement_ends();
                return ParsePosition::Over;
            }
            b';' => {
                // In the body of a routine it ends a statement of that body. So it does within brackets, in a rule.
                if self.brackets == 0 && !matches!(self.told, Told::Body(_)) {
                    self.statement_ends();
                }
                return ParsePosition::Outside;
            }
            b'/' => return ParsePosition::Slash,
            b'-' => return ParsePosition::Dash,
            _ if is_space(byte) => return ParsePosition::Outside,
            b'$' if self.before == Before::Letter => return ParsePosition::Outside,
            _ => {}
        }
        let may_tell = self.begins(is_letter(byte));
        match byte {
            b'\'' if matches!(before, Before::Escaping | Before::Escaped) => ParsePosition::Escaped,
            b'\'' | b'"' => ParsePosition::Quoted(byte),
            b'$' => {
                self.tag.clear();
                ParsePosition::Tag
            }
            b'(' | b')' => {
                self.brackets = if byte == b'(' { self.brackets + 1 } else { self.brackets.saturating_sub(1) };
                ParsePosition::Outside
            }
            // Most statements are told by their first letter.
            _ if self.told == Told::Nothing
                && !matches!(byte.to_ascii_uppercase(), b'A' | b'C'..=b'E' | b'P' | b'R') =>
            {
                self.told = Told::All;
                ParsePosition::Outside
            }
            _ if may_tell && is_letter(byte) && before != Before::Letter => {
                self.word = Word::default();
                self.word.push(byte);
                ParsePosition::Word
            }
            _ => ParsePosition::Outside,
        }
    }

    /// A part of a statement comes, which may be its first one. Returns whether a word may tell something.
    fn begins(&mut self, is_letter: bool) -> bool {
        if !std::mem::replace(&mut self.begun, true) {
            self.ends.goes_on |= self.ends.leaves;
            if !is_letter {
                self.told = Told::All;
            }
        }
        self.told != Told::All
    }

    fn statement_ends(&mut self) {
        self.ends.leaves |= std::mem::take(&mut self.rolls_back);
        (self.begun, self.told, self.brackets) = (false, Told::Nothing, 0);
    }

    /// Returns what is known with the word that has ended.
    fn tells(&mut self) -> Told {
        let word = |words: &[&str]| words.iter().any(|known| self.word.is(known));
        match self.told {
            Told::Nothing if word(&["COMMIT", "END"]) => self.commits(),
            Told::Prepare if word(&["TRANSACTION"]) => self.commits(),
            Told::Nothing if word(&["PREPARE"]) => Told::Prepare,
            Told::Nothing if word(&["ROLLBACK", "ABORT"]) => {
                self.rolls_back = true;
                Told::Rollback
            }
            Told::Rollback if word(&["WORK", "TRANSACTION", "AND"]) => Told::Rollback,
            Told::Rollback => {
                self.rolls_back = !word(&["TO", "PREPARED", "CHAIN"]);
                self.ends.chains |= word(&["CHAIN"]);
                self.ends.to_savepoints = self.ends.to_savepoints.saturating_add(word(&["TO"]).into());
                Told::All
            }
            Told::Nothing if word(&["DEALLOCATE", "DISCARD"]) => Told::Deallocate,
            Told::Deallocate if word(&["PREPARE"]) => Told::Deallocate,
            Told::Deallocate => {
                self.deallocates |= word(&["ALL"]);
                Told::All
            }
            Told::Nothing if word(&["CREATE"]) => Told::Create,
            Told::Create if word(&["OR", "REPLACE"]) => Told::Create,
            Told::Create if word(&["FUNCTION", "PROCEDURE"]) => Told::Routine,
            Told::Routine | Told::Begin if self.brackets == 0 && word(&["BEGIN"]) => Told::Begin,
            Told::Begin if self.brackets == 0 && word(&["ATOMIC"]) => Told::Body(1),
            Told::Routine | Told::Begin => Told::Routine,
            // The END of a CASE is none of the body.
            Told::Body(depth) if word(&["CASE"]) => Told::Body(depth.saturating_add(1)),
            Told::Body(1) if word(&["END"]) => Told::All,
            Told::Body(depth) if word(&["END"]) => Told::Body(depth - 1),
            Told::Body(depth) => Told::Body(depth),
            Told::Nothing | Told::Prepare | Told::Create | Told::All => Told::All,
        }
    }

    fn commits(&mut self) -> Told {
        (self.ends.commits, self.ends.leaves) = (true, true);
        Told::All
    }
}

fn is_letter(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || !byte.is_ascii()
}

/// The vertical tab is a space from PostgreSQL 16 on.
fn is_space(byte: u8) -> bool {
    byte.is_ascii_whitespace() || byte == b'\x0B'
}

/// The beginning of a word.
#[derive(Debug, Default)]
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

    fn is(&self, known: &str) -> bool {
        self.bytes.get(..self.length).is_some_and(|word| word.eq_ignore_ascii_case(known.as_bytes()))
    }
}
