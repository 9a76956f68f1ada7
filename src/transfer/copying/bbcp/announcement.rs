//! Questions to both hosts after a data connection failed: which address did the listener announce, and where does it lead?

use std::net::IpAddr;
use std::time::Duration;

use nix::unistd::gethostname;
use tokio::net::lookup_host;
use tokio::time::timeout;

use super::outcome::listener;
use crate::transfer::endpoint::{Endpoint, Remote};
use crate::transfer::failures::{DataConnection, ListenerAddresses, Role, TransferError};
use crate::transfer::plan::Plan;

/// Time limit of all questions. Without answers the failure has less text.
const LIMIT: Duration = Duration::from_secs(15);

/// Adds the answers of both hosts to an error about data connections. Returns every other error unchanged.
pub(super) async fn explain(mut error: TransferError, plan: &Plan) -> TransferError {
    if let TransferError::DataPort { connection, .. } = &mut error {
        let known = timeout(LIMIT, addresses(plan, connection)).await;
        connection.explain(known.unwrap_or_default(), plan.bbcp.no_dns);
    }
    error
}

async fn addresses(plan: &Plan, connection: &DataConnection) -> ListenerAddresses {
    let (listening, calling) = match listener(plan) {
        Role::Origin => (plan.source.endpoint(), plan.target.endpoint()),
        Role::Destination => (plan.target.endpoint(), plan.source.endpoint()),
    };
    match (listening, calling) {
        (Endpoint::Remote(remote), _) => of_remote_listener(remote, connection).await,
        (Endpoint::Local, Endpoint::Remote(remote)) => of_local_listener(remote).await,
        (Endpoint::Local, Endpoint::Local) => ListenerAddresses::default(),
    }
}

async fn of_remote_listener(remote: &Remote, connection: &DataConnection) -> ListenerAddresses {
    // An error means that nothing can be added.
    let Ok(answer) = remote.addresses("").await else {
        return ListenerAddresses::default();
    };
    let announced = connection
        .announced
        .as_deref()
        .or(answer.own_name.as_deref());
    let address_for_caller = match announced {
        Some(name) => resolve(name).await,
        None => None,
    };
    ListenerAddresses {
        caller_was_asked: true,
        address_for_caller,
        own_name: answer.own_name,
        own_address: answer.own_address,
        address_of_ssh: answer.ssh_server,
    }
}

async fn of_local_listener(remote: &Remote) -> ListenerAddresses {
    let own_name = gethostname().ok().and_then(|name| name.into_string().ok());
    let name = own_name.as_deref().unwrap_or_default();
    let own_address = resolve(name).await;
    let Ok(answer) = remote.addresses(name).await else {
        return ListenerAddresses {
            own_address,
            own_name,
            ..ListenerAddresses::default()
        };
    };
    ListenerAddresses {
        own_address,
        own_name,
        address_for_caller: answer.asked,
        // Where it does not find its own name, it may lack the program that looks names up.
        caller_was_asked: answer.own_address.is_some(),
        address_of_ssh: answer.ssh_client,
    }
}

/// First address of a name on this host, as bbcp uses it.
async fn resolve(name: &str) -> Option<IpAddr> {
    let mut addresses = lookup_host((name, 0)).await.ok()?;
    addresses.next().map(|address| address.ip().to_canonical())
}
