//! Tests that an opening's bytes pass as they must, wherever the stream cuts them.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::task::{Context, Poll, Wake, Waker};

use proptest::prelude::*;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::answers::{Answers, FirstRequest, Verdict};
use super::*;

const MARK: MarkText<'static, u64> = MarkText { statement: "mark", nonce: Some(7) };

fn message(letter: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len() + 4).unwrap().to_be_bytes();
    [&[letter][..], &length, body].concat()
}

/// The row of a mark.
fn row() -> Vec<u8> {
    message(b'D', b"\0\x02\0\0\0\x03731\0\0\0\x04\x30/A0")
}

fn values() -> Vec<Option<String>> {
    vec![Some("731".to_owned()), Some("0/A0".to_owned())]
}

fn begun() -> Vec<u8> {
    [message(b'1', b""), message(b'2', b""), message(b'C', b"BEGIN\0")].concat()
}

fn marked() -> Vec<u8> {
    [begun(), message(b'2', b""), row(), message(b'C', b"SELECT 1\0")].concat()
}

/// What a server sends unasked.
fn unasked() -> Vec<u8> {
    [message(b'N', b"SNOTICE\0\0"), message(b'S', b"a\0b\0"), message(b'A', b"\0\0\0\x01c\0d\0")].concat()
}

/// Puts what the server sends unasked before each message, and the same after the last one.
fn with_unasked(messages: &[u8]) -> Vec<u8> {
    let (mut all, mut rest) = (unasked(), messages);
    while !rest.is_empty() {
        let length = 1 + u32::from_be_bytes(rest[1..5].try_into().unwrap()) as usize;
        all.extend_from_slice(&rest[..length]);
        all.extend(unasked());
        rest = &rest[length..];
    }
    all
}

/// The first request, as the driver sends it: a statement that it prepares, one that is prepared, or a simple query.
fn first_requests() -> [Vec<u8>; 3] {
    let prepares = [message(b'P', b"s1\0SELECT 1\0\0\0"), message(b'D', b"Ss1\0"), message(b'S', b"")].concat();
    let executes = [message(b'B', b"\0s1\0\0\0\0\0"), message(b'E', b"\0\0\0\0\0"), message(b'S', b"")].concat();
    [prepares, executes, message(b'Q', b"INSERT INTO entries VALUES (1)\0")]
}

/// Cuts the bytes at these places.
fn cut<'a>(bytes: &'a [u8], places: &[prop::sample::Index]) -> Vec<&'a [u8]> {
    let mut places: Vec<_> = places.iter().map(|place| place.index(bytes.len() + 1)).collect();
    places.sort_unstable();
    let ends = places.iter().copied().chain([bytes.len()]);
    let mut from = 0;
    ends.map(|end| &bytes[std::mem::replace(&mut from, end)..end]).collect()
}

fn cuts() -> impl Strategy<Value = Vec<prop::sample::Index>> {
    prop::collection::vec(any::<prop::sample::Index>(), 0..12)
}

/// What the driver gets, and how the opening ended.
fn filtered(expected: &'static [u8], pieces: &[&[u8]]) -> (Vec<u8>, Verdict, Vec<Option<String>>) {
    let (mut answers, mut passed, mut verdict) = (Answers::default(), Vec::new(), Verdict::GoesOn);
    answers.begin(expected);
    for piece in pieces {
        let mut piece = piece.to_vec();
        if verdict == Verdict::GoesOn {
            let kept;
            (kept, verdict) = answers.take(&mut piece);
            piece.truncate(kept);
        } else if verdict != Verdict::Done {
            piece.clear();
        }
        passed.extend(piece);
    }
    (passed, verdict, answers.take_row())
}

