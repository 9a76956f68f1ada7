//! A TCP proxy on loopback, whose connections a test can cut.

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

/// Proxy that forwards connections while it is whole.
pub(crate) struct Proxy {
    port: u16,
    whole: watch::Sender<bool>,
    _listening: AbortOnDropHandle<()>,
}

impl Proxy {
    /// Starts a proxy in front of this port.
    pub(crate) async fn start(to: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (whole, seen) = watch::channel(true);
        let listening = async move {
            loop {
                let (client, _) = listener.accept().await.unwrap();
                tokio::spawn(pass(client, to, seen.clone()));
            }
        };
        Self {
            port,
            whole,
            _listening: AbortOnDropHandle::new(tokio::spawn(listening)),
        }
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Breaks every connection, and each new one, until [`Self::mend`] is called.
    pub(crate) fn cut(&self) {
        self.whole.send_replace(false);
    }

    pub(crate) fn mend(&self) {
        self.whole.send_replace(true);
    }
}

async fn pass(mut client: TcpStream, to: u16, mut whole: watch::Receiver<bool>) {
    if !*whole.borrow() {
        return;
    }
    let mut server = TcpStream::connect(("127.0.0.1", to)).await.unwrap();
    tokio::select! {
        _ = copy_bidirectional(&mut client, &mut server) => {}
        _ = whole.wait_for(|whole| !whole) => {}
    }
}
