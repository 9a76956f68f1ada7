//! Tells the broker what became of the deliveries of one channel.
//!
//! One task does so for all of them: what is decided while it waits goes out together, and
//! acknowledgements of all deliveries up to some tag in one frame (`multiple`, AMQP 0-9-1,
//! `basic.ack`). That is safe since a channel numbers its deliveries 1, 2, 3 …, whichever of its
//! consumers they are for: those up to a number are all decided only if each of them is.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use lapin::Channel;
use lapin::options::{BasicAckOptions, BasicNackOptions, BasicRejectOptions};
use lapin::types::DeliveryTag;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout_at};

use super::link::Link;
use super::window::{Held, Window};
use crate::broker::Verdict;
use crate::broker::consumer::{self, Settled};

/// Verdicts that go out together at most.
const BATCH: usize = 256;

/// How long verdicts wait for others, while more are to be expected.
const GATHERING: Duration = Duration::from_millis(1);

/// They wait until they are this part of what the worker holds: what is left keeps it busy.
const PART: usize = 4;

/// Takes the verdicts on one channel's deliveries. The task behind it ends with the last clone, when
/// all of them are told.
#[derive(Clone)]
pub(super) struct Settler(mpsc::UnboundedSender<Decided>);

/// A delivery of which it is decided what becomes of it.
struct Decided {
    tag: DeliveryTag,
    verdict: Verdict,
    /// Its place in the window, free when the verdict is told.
    _held: Held,
    told: oneshot::Sender<()>,
}

impl Settler {
    /// A settler for a new channel, which has delivered nothing yet.
    pub(super) fn new(channel: Channel, link: Arc<Link>, window: Arc<Window>) -> Self {
        let (decide, decided) = mpsc::unbounded_channel();
        tokio::spawn(tell(channel, link, window, decided));
        Self(decide)
    }

    /// Settles a delivery. It goes on if nobody waits for what is returned.
    pub(super) fn settle(&self, tag: DeliveryTag, verdict: Verdict, held: Held) -> Settled {
        let (told, settled) = oneshot::channel();
        // Nobody takes it only when the process ends.
        let _ = self.0.send(Decided {
            tag,
            verdict,
            _held: held,
            told,
        });
        settled
    }
}

async fn tell(
    channel: Channel,
    link: Arc<Link>,
    window: Arc<Window>,
    mut decided: mpsc::UnboundedReceiver<Decided>,
) {
    let mut ledger = Ledger::default();
    let mut batch = Vec::new();
    while decided.recv_many(&mut batch, BATCH).await > 0 {
        let until = Instant::now() + GATHERING;
        while batch.len() < BATCH && batch.len() * PART < window.counted() {
            let room = BATCH - batch.len();
            match timeout_at(until, decided.recv_many(&mut batch, room)).await {
                Ok(1..) => {}
                // No more come in time, or at all.
                Ok(0) | Err(_) => break,
            }
        }
        let frames = ledger.frames(batch.iter().map(|one| (one.tag, one.verdict)));
        let sent = join_all(frames.into_iter().map(|frame| send(&channel, frame))).await;
        let failed = sent.into_iter().find_map(Result::err);
        let failed = failed.map(|error| link.error(error, "to settle a delivery"));
        for one in batch.drain(..) {
            if let Some(error) = &failed {
                consumer::not_settled(error, one.verdict);
            }
            // Nobody may wait for it.
            let _ = one.told.send(());
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
        // Not basic.reject: quorum queues count that against the message.
        Frame::Requeue(tag) => {
            let options = BasicNackOptions {
                multiple: false,
                requeue: true,
            };
            channel.basic_nack(tag, options).await
        }
    }
}

/// What goes to the broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Frame {
    Ack { tag: DeliveryTag, multiple: bool },
    Reject(DeliveryTag),
    Requeue(DeliveryTag),
}

/// Which deliveries of a channel are decided.
#[derive(Debug, Default)]
struct Ledger {
    /// Each up to this one is.
    through: DeliveryTag,
    /// And these.
    beyond: BTreeSet<DeliveryTag>,
}

impl Ledger {
    /// The frames that tell these verdicts, in the order in which they have to go.
    fn frames(&mut self, verdicts: impl Iterator<Item = (DeliveryTag, Verdict)>) -> Vec<Frame> {
        let mut frames = Vec::new();
        let mut acknowledged = Vec::new();
        for (tag, verdict) in verdicts {
            self.beyond.insert(tag);
            match verdict {
                Verdict::Ack => acknowledged.push(tag),
                // Before every acknowledgement, which may take in all up to its own.
                Verdict::Reject => frames.push(Frame::Reject(tag)),
                Verdict::Requeue => frames.push(Frame::Requeue(tag)),
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

    /// Does with unsettled deliveries what a broker does.
    fn obey(frame: Frame, unsettled: &mut BTreeSet<DeliveryTag>) -> Vec<(DeliveryTag, Verdict)> {
        let (tag, verdict) = match frame {
            Frame::Ack {
                tag,
                multiple: true,
            } => {
                let rest = unsettled.split_off(&(tag + 1));
                let all = std::mem::replace(unsettled, rest);
                return all.into_iter().map(|tag| (tag, Verdict::Ack)).collect();
            }
            Frame::Ack { tag, .. } => (tag, Verdict::Ack),
            Frame::Reject(tag) => (tag, Verdict::Reject),
            Frame::Requeue(tag) => (tag, Verdict::Requeue),
        };
        assert!(unsettled.remove(&tag), "{tag} is not there to be settled");
        vec![(tag, verdict)]
    }

    proptest! {
        /// Each delivery gets the verdict that was given on it, and none that has none.
        #[test]
        fn every_delivery_gets_its_own_verdict(
            batches in prop::collection::vec(prop::collection::vec((any::<Index>(), 0_u8..8), 0..20), 0..20),
        ) {
            let mut ledger = Ledger::default();
            let mut coming = 1..;
            let mut undecided: Vec<DeliveryTag> = coming.by_ref().take(32).collect();
            let mut unsettled: BTreeSet<DeliveryTag> = undecided.iter().copied().collect();
            for batch in batches {
                let mut given = BTreeMap::new();
                for (which, verdict) in batch {
                    let tag = undecided.swap_remove(which.index(undecided.len()));
                    let verdict = match verdict {
                        0 => Verdict::Reject,
                        1 => Verdict::Requeue,
                        _ => Verdict::Ack,
                    };
                    given.insert(tag, verdict);
                    let next = coming.next().unwrap_or_default();
                    undecided.push(next);
                    unsettled.insert(next);
                }
                let frames = ledger.frames(given.iter().map(|(tag, verdict)| (*tag, *verdict)));
                let told: BTreeMap<_, _> =
                    frames.into_iter().flat_map(|frame| obey(frame, &mut unsettled)).collect();
                prop_assert_eq!(told, given);
            }
        }
    }

    #[test]
    fn those_in_line_go_together() {
        let mut ledger = Ledger::default();
        let mut frames =
            |tags: &[DeliveryTag]| ledger.frames(tags.iter().map(|tag| (*tag, Verdict::Ack)));
        let ack = |tag, multiple| Frame::Ack { tag, multiple };
        assert_eq!(frames(&[3, 4]), [ack(3, false), ack(4, false)]);
        assert_eq!(frames(&[2, 1, 7]), [ack(2, true), ack(7, false)]);
        assert_eq!(frames(&[5]), [ack(5, false)]);
        assert_eq!(frames(&[6, 8]), [ack(8, true)]);
    }
}
