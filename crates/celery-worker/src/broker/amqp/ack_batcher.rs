//! Acknowledgements of one channel, in batches.
//!
//! One task sends the dispositions of all deliveries of a channel. Dispositions that arrive while it waits are sent in one
//! batch, and the acknowledgements of all deliveries up to a tag share one frame (`multiple`, AMQP 0-9-1, `basic.ack`).
//! This is safe because a channel numbers its deliveries 1, 2, 3 … across its consumers, and a frame for all deliveries up to a
//! number is sent only once each of them is settled.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use lapin::Channel;
use lapin::options::{BasicAckOptions, BasicNackOptions, BasicRejectOptions};
use lapin::types::DeliveryTag;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout_at};

use super::connector::Connector;
use super::prefetch::{PrefetchSlot, PrefetchWindow};
use crate::broker::Disposition;
use crate::broker::consumer::{self, Settled};

/// Maximum number of dispositions in a batch.
const BATCH: usize = 256;

/// Maximum wait for further dispositions while more of them are expected.
const COLLECTION_TIME: Duration = Duration::from_millis(1);

/// A batch is sent once it has 1/`PART` of the deliveries in flight; the others keep the worker busy meanwhile.
const PART: usize = 4;

/// Accepts the dispositions of one channel's deliveries. Its task ends after the last clone was dropped and all
/// dispositions were sent.
#[derive(Clone)]
pub(super) struct AckBatcher(mpsc::UnboundedSender<PendingAck>);

/// A delivery and its disposition, waiting to be sent.
struct PendingAck {
    tag: DeliveryTag,
    disposition: Disposition,
    /// The delivery's slot in the prefetch window, free once the disposition is sent.
    _slot: PrefetchSlot,
    sent_tx: oneshot::Sender<()>,
}

impl AckBatcher {
    /// Creates a batcher for a new channel without deliveries.
    pub(super) fn new(
        channel: Channel,
        connector: Arc<Connector>,
        window: Arc<PrefetchWindow>,
    ) -> Self {
        let (sender, pending) = mpsc::unbounded_channel();
        tokio::spawn(send_batches(channel, connector, window, pending));
        Self(sender)
    }

    /// Settles a delivery, even if the returned receiver is dropped.
    pub(super) fn settle(
        &self,
        tag: DeliveryTag,
        disposition: Disposition,
        slot: PrefetchSlot,
    ) -> Settled {
        let (sent_tx, settled) = oneshot::channel();
        // The receiver is dropped only when the process ends.
        let _ = self.0.send(PendingAck {
            tag,
            disposition,
            _slot: slot,
            sent_tx,
        });
        settled
    }
}

async fn send_batches(
    channel: Channel,
    connector: Arc<Connector>,
    window: Arc<PrefetchWindow>,
    mut pending: mpsc::UnboundedReceiver<PendingAck>,
) {
    let mut ledger = AckLedger::default();
    let mut batch = Vec::new();
    while pending.recv_many(&mut batch, BATCH).await > 0 {
        let until = Instant::now() + COLLECTION_TIME;
        while batch.len() < BATCH && batch.len() * PART < window.counted() {
            let room = BATCH - batch.len();
            match timeout_at(until, pending.recv_many(&mut batch, room)).await {
                Ok(1..) => {}
                // No further disposition in time, or the channel of dispositions is closed.
                Ok(0) | Err(_) => break,
            }
        }
        let frames = ledger.frames(batch.iter().map(|one| (one.tag, one.disposition)));
        let sent = join_all(frames.into_iter().map(|frame| send(&channel, frame))).await;
        let failed = sent.into_iter().find_map(Result::err);
        let failed = failed.map(|error| connector.error(error, "to settle a delivery"));
        for one in batch.drain(..) {
            match &failed {
                // Dropped without a value.
                Some(error) => consumer::not_settled(error, one.disposition),
                // The caller may have dropped the receiver.
                None => drop(one.sent_tx.send(())),
            }
        }
    }
}

async fn send(channel: &Channel, frame: Frame) -> lapin::Result<()> {
    match frame {
        Frame::Ack { tag, multiple } => channel.basic_ack(tag, BasicAckOptions { multiple }).await,
        Frame::Reject(tag) => {
            let options = BasicRejectOptions { requeue: false };
            channel.basic_reject(tag, options).await
        }
        // Not basic.reject, which quorum queues count as a failed delivery of the message.
        Frame::Requeue(tag) => {
            let options = BasicNackOptions {
                multiple: false,
                requeue: true,
            };
            channel.basic_nack(tag, options).await
        }
    }
}

/// A frame that settles deliveries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Frame {
    Ack { tag: DeliveryTag, multiple: bool },
    Reject(DeliveryTag),
    Requeue(DeliveryTag),
}

