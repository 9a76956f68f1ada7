//! Shell patterns, as Python's `fnmatch` reads them: `*`, `?`, `[…]` and `[!…]`.

/// A pattern that is matched against a whole text.
///
/// ```
/// use celery_protocol::glob::Glob;
///
/// let pattern = Glob::new("celery@*[0-9]");
/// assert!(pattern.matches("celery@host7"));
/// assert!(!pattern.matches("celery@host"));
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Glob(Vec<Token>);

/// Part of a pattern.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    /// Any text, also an empty one.
    Text,
    /// This character.
    Char(char),
    /// One character that is in one of the ranges, or in none of them.
    OneOf {
        ranges: Vec<(char, char)>,
        negated: bool,
    },
}

impl Glob {
    /// Compiles a pattern. Every text is one; a `[` without its `]` stands for itself.
    #[must_use]
    pub fn new(pattern: &str) -> Self {
        let chars: Vec<char> = pattern.chars().collect();
        let mut tokens = Vec::new();
        let mut at = 0;
        while let Some(&char) = chars.get(at) {
            at += 1;
            let token = match char {
                '*' => Token::Text,
                '?' => Token::OneOf {
                    ranges: Vec::new(),
                    negated: true,
                },
                '[' => match set(&chars[at..]) {
                    Some((set, length)) => {
                        at += length;
                        set
                    }
                    None => Token::Char('['),
                },
                char => Token::Char(char),
            };
            if token != Token::Text || tokens.last() != Some(&Token::Text) {
                tokens.push(token);
            }
        }
        Self(tokens)
    }

    /// Returns true if the pattern matches the whole text. The time is at most proportional to the product of both
    /// lengths.
    #[must_use]
    pub fn matches(&self, text: &str) -> bool {
        let text: Vec<char> = text.chars().collect();
        let (mut token, mut at) = (0, 0);
        // The token behind the last `*`, and where the text that the `*` stands for ends.
        let mut last = None;
        while token < self.0.len() || at < text.len() {
            match (self.0.get(token), text.get(at)) {
                (Some(Token::Text), _) => {
                    token += 1;
                    last = Some((token, at));
                }
                (Some(one), Some(&char)) if one.is(char) => {
                    token += 1;
                    at += 1;
                }
                _ => match last {
                    Some((behind, end)) if end < text.len() => {
                        token = behind;
                        at = end + 1;
                        last = Some((behind, at));
                    }
                    _ => return false,
                },
            }
        }
        true
    }
}

impl Token {
    fn is(&self, char: char) -> bool {
        match self {
            Self::Text => false,
            Self::Char(one) => *one == char,
            Self::OneOf { ranges, negated } => {
                let is_in = |(first, last): &(char, char)| (*first..=*last).contains(&char);
                ranges.iter().any(is_in) != *negated
            }
        }
    }
}

/// The set behind a `[`, and its length with the `]`; `None` if there is no `]`.
fn set(chars: &[char]) -> Option<(Token, usize)> {
    let negated = chars.first() == Some(&'!');
    let start = usize::from(negated);
    // A `]` at the start is in the set.
    let length = chars.iter().skip(start + 1).position(|&char| char == ']')?;
    let end = start + 1 + length;
    let mut rest = &chars[start..end];
    let mut ranges = Vec::new();
    loop {
        rest = match rest {
            [] => break,
            [first, '-', last, rest @ ..] => {
                // A range from a later to an earlier character is empty.
                if first <= last {
                    ranges.push((*first, *last));
                }
                rest
            }
            [one, rest @ ..] => {
                ranges.push((*one, *one));
                rest
            }
        };
    }
    Some((Token::OneOf { ranges, negated }, end + 1))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    /// The values of `fnmatch.fnmatchcase`.
    #[rstest]
    #[case("tasks.add", "tasks.add", true)]
    #[case("tasks.add", "tasks.adds", false)]
    #[case("tasks.*", "tasks.add", true)]
    #[case("tasks.*", "tasks.", true)]
    #[case("tasks.*", "tasks", false)]
    #[case("*.add", "tasks.sub.add", true)]
    #[case("t*.s*b", "tasks.sub.b.sub", true)]
    #[case("t*.s*b", "tasks.sub.x", false)]
    #[case("*", "", true)]
    #[case("*", "a\nå", true)]
    #[case("a.c", "abc", false)]
    #[case("a?c", "aåc", true)]
    #[case("a?c", "ac", false)]
    #[case("[a-c]x", "bx", true)]
    #[case("[a-c]x", "dx", false)]
    #[case("[!a-c]x", "dx", true)]
    #[case("[!a-c]x", "bx", false)]
    #[case("[]-]x", "]x", true)]
    #[case("[]-]x", "-x", true)]
    #[case("[!]]x", "]x", false)]
    #[case("[c-a]x", "bx", false)]
    #[case("[!c-a]x", "bx", true)]
    #[case("[a-]x", "-x", true)]
    #[case("[^a]x", "^x", true)]
    #[case("[a", "[a", true)]
    #[case("[!", "[!", true)]
    #[case("[[]x", "[x", true)]
    #[case("\\*", "\\x", true)]
    fn texts_are_matched_as_by_python(
        #[case] pattern: &str,
        #[case] text: &str,
        #[case] expected: bool,
    ) {
        assert_eq!(Glob::new(pattern).matches(text), expected);
    }

    #[test]
    fn many_stars_take_little_time() {
        let pattern = Glob::new(&"*a".repeat(2000));
        assert!(!pattern.matches(&"a".repeat(1999)));
    }

    proptest! {
        #[test]
        fn any_pattern_is_matched_without_panic(pattern in ".{0,30}", text in ".{0,30}") {
            let _ = Glob::new(&pattern).matches(&text);
            let stars = format!("*{text}*");
            prop_assert!(text.contains(['[', '?', '*']) || Glob::new(&stars).matches(&text));
        }
    }
}
