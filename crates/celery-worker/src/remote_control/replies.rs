//! Sending of replies to the callers of remote control.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{WITHIN, shortened};
use crate::broker::{Broker, Publication};
use crate::worker::bounded_queue::{BoundedQueue, Queued};
use celery_protocol::pidbox::{self, ControlRequest};
use service_connection::error_chain::chain;

/// Maximum number of replies that wait for the broker, and their bytes.
const QUEUE: usize = 1000;
const QUEUE_BYTES: usize = 16 << 20;

/// Largest reply, in bytes.
const MAX_BYTES: usize = 8 << 20;

/// Longest ticket: it is repeated in a header, and headers must fit into a frame. Celery's are UUIDs.
const MAX_TICKET: usize = 255;

/// Time limit for the last replies when the worker ends.
const CLOSING: Duration = Duration::from_secs(1);

/// Maximum wait for the task queues before the first reply: a queue that cannot be consumed must not hide the worker.
const CONSUMED_WITHIN: Duration = Duration::from_secs(10);

/// Lifetime of an unread queue of replies; clients wait for a second by default.
const REPLY_LIFETIME: Duration = Duration::from_secs(10);

/// A reply and its method.
type Reply = (String, Publication);

/// Sends replies, so that the remote control need not wait for the broker.
pub(super) struct Replies {
    hostname: Arc<str>,
    line: BoundedQueue<Reply>,
    closing: CancellationToken,
    sending: TaskTracker,
}

impl Replies {
    /// Creates the line. Replies are sent once `consuming` is true: a caller that has an answer may rely on the queues.
    pub(super) fn new(
        hostname: Arc<str>,
        broker: Arc<dyn Broker>,
        consuming: watch::Receiver<bool>,
    ) -> Self {
        let (line, replies) = BoundedQueue::new(QUEUE, QUEUE_BYTES);
        let closing = CancellationToken::new();
        let sending = TaskTracker::new();
        sending.spawn(send(replies, broker, consuming, closing.clone()));
        sending.close();
        Self {
            hostname,
            line,
            closing,
            sending,
        }
    }

    /// Sends a reply, if one is wanted and there is room.
    pub(super) fn send(&self, request: &ControlRequest, reply: &Value, clock: u64) {
        let Some(reply_to) = &request.reply_to else {
            return;
        };
        let method = shortened(&request.method);
        let ticket = request.ticket.as_deref();
        if ticket.is_some_and(|ticket| ticket.len() > MAX_TICKET) {
            return not_sent(&method, "the ticket of the request is too long");
        }
        let mut message = pidbox::reply(&self.hostname, ticket, clock, reply);
        let bytes = message.body.len();
        if bytes > MAX_BYTES {
            let error = format!("the reply has {bytes} bytes, more than the {MAX_BYTES} allowed");
            message = pidbox::reply(&self.hostname, ticket, clock, &json!({ "error": error }));
        }
        let bytes = message.body.len();
        let publication = Publication {
            exchange: reply_to.exchange.clone(),
            routing_key: reply_to.routing_key.clone(),
            message,
            declare: None,
            mandatory: false,
            queue_lifetime: Some(REPLY_LIFETIME),
        };
        if !self.line.put((method.clone(), publication), bytes) {
            not_sent(&method, "too many replies wait for the broker");
        }
    }

    /// Sends the waiting replies within a time limit, and accepts no more.
    pub(super) async fn close(&self) {
        self.closing.cancel();
        if timeout(CLOSING, self.sending.wait()).await.is_err() {
            tracing::debug!("the last replies of the remote control were not sent in time");
        }
    }
}

async fn send(
    mut replies: mpsc::Receiver<Queued<Reply>>,
    broker: Arc<dyn Broker>,
    mut consuming: watch::Receiver<bool>,
    closing: CancellationToken,
) {
    let consumed = consuming.wait_for(|is_consuming| *is_consuming);
    // In each case the replies are sent now: the time limit has passed, or the worker ends.
    let _ = closing
        .run_until_cancelled(timeout(CONSUMED_WITHIN, consumed))
        .await;
    loop {
        let Queued { item, .. } = tokio::select! {
            // Closed first, so that the line is empty at the end.
            biased;
            Some(queued) = replies.recv() => queued,
            () = closing.cancelled() => return,
        };
        let (method, publication) = item;
        // A caller does not wait for as long as an alarm lasts.
        if let Some(reason) = broker.blocked() {
            not_sent(&method, &format!("the broker blocks publishers: {reason}"));
            continue;
        }
        if let Err(error) = broker.publish(&publication, WITHIN).await {
            not_sent(&method, &chain(&error).to_string());
        }
    }
}

fn not_sent(method: &str, error: &str) {
    tracing::warn!(method, error, "reply was not sent");
}
