//! The kernel's limits for TCP buffers at one end of a link.

use std::fs;

use serde::Serialize;

use crate::transfer::copying::bbcp::size;

/// Names below `/proc/sys`, in the order in which they are shown.
pub(crate) const NAMES: [&str; 5] = [
    "net/ipv4/tcp_rmem",
    "net/ipv4/tcp_wmem",
    "net/core/rmem_max",
    "net/core/wmem_max",
    "net/ipv4/tcp_congestion_control",
];

/// The kernel's limits for TCP buffers on one host, in bytes. Values that the host does not show are `None`; those of
/// `net.core` are missing in containers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(crate) struct KernelLimits {
    /// Smallest, first and largest receive buffer with auto-tuning.
    pub(crate) tcp_rmem: Option<[u64; 3]>,
    /// Smallest, first and largest send buffer with auto-tuning.
    pub(crate) tcp_wmem: Option<[u64; 3]>,
    /// Largest receive buffer that a program may request.
    pub(crate) rmem_max: Option<u64>,
    /// Largest send buffer that a program may request.
    pub(crate) wmem_max: Option<u64>,
    /// Name of the algorithm for congestion control.
    pub(crate) congestion_control: Option<String>,
}

impl KernelLimits {
    /// Reads the limits of this host.
    pub(crate) fn of_this_host() -> Self {
        let line = |name: &&str| {
            let value = fs::read_to_string(format!("/proc/sys/{name}")).ok()?;
            Some(format!("{name} {value}"))
        };
        Self::parse(NAMES.iter().filter_map(line))
    }

    /// Parses lines of a name of [`NAMES`] and its value.
    pub(crate) fn parse(lines: impl IntoIterator<Item = impl AsRef<str>>) -> Self {
        let mut limits = Self::default();
        for line in lines {
            let mut words = line.as_ref().split_whitespace();
            let name = words.next().unwrap_or_default();
            let values: Vec<&str> = words.collect();
            let number = |word: &&str| word.parse().ok();
            let three = || {
                let numbers: Vec<u64> = values.iter().filter_map(number).collect();
                <[u64; 3]>::try_from(numbers).ok()
            };
            let one = || values.first().and_then(number);
            match name {
                "net/ipv4/tcp_rmem" => limits.tcp_rmem = three(),
                "net/ipv4/tcp_wmem" => limits.tcp_wmem = three(),
                "net/core/rmem_max" => limits.rmem_max = one(),
                "net/core/wmem_max" => limits.wmem_max = one(),
                "net/ipv4/tcp_congestion_control" => {
                    limits.congestion_control = values.first().map(|&name| name.to_owned());
                }
                _ => {}
            }
        }
        limits
    }
}

/// The most bytes that one stream can have on their way: the largest send buffer of the sender, or half of the largest
/// receive buffer of the receiver, since the kernel keeps the other half for its own data. `None` if the limits are unknown.
///
/// A window that begins with `=` is fixed: the program requests it, up to `wmem_max` and `rmem_max`, and the kernel makes the
/// buffers twice as large.
pub(crate) fn stream_limit(
    sender: &KernelLimits,
    receiver: &KernelLimits,
    window: &str,
) -> Option<u64> {
    if let Some(window) = fixed(window) {
        let send = sender.wmem_max.map(|bytes| bytes.saturating_mul(2));
        let limits = [send, receiver.rmem_max, size(window)];
        return limits.into_iter().flatten().min();
    }
    let send = sender.tcp_wmem.map(|[.., most]| most)?;
    let receive = receiver.tcp_rmem.map(|[.., most]| most / 2)?;
    Some(send.min(receive))
}

