//! The messages that this process holds, and their settlement.
//!
//! Every claimed message has an *entry* in the record of held messages, a hash in Redis. The *field* of the entry
//! identifies it on every connection, so a message can be settled over another connection than the one that claimed it.
//!
//! One background task, the [`Settler`], sends all dispositions: those that wait at the same time are sent together.

use std::collections::HashMap;
use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::RECONNECT;
use super::connecting::{Commands, is_hopeless};
use super::names::Names;
use super::scripts::{self, Element, End};
use super::window::WindowSlot;
use crate::broker::consumer::Settled;
use crate::broker::{BrokerError, Disposition, Settlement};
use service_connection::backoff::RetryLoop;
use service_connection::error_chain::chain;

/// Maximum number of dispositions that are sent together.
const BATCH: usize = 256;

/// Pause after which no more restored messages are gathered. Those that are gathered return in their old order.
const COLLECTION_TIME: Duration = Duration::from_millis(50);

/// Time limit, from the moment at which the broker is closed, for the dispositions that are not sent yet.
const CLOSING: Duration = Duration::from_secs(5);

/// A held message.
#[derive(Debug)]
pub(super) struct HeldEntry {
    /// Field of the entry in the record of held messages.
    pub(super) field: String,
    pub(super) queue: String,
    /// Number of the message in the order of the claims.
    number: u64,
    /// True if another worker has taken the message over, or if it was returned.
    is_gone: AtomicBool,
}

/// The held messages of a broker.
#[derive(Debug)]
pub(super) struct Held {
    entries: Mutex<HashMap<String, Arc<HeldEntry>>>,
    /// Number of messages that were claimed.
    claims: AtomicU64,
    orders: mpsc::UnboundedSender<Order>,
    /// The time at which a broker that is being closed stops sending dispositions.
    close_by: watch::Sender<Option<Instant>>,
}

impl Held {
    /// Creates an empty record, with the receiver for its [`Settler`].
    pub(super) fn new() -> (Arc<Self>, mpsc::UnboundedReceiver<Order>) {
        let (orders, receiver) = mpsc::unbounded_channel();
        let held = Self {
            entries: Mutex::default(),
            claims: AtomicU64::new(0),
            orders,
            close_by: watch::Sender::default(),
        };
        (Arc::new(held), receiver)
    }

    /// Adds a claimed message.
    pub(super) fn add(&self, field: String, queue: String) -> Arc<HeldEntry> {
        let entry = Arc::new(HeldEntry {
            field: field.clone(),
            queue,
            number: self.claims.fetch_add(1, Ordering::Relaxed),
            is_gone: AtomicBool::new(false),
        });
        self.entries.lock().insert(field, entry.clone());
        entry
    }

    /// Fields of all held messages, in the order of their claims.
    pub(super) fn fields(&self) -> Vec<String> {
        let mut entries: Vec<_> = self.entries.lock().values().cloned().collect();
        entries.sort_unstable_by_key(|entry| entry.number);
        entries.iter().map(|entry| entry.field.clone()).collect()
    }

    /// Returns true if this process holds the message.
    pub(super) fn contains(&self, field: &str) -> bool {
        self.entries.lock().contains_key(field)
    }

    /// Records that another worker has taken over a message.
    pub(super) fn lose(&self, field: &str) {
        let Some(entry) = self.entries.lock().remove(field) else {
            return;
        };
        entry.is_gone.store(true, Ordering::SeqCst);
        tracing::warn!(
            queue = entry.queue,
            "a message was returned to its queue by another program while this worker held it; its task may run twice. \
             Programs with a smaller visibility_timeout, or a clock that is fast, do that"
        );
    }

    /// Moves an element that is not a message to the list of parked elements of its queue.
    pub(super) fn park(&self, entry: Arc<HeldEntry>, slot: WindowSlot) {
        // An error means that the broker is closed; the message then returns to its queue.
        drop(self.request(entry, slot, Action::Park));
    }

    /// Requests the settlement of a message. The result reports when it is settled.
    fn request(&self, entry: Arc<HeldEntry>, slot: WindowSlot, action: Action) -> Settled {
        let (done, settled) = oneshot::channel();
        // An error means that the broker is closed, which has returned the message.
        let _ = self.orders.send(Order::Settle(Box::new(ToSettle {
            entry,
            action,
            slot: Some(slot),
            done: Some(done),
        })));
        settled
    }

    /// Sends the dispositions that were requested before, and returns all other held messages to their queues.
    pub(super) async fn close(&self) {
        let (done, closed) = oneshot::channel();
        self.close_by.send_replace(Some(Instant::now() + CLOSING));
        if self.orders.send(Order::Close(done)).is_ok() {
            // An error means that the settler has ended.
            let _ = closed.await;
        }
    }

