//! Questions to a host about its network.

use super::parse::addresses;
use super::scripts::ADDRESSES;
use super::{AbsolutePath, Remote, ScriptCall};
use crate::transfer::endpoint::HostAddresses;
use crate::transfer::failures::{Role, TransferError};

impl Remote {
    /// Asks the host for its own addresses, and for that of a name.
    pub(in crate::transfer) async fn addresses(
        &self,
        name: &str,
    ) -> Result<HostAddresses, TransferError> {
        let nowhere = AbsolutePath::root();
        let arguments = [name];
        let role = Role::Destination;
        let request = ScriptCall::new(role, "getent", &nowhere, ADDRESSES, &arguments);
        let (request, reply) = self.run(request).await?;
        match (reply.code, reply.answers.as_slice()) {
            (0, [answer]) => {
                addresses(answer).ok_or_else(|| request.unexpected_answer(&reply.answers))
            }
            (0, answers) => Err(request.unexpected_answer(answers)),
            _ => Err(request.failure(reply)),
        }
    }
}
