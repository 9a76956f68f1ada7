//! The database as a source of data: connected when it is needed, and read once for all viewers.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::sync::{OnceCell, watch};
use tokio::time::{Instant, timeout, timeout_at};

use super::super::model::Unreachable;
use crate::clock;
use crate::settings::OpsDb;
use crate::transfer::database::{Database, DatabaseError};
use crate::transfer::repository::Repository;
use crate::{advice, transfer::schema::SchemaError};
use service_connection::error_chain::chain;

/// Maximum number of connections to the database.
const CONNECTIONS: u32 = 4;

/// Longest time limit for getting a connection. A statement has twice this time.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest wait of a request that has its own query. The server ends a connection after ten seconds without an answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Minimum age of data before they are read again.
const MIN_AGE: Duration = Duration::from_secs(1);

/// Expensive data are not read again before this multiple of the time that reading them has taken.
const SHARE: u32 = 20;

/// The database.
pub(super) struct Source {
    settings: OpsDb,
    repository: OnceCell<Repository>,
    failing_since: Mutex<Option<DateTime<Utc>>>,
}

impl Source {
    pub(super) fn new(settings: &OpsDb) -> Self {
        Self {
            settings: OpsDb {
                max_connections: CONNECTIONS,
                acquire_timeout: settings.acquire_timeout.min(ACQUIRE_TIMEOUT),
                ..settings.clone()
            },
            repository: OnceCell::new(),
            failing_since: Mutex::default(),
        }
    }

    /// Reads from the database.
    ///
    /// # Errors
    /// The database cannot be read, and the time since when.
    pub(super) async fn read<T, F>(
        &self,
        work: impl FnOnce(Repository) -> F,
    ) -> Result<T, Unreachable>
    where
        F: Future<Output = Result<T, DatabaseError>>,
    {
        let begin = clock::now();
        let reading = async {
            let repository = self.repository.get_or_try_init(|| self.open()).await?;
            let read = work(repository.clone()).await;
            read.map_err(|error| chain(&error).to_string())
        };
        match reading.await {
            Ok(value) => {
                *lock(&self.failing_since) = None;
                Ok(value)
            }
            Err(error) => Err(Unreachable {
                since: *lock(&self.failing_since).get_or_insert(begin),
                error,
            }),
        }
    }

    /// Reads from the database for one request, which waits for a limited time.
    ///
    /// # Errors
    /// The errors of [`Self::read`], or there was no answer in time.
    pub(super) async fn answer<T, F>(
        &self,
        work: impl FnOnce(Repository) -> F,
    ) -> Result<T, Unreachable>
    where
        F: Future<Output = Result<T, DatabaseError>>,
    {
        timeout(ANSWER_TIMEOUT, self.read(work))
            .await
            .unwrap_or_else(|_| Err(self.silent(ANSWER_TIMEOUT)))
    }

    async fn open(&self) -> Result<Repository, String> {
        let database = Database::connect_read_only(&self.settings)
            .await
            .map_err(|error| format!("{}{}", chain(&error), advice::database_command(&error)))?;
        Repository::open(database, self.settings.text_enum_labels)
            .await
            .map_err(|error| match &error {
                SchemaError::Differs(differences) => {
                    format!("{}{}", chain(&error), advice::schema_command(differences))
                }
                SchemaError::Database(_) => chain(&error).to_string(),
            })
    }

    /// The state while there is no answer for some time.
    pub(super) fn silent(&self, time: Duration) -> Unreachable {
        Unreachable {
            since: *lock(&self.failing_since).get_or_insert_with(clock::now),
            error: format!("no answer within {}", humantime::format_duration(time)),
        }
    }
}

type Reading<T> = Pin<Box<dyn Future<Output = Result<T, Unreachable>> + Send>>;

/// Data that are read once for all viewers.
pub(super) struct Part<T> {
    shared: Arc<Shared<T>>,
}

