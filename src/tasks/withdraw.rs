//! The row of a transfer whose message ends without an attempt.

use serde_json::Value;
use tokio_util::sync::CancellationToken;

use super::base::DataTransferTask;
use super::messages::data_transfer_id;
use crate::transfer::database_retry::retry_until_reachable;
use crate::transfer::id::TransferId;
use crate::transfer::repository::Withdrawal;
use celery_protocol::message::TaskMessage;
use celery_worker::task::Discarded;

impl DataTransferTask {
    /// Takes a transfer out of SCHEDULED if its message is not run, so that the row does not wait for it.
    ///
    /// A revoked message means that an operator does not want the transfer: it becomes FAILED. A message
    /// that has expired or has wrong arguments is not an error of the transfer: it becomes PENDING, and the
    /// manager sends a correct message.
    pub async fn discarded(&self, message: &TaskMessage, reason: &Discarded) {
        // The large body of a message that is not run is not read; its headers show the arguments.
        let shown = |repr: &Option<String>| repr.clone().map_or(Value::Null, Value::String);
        let id = data_transfer_id(&message.args, &message.kwargs)
            .or_else(|| data_transfer_id(&shown(&message.argsrepr), &shown(&message.kwargsrepr)));
        let Some(id) = id else {
            // The row of the message is unknown. The manager's reconciliation finds it.
            return;
        };
        let (why, withdrawal) = match reason {
            Discarded::Revoked => ("revoked", Withdrawal::Failed(revoked(id, &message.id))),
            Discarded::Expired => ("expired", Withdrawal::Pending),
            Discarded::WrongArguments(_) => ("wrong_arguments", Withdrawal::Pending),
        };
        self.withdraw(id, &message.id, &withdrawal, why).await;
    }

    /// Takes a transfer out of SCHEDULED. Tries until the database can be reached. Nothing is changed if a worker holds
    /// the transfer, or if another message was sent since. The worker drops this future when it stops.
    pub(super) async fn withdraw(
        &self,
        id: TransferId,
        task_id: &str,
        withdrawal: &Withdrawal,
        reason: &'static str,
    ) {
        let repository = self.service().repository();
        let withdrawing = || repository.withdraw(id, task_id, withdrawal);
        let never = CancellationToken::new();
        match retry_until_reachable(&never, withdrawing).await {
            Ok(true) => tracing::warn!(
                data_transfer_id = id.get(),
                task_id,
                reason,
                row = match withdrawal {
                    Withdrawal::Pending => "PENDING",
                    Withdrawal::Failed(_) => "FAILED",
                },
                "message ended without an attempt; its transfer no longer waits for it"
            ),
            Ok(false) => {}
            Err(error) => tracing::error!(
                data_transfer_id = id.get(),
                task_id,
                reason,
                error = error.chain(),
                "message ended without an attempt and its row could not be changed"
            ),
        }
    }
}

fn revoked(id: TransferId, task_id: &str) -> String {
    format!(
        "revoked by an operator through remote control, before it began (task {task_id}); \
         `ccat-transfer transfers retry {id}` sends it again"
    )
}
