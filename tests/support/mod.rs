//! What integration tests share: the services that `scripts/test.sh` starts.

#![allow(dead_code, reason = "each test binary uses a part of it")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests"
)]

pub mod tasks;

use std::time::Duration;

use ccat_transfer::broker::amqp::{Amqp, Options};

/// A service's URL from the environment. Where there is none the test is skipped and says so,
/// unless `TEST_SERVICES=required`, as in `scripts/test.sh`.
pub fn service(name: &str) -> Option<String> {
    let url = std::env::var(name).ok().filter(|url| !url.is_empty());
    if url.is_none() {
        assert_ne!(
            std::env::var("TEST_SERVICES").as_deref(),
            Ok("required"),
            "{name} is not set, but TEST_SERVICES=required"
        );
        eprintln!("skipped: {name} is not set; scripts/test.sh starts the service and sets it");
    }
    url
}

/// A transport to the test broker.
pub fn amqp(url: &str, name: &str) -> Amqp {
    Amqp::new(&Options {
        url: url.into(),
        heartbeat: 20,
        connection_timeout: Duration::from_secs(5),
        name: name.into(),
    })
    .unwrap()
}

/// A name that no other test uses.
pub fn unique(prefix: &str) -> String {
    format!("{prefix}-{}", uuid::Uuid::new_v4().simple())
}

/// Waits until `holds`, for half a minute at most.
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
