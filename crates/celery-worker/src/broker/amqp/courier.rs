//! Publishes over one channel, for everybody who has something to publish.
//!
//! lapin wakes whoever publishes twice for each message: when it is written, and when it is
//! confirmed. Here one task waits for all of them, and answers each; a thread that has read a
//! hundred confirmations then wakes one task and not a hundred.

use futures_util::stream::{FuturesUnordered, StreamExt};
use lapin::options::BasicPublishOptions;
use lapin::types::ShortString;
use lapin::{BasicProperties, Channel, ChannelState, Confirmation, ErrorKind};
use tokio::sync::{mpsc, oneshot};

/// Letters that are taken in at a time, before answers are looked at again.
const BATCH: usize = 64;

/// A message on its way out.
pub(super) struct Letter {
    pub(super) exchange: ShortString,
    pub(super) routing_key: ShortString,
    /// Whether it comes back if it reaches no queue.
    pub(super) mandatory: bool,
    pub(super) properties: BasicProperties,
    pub(super) body: Vec<u8>,
}

type Answer = lapin::Result<Confirmation>;

/// A channel in confirm mode. It is used by one task, which ends when nobody has letters for it
/// any more and all are answered.
pub(super) struct Courier {
    channel: Channel,
    // Without a bound, as lapin's own line is: a letter that is given up waiting for is in either.
    letters: mpsc::UnboundedSender<(Letter, oneshot::Sender<Answer>)>,
}

impl Courier {
    /// A courier on a channel that confirms.
    pub(super) fn new(channel: Channel) -> Self {
        let (letters, incoming) = mpsc::unbounded_channel();
        tokio::spawn(work(channel.clone(), incoming));
        Self { channel, letters }
    }

    /// Whether the channel is there.
    pub(super) fn is_open(&self) -> bool {
        self.channel.status().connected()
    }

    /// Publishes a letter and returns a future of the broker's answer. Dropping the future before the letter is
    /// written withdraws the letter. A letter that is written goes out even if its answer is not awaited.
    pub(super) fn publish(&self, letter: Letter) -> impl Future<Output = Answer> + use<> {
        let (answer, answered) = oneshot::channel();
        // If nobody takes it, nobody answers.
        let _ = self.letters.send((letter, answer));
        async {
            answered.await.unwrap_or_else(|_| {
                Err(ErrorKind::InvalidChannelState(ChannelState::Closed, "basic.publish").into())
            })
        }
    }
}

async fn work(
    channel: Channel,
    mut incoming: mpsc::UnboundedReceiver<(Letter, oneshot::Sender<Answer>)>,
) {
    let mut outside = FuturesUnordered::new();
    let mut batch = Vec::with_capacity(BATCH);
    loop {
        tokio::select! {
            biased;
            Some(()) = outside.next() => {}
            taken = incoming.recv_many(&mut batch, BATCH) => match taken {
                0 => break,
                _ => outside.extend(batch.drain(..).map(|(letter, answer)| post(&channel, letter, answer))),
            },
        }
    }
    while outside.next().await.is_some() {}
}

async fn post(channel: &Channel, letter: Letter, answer: oneshot::Sender<Answer>) {
    // Given up meanwhile: the caller may publish the message again.
    if answer.is_closed() {
        return;
    }
    let Letter {
        exchange,
        routing_key,
        mandatory,
        properties,
        body,
    } = letter;
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
    // Whoever asked may have given up waiting.
    let _ = answer.send(confirmed);
}
