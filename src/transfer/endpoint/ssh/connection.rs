//! The connection to one host.

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, timeout};

use super::master::{AskFailure, Master, MasterEnd};
use super::options::{Sharing, options};
use super::registry::ControlSockets;
use super::{LoginFailure, ScriptReply, SessionKind};
use crate::settings::Ssh;
use crate::transfer::endpoint::Host;

/// Maximum number of repetitions of a request whose connection was lost before the answer. All requests may be repeated.
const MAX_REPETITIONS: u32 = 2;

/// The connection to one host. Clones share it.
#[derive(Clone)]
pub(in crate::transfer::endpoint) struct HostConnection(Arc<Shared>);

struct Shared {
    host: Host,
    ssh: Ssh,
    sockets: Arc<ControlSockets>,
    /// Held during a login: sshd refuses connections at random if many log in at once (`MaxStartups`). The failure of the
    /// last login, and its time.
    login: tokio::sync::Mutex<Option<(Instant, LoginFailure)>>,
    /// Open connections: the first one is for requests, the others only for copies.
    open: Mutex<Vec<OpenConnection>>,
}

#[derive(Debug, Clone)]
struct OpenConnection {
    master: Arc<Master>,
    socket: PathBuf,
}

/// Reason why a request has no answer.
#[derive(Debug)]
pub(in crate::transfer::endpoint) enum RequestFailure {
    /// There is no connection.
    Login(LoginFailure),
    /// The connection was lost again and again.
    Lost(MasterEnd),
    /// There was no answer within the limit.
    TimedOut,
    /// An argument contains a line break.
    LineBreak,
}

/// A session of the connection that is reserved for the ssh of a copy.
#[derive(Debug)]
pub(in crate::transfer) struct CopySession {
    connection: HostConnection,
    open: OpenConnection,
    permit: Option<OwnedSemaphorePermit>,
}

impl CopySession {
    /// Arguments for ssh between the program and the host, without the login.
    pub(in crate::transfer) fn ssh_options(&self) -> Vec<String> {
        options(&self.connection.0.ssh, Sharing::Client(&self.open.socket))
    }

    /// End of the connection, if it was lost. The copy cannot continue without it.
    pub(in crate::transfer::endpoint) fn lost_connection(&self) -> Option<MasterEnd> {
        self.open.master.end()
    }
}

impl Drop for CopySession {
    fn drop(&mut self) {
        self.permit = None;
        self.connection.close_idle();
    }
}

impl fmt::Debug for HostConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = self.0.host.to_string();
        f.debug_tuple("HostConnection").field(&host).finish()
    }
}

impl HostConnection {
    pub(super) fn new(host: &Host, ssh: &Ssh, sockets: Arc<ControlSockets>) -> Self {
        Self(Arc::new(Shared {
            host: host.clone(),
            ssh: ssh.clone(),
            sockets,
            login: tokio::sync::Mutex::default(),
            open: Mutex::default(),
        }))
    }

    /// Runs a script on the host. If the connection is lost before the answer, the request is repeated over a new one.
    pub(in crate::transfer::endpoint) async fn request(
        &self,
        script: &str,
        arguments: &[&str],
        limit: Duration,
    ) -> Result<ScriptReply, RequestFailure> {
        let mut repetitions = 0;
        loop {
            let master = self.connect(|open| Some(open.first()?.master.clone()));
            let master = master.await;
            let master = master.map_err(RequestFailure::Login)?;
            let lost = match timeout(limit, master.ask(script, arguments)).await {
                Ok(Ok(reply)) => return Ok(reply),
                Ok(Err(AskFailure::Lost(end))) => end,
                Ok(Err(AskFailure::LineBreak)) => return Err(RequestFailure::LineBreak),
                Err(_) => {
                    master.check().await;
                    return Err(RequestFailure::TimedOut);
                }
            };
            if repetitions == MAX_REPETITIONS {
                return Err(RequestFailure::Lost(lost.unwrap_or_default()));
            }
            repetitions += 1;
        }
    }

    /// Reserves a session for a copy. If no open connection has room for it, a further one is made.
    ///
    /// # Errors
    /// A connection was necessary and could not be made.
    pub(in crate::transfer::endpoint) async fn copy_session(
        &self,
        kind: SessionKind,
    ) -> Result<CopySession, LoginFailure> {
        let reserve = |open: &[OpenConnection]| {
            let open = match kind {
                // The connection for requests is the first.
                SessionKind::Commands => open.iter().find(|open| open.master.has_room(kind)),
                SessionKind::Data => open.iter().max_by_key(|open| open.master.room()),
            }?;
            Some((open.clone(), open.master.reserve(kind)?))
        };
        let (open, permit) = self.connect(reserve).await?;
        Ok(CopySession {
            connection: self.clone(),
            open,
            permit: Some(permit),
        })
    }

    /// Returns what `choose` takes of the open connections. If it takes nothing, logs in first.
    ///
    /// Only one login runs at a time. Those who wait for it share its failure: an unreachable host is not tried by each
    /// of them.
    async fn connect<T>(
        &self,
        choose: impl Fn(&[OpenConnection]) -> Option<T>,
    ) -> Result<T, LoginFailure> {
        let asked = Instant::now();
        loop {
            if let Some(chosen) = choose(&self.open()) {
                return Ok(chosen);
            }
            let mut last = self.0.login.lock().await;
            if let Some(chosen) = choose(&self.open()) {
                return Ok(chosen);
            }
            if let Some((failed, failure)) = &*last
                && *failed > asked
            {
                return Err(failure.clone());
            }
            match self.log_in().await {
                Ok(open) => self.open().push(open),
                Err(failure) => *last = Some((Instant::now(), failure)),
            }
        }
    }

    async fn log_in(&self) -> Result<OpenConnection, LoginFailure> {
        let Shared {
            host, ssh, sockets, ..
        } = &*self.0;
        let socket = sockets
            .next()
            .map_err(|error| LoginFailure::Spawn(Arc::new(error)))?;
        let began = Instant::now();
        let master = Master::log_in(host, ssh, &socket).await?;
        tracing::debug!(
            host = %host,
            elapsed_s = began.elapsed().as_secs_f64(),
            "ssh connection opened"
        );
        Ok(OpenConnection {
            master: Arc::new(master),
            socket,
        })
    }

    /// The open connections, without those that were lost.
    fn open(&self) -> MutexGuard<'_, Vec<OpenConnection>> {
        let mut open = self.0.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|open| open.master.is_alive());
        open
    }

    /// Closes further connections as soon as no copy uses any connection: between the copies of a worker, a single
    /// connection is idle again and again.
    fn close_idle(&self) {
        let mut open = self.open();
        if !open.iter().any(|open| open.master.has_copies()) {
            open.truncate(1);
        }
    }
}
