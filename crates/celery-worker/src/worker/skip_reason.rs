//! The decision if a task must not run, which several steps ask for.

use super::runtime::Runtime;
use crate::clock;
use celery_protocol::message::TaskMessage;
use celery_protocol::result::Cause;

impl Runtime {
    /// Reason why a task must not run, if any.
    pub(super) fn skip_reason(&self, message: &TaskMessage) -> Option<Cause> {
        let is_expired = message
            .expires
            .is_some_and(|expires| expires <= clock::now());
        match is_expired {
            true => Some(Cause::Expired),
            false => self.revoked.revokes(message).then_some(Cause::Revoked),
        }
    }
}