/// Limits of the kernels with which every stream can have its share of the bytes on their way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NeededBuffers {
    /// Name in `sysctl` and value at the sender.
    sender: (&'static str, u64),
    /// The same at the receiver.
    receiver: (&'static str, u64),
    /// Needed window, if it is fixed.
    window: Option<u64>,
}

/// Computes the limits that [`stream_limit`] needs to allow a share of `on_their_way` bytes.
pub(crate) fn needed_buffers(on_their_way: u64, streams: u64, window: &str) -> NeededBuffers {
    let share = on_their_way.div_ceil(streams.max(1));
    match fixed(window) {
        Some(_) => NeededBuffers {
            sender: ("net.core.wmem_max", share.div_ceil(2)),
            receiver: ("net.core.rmem_max", share),
            window: Some(share),
        },
        None => NeededBuffers {
            sender: ("the last number of net.ipv4.tcp_wmem", share),
            receiver: (
                "the last number of net.ipv4.tcp_rmem",
                share.saturating_mul(2),
            ),
            window: None,
        },
    }
}

impl NeededBuffers {
    /// Names the values to change on the hosts with these names.
    pub(crate) fn advice(&self, sender: &str, receiver: &str) -> String {
        let (send, send_bytes) = self.sender;
        let (receive, receive_bytes) = self.receiver;
        let kernel = format!(
            "raise {send} on {sender} to {send_bytes} and {receive} on {receiver} to {receive_bytes} (sysctl)"
        );
        match self.window {
            Some(bytes) => format!("{kernel}, and bbcp.window to \"={bytes}\""),
            None => kernel,
        }
    }
}

/// The size of a fixed window.
fn fixed(window: &str) -> Option<&str> {
    window.strip_prefix('=')
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn limits(tcp_rmem: u64, tcp_wmem: u64) -> KernelLimits {
        KernelLimits {
            tcp_rmem: Some([4096, 131_072, tcp_rmem]),
            tcp_wmem: Some([4096, 16_384, tcp_wmem]),
            rmem_max: Some(4 << 20),
            wmem_max: Some(1 << 20),
            congestion_control: Some("bbr".into()),
        }
    }

    #[test]
    fn files_of_the_kernel_are_read() {
        let text = "net/ipv4/tcp_rmem 4096\t131072\t33554432\nnet/ipv4/tcp_wmem 4096\t16384\t4194304\n\
                    net/core/rmem_max 4194304\nnet/core/wmem_max 1048576\nnet/ipv4/tcp_congestion_control bbr\n";
        assert_eq!(KernelLimits::parse(text.lines()), limits(32 << 20, 4 << 20));
        let unknown = KernelLimits::parse(["net/ipv4/tcp_rmem -", "net/core/rmem_max", "x 1", ""]);
        assert_eq!(unknown, KernelLimits::default());
        assert!(KernelLimits::of_this_host().tcp_rmem.is_some());
    }

    #[rstest]
    #[case::sender(32 << 20, 4 << 20, "8m", Some(4 << 20))]
    #[case::receiver(6 << 20, 4 << 20, "", Some(3 << 20))]
    #[case::fixed(32 << 20, 4 << 20, "=1m", Some(1 << 20))]
    #[case::fixed_above_the_limit(32 << 20, 4 << 20, "=8m", Some(2 << 20))]
    #[case::fixed_without_auto_tuning(4096, 4096, "=2m", Some(2 << 20))]
    fn limit_of_a_stream(
        #[case] tcp_rmem: u64,
        #[case] tcp_wmem: u64,
        #[case] window: &str,
        #[case] expected: Option<u64>,
    ) {
        let limits = limits(tcp_rmem, tcp_wmem);
        assert_eq!(stream_limit(&limits, &limits, window), expected);
        assert_eq!(stream_limit(&limits, &KernelLimits::default(), "8m"), None);
    }

    #[test]
    fn a_fixed_window_needs_the_whole_receive_buffer() {
        let mut limits = limits(32 << 20, 4 << 20);
        limits.wmem_max = Some(4 << 20);
        limits.rmem_max = Some(1 << 20);
        assert_eq!(stream_limit(&limits, &limits, "=8m"), Some(1 << 20));
    }

    /// With the needed values, the kernels allow the bytes on their way.
    #[rstest]
    #[case(
        "8m",
        "raise the last number of net.ipv4.tcp_wmem on a to 7500001 and the last number of net.ipv4.tcp_rmem on b to 15000002 (sysctl)"
    )]
    #[case(
        "=1m",
        "raise net.core.wmem_max on a to 3750001 and net.core.rmem_max on b to 7500001 (sysctl), and bbcp.window to \"=7500001\""
    )]
    fn needed_limits_are_enough(#[case] window: &str, #[case] advice: &str) {
        let needed = needed_buffers(30_000_001, 4, window);
        assert_eq!(needed.advice("a", "b"), advice);
        let (send, receive) = (needed.sender.1, needed.receiver.1);
        let limits = KernelLimits {
            tcp_rmem: Some([0, 0, receive]),
            tcp_wmem: Some([0, 0, send]),
            rmem_max: Some(receive),
            wmem_max: Some(send),
            congestion_control: None,
        };
        let window = needed
            .window
            .map_or(window.to_owned(), |bytes| format!("={bytes}"));
        let allowed = stream_limit(&limits, &limits, &window).unwrap_or(0);
        assert!(allowed * 4 >= 30_000_001, "{allowed}");
    }
}
