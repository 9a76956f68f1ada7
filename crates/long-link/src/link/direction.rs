//! One direction of the link: decides when each packet arrives, or why it is lost.
//!
//! Pure: the caller passes the time, as the duration since any fixed moment, and the seed of the random draws.
//!
//! A packet waits in the queue until the transmitter has sent all earlier ones, is sent at the configured rate, and then
//! travels for the configured delay. Packets arrive in the order in which they were sent, except for the share that is
//! reordered.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::time::Duration;

use serde::Serialize;

use super::parameters::{Parameters, Setting};

/// Most bytes that a direction holds, which is 3 s at 1 Gbit/s. Without a rate the queue has no other limit.
const MOST_BYTES_HELD: usize = 400_000_000;
/// Most buffers that are kept for later packets.
const MOST_SPARE_BUFFERS: usize = 16_384;

/// Reason for the loss of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Loss {
    /// The link is interrupted
    Cut,
    /// A firewall drops its ports
    Blocked,
    /// It is larger than the largest that passes
    TooLarge,
    /// By the random share
    Random,
    /// The queue of the transmitter is full
    QueueFull,
}

/// Numbers of packets and bytes since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(super) struct Counters {
    sent_packets: u64,
    arrived_packets: u64,
    arrived_bytes: u64,
    reordered_packets: u64,
    lost_by_cut: u64,
    lost_by_block: u64,
    lost_by_size: u64,
    lost_at_random: u64,
    lost_by_full_queue: u64,
}

/// A packet on its way, ordered by its arrival.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Held {
    arrival: Duration,
    number: u64,
    packet: Vec<u8>,
}

/// One direction of the link, with the packets that are on their way.
#[derive(Debug)]
pub(super) struct Direction {
    parameters: Parameters,
    random: fastrand::Rng,
    /// Time at which the transmitter has sent all packets of the queue
    idle_at: Duration,
    /// Packets that arrive in the order of sending
    in_order: VecDeque<Held>,
    /// Packets that others overtake
    overtaken: BinaryHeap<Reverse<Held>>,
    held_bytes: usize,
    most_bytes_held: usize,
    /// Buffers of packets that have arrived
    spare: Vec<Vec<u8>>,
    counters: Counters,
}

impl Direction {
    pub(super) fn new(parameters: Parameters, seed: u64) -> Self {
        Self {
            parameters,
            random: fastrand::Rng::with_seed(seed),
            idle_at: Duration::ZERO,
            in_order: VecDeque::new(),
            overtaken: BinaryHeap::new(),
            held_bytes: 0,
            most_bytes_held: MOST_BYTES_HELD,
            spare: Vec::new(),
            counters: Counters::default(),
        }
    }

    pub(super) fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    pub(super) fn counters(&self) -> Counters {
        self.counters
    }

    /// Changes a property. A packet that was already sent keeps its arrival; an interruption loses all that are on
    /// their way.
    pub(super) fn apply(&mut self, setting: &Setting) {
        let parameters = &mut self.parameters;
        match setting {
            Setting::Delay(delay) => parameters.delay = *delay,
            Setting::Rate(rate) => parameters.rate = *rate,
            Setting::Queue(queue) => parameters.queue = *queue,
            Setting::Loss(share) => parameters.loss = *share,
            Setting::Reorder(share) => parameters.reorder = *share,
            Setting::ReorderDelay(delay) => parameters.reorder_delay = *delay,
            Setting::Largest(bytes) => parameters.largest = *bytes,
            Setting::Blocked(ports) => parameters.blocked = ports.clone(),
            Setting::Cut(is_cut) => {
                parameters.is_cut = *is_cut;
                if *is_cut {
                    self.lose_all();
                }
            }
        }
    }

    fn lose_all(&mut self) {
        self.counters.lost_by_cut += (self.in_order.len() + self.overtaken.len()) as u64;
        self.in_order.clear();
        self.overtaken.clear();
        self.held_bytes = 0;
        self.idle_at = Duration::ZERO;
    }