    /// Runs until the time limit of a broker that is being closed is over; for ever, if it is not closed.
    async fn closing_ends(&self) {
        let mut close_by = self.close_by.subscribe();
        // The sender exists as long as `self`.
        let close_by = close_by.wait_for(Option::is_some).await.map(|at| *at);
        match close_by {
            Ok(Some(at)) => sleep_until(at).await,
            _ => pending().await,
        }
    }

    /// Removes all entries, and marks them as gone.
    fn take_all(&self) -> Vec<Arc<HeldEntry>> {
        let taken: Vec<_> = self
            .entries
            .lock()
            .drain()
            .map(|(_, entry)| entry)
            .collect();
        for entry in &taken {
            entry.is_gone.store(true, Ordering::SeqCst);
        }
        taken
    }

    fn remove(&self, field: &str) {
        self.entries.lock().remove(field);
    }
}

/// Settlement of a delivery with an entry in the record.
pub(super) struct Recorded {
    pub(super) held: Arc<Held>,
    pub(super) entry: Arc<HeldEntry>,
    pub(super) slot: WindowSlot,
    /// Cancelled when the queue is no longer consumed.
    pub(super) leaving: CancellationToken,
}

impl Settlement for Recorded {
    fn settle(self: Box<Self>, disposition: Disposition) -> Settled {
        let action = match disposition {
            // Redis has no dead-letter exchanges: a rejected message is deleted.
            Disposition::Ack | Disposition::Reject => Action::Remove,
            // A queue that is no longer consumed gets its messages back at the front. Otherwise the message goes to the
            // end of the queue, behind the messages that wait.
            Disposition::Requeue if self.leaving.is_cancelled() => Action::Return(End::Next),
            Disposition::Requeue => Action::Return(End::Last),
        };
        self.held.request(self.entry, self.slot, action)
    }

    fn is_void(&self) -> bool {
        self.entry.is_gone.load(Ordering::SeqCst)
    }

    fn set_exempt(&self, is_exempt: bool) {
        self.slot.set_exempt(is_exempt);
    }
}

/// Settlement of a delivery without an entry in the record: nothing has to be sent.
pub(super) struct Unrecorded {
    pub(super) slot: WindowSlot,
}

impl Settlement for Unrecorded {
    fn settle(self: Box<Self>, _: Disposition) -> Settled {
        let (done, settled) = oneshot::channel();
        // The receiver exists: it is returned below.
        let _ = done.send(());
        settled
    }

    fn is_void(&self) -> bool {
        false
    }

    fn set_exempt(&self, is_exempt: bool) {
        self.slot.set_exempt(is_exempt);
    }
}

/// A request to the settler.
#[derive(Debug)]
pub(super) enum Order {
    Settle(Box<ToSettle>),
    Close(oneshot::Sender<()>),
}

/// Treatment of a held message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Remove,
    Return(End),
    /// Moves the element, which is not a message, to the list of parked elements.
    Park,
}

#[derive(Debug)]
pub(super) struct ToSettle {
    entry: Arc<HeldEntry>,
    action: Action,
    /// The place in the prefetch window, which is free once the message is settled.
    slot: Option<WindowSlot>,
    done: Option<oneshot::Sender<()>>,
}

impl ToSettle {
    /// Creates a request to return a message to the front of its queue.
    fn restoring(entry: Arc<HeldEntry>) -> Self {
        Self {
            entry,
            action: Action::Return(End::Next),
            slot: None,
            done: None,
        }
    }

    fn is_restored(&self) -> bool {
        self.action == Action::Return(End::Next)
    }

    /// Frees the place in the prefetch window, and reports the settlement.
    fn finish(&mut self) {
        self.slot = None;
        if let Some(done) = self.done.take() {
            // The receiver may be gone.
            let _ = done.send(());
        }
    }
}

/// The background task that sends dispositions.
pub(super) struct Settler {
    pub(super) commands: Arc<Commands>,
    pub(super) names: Arc<Names>,
    pub(super) held: Arc<Held>,
}

impl Settler {
    /// Runs until the broker is closed.
    pub(super) async fn run(self, mut orders: mpsc::UnboundedReceiver<Order>) {
        let mut batch = Vec::with_capacity(BATCH);
        loop {
            batch.clear();
            if orders.recv_many(&mut batch, BATCH).await == 0 {
                return;
            }
            let has_restored =
                |order: &Order| matches!(order, Order::Settle(one) if one.is_restored());
            if batch.iter().any(has_restored) {
                collect_batch(&mut orders, &mut batch).await;
            }
            let mut closing = None;
            let mut settled = Vec::with_capacity(batch.len());
            for order in batch.drain(..) {
                match order {
                    Order::Settle(one) => settled.push(*one),
                    Order::Close(done) => closing = Some(done),
                }
            }
            if let Some(done) = closing {
                let known: Vec<_> = settled.iter().map(|one| one.entry.field.clone()).collect();
                let mut rest = self.held.take_all();
                rest.retain(|entry| !known.contains(&entry.field));
                settled.extend(rest.into_iter().map(ToSettle::restoring));
                self.settle_until_closed(settled).await;
                // The broker may have been dropped.
                let _ = done.send(());
                return;
            }
            self.settle_until_closed(settled).await;
        }
    }

