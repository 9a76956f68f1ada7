//! One ssh connection per host, for all requests and copies of this process.
//!
//! Over a long link a login takes seconds: its round trips are sequential. The [connection](HostConnection) to a host is
//! made at its first use and stays open. It is an ssh process ([`master`]) with a [`shell`] for our requests, and with a
//! control socket in a private directory, by which the ssh of bbcp opens its own session. Each such process ends with
//! this one, for whatever reason this one ends (see [`relayed_command`](crate::process::relayed_command)).

use std::io;
use std::sync::Arc;
use std::time::Duration;

mod connection;
mod master;
mod options;
mod registry;
mod shell;

pub(in crate::transfer) use connection::CopySession;
pub(super) use connection::{HostConnection, RequestFailure};
pub(super) use master::MasterEnd;
pub(in crate::transfer) use registry::SshConnections;

/// Time limit of a login.
pub(super) const LOGIN_LIMIT: Duration = Duration::from_secs(60);

/// Answer of a script.
#[derive(Debug)]
pub(super) struct ScriptReply {
    /// Exit code.
    pub(super) code: i32,
    /// Lines of the answer.
    pub(super) answers: Vec<String>,
    /// Last line of the other output.
    pub(super) complaint: String,
}

/// Use of a copy's session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SessionKind {
    /// bbcp starts its other end, and the data have connections of their own.
    Commands,
    /// The data are sent through the session.
    Data,
}

/// Reason why there is no connection to a host. All who wait for a login get the same.
#[derive(Debug, Clone)]
pub(super) enum LoginFailure {
    /// There is no ssh on this host.
    ProgramMissing,
    /// ssh could not be started.
    Spawn(Arc<io::Error>),
    /// ssh has ended.
    Ended(MasterEnd),
    /// The other host did not answer within [`LOGIN_LIMIT`].
    TimedOut,
}