    /// Sends a packet at the time `now`.
    ///
    /// # Errors
    /// The packet is lost.
    pub(super) fn send(&mut self, now: Duration, packet: &[u8]) -> Result<(), Loss> {
        self.counters.sent_packets += 1;
        let number = self.counters.sent_packets;
        match self.arrival(now, packet) {
            Ok((arrival, is_overtaken)) => {
                self.hold(number, packet, arrival, is_overtaken);
                Ok(())
            }
            Err(loss) => {
                *match loss {
                    Loss::Cut => &mut self.counters.lost_by_cut,
                    Loss::Blocked => &mut self.counters.lost_by_block,
                    Loss::TooLarge => &mut self.counters.lost_by_size,
                    Loss::Random => &mut self.counters.lost_at_random,
                    Loss::QueueFull => &mut self.counters.lost_by_full_queue,
                } += 1;
                Err(loss)
            }
        }
    }

    /// Time of the packet's arrival, and true if later packets may overtake it.
    fn arrival(&mut self, now: Duration, packet: &[u8]) -> Result<(Duration, bool), Loss> {
        let parameters = &self.parameters;
        if parameters.is_cut {
            return Err(Loss::Cut);
        }
        if parameters.blocked.contain(packet) {
            return Err(Loss::Blocked);
        }
        if parameters.largest.is_some_and(|most| packet.len() > most) {
            return Err(Loss::TooLarge);
        }
        if parameters.loss.draw(&mut self.random) {
            return Err(Loss::Random);
        }
        let starts = self.idle_at.max(now);
        if starts - now > parameters.queue || self.held_bytes + packet.len() > self.most_bytes_held
        {
            return Err(Loss::QueueFull);
        }
        self.idle_at = starts + parameters.rate.time_for(packet.len());
        let arrival = self.idle_at + parameters.delay;
        if parameters.reorder.draw(&mut self.random) {
            return Ok((arrival + parameters.reorder_delay, true));
        }
        // Also after the delay was reduced, packets do not overtake each other.
        let last = self.in_order.back().map_or(arrival, |held| held.arrival);
        Ok((arrival.max(last), false))
    }

    fn hold(&mut self, number: u64, packet: &[u8], arrival: Duration, is_overtaken: bool) {
        let mut buffer = self.spare.pop().unwrap_or_default();
        buffer.clear();
        buffer.extend_from_slice(packet);
        self.held_bytes += packet.len();
        let held = Held {
            arrival,
            number,
            packet: buffer,
        };
        if is_overtaken {
            self.counters.reordered_packets += 1;
            self.overtaken.push(Reverse(held));
        } else {
            self.in_order.push_back(held);
        }
    }

    /// Time of the next arrival.
    pub(super) fn next_arrival(&self) -> Option<Duration> {
        let in_order = self.in_order.front().map(|held| held.arrival);
        let overtaken = self.overtaken.peek().map(|held| held.0.arrival);
        in_order.into_iter().chain(overtaken).min()
    }

    /// Passes every packet that has arrived at the time `now` to `receive`, in the order of arrival.
    pub(super) fn arrive(&mut self, now: Duration, mut receive: impl FnMut(&[u8])) {
        while let Some(held) = self.take_arrived(now) {
            receive(&held.packet);
            self.held_bytes -= held.packet.len();
            self.counters.arrived_packets += 1;
            self.counters.arrived_bytes += held.packet.len() as u64;
            if self.spare.len() < MOST_SPARE_BUFFERS {
                self.spare.push(held.packet);
            }
        }
    }

