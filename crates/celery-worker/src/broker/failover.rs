//! The brokers of a list: the one in use, and the order in which the others are tried.

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::BrokerError;
use service_connection::error_chain::chain;

/// Order in which the brokers of a list are tried after the one in use has failed (Celery's `broker_failover_strategy`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum FailoverStrategy {
    /// The order of the list; after the last broker, the first one follows.
    #[default]
    RoundRobin,
    /// A new random order after each failure, so that clients are spread over the others.
    Shuffle,
}

/// The brokers of a list. One is in use, and the connections of a process share this choice.
pub(super) struct BrokerList<T> {
    all: Vec<T>,
    strategy: FailoverStrategy,
    current: watch::Sender<Choice>,
}

/// Choice of a broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Choice {
    /// Position in the list.
    position: usize,
    /// Number of times that the same address turned out to belong to another server.
    renewals: u64,
}

impl<T> BrokerList<T> {
    /// Creates a list whose first broker is in use.
    pub(super) fn new(all: Vec<T>, strategy: FailoverStrategy) -> Self {
        Self {
            all,
            strategy,
            current: watch::Sender::new(Choice {
                position: 0,
                renewals: 0,
            }),
        }
    }

    /// All brokers in the order of the list.
    pub(super) fn all(&self) -> &[T] {
        &self.all
    }

    /// Number of brokers.
    pub(super) fn count(&self) -> u32 {
        u32::try_from(self.all.len()).unwrap_or(u32::MAX)
    }

    /// The broker in use; none if the list is empty.
    pub(super) fn current(&self) -> Option<&T> {
        self.all.get(self.position())
    }

    /// All brokers, the one in use first, and then the others in the order of the list.
    pub(super) fn starting_with_current(&self) -> impl Iterator<Item = &T> {
        let (before, from) = self.all.split_at(self.position());
        from.iter().chain(before)
    }

    /// All brokers with the choice of each, in the order of one attempt to connect: the one in use first, the others by
    /// the strategy.
    pub(super) fn in_turn(&self) -> Vec<(Choice, &T)> {
        let Choice { position, renewals } = self.choice();
        let choice = |(position, broker)| (Choice { position, renewals }, broker);
        let mut turn: Vec<_> = self.all.iter().enumerate().map(choice).collect();
        turn.rotate_left(position);
        if self.strategy == FailoverStrategy::Shuffle
            && let Some((_, others)) = turn.split_first_mut()
        {
            fastrand::shuffle(others);
        }
        turn
    }

    /// The current choice.
    pub(super) fn choice(&self) -> Choice {
        *self.current.borrow()
    }

    fn position(&self) -> usize {
        self.choice().position
    }

    /// Uses a broker that has accepted a connection. `place` is its address for messages.
    pub(super) fn select(&self, choice: Choice, place: &str) {
        let position = choice.position;
        let is_another = self.current.send_if_modified(|current| {
            std::mem::replace(&mut current.position, position) != position
        });
        if is_another {
            tracing::info!(broker = place, "connected to the next broker of the list");
        }
    }

    /// Ends the current choice: the address of the broker in use belongs to another server from now on.
    #[cfg(feature = "redis")]
    pub(super) fn renew(&self) {
        self.current.send_modify(|current| current.renewals += 1);
    }

    /// Waits until another choice is made.
    #[cfg(feature = "redis")]
    pub(super) async fn left(&self, choice: Choice) {
        let mut current = self.current.subscribe();
        // The sender lives as long as this list, so that there is no error.
        let _ = current.wait_for(|current| *current != choice).await;
    }
}

/// Failures of one attempt to connect to a broker of a list.
#[derive(Default)]
pub(super) struct ConnectFailures(Option<BrokerError>);

impl ConnectFailures {
    /// Adds the failure of the broker with the address `place`. An error after which another attempt can succeed takes
    /// precedence.
    pub(super) fn add(&mut self, place: &str, error: BrokerError) {
        tracing::debug!(broker = place, error = %chain(&error), "connecting to a broker failed");
        if !matches!(self.0, Some(BrokerError::Unreachable { .. })) {
            self.0 = Some(error);
        }
    }

    /// The error of the attempt; none if the list is empty.
    pub(super) fn into_error(self) -> Option<BrokerError> {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turn(list: &BrokerList<&'static str>) -> String {
        list.in_turn().into_iter().map(|(_, name)| *name).collect()
    }

    #[test]
    fn brokers_are_tried_from_the_one_in_use() {
        let list = BrokerList::new(vec!["a", "b", "c"], FailoverStrategy::RoundRobin);
        assert_eq!(turn(&list), "abc");
        list.select(list.in_turn()[1].0, "b");
        assert_eq!(turn(&list), "bca");
        assert_eq!(list.current(), Some(&"b"));
    }

    #[test]
    fn shuffled_brokers_are_tried_in_a_random_order() {
        let list = BrokerList::new(vec!["a", "b", "c"], FailoverStrategy::Shuffle);
        let c = Choice {
            position: 2,
            renewals: 0,
        };
        list.select(c, "c");
        let turns: std::collections::BTreeSet<String> = (0..200).map(|_| turn(&list)).collect();
        assert_eq!(turns.into_iter().collect::<Vec<_>>(), ["cab", "cba"]);
    }

    #[cfg(feature = "redis")]
    #[tokio::test]
    async fn another_choice_ends_the_wait() {
        let list = BrokerList::new(vec!["a", "b"], FailoverStrategy::RoundRobin);
        let b = list.in_turn()[1].0;
        tokio::join!(list.left(list.choice()), async { list.select(b, "b") });
        tokio::join!(list.left(list.choice()), async { list.renew() });
        assert_eq!(list.current(), Some(&"b"));
    }
}
