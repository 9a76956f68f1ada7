//! A broker for tests that records what would be sent.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;

use super::consumer::Feed;
use super::{Broker, BrokerError, Consumer, Publication, QueueDepth, Subscription};

/// Keeps what was published, and answers as a broker that took it.
#[derive(Debug, Default)]
pub struct Recorder(Mutex<Vec<Publication>>);

impl Recorder {
    /// What was published since it was last asked, in order.
    #[must_use]
    pub fn take(&self) -> Vec<Publication> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[async_trait]
impl Broker for Recorder {
    fn masked_url(&self) -> String {
        "recorder://".into()
    }
    async fn publish(&self, publication: &Publication, _: Duration) -> Result<(), BrokerError> {
        let mut published = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        published.push(publication.clone());
        Ok(())
    }
    async fn publish_until_confirmed(
        &self,
        publication: &Publication,
        within: Duration,
    ) -> Result<(), BrokerError> {
        self.publish(publication, within).await
    }
    async fn prepare(&self, _: Duration) -> Result<(), BrokerError> {
        Ok(())
    }
    fn consume(&self, subscription: Subscription) -> Consumer {
        Feed::new(&subscription, Default::default()).1
    }
    async fn survey(&self, _: &[String]) -> Result<Vec<QueueDepth>, BrokerError> {
        Ok(Vec::new())
    }
    async fn close(&self) {}
}
