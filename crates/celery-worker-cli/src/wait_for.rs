//! The flag `--wait-for`: waits for servers that cannot be reached yet when a service starts.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};

use celery_worker::broker::Broker;
use service_connection::backoff::{RetryState, Setback, in_seconds};
use service_connection::error_chain::chain;

use crate::error::{ProcessError, StartError};

/// First and longest pause between two attempts.
const PAUSES: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));

/// The flag `--wait-for`.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct WaitFor {
    /// Wait at the start up to this number of seconds for the broker and the database, instead of failing [without a
    /// number: 60].
    #[arg(
        long = "wait-for",
        value_name = "SECONDS",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "60"
    )]
    seconds: Option<u32>,
}

impl WaitFor {
    /// The deadline for all servers together, counted from this call.
    #[must_use]
    pub fn deadline(self) -> StartDeadline {
        StartDeadline::new(self.seconds)
    }
}

/// Deadline until which the start waits for its servers; without one, it does not wait.
#[derive(Debug, Clone, Copy)]
pub struct StartDeadline(Option<Instant>);

impl StartDeadline {
    fn new(seconds: Option<u32>) -> Self {
        Self(seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds.into())))
    }

    /// Waits until the broker answers. Without a deadline it returns at once, because a worker or another service
    /// retries its connection itself.
    ///
    /// # Errors
    /// As [`Self::retry_until_reachable`].
    pub async fn wait_for_broker(self, broker: &dyn Broker) -> Result<(), ProcessError> {
        if self.0.is_none() {
            return Ok(());
        }
        let ask = async || Ok(broker.survey(&[]).await.map(drop)?);
        self.retry_until_reachable("the broker", ask).await
    }

    /// Calls `connect` until the server `name` can be reached, or the deadline has passed.
    ///
    /// # Errors
    /// The last error. An error for which waiting does not help (a wrong password, another schema) is returned at once.
    pub async fn retry_until_reachable<T, E: StartError + 'static>(
        self,
        name: &str,
        mut connect: impl AsyncFnMut() -> Result<T, E>,
    ) -> Result<T, E> {
        let Some(until) = self.0 else {
            return connect().await;
        };
        // The pause is short compared to the total time, so that the last attempt is near its end.
        let whole = until.saturating_duration_since(Instant::now());
        let mut attempts = RetryState::new((PAUSES.0, PAUSES.1.min(whole / 10).max(PAUSES.0)));
        loop {
            let error = match timeout_at(until, connect()).await {
                Ok(Err(error)) if error.is_unreachable() => error,
                Ok(answer) => return answer,
                Err(_) => {
                    ProcessError::Unreachable(format!("{name} did not answer (--wait-for)")).into()
                }
            };
            let Setback { pause, should_log } = attempts.failed(&error);
            if Instant::now() + pause >= until {
                return Err(error);
            }
            if should_log {
                tracing::warn!(
                    server = name,
                    error = %chain(&error),
                    retry_in_s = in_seconds(pause),
                    "waiting for a server (--wait-for)"
                );
            }
            sleep(pause).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unreachable() -> ProcessError {
        ProcessError::Unreachable("not yet".into())
    }

    #[tokio::test]
    async fn unreachable_server_is_retried() {
        let mut tries = 0;
        let reached = StartDeadline::new(Some(60)).retry_until_reachable("it", async || {
            tries += 1;
            if tries > 2 {
                Ok(tries)
            } else {
                Err(unreachable())
            }
        });
        assert!(matches!(reached.await, Ok(3)));
    }

    #[tokio::test]
    async fn wait_ends_at_the_deadline() {
        let never = async || Err::<(), _>(unreachable());
        let began = Instant::now();
        let reached = StartDeadline::new(Some(3))
            .retry_until_reachable("it", never)
            .await;
        assert!(matches!(reached, Err(ProcessError::Unreachable(_))));
        let waited = began.elapsed();
        assert!(
            (Duration::from_millis(2500)..Duration::from_secs(4)).contains(&waited),
            "{waited:?}"
        );
        let silent = async || std::future::pending::<Result<(), ProcessError>>().await;
        let reached = StartDeadline::new(Some(1))
            .retry_until_reachable("it", silent)
            .await;
        assert!(matches!(reached, Err(ProcessError::Unreachable(_))));
    }

    #[tokio::test]
    async fn other_errors_are_returned_at_once() {
        let mut tries = 0;
        let reached = StartDeadline::new(Some(3600)).retry_until_reachable("it", async || {
            tries += 1;
            Err::<(), _>(ProcessError::Configuration("wrong".into()))
        });
        assert!(matches!(reached.await, Err(ProcessError::Configuration(_))));
        let reached = StartDeadline::new(None).retry_until_reachable("it", async || {
            tries += 1;
            Err::<(), _>(unreachable())
        });
        assert!(reached.await.is_err());
        assert_eq!(tries, 2);
    }
}
