//! bbcp's notation of sizes and rates.

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