/// Settled deliveries of a channel.
#[derive(Debug, Default)]
struct AckLedger {
    /// Every delivery up to this tag is settled.
    through: DeliveryTag,
    /// Settled deliveries after a gap.
    beyond: BTreeSet<DeliveryTag>,
}

impl AckLedger {
    /// The frames for these dispositions, in the order in which they must be sent.
    fn frames(
        &mut self,
        dispositions: impl Iterator<Item = (DeliveryTag, Disposition)>,
    ) -> Vec<Frame> {
        let mut frames = Vec::new();
        let mut acknowledged = Vec::new();
        for (tag, disposition) in dispositions {
            self.beyond.insert(tag);
            match disposition {
                Disposition::Ack => acknowledged.push(tag),
                // Sent before every acknowledgement, because one with `multiple` may include this tag.
                Disposition::Reject => frames.push(Frame::Reject(tag)),
                Disposition::Requeue => frames.push(Frame::Requeue(tag)),
            }
        }
        while self.beyond.first() == Some(&(self.through + 1)) {
            self.beyond.pop_first();
            self.through += 1;
        }
        acknowledged.sort_unstable();
        let together = acknowledged.partition_point(|tag| *tag <= self.through);
        if let Some(&tag) = acknowledged[..together].last() {
            let multiple = together > 1;
            frames.push(Frame::Ack { tag, multiple });
        }
        let alone = acknowledged[together..].iter();
        frames.extend(alone.map(|&tag| Frame::Ack {
            tag,
            multiple: false,
        }));
        frames
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use proptest::sample::Index;

    use super::*;

    /// Applies a frame to unsettled deliveries as a broker does.
    fn apply(
        frame: Frame,
        unsettled: &mut BTreeSet<DeliveryTag>,
    ) -> Vec<(DeliveryTag, Disposition)> {
        let (tag, disposition) = match frame {
            Frame::Ack {
                tag,
                multiple: true,
            } => {
                let rest = unsettled.split_off(&(tag + 1));
                let all = std::mem::replace(unsettled, rest);
                return all.into_iter().map(|tag| (tag, Disposition::Ack)).collect();
            }
            Frame::Ack { tag, .. } => (tag, Disposition::Ack),
            Frame::Reject(tag) => (tag, Disposition::Reject),
            Frame::Requeue(tag) => (tag, Disposition::Requeue),
        };
        assert!(unsettled.remove(&tag), "{tag} is not there to be settled");
        vec![(tag, disposition)]
    }

    proptest! {
        /// Each delivery gets its own disposition, and an unsettled one gets none.
        #[test]
        fn every_delivery_gets_its_own_disposition(
            batches in prop::collection::vec(prop::collection::vec((any::<Index>(), 0_u8..8), 0..20), 0..20),
        ) {
            let mut ledger = AckLedger::default();
            let mut coming = 1..;
            let mut unsettled_tags: Vec<DeliveryTag> = coming.by_ref().take(32).collect();
            let mut unsettled: BTreeSet<DeliveryTag> = unsettled_tags.iter().copied().collect();
            for batch in batches {
                let mut expected = BTreeMap::new();
                for (which, disposition) in batch {
                    let tag = unsettled_tags.swap_remove(which.index(unsettled_tags.len()));
                    let disposition = match disposition {
                        0 => Disposition::Reject,
                        1 => Disposition::Requeue,
                        _ => Disposition::Ack,
                    };
                    expected.insert(tag, disposition);
                    let next = coming.next().unwrap_or_default();
                    unsettled_tags.push(next);
                    unsettled.insert(next);
                }
                let frames = ledger.frames(expected.iter().map(|(tag, disposition)| (*tag, *disposition)));
                let sent_tx: BTreeMap<_, _> =
                    frames.into_iter().flat_map(|frame| apply(frame, &mut unsettled)).collect();
                prop_assert_eq!(sent_tx, expected);
            }
        }
    }

    #[test]
    fn consecutive_acknowledgements_share_a_frame() {
        let mut ledger = AckLedger::default();
        let mut frames =
            |tags: &[DeliveryTag]| ledger.frames(tags.iter().map(|tag| (*tag, Disposition::Ack)));
        let ack = |tag, multiple| Frame::Ack { tag, multiple };
        assert_eq!(frames(&[3, 4]), [ack(3, false), ack(4, false)]);
        assert_eq!(frames(&[2, 1, 7]), [ack(2, true), ack(7, false)]);
        assert_eq!(frames(&[5]), [ack(5, false)]);
        assert_eq!(frames(&[6, 8]), [ack(8, true)]);
    }
}
