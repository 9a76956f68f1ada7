//! The kernel's limits for TCP buffers at one end of a link.

use std::fs;

use serde::Serialize;

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
/// receive buffer of the receiver, since the kernel keeps the other half for its own data. A window that begins with `=`
/// turns auto-tuning off, and then the limits of `net.core` apply. `None` if the limits are unknown.
pub(crate) fn stream_limit(
    sender: &KernelLimits,
    receiver: &KernelLimits,
    window: &str,
) -> Option<u64> {
    if let Some(window) = window.strip_prefix('=') {
        // The kernel doubles a requested size.
        let of_kernel =
            [sender.wmem_max, receiver.rmem_max].map(|limit| limit.map(|bytes| 2 * bytes));
        let limits = of_kernel.into_iter().flatten();
        return limits.chain(size(window)).min();
    }
    let send = sender.tcp_wmem.map(|[.., most]| most)?;
    let receive = receiver.tcp_rmem.map(|[.., most]| most / 2)?;
    Some(send.min(receive))
}

/// Number of bytes of a size or rate in bbcp's notation; `None` for an empty text.
pub(crate) fn size(text: &str) -> Option<u64> {
    let text = text.strip_prefix('=').unwrap_or(text);
    let (digits, unit) = match text.char_indices().last()? {
        (at, 'k') => (&text[..at], 1 << 10),
        (at, 'm') => (&text[..at], 1 << 20),
        (at, 'g') => (&text[..at], 1 << 30),
        _ => (text, 1),
    };
    digits.parse::<u64>().ok()?.checked_mul(unit)
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

    #[rstest]
    #[case("8m", Some(8 << 20))]
    #[case("=100k", Some(100 << 10))]
    #[case("2g", Some(2 << 30))]
    #[case("7", Some(7))]
    #[case("", None)]
    #[case("m", None)]
    #[case("99999999999999999999g", None)]
    fn sizes(#[case] text: &str, #[case] bytes: Option<u64>) {
        assert_eq!(size(text), bytes);
    }
}
