//! Publishing over one channel in confirm mode.
//!
//! lapin wakes a publishing task twice for each message: when it is written, and when it is confirmed. Here one task
//! waits for all messages and answers each caller, so that a thread that has read a hundred confirms wakes one task
//! instead of a hundred.

use futures_util::stream::{FuturesUnordered, StreamExt};
use lapin::options::BasicPublishOptions;
use lapin::types::ShortString;
use lapin::{BasicProperties, Channel, ChannelState, Confirmation, ErrorKind};
use tokio::sync::{mpsc, oneshot};

/// Maximum number of messages that are accepted before confirms are processed again.
const BATCH: usize = 64;

/// A message to publish.
pub(super) struct Outgoing {
    pub(super) exchange: ShortString,
    pub(super) routing_key: ShortString,
    /// True if the broker returns a message that reaches no queue.
    pub(super) mandatory: bool,
    pub(super) properties: BasicProperties,
    pub(super) body: Vec<u8>,
}

type Confirm = lapin::Result<Confirmation>;

/// A channel in confirm mode. Its task ends once this value is dropped and every message is answered.
pub(super) struct ConfirmPublisher {
    channel: Channel,
    // Unbounded, like lapin's own queue: a message whose caller has given up waits in one of the two.
    outgoing: mpsc::UnboundedSender<(Outgoing, oneshot::Sender<Confirm>)>,
}

impl ConfirmPublisher {
    /// Creates a publisher on a channel in confirm mode.
    pub(super) fn new(channel: Channel) -> Self {
        let (outgoing, incoming) = mpsc::unbounded_channel();
        tokio::spawn(work(channel.clone(), incoming));
        Self { channel, outgoing }
    }

    /// Returns true while the channel is open.
    pub(super) fn is_open(&self) -> bool {
        self.channel.status().connected()
    }

    /// Publishes a message and returns a future of the broker's confirm. Dropping the future before the message is
    /// written withdraws the message. A written message is sent even if its confirm is not awaited.
    pub(super) fn publish(&self, outgoing: Outgoing) -> impl Future<Output = Confirm> + use<> {
        let (answer, answered) = oneshot::channel();
        // If the task has ended, the receiver reports it.
        let _ = self.outgoing.send((outgoing, answer));
        async {
            answered.await.unwrap_or_else(|_| {
                Err(ErrorKind::InvalidChannelState(ChannelState::Closed, "basic.publish").into())
            })
        }
    }
}

async fn work(
    channel: Channel,
    mut incoming: mpsc::UnboundedReceiver<(Outgoing, oneshot::Sender<Confirm>)>,
) {
    let mut outside = FuturesUnordered::new();
    let mut batch = Vec::with_capacity(BATCH);
    loop {
        tokio::select! {
            biased;
            Some(()) = outside.next() => {}
            taken = incoming.recv_many(&mut batch, BATCH) => match taken {
                0 => break,
                _ => outside.extend(batch.drain(..).map(|(outgoing, answer)| post(&channel, outgoing, answer))),
            },
        }
    }
    while outside.next().await.is_some() {}
}

async fn post(channel: &Channel, outgoing: Outgoing, answer: oneshot::Sender<Confirm>) {
    // The caller has given up and may publish the message again.
    if answer.is_closed() {
        return;
    }
    let Outgoing {
        exchange,
        routing_key,
        mandatory,
        properties,
        body,
    } = outgoing;
    let options = BasicPublishOptions {
        mandatory,
        ..Default::default()
    };
    let written = channel
        .basic_publish(exchange, routing_key, options, &body, properties)
        .await;
    let confirmed = match written {
        Ok(confirmation) => confirmation.await,
        Err(error) => Err(error),
    };
    // The caller may have given up.
    let _ = answer.send(confirmed);
}
