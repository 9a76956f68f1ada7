//! Options of a broker of any kind.

use std::sync::Arc;

use super::{Broker, BrokerError};
use crate::liveness::LivenessRegistry;

/// Options of a broker; the scheme of its URL decides about the kind.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum BrokerOptions {
    /// RabbitMQ.
    #[cfg(feature = "amqp")]
    Amqp(super::amqp::AmqpOptions),
    /// Redis.
    #[cfg(feature = "redis")]
    Redis(Box<super::redis::RedisBrokerOptions>),
}

impl BrokerOptions {
    /// Creates the broker, which connects at its first use. The loops of its subscriptions are registered in `liveness`.
    ///
    /// # Errors
    /// [`BrokerError::Url`] and [`BrokerError::Tls`].
    pub fn open(&self, liveness: &LivenessRegistry) -> Result<Arc<dyn Broker>, BrokerError> {
        let liveness = liveness.clone();
        match self {
            #[cfg(feature = "amqp")]
            Self::Amqp(options) => Ok(Arc::new(
                super::amqp::Amqp::new(options)?.with_liveness(liveness),
            )),
            #[cfg(feature = "redis")]
            Self::Redis(options) => Ok(Arc::new(
                super::redis::RedisBroker::new(options)?.with_liveness(liveness),
            )),
        }
    }
}