proptest! {
    #[test]
    fn the_answers_are_taken_out_wherever_they_are_cut(places in cuts(), marks: bool, writes: bool, noisy: bool) {
        let (expected, mut answers) = if marks { (MARKED, marked()) } else { (BEGUN, begun()) };
        if marks && !writes {
            answers = [begun(), message(b'2', b""), message(b'C', b"SELECT 0\0")].concat();
        }
        let behind = [message(b'D', b"\0\0"), message(b'C', b"SELECT 1\0"), message(b'Z', b"T")].concat();
        let answers = if noisy { with_unasked(&answers) } else { answers };
        let all = [answers, behind.clone()].concat();
        let (passed, verdict, row) = filtered(expected, &cut(&all, &places));
        prop_assert_eq!(verdict, Verdict::Done);
        let noise = unasked().repeat(if !noisy { 0 } else if !marks { 4 } else if writes { 7 } else { 6 });
        prop_assert_eq!(passed, [noise, behind].concat());
        prop_assert_eq!(row, if marks && writes { values() } else { Vec::new() });
    }

    #[test]
    fn an_error_is_the_last_that_passes(places in cuts(), at in 0..6_usize) {
        let mut letters = marked();
        let ends = (0..at).fold(0, |from, _| {
            from + 1 + u32::from_be_bytes(letters[from + 1..from + 5].try_into().unwrap()) as usize
        });
        letters.truncate(ends);
        let error = message(b'E', b"SERROR\0C57014\0Mno\0\0");
        let all = [letters, unasked(), error.clone(), message(b'Z', b"I"), message(b'C', b"INSERT 0 1\0")].concat();
        let (passed, verdict, _) = filtered(MARKED, &cut(&all, &places));
        prop_assert_eq!(verdict, Verdict::Failed);
        prop_assert_eq!(passed, [unasked(), error].concat());
    }

    #[test]
    fn no_bytes_break_it(bytes in prop::collection::vec(any::<u8>(), 0..64), places in cuts()) {
        filtered(MARKED, &cut(&bytes, &places));
        let (mut first, mut taken) = (FirstRequest::default(), 0);
        for piece in cut(&bytes, &places) {
            let length = first.take(piece);
            prop_assert!(length <= piece.len());
            taken += length;
        }
        prop_assert!(taken <= bytes.len());
    }

    #[test]
    fn the_first_request_ends_with_its_sync_or_query(places in cuts(), which in 0..3_usize, second in 0..3_usize) {
        let [one, two] = [which, second].map(|index| first_requests()[index].clone());
        let all = [one.clone(), two].concat();
        let mut first = FirstRequest::default();
        let taken: usize = cut(&all, &places).into_iter().map(|piece| first.take(piece)).sum();
        prop_assert_eq!(taken, one.len());
        prop_assert!(first.is_over());
    }
}

#[test]
fn what_is_no_answer_is_strange() {
    for strange in [message(b'Z', b"I"), message(b'C', b"BEGIN\0"), message(b'T', b"\0\0"), message(b'!', b"")] {
        let (passed, verdict, _) = filtered(BEGUN, &[&strange]);
        assert_eq!((passed, verdict), (Vec::new(), Verdict::Strange), "{strange:?}");
    }
    let two_rows = [begun(), message(b'2', b""), row(), row()].concat();
    assert_eq!(filtered(MARKED, &[&two_rows]).1, Verdict::Strange);
}

/// A socket that takes and gives so many bytes at a time.
#[derive(Default)]
struct FakeSocket {
    taken: Vec<u8>,
    /// How many bytes it takes at the next calls. Then it takes none.
    takes: VecDeque<usize>,
    gives: VecDeque<Vec<u8>>,
    flushed: usize,
}

impl AsyncWrite for FakeSocket {
    fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let Some(takes) = self.takes.pop_front() else { return Poll::Pending };
        let length = takes.min(buf.len());
        self.taken.extend_from_slice(&buf[..length]);
        Poll::Ready(Ok(length))
    }

    fn poll_flush(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.flushed = self.taken.len();
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for FakeSocket {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Some(bytes) = self.gives.pop_front() else { return Poll::Pending };
        buf.put_slice(&bytes);
        Poll::Ready(Ok(()))
    }
}

