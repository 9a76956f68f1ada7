//! Questions to a host about its network, and the file of a trial copy from it.

use super::parse::addresses;
use super::scripts::{ADDRESSES, KERNEL, MAKE_TRIAL, REMOVE_TRIAL};
use super::{AbsolutePath, Remote, ScriptCall, expect_word};
use crate::transfer::endpoint::HostAddresses;
use crate::transfer::failures::{Role, TransferError};
use crate::transfer::link_probe::KERNEL_NAMES;

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

    /// Reads the limits of the host's kernel, one in each line.
    pub(in crate::transfer) async fn kernel_limits(&self) -> Result<Vec<String>, TransferError> {
        let nowhere = AbsolutePath::root();
        let role = Role::Destination;
        let request = ScriptCall::new(role, "sysctl", &nowhere, KERNEL, &KERNEL_NAMES);
        let (request, reply) = self.run(request).await?;
        match reply.code {
            0 => Ok(reply.answers),
            _ => Err(request.failure(reply)),
        }
    }

    /// Makes a sparse file in a directory of its own, in the host's directory for temporary files. Returns its path.
    pub(in crate::transfer) async fn make_trial_file(
        &self,
        name: &str,
        bytes: u64,
    ) -> Result<String, TransferError> {
        let nowhere = AbsolutePath::root();
        let bytes = bytes.to_string();
        let arguments = [name, bytes.as_str()];
        let request = ScriptCall::new(Role::Origin, "create", &nowhere, MAKE_TRIAL, &arguments);
        let (request, mut reply) = self.run(request).await?;
        match (reply.code, reply.answers.pop()) {
            (0, Some(path)) => Ok(path),
            _ => Err(request.failure(reply)),
        }
    }

    /// Removes the file of [`Self::make_trial_file`] with its directory.
    pub(in crate::transfer) async fn remove_trial_file(
        &self,
        name: &str,
    ) -> Result<(), TransferError> {
        let nowhere = AbsolutePath::root();
        let arguments = [name];
        let request = ScriptCall::new(Role::Origin, "unlink", &nowhere, REMOVE_TRIAL, &arguments);
        let (request, reply) = self.run(request).await?;
        expect_word(&request, reply, "removed")
    }
}
