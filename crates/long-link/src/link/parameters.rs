//! Properties of the link, and their notation: `delay=120ms`, `rate=1000Mbit`, `loss=0.1%`.

use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

use serde::{Serialize, Serializer};

/// Number of equal parts into which a [`Share`] is divided.
const PARTS: u32 = 1_000_000;

/// A share of all packets, in parts per million.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Share(u32);

impl Share {
    /// Draws for one packet. Returns true for this share of the packets.
    pub(super) fn draw(self, random: &mut fastrand::Rng) -> bool {
        self.0 > 0 && random.u32(0..PARTS) < self.0
    }
}

impl FromStr for Share {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const EXPECTED: &str = "expected a share such as 0.1%, 500ppm or 0";
        let (number, factor) = match (text.strip_suffix('%'), text.strip_suffix("ppm")) {
            (Some(percent), _) => (percent, f64::from(PARTS) / 100.0),
            (_, Some(millionths)) => (millionths, 1.0),
            _ if text == "0" => (text, 1.0),
            _ => return Err(EXPECTED),
        };
        let parts = number.parse::<f64>().map_err(|_| EXPECTED)? * factor;
        if !(0.0..=f64::from(PARTS)).contains(&parts) {
            return Err("a share is between 0 and 100%");
        }
        Ok(Self(parts.round() as u32))
    }
}

/// A rate in bits per second; none is unlimited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Rate(Option<u64>);

impl Rate {
    /// Time that the transmitter needs for a packet.
    pub(super) fn time_for(self, bytes: usize) -> Duration {
        self.0.map_or(Duration::ZERO, |bits_per_s| {
            Duration::from_nanos(bytes as u64 * 8 * 1_000_000_000 / bits_per_s)
        })
    }
}

impl FromStr for Rate {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const EXPECTED: &str = "expected a rate such as 500kbit, 1000Mbit, 1Gbit or unlimited";
        if text == "unlimited" {
            return Ok(Self(None));
        }
        let (number, factor) = [("kbit", 1e3), ("Mbit", 1e6), ("Gbit", 1e9)]
            .into_iter()
            .find_map(|(unit, factor)| Some((text.strip_suffix(unit)?, factor)))
            .ok_or(EXPECTED)?;
        let bits_per_s = number.parse::<f64>().map_err(|_| EXPECTED)? * factor;
        if !(1e3..=1e12).contains(&bits_per_s) {
            return Err("a rate is between 1kbit and 1000Gbit");
        }
        Ok(Self(Some(bits_per_s.round() as u64)))
    }
}

/// TCP ports whose packets are lost, as behind a firewall that drops them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Ports(Option<RangeInclusive<u16>>);

impl Ports {
    /// Returns true if the packet comes from or goes to one of the ports.
    pub(super) fn contain(&self, packet: &[u8]) -> bool {
        self.0.as_ref().is_some_and(|blocked| {
            tcp_ports(packet).is_some_and(|ports| ports.iter().any(|port| blocked.contains(port)))
        })
    }
}

impl FromStr for Ports {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const EXPECTED: &str = "expected ports such as 5031, 5031-5039 or none";
        if text == "none" {
            return Ok(Self(None));
        }
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        match (first.parse(), last.parse()) {
            (Ok(first), Ok(last)) if first <= last => Ok(Self(Some(first..=last))),
            _ => Err(EXPECTED),
        }
    }
}

/// Source and destination port of an IPv4 packet that begins a TCP segment.
fn tcp_ports(packet: &[u8]) -> Option<[u16; 2]> {
    const TCP: u8 = 6;
    let first = packet.first()?;
    let fragment_offset = u16::from_be_bytes([*packet.get(6)?, *packet.get(7)?]) & 0x1fff;
    if first >> 4 != 4 || *packet.get(9)? != TCP || fragment_offset != 0 {
        return None;
    }
    let header = usize::from(first & 0xf) * 4;
    match packet.get(header..header + 4)? {
        [a, b, c, d] => Some([u16::from_be_bytes([*a, *b]), u16::from_be_bytes([*c, *d])]),
        _ => None,
    }
}

/// Properties of one direction of the link. By default, packets arrive at once.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Parameters {
    /// Time on the way, after the transmitter has sent the packet
    #[serde(rename = "delay_s", serialize_with = "seconds")]
    pub(super) delay: Duration,
    /// Rate of the transmitter
    #[serde(rename = "rate_bits_per_s")]
    pub(super) rate: Rate,
    /// Longest time that a packet waits for the transmitter; the queue is full if it would be longer
    #[serde(rename = "queue_s", serialize_with = "seconds")]
    pub(super) queue: Duration,
    /// Packets lost at random
    #[serde(rename = "loss_ppm")]
    pub(super) loss: Share,
    /// Packets that later packets overtake, because they take `reorder_delay` longer
    #[serde(rename = "reorder_ppm")]
    pub(super) reorder: Share,
    #[serde(rename = "reorder_delay_s", serialize_with = "seconds")]
    pub(super) reorder_delay: Duration,
    /// Size above which packets are lost without a notice to their sender; none: all pass
    #[serde(rename = "largest_bytes")]
    pub(super) largest: Option<usize>,
    /// Ports behind a firewall
    pub(super) blocked: Ports,
    /// The link is interrupted
    #[serde(rename = "cut")]
    pub(super) is_cut: bool,
}

fn seconds<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(duration.as_secs_f64())
}