    /// Settles messages, but no longer than a shutdown may take: the server may be unreachable.
    async fn settle_until_closed(&self, settled: Vec<ToSettle>) {
        tokio::select! {
            biased;
            () = self.settle(settled) => {}
            () = self.held.closing_ends() => {
                tracing::warn!(
                    "messages could not be returned in time; another worker gets them after the visibility timeout"
                );
                // A message that was acknowledged must not be returned by a later request.
                self.held.take_all();
            }
        }
    }

    /// Settles messages; repeats this until the server has answered, or returns an error that a repetition cannot cure.
    async fn settle(&self, mut settled: Vec<ToSettle>) {
        // Restored messages are moved last, the newest first: so the oldest one becomes the next one in its queue.
        settled.sort_by_key(|one| match one.is_restored() {
            true => (1, u64::MAX - one.entry.number),
            false => (0, one.entry.number),
        });
        let pending = Mutex::new(settled);
        let attempt = async || {
            let settled = std::mem::take(&mut *pending.lock());
            let (result, rest) = self.settle_once(settled).await;
            *pending.lock() = rest;
            result
        };
        let should_retry = |error: &BrokerError| {
            // The caller does not wait for an unreachable server. The message stays held until the server has answered.
            for one in pending.lock().iter_mut() {
                one.finish();
            }
            !is_hopeless(error)
        };
        let log = |error: &BrokerError, pause_s| {
            tracing::warn!(error = %chain(error), retry_in_s = pause_s, "messages are not settled yet; retrying");
        };
        let done = RetryLoop::new(RECONNECT)
            .run(attempt, should_retry, log)
            .await;
        if let Err(error) = done {
            tracing::error!(
                error = %chain(&error),
                "messages could not be settled; they return to their queues after the visibility timeout"
            );
            for one in pending.lock().iter() {
                self.held.remove(&one.entry.field);
            }
        }
    }

    /// Tries once to settle messages. Returns those that are not settled yet.
    async fn settle_once(
        &self,
        settled: Vec<ToSettle>,
    ) -> (Result<(), BrokerError>, Vec<ToSettle>) {
        let (removed, mut others): (Vec<_>, Vec<_>) = settled
            .into_iter()
            .partition(|one| one.action == Action::Remove);
        if !removed.is_empty() {
            let fields: Vec<_> = removed.iter().map(|one| one.entry.field.clone()).collect();
            let done = self
                .commands
                .run("to acknowledge", async |connection| {
                    scripts::remove(connection, &self.names, &fields).await
                })
                .await;
            if let Err(error) = done {
                let rest = removed.into_iter().chain(others).collect();
                return (Err(error), rest);
            }
            removed.into_iter().for_each(|one| self.finish(one));
        }
        others.reverse();
        while let Some(one) = others.pop() {
            if let Err(error) = self.move_to(&one).await {
                others.push(one);
                others.reverse();
                return (Err(error), others);
            }
            self.finish(one);
        }
        (Ok(()), Vec::new())
    }

    fn finish(&self, mut one: ToSettle) {
        self.held.remove(&one.entry.field);
        one.finish();
    }

    /// Moves a message to its queue, or to the list of parked elements, unless another worker has it.
    async fn move_to(&self, one: &ToSettle) -> Result<(), BrokerError> {
        let (names, entry) = (&*self.names, &*one.entry);
        let field = entry.field.as_str();
        self.commands
            .run("to return a message", async |connection| {
                let parked = names.parked(&entry.queue);
                let (list, end, element) = match one.action {
                    Action::Remove | Action::Park => {
                        (parked, End::Last, Element::claimed(&entry.queue))
                    }
                    Action::Return(end) => {
                        let Some(outline) = scripts::outline(connection, names, field).await?
                        else {
                            return Ok(());
                        };
                        match outline.returned() {
                            Ok((held, element)) => {
                                (names.list(&entry.queue, held.priority), end, element)
                            }
                            Err(_) => (parked, End::Last, Element::entry()),
                        }
                    }
                };
                scripts::move_to(connection, names, field, (&list, end), &element)
                    .await
                    .map(drop)
            })
            .await
    }
}

/// Adds the requests that follow within [`COLLECTION_TIME`], so that restored messages return in their old order.
async fn collect_batch(orders: &mut mpsc::UnboundedReceiver<Order>, batch: &mut Vec<Order>) {
    while let Ok(Some(order)) = timeout(COLLECTION_TIME, orders.recv()).await {
        let is_last = matches!(order, Order::Close(_));
        batch.push(order);
        if is_last {
            break;
        }
    }
}