    fn take_arrived(&mut self, now: Duration) -> Option<Held> {
        if self.next_arrival()? > now {
            return None;
        }
        let is_overtaken_next = match (self.in_order.front(), self.overtaken.peek()) {
            (Some(in_order), Some(overtaken)) => overtaken.0 < *in_order,
            (in_order, _) => in_order.is_none(),
        };
        if is_overtaken_next {
            self.overtaken.pop().map(|held| held.0)
        } else {
            self.in_order.pop_front()
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn direction(settings: &[&str]) -> Direction {
        let mut direction = Direction::new(Parameters::default(), 7);
        let usual = ["delay=120ms", "rate=1000Mbit", "queue=100ms"];
        for setting in usual.iter().chain(settings) {
            direction.apply(&setting.parse().unwrap());
        }
        direction
    }

    /// Time and first byte of every packet that arrives.
    fn arrivals(direction: &mut Direction) -> Vec<(Duration, u8)> {
        let mut arrivals = Vec::new();
        while let Some(at) = direction.next_arrival() {
            direction.arrive(at, |packet| arrivals.push((at, packet[0])));
        }
        arrivals
    }

    #[test]
    fn packet_takes_the_delay_and_its_time_at_the_rate() {
        let mut direction = direction(&["delay=120ms", "rate=8Mbit"]);
        direction.send(5 * MS, &[1; 1000]).unwrap();
        direction.send(5 * MS, &[2; 1000]).unwrap();
        let expected = [(126 * MS, 1), (127 * MS, 2)];
        assert_eq!(arrivals(&mut direction), expected);
    }

    #[test]
    fn packet_does_not_arrive_early() {
        let mut direction = direction(&["delay=120ms", "rate=unlimited"]);
        direction.send(Duration::ZERO, &[1]).unwrap();
        let mut count = 0;
        direction.arrive(120 * MS - Duration::from_nanos(1), |_| count += 1);
        assert_eq!(count, 0);
        direction.arrive(120 * MS, |_| count += 1);
        assert_eq!(count, 1);
    }

    #[test]
    fn full_queue_loses_packets() {
        let mut direction = direction(&["rate=8Mbit", "queue=10ms"]);
        let lost = (0..20).filter(|_| direction.send(MS, &[0; 1000]).is_err());
        assert_eq!(lost.count(), 9); // one is sent, ten wait
        direction.send(2 * MS, &[0; 1000]).unwrap();
        assert_eq!(direction.send(2 * MS, &[0; 1000]), Err(Loss::QueueFull));
    }

    #[test]
    fn bytes_on_the_way_are_bounded() {
        let mut direction = direction(&["rate=unlimited"]);
        direction.most_bytes_held = 10_000;
        let held = (0..100).take_while(|_| direction.send(MS, &[0; 900]).is_ok());
        assert_eq!(held.count(), 11);
    }

    #[test]
    fn reordered_packet_is_overtaken() {
        let mut direction = direction(&["rate=unlimited", "reorder=100%", "reorder-delay=10ms"]);
        direction.send(Duration::ZERO, &[1]).unwrap();
        direction.apply(&"reorder=0".parse().unwrap());
        direction.send(9 * MS, &[2]).unwrap();
        direction.send(11 * MS, &[3]).unwrap();
        let expected = [(129 * MS, 2), (130 * MS, 1), (131 * MS, 3)];
        assert_eq!(arrivals(&mut direction), expected);
        assert_eq!(direction.counters().reordered_packets, 1);
    }

    #[test]
    fn shorter_delay_does_not_reorder() {
        let mut direction = direction(&["rate=unlimited"]);
        direction.send(Duration::ZERO, &[1]).unwrap();
        direction.apply(&"delay=1ms".parse().unwrap());
        direction.send(MS, &[2]).unwrap();
        assert_eq!(arrivals(&mut direction), [(120 * MS, 1), (120 * MS, 2)]);
    }

    #[test]
    fn interruption_loses_packets_on_their_way() {
        let mut direction = direction(&[]);
        direction.send(Duration::ZERO, &[1]).unwrap();
        direction.apply(&Setting::Cut(true));
        assert_eq!(direction.send(MS, &[2]), Err(Loss::Cut));
        assert_eq!(direction.next_arrival(), None);
        direction.apply(&Setting::Cut(false));
        direction.send(2 * MS, &[3]).unwrap();
        assert_eq!(arrivals(&mut direction).len(), 1);
        assert_eq!(direction.counters().lost_by_cut, 2);
    }

    #[test]
    fn large_packets_are_lost() {
        let mut direction = direction(&["largest=1400"]);
        direction.send(Duration::ZERO, &[0; 1400]).unwrap();
        let larger = direction.send(Duration::ZERO, &[0; 1401]);
        assert_eq!(larger, Err(Loss::TooLarge));
    }

    #[test]
    fn packets_of_blocked_ports_are_lost() {
        let mut direction = direction(&["blocked=5031-5039"]);
        let mut packet = [0; 40];
        (packet[0], packet[9]) = (0x45, 6);
        packet[22..24].copy_from_slice(&5035_u16.to_be_bytes());
        assert_eq!(direction.send(MS, &packet), Err(Loss::Blocked));
        packet[22..24].copy_from_slice(&22_u16.to_be_bytes());
        direction.send(MS, &packet).unwrap();
    }

    #[test]
    fn random_loss_has_its_share() {
        let mut direction = direction(&["rate=unlimited", "loss=1%"]);
        let lost = (0..100_000).filter(|_| direction.send(MS, &[0]).is_err());
        let count = lost.count();
        assert!((900..1100).contains(&count), "{count}");
    }

    proptest! {
        /// A packet is lost at once, or arrives exactly once: not before its delay, in the order of sending, and not
        /// faster than the rate permits.
        #[test]
        fn every_packet_arrives_once_or_is_lost(
            packets in prop::collection::vec((0_u64..3_000, 1_usize..9000), 1..200),
            loss in 0_u32..300_000,
            queue_ms in 0_u64..20,
        ) {
            let mut direction = direction(&["delay=5ms", "rate=100Mbit"]);
            direction.apply(&format!("loss={loss}ppm").parse().unwrap());
            direction.apply(&format!("queue={queue_ms}ms").parse().unwrap());
            let mut now = Duration::ZERO;
            let mut held = Vec::new();
            let mut arrived = Vec::new();
            let mut lost = 0;
            for (number, (pause_us, bytes)) in packets.iter().enumerate() {
                now += Duration::from_micros(*pause_us);
                while let Some(at) = direction.next_arrival().filter(|at| *at <= now) {
                    direction.arrive(at, |packet| arrived.push((at, packet.to_vec())));
                }
                let mut packet = vec![0; bytes + 8];
                packet[..8].copy_from_slice(&number.to_le_bytes());
                match direction.send(now, &packet) {
                    Ok(()) => held.push((now, packet)),
                    Err(_) => lost += 1,
                }
            }
            while let Some(at) = direction.next_arrival() {
                direction.arrive(at, |packet| arrived.push((at, packet.to_vec())));
            }
            prop_assert_eq!(held.len() + lost, packets.len());
            prop_assert_eq!(held.len(), arrived.len());
            let mut earliest = Duration::ZERO;
            for ((sent, packet), (at, received)) in held.iter().zip(&arrived) {
                prop_assert_eq!(packet, received);
                let own_time = Duration::from_nanos(packet.len() as u64 * 80);
                earliest = earliest.max(*sent + 5 * MS) + own_time;
                prop_assert!(*at >= earliest, "{at:?} before {earliest:?}");
                let longest = Duration::from_millis(queue_ms) + own_time + 5 * MS;
                prop_assert!(*at <= *sent + longest);
            }
        }

        /// Reordered packets are delayed, and lose or repeat nothing.
        #[test]
        fn reordering_keeps_all_packets(share in 0_u32..=1_000_000, count in 1_u8..200) {
            let mut direction = direction(&["rate=unlimited", "reorder-delay=3ms"]);
            direction.apply(&format!("reorder={share}ppm").parse().unwrap());
            for number in 0..count {
                direction.send(MS * u32::from(number), &[number]).unwrap();
            }
            let mut arrived = arrivals(&mut direction);
            prop_assert!(arrived.is_sorted_by_key(|(at, _)| *at));
            arrived.sort_by_key(|(_, number)| *number);
            prop_assert_eq!(arrived.len(), usize::from(count));
            for (index, (at, number)) in arrived.into_iter().enumerate() {
                prop_assert_eq!(index, usize::from(number));
                let on_time = MS * (u32::from(number) + 120);
                prop_assert!(at == on_time || at == on_time + 3 * MS, "{at:?}");
            }
        }
    }
}