/// A session's stream, and what its driver sends and has received.
#[derive(Default)]
struct Session {
    opening: Opening,
    passage: Passage,
    socket: FakeSocket,
    received: Vec<u8>,
    silent: bool,
}

impl Session {
    fn armed() -> Self {
        let stream = Self { silent: true, ..Self::default() };
        assert!(stream.opening.arm("BEGIN", Some(MARK)));
        stream
    }

    /// Sends as much as is taken over. Returns how many bytes these are.
    fn send(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let (mut sent, mut cx) = (0, Context::from_waker(Waker::noop()));
        while sent < bytes.len() {
            match self.passage.poll_write(&self.opening, self.silent, &mut self.socket, &mut cx, &bytes[sent..]) {
                Poll::Ready(Ok(taken)) => sent += taken,
                Poll::Ready(Err(error)) => return Err(error),
                Poll::Pending => return Ok(sent),
            }
        }
        if let Poll::Ready(flushed) = self.passage.poll_flush(&mut self.socket, &mut cx) {
            flushed?;
        }
        Ok(sent)
    }

    /// Receives everything that the socket gives.
    fn receive(&mut self) -> io::Result<()> {
        let mut cx = Context::from_waker(Waker::noop());
        loop {
            let mut space = [0; 256];
            let mut buf = ReadBuf::new(&mut space);
            match self.passage.poll_read(&self.opening, &mut self.socket, &mut cx, &mut buf) {
                Poll::Ready(Ok(())) => {
                    assert!(!buf.filled().is_empty(), "that would be the end of the stream");
                    self.received.extend_from_slice(buf.filled());
                }
                Poll::Ready(Err(error)) => return Err(error),
                Poll::Pending => return Ok(()),
            }
        }
    }
}

fn opening_bytes() -> Vec<u8> {
    let mut bytes = BytesMut::new();
    write(&mut bytes, "BEGIN", Some(MARK)).unwrap();
    bytes.to_vec()
}

