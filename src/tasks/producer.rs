//! The messages that this stage sends.

use std::sync::Arc;

use async_trait::async_trait;
use celery::Celery;
use celery::task::Signature;

use super::{TransferFilesBbcp, TransferFilesBbcpParams};
use crate::manager::{Submit, SubmitError};

/// Sends `transfer_files_bbcp` through an app.
pub struct Producer(pub Arc<Celery>);

#[async_trait]
impl Submit for Producer {
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
