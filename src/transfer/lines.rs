//! Lines of a program's output.

/// Number of bytes that are kept of a line; the lines of the programs that are read here are shorter.
const MAX_LINE_BYTES: usize = 8 << 10;

/// Splits a stream of bytes into lines of bounded length.
#[derive(Debug, Default)]
pub struct Lines {
    pending: Vec<u8>,
}

impl Lines {
    /// Adds the next bytes, and calls `line` for each line that they complete, without its end. Only the beginning of a
    /// line that is too long is kept.
    pub fn push(&mut self, bytes: &[u8], mut line: impl FnMut(&[u8])) {
        let mut rest = bytes;
        while let Some(end) = rest.iter().position(|b| *b == b'\n') {
            self.buffer(&rest[..end]);
            line(&self.pending);
            self.pending.clear();
            rest = &rest[end + 1..];
        }
        self.buffer(rest);
    }

    /// Calls `line` for the text after the last line end, if any.
    pub fn finish(self, mut line: impl FnMut(&[u8])) {
        if !self.pending.is_empty() {
            line(&self.pending);
        }
    }

    fn buffer(&mut self, bytes: &[u8]) {
        let room = MAX_LINE_BYTES.saturating_sub(self.pending.len());
        self.pending
            .extend_from_slice(&bytes[..bytes.len().min(room)]);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn long_line_is_cut_and_the_next_is_complete() {
        let mut lines = Lines::default();
        let mut seen = Vec::new();
        for _ in 0..100 {
            lines.push(&[b'x'; 4096], |line| seen.push(line.to_vec()));
            assert!(lines.pending.capacity() <= 2 * MAX_LINE_BYTES);
        }
        lines.push(b"\nnext\nrest", |line| seen.push(line.to_vec()));
        lines.finish(|line| seen.push(line.to_vec()));
        assert_eq!(seen[0].len(), MAX_LINE_BYTES);
        assert_eq!(&seen[1..], [b"next".to_vec(), b"rest".to_vec()]);
    }

    proptest! {
        #[test]
        fn lines_do_not_depend_on_the_cuts(bytes: Vec<u8>, cut in 0usize..64) {
            let cut = cut.min(bytes.len());
            let collect = |parts: &[&[u8]]| {
                let mut lines = Lines::default();
                let mut seen = Vec::new();
                for part in parts {
                    lines.push(part, |line| seen.push(line.to_vec()));
                }
                lines.finish(|line| seen.push(line.to_vec()));
                seen
            };
            prop_assert_eq!(collect(&[&bytes]), collect(&[&bytes[..cut], &bytes[cut..]]));
        }
    }
}
