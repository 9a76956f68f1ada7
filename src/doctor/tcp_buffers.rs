//! Check of the kernels' TCP buffers for the links between this host and another one.
//!
//! TCP keeps all bytes that are on their way in a buffer of the sender and in one of the receiver. The product of rate and
//! round-trip time must fit in the buffers of all streams together; else the copy is slower than the link.

use std::time::Duration;

use humansize::{BINARY, format_size};

use super::locations::failed;
use super::{Outcome, Verdict};
use crate::settings::Bbcp;
use crate::transfer::copying::bbcp;
use crate::transfer::endpoint::Remote;
use crate::transfer::failures::{THIS_HOST, TransferError};
use crate::transfer::link_probe::{
    ASSUMED_RATE, KernelLimits, kernel_limits, needed_buffers, round_trip, stream_limit,
};

/// Advice for all links with too small buffers.
const GENERAL_ADVICE: &str = "`ccat-transfer links probe` measures a link; if it is slower than assumed, set bbcp.max_rate for it";

/// A link between this host and another one.
#[derive(Debug)]
pub(super) struct CheckedLink {
    pub(super) name: String,
    /// True if this host is the sender.
    pub(super) is_push: bool,
    pub(super) bbcp: Bbcp,
}

/// TCP between this host and another one: the round-trip time, and the limits of both kernels.
struct TcpPath {
    round_trip: Duration,
    here: KernelLimits,
    there: KernelLimits,
}

pub(super) async fn check_tcp_buffers(remote: &Remote, links: &[CheckedLink]) -> Outcome {
    let path = match TcpPath::measure(remote).await {
        Ok(path) => path,
        Err(error) => return failed(&error),
    };
    let outcomes: Vec<_> = links
        .iter()
        .map(|link| path.outcome(link, &remote.host.to_string()))
        .collect();
    let is_low = outcomes.iter().any(|o| o.verdict == Verdict::Yellow);
    let verdict = if is_low {
        Verdict::Yellow
    } else {
        Verdict::Green
    };
    let found: Vec<_> = outcomes.iter().map(|o| o.found.as_str()).collect();
    let mut advice: Vec<_> = outcomes.iter().filter_map(|o| o.advice.clone()).collect();
    if is_low {
        advice.push(GENERAL_ADVICE.to_owned());
    }
    let advice = (!advice.is_empty()).then(|| advice.join(". "));
    Outcome::new(verdict, found.join("; "), advice)
}

impl TcpPath {
    async fn measure(remote: &Remote) -> Result<Self, TransferError> {
        Ok(Self {
            round_trip: round_trip(remote).await?,
            here: KernelLimits::of_this_host(),
            there: kernel_limits(Some(remote)).await?,
        })
    }

    /// Compares the bytes on their way over a link with the limits of both ends.
    fn outcome(&self, link: &CheckedLink, host: &str) -> Outcome {
        let CheckedLink {
            name,
            is_push,
            bbcp,
        } = link;
        let known_rate = bbcp::size(&bbcp.max_rate);
        let rate = known_rate.unwrap_or(ASSUMED_RATE);
        let rate_text = match known_rate {
            Some(rate) => format!("{}/s (bbcp.max_rate)", bytes_text(rate)),
            None => "1 Gbit/s (assumed, since bbcp.max_rate is empty)".into(),
        };
        let delay = self.round_trip.as_micros();
        let on_their_way = u128::from(rate) * delay / 1_000_000;
        let on_their_way = u64::try_from(on_their_way).unwrap_or(u64::MAX);
        let needs = format!(
            "{name}: {} are on their way at {rate_text} and a round trip of {:.1} ms",
            bytes_text(on_their_way),
            self.round_trip.as_secs_f64() * 1000.0
        );
        let (sender, receiver) = match is_push {
            true => (&self.here, &self.there),
            false => (&self.there, &self.here),
        };
        let Some(per_stream) = stream_limit(sender, receiver, &bbcp.window) else {
            return Outcome::green(format!("{needs}; the limits of the kernels cannot be read"));
        };
        let streams = u64::from(bbcp.streams);
        let allowed = per_stream.saturating_mul(streams);
        let found = format!(
            "{needs}; the kernels allow {} ({streams} streams of {})",
            bytes_text(allowed),
            bytes_text(per_stream)
        );
        if allowed >= on_their_way {
            return Outcome::green(found);
        }
        let (sender, receiver) = match is_push {
            true => (THIS_HOST, host),
            false => (host, THIS_HOST),
        };
        let needed = needed_buffers(on_their_way, streams, &bbcp.window);
        Outcome::yellow(
            found,
            format!(
                "a copy over {name} cannot use the whole link: use more streams, or {}",
                needed.advice(sender, receiver)
            ),
        )
    }
}

fn bytes_text(bytes: u64) -> String {
    format_size(bytes, BINARY)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::enough(
        240,
        16,
        "8m",
        "",
        true,
        Verdict::Green,
        "28.61 MiB are on their way at 1 Gbit/s (assumed"
    )]
    #[case::too_few_streams(
        240,
        4,
        "8m",
        "",
        true,
        Verdict::Yellow,
        "the kernels allow 16 MiB (4 streams of 4 MiB)"
    )]
    #[case::the_other_direction(
        240,
        4,
        "8m",
        "",
        false,
        Verdict::Yellow,
        "the kernels allow 4 MiB (4 streams of 1 MiB)"
    )]
    #[case::a_slow_link(
        240,
        4,
        "8m",
        "10m",
        true,
        Verdict::Green,
        "2.40 MiB are on their way at 10 MiB/s (bbcp.max_rate)"
    )]
    #[case::a_fixed_window(240, 16, "=1m", "", true, Verdict::Yellow, "(16 streams of 1 MiB)")]
    #[case::near(1, 1, "", "", true, Verdict::Green, "a round trip of 1.0 ms")]
    fn buffers_are_compared_with_the_link(
        #[case] round_trip_ms: u64,
        #[case] streams: u8,
        #[case] window: &str,
        #[case] max_rate: &str,
        #[case] is_push: bool,
        #[case] verdict: Verdict,
        #[case] text: &str,
    ) {
        let limits = |tcp_rmem: u64, tcp_wmem: u64| KernelLimits {
            tcp_rmem: Some([4096, 131_072, tcp_rmem]),
            tcp_wmem: Some([4096, 16_384, tcp_wmem]),
            ..KernelLimits::default()
        };
        let path = TcpPath {
            round_trip: Duration::from_millis(round_trip_ms),
            here: limits(6 << 20, 4 << 20),
            there: limits(32 << 20, 1 << 20),
        };
        let mut bbcp = crate::settings::load(None, []).unwrap().bbcp;
        bbcp.streams = streams;
        bbcp.window = window.into();
        bbcp.max_rate = max_rate.into();
        let link = CheckedLink {
            name: "ccat → cologne".into(),
            is_push,
            bbcp,
        };
        let found = path.outcome(&link, "koln");
        assert_eq!(found.verdict, verdict, "{}", found.found);
        assert!(found.found.contains(text), "{}", found.found);
        assert_eq!(found.advice.is_some(), verdict == Verdict::Yellow);
    }
}
