//! Producer of the messages of this program.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use celery::Celery;
use celery::error::{BrokerError, CeleryError};
use celery::task::{Signature, Task as _};

use super::{TransferFilesBbcp, TransferFilesBbcpParams};
use crate::manager::{Submit, SubmitError};
use crate::settings;
use crate::transfer::id::TransferId;
use celery_worker::celery_crate::app;
use celery_worker_cli::metrics::TaskMetrics;

/// Sends `transfer_files_bbcp` through an app.
pub struct Producer {
    app: Arc<Celery>,
    /// Name of the task in messages.
    task: String,
    metrics: Option<TaskMetrics>,
}

impl Producer {
    /// Creates a producer that sends through `app`; the settings contain the names of the tasks.
    #[must_use]
    pub fn new(app: Arc<Celery>, settings: &settings::Celery) -> Self {
        let task = super::wire_names(settings).remove(TransferFilesBbcp::NAME);
        Self {
            app,
            task: task.unwrap_or_else(|| TransferFilesBbcp::NAME.to_owned()),
            metrics: None,
        }
    }

    /// Adds counters for the sent messages.
    #[must_use]
    pub fn with_metrics(self, metrics: TaskMetrics) -> Self {
        Self {
            metrics: Some(metrics),
            ..self
        }
    }
}

#[async_trait]
impl Submit for Producer {
    async fn prepare(&self, within: Duration) -> Result<(), SubmitError> {
        // In whole seconds, at least one: the resolution of the crate's time limits.
        let seconds = u32::try_from(within.as_secs()).unwrap_or(u32::MAX).max(1);
        self.app
            .broker
            .reconnect(seconds)
            .await
            .map_err(SubmitError::unanswered)
    }

    async fn submit(
        &self,
        data_transfer_id: TransferId,
        queue: &str,
    ) -> Result<String, SubmitError> {
        let params = TransferFilesBbcpParams {
            data_transfer_id,
            session: None,
        };
        let signature = Signature::<TransferFilesBbcp>::new(params).with_queue(queue);
        let sent = self.app.send_task(signature).await.map_err(submit_error)?;
        if let Some(metrics) = &self.metrics {
            metrics.sent(&self.task, queue);
        }
        Ok(sent.task_id)
    }
}

fn submit_error(error: CeleryError) -> SubmitError {
    match &error {
        CeleryError::BrokerError(BrokerError::IoError(source)) if app::is_unanswered(source) => {
            SubmitError::unanswered(error)
        }
        _ => SubmitError::refused(error),
    }
}
