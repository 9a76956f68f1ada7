//! A queue inside the worker that is bounded by items and by bytes.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

/// The sending end. An item that does not fit is rejected at once, so that a sender never waits.
#[derive(Debug)]
pub(crate) struct BoundedQueue<T> {
    sender: mpsc::Sender<Queued<T>>,
    room: Arc<Semaphore>,
}

/// An item of the queue. Dropping it frees its bytes.
#[derive(Debug)]
pub(crate) struct Queued<T> {
    pub(crate) item: T,
    _room: OwnedSemaphorePermit,
}

impl<T> BoundedQueue<T> {
    /// Creates a queue with a maximum number of items and of bytes, and returns both ends.
    pub(crate) fn new(items: usize, bytes: usize) -> (Self, mpsc::Receiver<Queued<T>>) {
        let (sender, receiver) = mpsc::channel(items);
        let room = Arc::new(Semaphore::new(bytes));
        (Self { sender, room }, receiver)
    }

    /// Adds an item of `bytes` bytes; returns false if it does not fit.
    pub(crate) fn put(&self, item: T, bytes: usize) -> bool {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        let Ok(room) = self.room.clone().try_acquire_many_owned(bytes) else {
            return false;
        };
        self.sender.try_send(Queued { item, _room: room }).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_and_bytes_are_bounded() {
        let (line, mut receiver) = BoundedQueue::new(2, 10);
        assert!(line.put("a", 8));
        assert!(!line.put("no bytes left", 3));
        assert!(line.put("b", 2));
        assert!(!line.put("no place left", 0));
        drop(receiver.try_recv());
        assert!(line.put("c", 8));
    }
}
