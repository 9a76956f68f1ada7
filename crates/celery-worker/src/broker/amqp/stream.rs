//! A connection's socket, with a [`Screen`] between the broker and the AMQP library.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use async_rs::traits::Reactor;
use async_rs::util::RuntimeParts;
use async_rs::{Runtime, Tokio};
use futures_util::Stream;
use futures_util::io::{AsyncRead, AsyncWrite};
use lapin::tcp::{AMQPUriTcpExt, AsyncTcpStream, OwnedTLSConfig};
use lapin::uri::AMQPUri;
use lapin::{Connection, ConnectionProperties};

use super::screen::{Bodies, ConnectionLimits, Notes, Screen};

/// Bytes per read if the library has less room than a frame needs.
const STEP: usize = 4096;

/// Connects as the library does, and adds a screen.
pub(super) async fn connect(
    uri: AMQPUri,
    tls: OwnedTLSConfig,
    limits: ConnectionLimits,
    notes: Arc<Notes>,
    properties: ConnectionProperties,
) -> lapin::Result<Connection> {
    let tokio = Tokio::current();
    let screened = ScreenedReactor(tokio.clone());
    let runtime = Runtime::new(RuntimeParts::new(tokio.clone(), screened));
    let tokio = Runtime::new(tokio);
    let connect = async move |uri: AMQPUri, _| {
        let socket = uri.connect_with_config_async(tls.as_ref(), &tokio).await?;
        let screen = Screen::new(limits, notes.clone());
        Ok(AsyncTcpStream::Plain(Screened::new(socket, screen)))
    };
    Connection::connector(uri, runtime, connect, properties).await
}

type Socket = AsyncTcpStream<<Tokio as Reactor>::TcpStream>;

/// A socket, in clear text or not, whose input is screened.
pub(super) struct Screened {
    socket: Socket,
    screen: Screen,
    /// Screened bytes that the library has not read yet.
    waiting: Vec<u8>,
    /// Number of these bytes that the library has read.
    gone: usize,
}

impl Screened {
    fn new(socket: Socket, screen: Screen) -> Self {
        Self {
            socket,
            screen,
            waiting: Vec::new(),
            gone: 0,
        }
    }

    fn hand_over(&mut self, buffer: &mut [u8]) -> usize {
        let left = self.waiting.get(self.gone..).unwrap_or_default();
        let count = left.len().min(buffer.len());
        buffer[..count].copy_from_slice(&left[..count]);
        self.gone += count;
        if self.gone == self.waiting.len() {
            self.waiting = Vec::new();
            self.gone = 0;
        }
        count
    }
}

impl AsyncRead for Screened {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        if buffer.is_empty() {
            return Poll::Ready(Ok(0));
        }
        loop {
            if !this.waiting.is_empty() {
                return Poll::Ready(Ok(this.hand_over(buffer)));
            }
            let socket = Pin::new(&mut this.socket);
            let begun = this.screen.partial().len();
            if begun < buffer.len() {
                // The common case, which copies only the beginning of a frame.
                let count = ready!(socket.poll_read(context, &mut buffer[begun..]))?;
                if count == 0 {
                    return Poll::Ready(Ok(0));
                }
                buffer[..begun].copy_from_slice(this.screen.partial());
                let count = this.screen.process(&mut buffer[..begun + count]);
                if count > 0 {
                    return Poll::Ready(Ok(count));
                }
            } else {
                let mut step = [0; STEP];
                let count = ready!(socket.poll_read(context, &mut step))?;
                if count == 0 {
                    return Poll::Ready(Ok(0));
                }
                let mut data = std::mem::take(this.screen.partial());
                data.extend_from_slice(&step[..count]);
                let count = this.screen.process(&mut data);
                data.truncate(count);
                this.waiting = data;
            }
        }
    }
}

impl AsyncWrite for Screened {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(context, buffer)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write_vectored(context, buffers)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(context)
    }

    fn poll_close(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_close(context)
    }
}

/// Tokio's reactor, with streams that are screened: the library names its streams by their reactor.
#[derive(Debug, Clone)]
struct ScreenedReactor(Tokio);

impl Reactor for ScreenedReactor {
    type TcpStream = Screened;
    type Sleep = <Tokio as Reactor>::Sleep;

    fn register<H: io::Read + io::Write + AsFd + AsRawFd + Send + 'static>(
        &self,
        socket: H,
    ) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static> {
        self.0.register(socket)
    }

    fn sleep(&self, time: Duration) -> Self::Sleep {
        self.0.sleep(time)
    }

    fn interval(&self, time: Duration) -> impl Stream<Item = Instant> + Send + 'static {
        self.0.interval(time)
    }

    fn tcp_connect_addr(
        &self,
        address: SocketAddr,
    ) -> impl Future<Output = io::Result<Self::TcpStream>> + Send + 'static {
        let connected = self.0.tcp_connect_addr(address);
        async move {
            let limits = ConnectionLimits {
                frame: 0,
                is_last: false,
                bodies: Bodies::ALL,
            };
            let screen = Screen::new(limits, Arc::default());
            Ok(Screened::new(
                AsyncTcpStream::Plain(connected.await?),
                screen,
            ))
        }
    }
}
