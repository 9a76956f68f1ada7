//! Common parts of the integration tests; the services are started by `scripts/test.sh`.

#![allow(dead_code, reason = "each test binary uses a part of it")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests"
)]

mod service;

pub use service::service;

use std::time::Duration;

use celery_worker::broker::amqp::{Amqp, AmqpOptions};

/// Creates a client of the test broker.
pub fn amqp(url: &str, name: &str) -> Amqp {
    Amqp::new(&AmqpOptions::new(url, name)).unwrap()
}

/// Returns a name that no other test uses.
pub fn unique(prefix: &str) -> String {
    format!("{prefix}-{}", uuid::Uuid::new_v4().simple())
}

/// Waits until `holds` returns true, for at most half a minute.
pub async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    while !holds().await {
        assert!(
            tokio::time::Instant::now() < deadline,
            "not within 30 s: {what}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
