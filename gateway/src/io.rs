//! A client's connection with the two clocks HTTP libraries lack: one for reading (headers, idle keep-alive), one for a
//! peer that stops reading. An expired clock is an I/O error, which makes hyper drop the connection and all it carries.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::{Duration, Instant, Sleep, sleep_until},
};

use crate::config::Timing;

/// What the requests of a connection tell its clocks.
#[derive(Debug, Default)]
pub(crate) struct Activity {
    /// Requests whose response is not finished.
    pub(crate) open: AtomicUsize,
    /// Requests ever begun.
    pub(crate) begun: AtomicUsize,
    /// HTTP/2 frames arrive outside of requests too, so a byte is no sign of a header there.
    pub(crate) multiplexed: AtomicBool,
}

#[derive(Clone, Copy, PartialEq)]
enum Phase {
    Idle,
    Header,
    Busy,
}

#[derive(Debug)]
pub(crate) struct Timed {
    stream: TcpStream,
    activity: Arc<Activity>,
    timing: Timing,
    reading: Clock,
    writing: Clock,
    /// Requests begun when the last byte of a new header came.
    header_of: Option<usize>,
}

/// Runs while it is armed.
#[derive(Debug)]
struct Clock {
    sleep: Pin<Box<Sleep>>,
    armed: Option<Phase>,
}

impl std::fmt::Debug for Phase {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Idle => "idle",
            Self::Header => "header",
            Self::Busy => "busy",
        })
    }
}

impl Clock {
    fn new() -> Self {
        Self { sleep: Box::pin(sleep_until(Instant::now())), armed: None }
    }

    /// Starts anew only when the phase is a new one.
    fn expired(&mut self, phase: Phase, limit: Duration, context: &mut Context<'_>) -> bool {
        if self.armed != Some(phase) {
            self.armed = Some(phase);
            self.sleep.as_mut().reset(Instant::now() + limit);
        }
        self.sleep.as_mut().poll(context).is_ready()
    }
}

impl Timed {
    pub(crate) fn new(stream: TcpStream, activity: Arc<Activity>, timing: Timing) -> Self {
        Self { stream, activity, timing, reading: Clock::new(), writing: Clock::new(), header_of: Some(0) }
    }

    fn phase(&self) -> Phase {
        if self.activity.open.load(Ordering::Relaxed) > 0 {
            Phase::Busy
        } else if self.header_of == Some(self.activity.begun.load(Ordering::Relaxed)) {
            Phase::Header
        } else {
            Phase::Idle
        }
    }

    fn written<T>(&mut self, poll: Poll<io::Result<T>>, context: &mut Context<'_>) -> Poll<io::Result<T>> {
        if poll.is_ready() {
            self.writing.armed = None;
        } else if self.writing.expired(Phase::Busy, self.timing.write_stall, context) {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        poll
    }
}

impl AsyncRead for Timed {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buffer.filled().len();
        if let Poll::Ready(result) = Pin::new(&mut this.stream).poll_read(context, buffer) {
            let multiplexed = this.activity.multiplexed.load(Ordering::Relaxed);
            if buffer.filled().len() > before && !multiplexed && this.phase() == Phase::Idle {
                this.header_of = Some(this.activity.begun.load(Ordering::Relaxed));
            }
            return Poll::Ready(result);
        }
        loop {
            let phase = this.phase();
            let limit = if phase == Phase::Header { this.timing.header } else { this.timing.keep_alive };
            if !this.reading.expired(phase, limit, context) {
                return Poll::Pending;
            }
            if phase != Phase::Busy {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
            // A request is being answered: look again later.
            this.reading.armed = None;
        }
    }
}

impl AsyncWrite for Timed {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.written(poll, context)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, context: &mut Context<'_>, slices: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.written(poll, context)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(ready!(Pin::new(&mut self.stream).poll_shutdown(context)))
    }
}
