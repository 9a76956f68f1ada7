//! Parked elements: elements of a queue that are not messages. An operator looks at them, and decides.

use redis::{AsyncCommands as _, Direction};

use super::probe::RedisProbe;
use crate::broker::BrokerError;
use celery_protocol::virtual_message;

/// An element that was parked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParkedElement {
    /// The element; bytes that are not UTF-8 are replaced.
    pub text: String,
    /// Reason why it is not a message; `None` if it can be read now.
    pub problem: Option<String>,
}

impl RedisProbe {
    /// Returns the first parked elements of a queue, up to `limit`, the oldest first.
    ///
    /// # Errors
    /// The server cannot be reached, or refuses.
    pub async fn parked(&self, queue: &str, limit: u16) -> Result<Vec<ParkedElement>, BrokerError> {
        let list = self.names.parked(queue);
        let last = isize::try_from(limit).unwrap_or(isize::MAX);
        let mut elements: Vec<Vec<u8>> = self
            .commands
            .run("LRANGE", async |connection| {
                connection.lrange(&list, -last, -1).await
            })
            .await?;
        elements.reverse();
        let shown = |element: &Vec<u8>| ParkedElement {
            text: String::from_utf8_lossy(element).into_owned(),
            problem: virtual_message::decode(element, usize::MAX)
                .err()
                .map(|problem| problem.to_string()),
        };
        Ok(elements.iter().map(shown).collect())
    }

    /// Returns all parked elements of a queue to the queue, for workers that can read them. Returns their number.
    ///
    /// # Errors
    /// The server cannot be reached, or refuses.
    pub async fn requeue_parked(&self, queue: &str) -> Result<u64, BrokerError> {
        let (parked, list) = (self.names.parked(queue), self.names.list(queue, 0));
        self.commands
            .run("LMOVE", async |connection| {
                let count: u64 = connection.llen(&parked).await?;
                for moved in 0..count {
                    let element: Option<Vec<u8>> = connection
                        .lmove(&parked, &list, Direction::Right, Direction::Left)
                        .await?;
                    if element.is_none() {
                        return Ok(moved);
                    }
                }
                Ok(count)
            })
            .await
    }

    /// Deletes all parked elements of a queue. Returns their number.
    ///
    /// # Errors
    /// The server cannot be reached, or refuses.
    pub async fn delete_parked(&self, queue: &str) -> Result<u64, BrokerError> {
        let parked = self.names.parked(queue);
        self.commands
            .run("DEL", async |connection| {
                let (count, ()): (u64, ()) = redis::pipe()
                    .atomic()
                    .llen(&parked)
                    .del(&parked)
                    .query_async(connection)
                    .await?;
                Ok(count)
            })
            .await
    }
}