struct Shared<T> {
    read: Box<dyn Fn() -> Reading<T> + Send + Sync>,
    /// The data are not read again before this multiple of the time that reading them has taken.
    rest: u32,
    /// The data are not read again before this time.
    min_age: Duration,
    state: Mutex<State<T>>,
    /// Changes whenever the data were read.
    ended: watch::Sender<()>,
}

struct State<T> {
    value: Option<Arc<T>>,
    failure: Option<Unreachable>,
    /// Time until which the data are current; `None` before they were read for the first time.
    current_until: Option<Instant>,
    /// Start of the running read, by both clocks.
    running: Option<(Instant, DateTime<Utc>)>,
}

impl<T: Send + Sync + 'static> Part<T> {
    /// Data that are read whenever they are a second old.
    pub(super) fn new<F>(
        source: &Arc<Source>,
        read: impl Fn(Repository) -> F + Clone + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = Result<T, DatabaseError>> + Send + 'static,
    {
        Self::with_rest(source, 1, read)
    }

    /// Data that are read for a twentieth of the time at most.
    pub(super) fn expensive<F>(
        source: &Arc<Source>,
        read: impl Fn(Repository) -> F + Clone + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = Result<T, DatabaseError>> + Send + 'static,
    {
        Self::with_rest(source, SHARE, read)
    }

    fn with_rest<F>(
        source: &Arc<Source>,
        rest: u32,
        read: impl Fn(Repository) -> F + Clone + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = Result<T, DatabaseError>> + Send + 'static,
    {
        let source = source.clone();
        Self::of(rest, MIN_AGE, move || {
            let (source, read) = (source.clone(), read.clone());
            Box::pin(async move { source.read(read).await })
        })
    }

    fn of(
        rest: u32,
        min_age: Duration,
        read: impl Fn() -> Reading<T> + Send + Sync + 'static,
    ) -> Self {
        Self {
            shared: Arc::new(Shared {
                read: Box::new(read),
                rest,
                min_age,
                state: Mutex::new(State {
                    value: None,
                    failure: None,
                    current_until: None,
                    running: None,
                }),
                ended: watch::Sender::new(()),
            }),
        }
    }

    /// Returns the data, and the failure if they are not current because of one. Waits for new data if necessary: until
    /// they have been read for `patience`.
    pub(super) async fn newest(&self, patience: Duration) -> (Option<Arc<T>>, Option<Unreachable>) {
        self.get(patience, true).await
    }

    /// Returns the data, which may be old; reads them in the background if so. Waits only if there are none.
    pub(super) async fn latest(&self, patience: Duration) -> (Option<Arc<T>>, Option<Unreachable>) {
        self.get(patience, false).await
    }

    async fn get(
        &self,
        patience: Duration,
        waits_always: bool,
    ) -> (Option<Arc<T>>, Option<Unreachable>) {
        let mut ended = self.shared.ended.subscribe();
        let (started, has_value) = {
            let mut state = lock(&self.shared.state);
            let now = Instant::now();
            let is_current = state.current_until.is_some_and(|until| now < until);
            if is_current && state.running.is_none() {
                return (state.value.clone(), state.failure.clone());
            }
            let started = match state.running {
                Some((started, _)) => started,
                None => {
                    state.running = Some((now, clock::now()));
                    tokio::spawn(self.shared.clone().run());
                    now
                }
            };
            (started, state.value.is_some())
        };
        if waits_always || !has_value {
            // Its error says that the time is over.
            let _ = timeout_at(started + patience, ended.changed()).await;
        }
        let state = lock(&self.shared.state);
        let mut failure = state.failure.clone();
        if let (None, true, Some((started, at))) = (&failure, waits_always, state.running)
            && started.elapsed() >= patience
        {
            failure = Some(Unreachable {
                since: at,
                error: format!("no answer within {}", humantime::format_duration(patience)),
            });
        }
        (state.value.clone(), failure)
    }
}

impl<T> Shared<T> {
    async fn run(self: Arc<Self>) {
        let _end = Running(&self);
        let started = Instant::now();
        let read = (self.read)().await;
        let now = Instant::now();
        let mut state = lock(&self.state);
        let rest = match read {
            Ok(value) => {
                state.value = Some(Arc::new(value));
                state.failure = None;
                now.duration_since(started) * self.rest
            }
            Err(failure) => {
                state.failure = Some(failure);
                Duration::ZERO
            }
        };
        state.current_until = Some(now + rest.max(self.min_age));
    }
}

/// A running read; also ends one that has panicked.
struct Running<'a, T>(&'a Shared<T>);

impl<T> Drop for Running<'_, T> {
    fn drop(&mut self) {
        lock(&self.0.state).running = None;
        self.0.ended.send_replace(());
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No code panics while it holds the lock.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);
    const FOR_EVER: Duration = Duration::from_secs(3600);

    /// Data that count how often they were read. Reading fails from the time `fails_from` on.
    fn counting(rest: u32, min_age: Duration, fails_from: u32) -> Part<u32> {
        let count = Arc::new(AtomicU32::new(0));
        Part::of(rest, min_age, move || {
            let number = count.fetch_add(1, Ordering::Relaxed) + 1;
            Box::pin(async move {
                tokio::time::sleep(Duration::from_millis(5)).await;
                match number < fails_from {
                    true => Ok(number),
                    false => Err(Unreachable {
                        since: DateTime::UNIX_EPOCH,
                        error: "gone".to_owned(),
                    }),
                }
            })
        })
    }

    async fn newest(part: &Part<u32>, patience: Duration) -> (Option<u32>, Option<String>) {
        let (value, failure) = part.newest(patience).await;
        (value.as_deref().copied(), failure.map(|f| f.error))
    }

    #[tokio::test]
    async fn all_viewers_share_one_read() {
        let part = counting(0, FOR_EVER, u32::MAX);
        let (one, two) = tokio::join!(newest(&part, PATIENCE), newest(&part, PATIENCE));
        assert_eq!((one, two), ((Some(1), None), (Some(1), None)));
        assert_eq!(newest(&part, PATIENCE).await, (Some(1), None));
        let part = counting(0, Duration::ZERO, u32::MAX);
        assert_eq!(newest(&part, PATIENCE).await, (Some(1), None));
        assert_eq!(newest(&part, PATIENCE).await, (Some(2), None));
    }

    #[tokio::test]
    async fn expensive_data_are_read_seldom_and_in_the_background() {
        let latest = async |part: &Part<u32>| part.latest(PATIENCE).await.0.as_deref().copied();
        let part = counting(1_000_000, Duration::ZERO, u32::MAX);
        assert_eq!(latest(&part).await, Some(1));
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert_eq!(newest(&part, PATIENCE).await, (Some(1), None));
        let part = counting(0, Duration::ZERO, u32::MAX);
        assert_eq!(latest(&part).await, Some(1));
        assert_eq!(latest(&part).await, Some(1), "it does not wait");
        while latest(&part).await == Some(1) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    #[tokio::test]
    async fn last_data_remain_after_a_failure() {
        let part = counting(0, Duration::ZERO, 2);
        assert_eq!(newest(&part, PATIENCE).await, (Some(1), None));
        let failed = (Some(1), Some("gone".to_owned()));
        assert_eq!(newest(&part, PATIENCE).await, failed);
    }

    #[tokio::test]
    async fn silence_is_a_failure_without_another_wait() {
        let part: Part<u32> = Part::of(0, Duration::ZERO, || Box::pin(std::future::pending()));
        let patience = Duration::from_secs(1);
        let silent = (None, Some("no answer within 1s".to_owned()));
        assert_eq!(newest(&part, patience).await, silent);
        let before = Instant::now();
        assert_eq!(newest(&part, patience).await, silent);
        assert!(before.elapsed() < patience);
    }
}