#[test]
fn an_opening_has_no_sync() {
    let expected = [
        message(b'P', b"\0BEGIN\0\0\0"),
        message(b'B', b"\0\0\0\0\0\0\0\0"),
        message(b'E', b"\0\0\0\0\0"),
        message(b'B', b"\0mark\0\0\0\0\x01\0\0\0\x017\0\0"),
        message(b'E', b"\0\0\0\0\0"),
    ];
    assert_eq!(opening_bytes(), expected.concat());
    let mut begin = BytesMut::new();
    write(&mut begin, "BEGIN", None::<MarkText<'_, u64>>).unwrap();
    assert_eq!(begin.to_vec(), expected[..3].concat());
}

proptest! {
    #[test]
    fn what_follows_the_first_request_waits_for_begin(
        takes in prop::collection::vec(1..90_usize, 1..6), places in cuts(), which in 0..3_usize, second in 0..3_usize
    ) {
        let [one, two] = [which, second].map(|index| first_requests()[index].clone());
        let mut stream = Session::armed();
        let both = [one.clone(), two].concat();
        stream.socket.takes = takes.into();
        let mut sent = stream.send(&both)?;
        prop_assert!(sent <= one.len());
        // The socket is free again.
        stream.socket.takes = [usize::MAX; 9].into();
        sent += stream.send(&both[sent..])?;
        prop_assert_eq!(sent, one.len());
        prop_assert_eq!(&stream.socket.taken, &[opening_bytes(), one.clone()].concat());
        prop_assert_eq!(stream.socket.flushed, stream.socket.taken.len());
        prop_assert_eq!(stream.opening.state(), OpeningState::UnderWay);
        prop_assert!(!stream.opening.arm("BEGIN", Some(MARK)));

        let behind = [message(b'C', b"INSERT 0 1\0"), message(b'Z', b"T")].concat();
        let answers = [marked(), behind.clone()].concat();
        let parts = cut(&answers, &places).into_iter().filter(|it| !it.is_empty());
        stream.socket.gives = parts.map(<[u8]>::to_vec).collect();
        stream.receive()?;
        prop_assert_eq!(&stream.received, &behind);
        prop_assert_eq!(stream.opening.state(), OpeningState::Done);
        prop_assert_eq!(stream.send(&both[sent..])?, both.len() - sent);
        prop_assert_eq!(stream.socket.taken, [opening_bytes(), both].concat());
        prop_assert_eq!(stream.opening.take_row(), Some(values()));
        prop_assert_eq!(stream.opening.take_row(), None);
        prop_assert_eq!(stream.opening.state(), OpeningState::Absent);
    }
}

#[test]
fn nothing_is_sent_behind_an_opening_that_failed() {
    for strange in [false, true] {
        let mut stream = Session::armed();
        stream.socket.takes = [usize::MAX; 9].into();
        let one = first_requests()[2].clone();
        assert_eq!(stream.send(&one).unwrap(), one.len());
        let error = if strange { message(b'Z', b"I") } else { message(b'E', b"SERROR\0\0") };
        stream.socket.gives = [error.clone(), message(b'Z', b"I")].into();
        assert!(stream.receive().is_err(), "the session must end");
        assert_eq!(stream.received, if strange { Vec::new() } else { error });
        // Whoever does not understand an answer does not know what was carried out.
        let state = if strange { OpeningState::UnderWay } else { OpeningState::Failed };
        assert_eq!(stream.opening.state(), state);
        let before = stream.socket.taken.len();
        assert!(stream.send(&one).is_err());
        assert_eq!(stream.socket.taken.len(), before);
        assert!(stream.receive().is_err());
        assert_eq!(stream.opening.take_row(), None);
    }
}

#[test]
fn an_opening_never_travels_behind_something_unanswered() {
    let mut stream = Session { silent: false, ..Session::armed() };
    stream.socket.takes = [usize::MAX; 9].into();
    assert!(stream.send(&first_requests()[2]).is_err());
    assert!(stream.socket.taken.is_empty());
    assert_eq!(stream.opening.state(), OpeningState::Failed);
}

#[test]
fn a_session_that_ends_begins_nothing() {
    let mut stream = Session::armed();
    stream.socket.takes = [usize::MAX; 9].into();
    stream.send(&message(b'X', b"")).unwrap();
    assert_eq!(stream.socket.taken, message(b'X', b""));
    assert_eq!(stream.opening.state(), OpeningState::Armed);
}

#[test]
fn a_large_first_request_passes_in_parts() {
    let mut stream = Session::armed();
    let one = message(b'Q', &vec![b'a'; 100_000]);
    stream.socket.takes = std::iter::repeat_n(1000, 200).collect();
    assert_eq!(stream.send(&one).unwrap(), one.len());
    assert_eq!(stream.socket.taken, [opening_bytes(), one].concat());
    assert_eq!(stream.send(&first_requests()[2]).unwrap(), 0, "it waits");
}

/// Counts how often it is woken.
#[derive(Default)]
struct Woken(AtomicUsize);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn what_is_held_back_is_woken_by_the_answers() {
    let (mut stream, woken) = (Session::armed(), Arc::<Woken>::default());
    stream.socket.takes = [usize::MAX; 9].into();
    let one = first_requests()[2].clone();
    stream.send(&one).unwrap();
    let waker = Waker::from(Arc::clone(&woken));
    let mut cx = Context::from_waker(&waker);
    assert!(stream.passage.poll_write(&stream.opening, true, &mut stream.socket, &mut cx, &one).is_pending());
    stream.socket.gives = [marked()].into();
    stream.receive().unwrap();
    assert_eq!(woken.0.load(Ordering::SeqCst), 1);
}
