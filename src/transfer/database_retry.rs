//! Repetition of statements until the ops-db accepts them.
//!
//! An error of the database is not an error of a transfer unless it concerns the values of that transfer's rows.
//! Therefore an attempt waits: with short pauses for a database that cannot be reached, and with longer ones for a
//! database that refuses a login or a statement, since an administrator has to act. The message stays unacknowledged
//! meanwhile, and the attempt keeps its lease until another worker takes it.

use std::ops::ControlFlow;
use std::time::Duration;

use futures_util::future::select_all;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::database::DatabaseError;
use super::failures::TransferError;
use super::lease::{Lease, LeaseError};
use service_connection::backoff::{RetryState, Setback, in_seconds};
use service_connection::error_chain::chain;

/// First and longest pause between two attempts to reach the database.
const UNREACHABLE_PAUSES: (Duration, Duration) =
    (Duration::from_millis(200), Duration::from_secs(10));

/// First and longest pause between two statements that the database refuses.
const REFUSED_PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// Repeats a call until the database answers, or until the caller gives up.
///
/// # Errors
/// [`TransferError::Interrupted`] if `cancelled` is cancelled during the wait for the database,
/// [`TransferError::Database`] if the database refuses a value of this transfer.
pub async fn retry_until_reachable<T, F>(
    cancelled: &CancellationToken,
    ask: impl FnMut() -> F,
) -> Result<T, TransferError>
where
    F: Future<Output = Result<T, DatabaseError>>,
{
    retry(&[cancelled], |_| true, ask).await
}

/// Makes a change that needs a lease, and waits for the database as long as needed.
///
/// # Errors
/// [`TransferError::LeaseLost`], and the errors of [`retry_until_reachable`].
pub async fn write_with_lease<F>(
    lease: &Lease,
    cancelled: &CancellationToken,
    mut change: impl FnMut() -> F,
) -> Result<(), TransferError>
where
    F: Future<Output = Result<(), LeaseError>>,
{
    let answer = retry_until_reachable(cancelled, || {
        let changing = change();
        async {
            match changing.await {
                Ok(()) => Ok(ControlFlow::Continue(())),
                Err(LeaseError::Lost) => Ok(ControlFlow::Break(())),
                Err(LeaseError::Database(error)) => Err(error),
            }
        }
    })
    .await?;
    match answer {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(TransferError::LeaseLost {
            id: lease.data_transfer_id(),
        }),
    }
}

/// Repeats a call until the database answers, until one of `ends` is cancelled, or until `is_retryable` returns false
/// for an error.
///
/// # Errors
/// The errors of [`retry_until_reachable`].
pub(super) async fn retry<T, F>(
    ends: &[&CancellationToken],
    is_retryable: impl Fn(&DatabaseError) -> bool,
    mut ask: impl FnMut() -> F,
) -> Result<T, TransferError>
where
    F: Future<Output = Result<T, DatabaseError>>,
{
    // No `RetryLoop`: the two kinds of failure have pauses and log levels of their own, and only a pause is cancelled,
    // never a statement that may have been committed.
    let (mut unreachable, mut refused) = (
        RetryState::new(UNREACHABLE_PAUSES),
        RetryState::new(REFUSED_PAUSES),
    );
    loop {
        let error = match ask().await {
            Ok(answer) => return Ok(answer),
            Err(error) => error,
        };
        if error.is_of_one_row() || !is_retryable(&error) {
            return Err(TransferError::Database {
                source: error.into(),
            });
        }
        let pause = match error.is_unreachable() {
            true => {
                let Setback { pause, should_log } = unreachable.failed(&error);
                if should_log {
                    tracing::warn!(
                        error = %chain(&error),
                        retry_in_s = in_seconds(pause),
                        "the database cannot be reached"
                    );
                }
                pause
            }
            false => {
                let Setback { pause, should_log } = refused.failed(&error);
                if should_log {
                    tracing::error!(
                        error = %chain(&error),
                        retry_in_s = in_seconds(pause),
                        "the database refuses statements; waiting until this is corrected"
                    );
                }
                pause
            }
        };
        tokio::select! {
            () = any_cancelled(ends) => {
                return Err(TransferError::STOPPED);
            }
            () = sleep(pause) => {}
        }
    }
}

/// Waits until one of the tokens is cancelled.
pub(super) async fn any_cancelled(ends: &[&CancellationToken]) {
    let cancelled = ends.iter().map(|end| Box::pin(end.cancelled()));
    select_all(cancelled).await;
}
