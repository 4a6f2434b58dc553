//! The messages of PostgreSQL's protocol in a byte stream, however it was cut into pieces.

// Request codes of the start-up phase: https://www.postgresql.org/docs/current/protocol-message-formats.html
pub const CANCEL: u32 = 80_877_102;
pub const TLS: u32 = 80_877_103;
pub const GSS: u32 = 80_877_104;
/// The first byte of a TLS record that carries a handshake.
const HANDSHAKE: u8 = 0x16;

/// What a frame is, as its header says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Head {
    /// A message of the start-up phase, with its code.
    Request(u32),
    /// The server's one byte in answer to the wish for encryption.
    Byte(u8),
    /// A message with its type letter.
    Message(u8),
    /// Some bytes of an encrypted stream.
    Opaque,
}

/// One message, with its header.
pub struct Frame {
    pub head: Head,
    pub bytes: Vec<u8>,
}

impl Frame {
    /// What follows on the letter and the length; nothing in a message of the start-up phase.
    pub fn body(&self) -> &[u8] {
        match self.head {
            Head::Message(_) => self.bytes.get(5..).unwrap_or_default(),
            _ => &[],
        }
    }
}

/// Takes bytes and gives whole frames. Every byte that goes in comes out once, in its place.
pub struct Frames {
    bytes: Vec<u8>,
    /// The bytes before this one have been given out.
    at: usize,
    /// After a client's start-up message, messages begin with a type letter. A server's always do …
    lettered: bool,
    /// … but for so many answers to the wish for encryption.
    single: usize,
    opaque: bool,
}

impl Frames {
    fn new(lettered: bool) -> Self {
        Self { bytes: Vec::new(), at: 0, lettered, single: 0, opaque: false }
    }

    /// What a client sends, from the start.
    pub fn of_client() -> Self {
        Self::new(false)
    }

    /// What a server sends, from the start.
    pub fn of_server() -> Self {
        Self::new(true)
    }

    pub fn feed(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.at);
        self.at = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// The server was asked for encryption: it answers with a byte.
    pub fn expect_byte(&mut self) {
        self.single += 1;
    }

    /// From here on there is nothing to be understood.
    pub fn make_opaque(&mut self) {
        self.opaque = true;
    }

    /// The next frame, if it is there to its end.
    pub fn next(&mut self) -> Option<Frame> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let first = *rest.first()?;
        self.opaque |= !self.lettered && first == HANDSHAKE;
        let (head, size) = if self.opaque {
            (Head::Opaque, rest.len())
        } else if !self.lettered {
            let code = u32::from_be_bytes(*rest.get(4..)?.first_chunk()?);
            (Head::Request(code), length(rest)?.max(8))
        } else if self.single > 0 && matches!(first, b'N' | b'S' | b'G') {
            self.single -= 1;
            (Head::Byte(first), 1)
        } else {
            (Head::Message(first), 1 + length(rest.get(1..)?)?.max(4))
        };
        let bytes = rest.get(..size)?.to_vec();
        self.at += size;
        self.lettered |= matches!(head, Head::Request(code) if !matches!(code, CANCEL | TLS | GSS));
        Some(Frame { head, bytes })
    }
}

fn length(bytes: &[u8]) -> Option<usize> {
    bytes.first_chunk().map(|size| u32::from_be_bytes(*size) as usize)
}

/// A message with its letter and its length.
pub fn framed(letter: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(4 + body.len()).expect("a message of less than 4 GiB");
    [&[letter][..], &length.to_be_bytes(), body].concat()
}

/// For the tests of whatever is built on this.
pub mod samples {
    pub fn startup(code: u32, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(8 + body.len()).unwrap();
        [&length.to_be_bytes(), &code.to_be_bytes(), body].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::samples::startup;
    use super::*;

    fn heads(mut frames: Frames, stream: &[u8], size: usize) -> Vec<Head> {
        let (mut heads, mut out) = (Vec::new(), Vec::new());
        for part in stream.chunks(size) {
            frames.feed(part);
            while let Some(frame) = frames.next() {
                heads.push(frame.head);
                out.extend(frame.bytes);
            }
        }
        assert_eq!(out, stream, "in pieces of {size}");
        heads
    }

    #[test]
    fn frames_are_found_however_they_are_cut() {
        let client = [startup(TLS, b""), startup(196_608, b"user\0app\0\0"), framed(b'Q', b"SELECT 1\0")].concat();
        let server = [b"N".to_vec(), framed(b'N', b"S\0"), framed(b'Z', b"I")].concat();
        for size in 1..=client.len() {
            let expected = [Head::Request(TLS), Head::Request(196_608), Head::Message(b'Q')];
            assert_eq!(heads(Frames::of_client(), &client, size), expected);
            let mut frames = Frames::of_server();
            frames.expect_byte();
            let expected = [Head::Byte(b'N'), Head::Message(b'N'), Head::Message(b'Z')];
            assert_eq!(heads(frames, &server, size), expected);
        }
    }

    #[test]
    fn a_body_comes_without_its_header() {
        let mut frames = Frames::of_server();
        frames.feed(&framed(b'Z', b"T"));
        assert_eq!(frames.next().unwrap().body(), b"T");
    }

    #[test]
    fn what_is_encrypted_passes_in_pieces() {
        let stream = [startup(TLS, b""), vec![HANDSHAKE, 3, 1, 0, 200, 1, 2, 3]].concat();
        let heads = heads(Frames::of_client(), &stream, 8);
        assert_eq!(heads, [Head::Request(TLS), Head::Opaque]);
    }

    #[test]
    fn a_senseless_length_does_not_stop_the_stream() {
        let mut frames = Frames::of_server();
        frames.feed(&[b'C', 0, 0, 0, 0, b'Z', 0, 0, 0, 5, b'I']);
        assert_eq!(frames.next().unwrap().bytes.len(), 5);
        assert_eq!(frames.next().unwrap().head, Head::Message(b'Z'));
    }
}
