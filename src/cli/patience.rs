//! `--wait-for`: servers that are not there yet when a service starts.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};

use super::CliError;
use celery_worker::broker::Broker;
use service_connection::backoff::{RetryState, Setback, in_seconds};
use service_connection::error_chain::chain;

/// First and longest pause between two tries.
const PAUSES: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));

/// The flag.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct WaitFor {
    /// Wait so many seconds at the start for the broker and the database, instead of failing
    /// [without a number: 60].
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
    /// The time begins now.
    pub(super) fn patience(self) -> Patience {
        Patience::new(self.seconds)
    }
}

/// How long the broker and the database may take to be there, both together.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience(Option<Instant>);

impl Patience {
    /// So many seconds from now; none is no patience at all.
    fn new(seconds: Option<u32>) -> Self {
        Self(seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds.into())))
    }

    /// Asks until the broker answers, or the time is over. Without patience it is not asked at all: a
    /// worker or a manager goes on trying by itself.
    ///
    /// # Errors
    /// As [`Self::reach`].
    pub(super) async fn reach_broker(self, transport: &dyn Broker) -> Result<(), CliError> {
        if self.0.is_none() {
            return Ok(());
        }
        let ask = async || Ok(transport.survey(&[]).await.map(drop)?);
        self.reach("the broker", ask).await
    }

    /// Asks until `what` answers, or the time is over.
    ///
    /// # Errors
    /// The last one. One that waiting does not mend (a wrong password, another schema) at once.
    pub(super) async fn reach<T>(
        self,
        what: &str,
        mut ask: impl AsyncFnMut() -> Result<T, CliError>,
    ) -> Result<T, CliError> {
        let Some(until) = self.0 else {
            return ask().await;
        };
        // A last try comes near the end of a short time, too.
        let whole = until.saturating_duration_since(Instant::now());
        let mut attempts = RetryState::new((PAUSES.0, PAUSES.1.min(whole / 10).max(PAUSES.0)));
        loop {
            let answer = timeout_at(until, ask()).await;
            let error = match answer {
                Ok(Err(error)) if error.is_unreachable() => error,
                Ok(answer) => return answer,
                Err(_) => CliError::Unreachable(format!("{what} did not answer (--wait-for)")),
            };
            let Setback { pause, should_log } = attempts.failed(&error);
            if Instant::now() + pause >= until {
                return Err(error);
            }
            if should_log {
                tracing::warn!(
                    server = what,
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

    fn unreachable() -> CliError {
        CliError::Unreachable("not yet".into())
    }

    #[tokio::test]
    async fn it_waits_for_what_comes() {
        let mut tries = 0;
        let reached = Patience::new(Some(60)).reach("it", async || {
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
    async fn it_does_not_wait_for_ever() {
        let never = async || Err::<(), _>(unreachable());
        let began = Instant::now();
        let reached = Patience::new(Some(3)).reach("it", never).await;
        assert!(matches!(reached, Err(CliError::Unreachable(_))));
        let waited = began.elapsed();
        assert!(
            (Duration::from_millis(2500)..Duration::from_secs(4)).contains(&waited),
            "{waited:?}"
        );
        let silent = async || std::future::pending::<Result<(), CliError>>().await;
        let reached = Patience::new(Some(1)).reach("it", silent).await;
        assert!(matches!(reached, Err(CliError::Unreachable(_))));
    }

    #[tokio::test]
    async fn it_does_not_wait_for_what_waiting_does_not_mend() {
        let mut tries = 0;
        let reached = Patience::new(Some(3600)).reach("it", async || {
            tries += 1;
            Err::<(), _>(CliError::Configuration("wrong".into()))
        });
        assert!(matches!(reached.await, Err(CliError::Configuration(_))));
        let reached = Patience::new(None).reach("it", async || {
            tries += 1;
            Err::<(), _>(unreachable())
        });
        assert!(reached.await.is_err());
        assert_eq!(tries, 2);
    }
}
