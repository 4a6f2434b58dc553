//! The stream's side of an opening: sends it with the first request, holds back what follows, and takes its answers
//! out of what is received.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::bytes::{Buf, BytesMut};

use super::answers::{Answers, FirstRequest, Verdict};
use super::{Opening, OpeningState};

/// The most bytes of the first request that are copied behind the opening. The rest follows without a copy.
const MOST_COPIED: usize = 16 * 1024;

/// How far the opening on a stream has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    /// None is under way.
    #[default]
    Free,
    /// It was sent, and is not answered.
    UnderWay,
    /// It has failed, or was not understood, so the session must end.
    Failed,
}

/// What the opening makes of one session's stream.
#[derive(Debug, Default)]
pub(in crate::server) struct Passage {
    phase: Phase,
    /// What the driver has handed over, and the socket has not taken yet.
    unsent: BytesMut,
    first: FirstRequest,
    answers: Answers,
    /// Woken when what is held back may be sent.
    held: Option<Waker>,
}

impl Passage {
    /// Returns whether the socket has not taken everything that the driver has handed over.
    pub(in crate::server) fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Receives what is for the driver. This is never `Ready` without bytes while the stream goes on.
    pub(in crate::server) fn poll_read<S: AsyncRead + Unpin>(
        &mut self,
        opening: &Opening,
        stream: &mut S,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            match self.phase {
                Phase::Free => return Pin::new(stream).poll_read(cx, buf),
                Phase::Failed => return Poll::Ready(Err(not_begun())),
                Phase::UnderWay => {}
            }
            let before = buf.filled().len();
            ready!(Pin::new(&mut *stream).poll_read(cx, buf))?;
            let received = buf.filled_mut().get_mut(before..).unwrap_or_default();
            if received.is_empty() {
                return Poll::Ready(Ok(()));
            }
            let (kept, verdict) = self.answers.take(received);
            buf.set_filled(before + kept);
            self.judge(opening, verdict);
            if kept > 0 {
                return Poll::Ready(Ok(()));
            }
        }
    }

    fn judge(&mut self, opening: &Opening, verdict: Verdict) {
        seen!("openings", "{verdict:?}");
        match verdict {
            Verdict::GoesOn => {}
            Verdict::Failed if planted!("ignores an opening that failed") => {
                self.phase = Phase::Free;
                opening.done(Vec::new());
            }
            Verdict::Done => {
                self.phase = Phase::Free;
                opening.done(self.answers.take_row());
                if let Some(held) = self.held.take() {
                    held.wake();
                }
            }
            Verdict::Failed => self.fail(opening),
            // Nobody knows what was carried out. The session is lost before the first answer.
            Verdict::Strange => self.phase = Phase::Failed,
        }
    }

    /// The server has carried out nothing since the opening was armed.
    fn fail(&mut self, opening: &Opening) {
        self.phase = Phase::Failed;
        opening.failed();
    }

    /// Sends what comes from the driver. `Ready` means that it was taken over, not that the socket has it: see
    /// [`Self::has_unsent`]. `silent`: everything that was sent before is answered.
    pub(in crate::server) fn poll_write<S: AsyncWrite + Unpin>(
        &mut self,
        opening: &Opening,
        silent: bool,
        stream: &mut S,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_unsent(stream, cx))?;
        match self.phase {
            // A message that ends the session begins no transaction.
            Phase::Free if matches!(buf.first(), None | Some(b'X')) => Pin::new(stream).poll_write(cx, buf),
            // The driver has closed a statement at the very moment when the opening was armed.
            Phase::Free if !silent && opening.state() == OpeningState::Armed => {
                self.fail(opening);
                Poll::Ready(Err(not_begun()))
            }
            Phase::Free => match opening.depart(&mut self.unsent) {
                None => Pin::new(stream).poll_write(cx, buf),
                Some(answers) => self.poll_first(answers, stream, cx, buf),
            },
            Phase::UnderWay if self.first.is_over() && planted!("lets a request through before BEGIN is answered") => {
                Pin::new(stream).poll_write(cx, buf)
            }
            Phase::UnderWay if self.first.is_over() => {
                self.held = Some(cx.waker().clone());
                // The driver does not flush while it has more to send.
                match Pin::new(stream).poll_flush(cx) {
                    Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
                    _ => Poll::Pending,
                }
            }
            Phase::UnderWay => {
                let mut first = self.first;
                let length = first.take(buf);
                let taken = ready!(Pin::new(stream).poll_write(cx, &buf[..length]))?;
                self.first.take(&buf[..taken]);
                Poll::Ready(Ok(taken))
            }
            Phase::Failed => Poll::Ready(Err(not_begun())),
        }
    }

    /// Sends the opening, and the first request behind it.
    fn poll_first<S: AsyncWrite + Unpin>(
        &mut self,
        answers: &'static [u8],
        stream: &mut S,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        (self.phase, self.first) = (Phase::UnderWay, FirstRequest::default());
        self.answers.begin(answers);
        let taken = self.first.take(&buf[..buf.len().min(MOST_COPIED)]);
        self.unsent.extend_from_slice(&buf[..taken]);
        if let Poll::Ready(sent) = self.poll_unsent(stream, cx) {
            sent?;
        }
        Poll::Ready(Ok(taken))
    }

    pub(in crate::server) fn poll_flush<S: AsyncWrite + Unpin>(
        &mut self,
        stream: &mut S,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        ready!(self.poll_unsent(stream, cx))?;
        Pin::new(stream).poll_flush(cx)
    }

    fn poll_unsent<S: AsyncWrite + Unpin>(&mut self, stream: &mut S, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.unsent.has_remaining() {
            let taken = ready!(Pin::new(&mut *stream).poll_write(cx, &self.unsent))?;
            if taken == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.unsent.advance(taken);
        }
        Poll::Ready(Ok(()))
    }
}

/// The error that ends the session.
fn not_begun() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "BEGIN has failed, so the pool ends the session")
}
