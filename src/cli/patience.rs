//! `--wait-for`: servers that are not there yet when a service starts.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};

use super::CliError;
use crate::pauses::Pauses;
use crate::telemetry::chain;

/// First and longest pause between two tries.
const PAUSES: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));

/// How long the broker and the database may take to be there, both together.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience(Option<Instant>);

impl Patience {
    /// So many seconds from now; none is no patience at all.
    pub(super) fn new(seconds: Option<u32>) -> Self {
        Self(seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds.into())))
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
        let mut pauses = Pauses::new(PAUSES.0, PAUSES.1);
        loop {
            let answer = timeout_at(until, ask()).await;
            let error = match answer {
                Ok(Err(error)) if error.is_unreachable() => error,
                Ok(answer) => return answer,
                Err(_) => CliError::Unreachable(format!("{what} did not answer (--wait-for)")),
            };
            let pause = pauses.next_pause();
            if Instant::now() + pause >= until {
                return Err(error);
            }
            tracing::warn!(
                error = %chain(&error),
                retry_in = %humantime::format_duration(pause),
                "waiting for {what}"
            );
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

    #[tokio::test(start_paused = true)]
    async fn it_waits_for_what_comes_and_not_for_ever() {
        let mut tries = 0;
        let reached = Patience::new(Some(60)).reach("it", async || {
            tries += 1;
            if tries > 4 {
                Ok(tries)
            } else {
                Err(unreachable())
            }
        });
        assert!(matches!(reached.await, Ok(5)));

        let began = Instant::now();
        let reached = Patience::new(Some(60)).reach("it", async || Err::<(), _>(unreachable()));
        assert!(matches!(reached.await, Err(CliError::Unreachable(_))));
        assert!(began.elapsed() <= Duration::from_secs(60));
        assert!(began.elapsed() >= Duration::from_secs(50));
    }

    #[tokio::test(start_paused = true)]
    async fn it_does_not_wait_for_what_waiting_does_not_mend() {
        let wrong = async || Err::<(), _>(CliError::Configuration("wrong".into()));
        let began = Instant::now();
        let reached = Patience::new(Some(60)).reach("it", wrong).await;
        assert!(matches!(reached, Err(CliError::Configuration(_))));
        let reached = Patience::new(None).reach("it", async || Err::<(), _>(unreachable()));
        assert!(reached.await.is_err());
        assert_eq!(began.elapsed(), Duration::ZERO);
    }
}