/// A new value of one property.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Setting {
    /// `delay=120ms`
    Delay(Duration),
    /// `rate=1000Mbit`
    Rate(Rate),
    /// `queue=100ms`
    Queue(Duration),
    /// `loss=0.1%`
    Loss(Share),
    /// `reorder=1%`
    Reorder(Share),
    /// `reorder-delay=10ms`
    ReorderDelay(Duration),
    /// `largest=1400` or `largest=none`
    Largest(Option<usize>),
    /// `blocked=5031-5039` or `blocked=none`
    Blocked(Ports),
    /// `cut=yes` or `cut=no`
    Cut(bool),
}

/// A setting that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{setting}: {problem}")]
pub(crate) struct SettingError {
    setting: String,
    problem: String,
}

impl FromStr for Setting {
    type Err = SettingError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let problem = |problem: String| SettingError {
            setting: text.to_owned(),
            problem,
        };
        let (name, value) = text
            .split_once('=')
            .ok_or_else(|| problem("expected name=value".into()))?;
        let unsuitable = |reason: &str| problem(reason.into());
        Ok(match name {
            "delay" => Self::Delay(duration(value).map_err(unsuitable)?),
            "rate" => Self::Rate(value.parse().map_err(unsuitable)?),
            "queue" => Self::Queue(duration(value).map_err(unsuitable)?),
            "loss" => Self::Loss(value.parse().map_err(unsuitable)?),
            "reorder" => Self::Reorder(value.parse().map_err(unsuitable)?),
            "reorder-delay" => Self::ReorderDelay(duration(value).map_err(unsuitable)?),
            "largest" => Self::Largest(match value {
                "none" => None,
                _ => Some(
                    value
                        .parse()
                        .map_err(|_| unsuitable("expected a number of bytes or none"))?,
                ),
            }),
            "blocked" => Self::Blocked(value.parse().map_err(unsuitable)?),
            "cut" => Self::Cut(match value {
                "yes" => true,
                "no" => false,
                _ => return Err(unsuitable("expected yes or no")),
            }),
            _ => {
                return Err(unsuitable(
                    "no such property; there are delay, rate, queue, loss, reorder, reorder-delay, \
                     largest, blocked, cut and mtu",
                ));
            }
        })
    }
}

/// Reads a time such as `120ms`.
pub(crate) fn duration(text: &str) -> Result<Duration, &'static str> {
    humantime::parse_duration(text).map_err(|_| "expected a time such as 120ms or 30s")
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("delay=120ms", Setting::Delay(Duration::from_millis(120)))]
    #[case("delay=0", Setting::Delay(Duration::ZERO))]
    #[case("rate=1000Mbit", Setting::Rate(Rate(Some(1_000_000_000))))]
    #[case("rate=2.5Gbit", Setting::Rate(Rate(Some(2_500_000_000))))]
    #[case("rate=unlimited", Setting::Rate(Rate(None)))]
    #[case("loss=0.1%", Setting::Loss(Share(1000)))]
    #[case("loss=100%", Setting::Loss(Share(PARTS)))]
    #[case("loss=50ppm", Setting::Loss(Share(50)))]
    #[case("loss=0", Setting::Loss(Share(0)))]
    #[case("reorder=1%", Setting::Reorder(Share(10_000)))]
    #[case("reorder-delay=5ms", Setting::ReorderDelay(Duration::from_millis(5)))]
    #[case("largest=1400", Setting::Largest(Some(1400)))]
    #[case("largest=none", Setting::Largest(None))]
    #[case("blocked=5031-5039", Setting::Blocked(Ports(Some(5031..=5039))))]
    #[case("blocked=22", Setting::Blocked(Ports(Some(22..=22))))]
    #[case("blocked=none", Setting::Blocked(Ports(None)))]
    #[case("cut=yes", Setting::Cut(true))]
    fn settings_are_read(#[case] text: &str, #[case] setting: Setting) {
        assert_eq!(text.parse::<Setting>().unwrap(), setting);
    }

    #[rstest]
    #[case("delay")]
    #[case("delay=120")]
    #[case("rate=1000")]
    #[case("rate=0Mbit")]
    #[case("rate=nanMbit")]
    #[case("loss=1")]
    #[case("loss=101%")]
    #[case("loss=-1%")]
    #[case("loss=nan%")]
    #[case("largest=-1")]
    #[case("blocked=9-1")]
    #[case("cut=true")]
    #[case("speed=1")]
    fn wrong_settings_are_refused(#[case] text: &str) {
        let error = text.parse::<Setting>().unwrap_err();
        assert!(error.to_string().starts_with(text), "{error}");
    }

    fn packet(protocol: u8, fragment: u8, header: u8) -> Vec<u8> {
        let mut packet = vec![0; 40];
        packet[0] = 0x40 | header;
        packet[7] = fragment;
        packet[9] = protocol;
        let at = usize::from(header) * 4;
        packet[at..at + 4].copy_from_slice(&[0x13, 0xa7, 0x00, 0x16]);
        packet
    }

    #[rstest]
    #[case(&packet(6, 0, 5), Some([5031, 22]))]
    #[case(&packet(6, 0, 6), Some([5031, 22]))]
    #[case::udp(&packet(17, 0, 5), None)]
    #[case::a_later_fragment(&packet(6, 1, 5), None)]
    #[case::cut_off(&packet(6, 0, 5)[..22], None)]
    #[case::empty(&[], None)]
    fn ports_of_a_packet(#[case] packet: &[u8], #[case] ports: Option<[u16; 2]>) {
        assert_eq!(tcp_ports(packet), ports);
    }
}
