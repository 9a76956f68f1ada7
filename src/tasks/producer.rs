//! The messages that this stage sends.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use celery::Celery;
use celery::task::Signature;

use super::{TransferFilesBbcp, TransferFilesBbcpParams};
use crate::manager::{Submit, SubmitError};

/// Sends `transfer_files_bbcp` through an app.
pub struct Producer(pub Arc<Celery>);

#[async_trait]
impl Submit for Producer {
    async fn prepare(&self, within: Duration) -> Result<(), SubmitError> {
        // In whole seconds, one at the least: the crate's idea of time.
        let seconds = u32::try_from(within.as_secs()).unwrap_or(u32::MAX).max(1);
        self.0
            .broker
            .reconnect(seconds)
            .await
            .map_err(|e| SubmitError(Box::new(e)))
    }

    async fn submit(&self, data_transfer_id: i64, queue: &str) -> Result<(), SubmitError> {
        let params = TransferFilesBbcpParams {
            data_transfer_id,
            session: None,
        };
        let signature = Signature::<TransferFilesBbcp>::new(params).with_queue(queue);
        self.0
            .send_task(signature)
            .await
            .map(drop)
            .map_err(|e| SubmitError(Box::new(e)))
    }
}
