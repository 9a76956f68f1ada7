//! The link between two sites: its limits, time windows and pause, and the order in which links are served.
//!
//! Pure functions: rows and the time of day are arguments.

use std::collections::VecDeque;
use std::fmt;
use std::str::FromStr;

use chrono::{DateTime, NaiveTime, Utc};
use serde::{Serialize, Serializer};
use utoipa::ToSchema;

use crate::settings::{Bbcp, LinkSettings};

/// A link, named by the short names of its sites as in `[[routes]]` of the settings.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, ToSchema)]
pub struct LinkName {
    /// Short name of the site to copy from.
    pub origin: String,
    /// Short name of the site to copy to.
    pub destination: String,
}

impl fmt::Display for LinkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} → {}", self.origin, self.destination)
    }
}

/// Limits, pause and overrides of a link.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Link {
    /// Name of the link.
    #[serde(flatten)]
    pub name: LinkName,
    /// Maximum number of transfers that are SCHEDULED or IN_PROGRESS at once; `None` for no limit.
    pub max_active: Option<u32>,
    /// Priority; the highest is scheduled first.
    pub priority: i64,
    /// Times of the day with another limit.
    pub capacity: Capacity,
    /// Values that override the settings.
    #[serde(flatten)]
    pub overrides: Overrides,
    /// The pause; `None` while the link is open.
    pub pause: Option<Pause>,
    /// Number of transfers that managers have scheduled so far.
    #[serde(skip)]
    pub issued: i64,
}

impl Link {
    /// Creates a link without a row: no limits and no overrides.
    #[must_use]
    pub fn unlimited(name: LinkName) -> Self {
        Self {
            name,
            max_active: None,
            priority: 0,
            capacity: Capacity::default(),
            overrides: Overrides::default(),
            pause: None,
            issued: 0,
        }
    }

    /// Maximum number of transfers that may be SCHEDULED or IN_PROGRESS at `now`; `None` for no limit.
    #[must_use]
    pub fn limit(&self, now: DateTime<Utc>) -> Option<u32> {
        if self.pause.is_some() {
            return Some(0);
        }
        self.capacity.limit_at(now.time()).or(self.max_active)
    }

    /// Time at which the link takes transfers again, if a time window lets it take none at `now`. `None` if it takes some,
    /// if it is paused, or if it takes none at any time of the day.
    #[must_use]
    pub fn closed_until(&self, now: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let is_closed = |time| self.limit(time) == Some(0);
        if self.pause.is_some() || !is_closed(now) {
            return None;
        }
        let windows = self.capacity.0.as_deref().ok()?;
        let today = now.date_naive();
        // The limit changes only at the start and the end of a window.
        let changes = [today, today.succ_opt()?].into_iter().flat_map(|day| {
            let times = windows
                .iter()
                .flat_map(|window| [window.from, window.until]);
            times.map(move |time| day.and_time(time).and_utc())
        });
        changes
            .filter(|time| *time > now && !is_closed(*time))
            .min()
    }
}

/// Keys of `[bbcp]` that the row of a link overrides. A value in the row takes precedence over the settings file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Overrides {
    /// Overrides `streams`.
    pub streams: Option<i64>,
    /// Overrides `window`.
    #[serde(rename = "window")]
    pub tcp_window: Option<String>,
    /// Overrides `max_rate`.
    pub max_rate: Option<String>,
}

impl Overrides {
    /// Applies the overrides to the settings of a link.
    ///
    /// # Errors
    /// The problems of values that bbcp would not accept, by the rules for the settings file.
    pub fn apply_to(&self, mut settings: LinkSettings) -> Result<LinkSettings, String> {
        settings.bbcp = self.apply_to_bbcp(settings.bbcp)?;
        Ok(settings)
    }

    fn apply_to_bbcp(&self, mut bbcp: Bbcp) -> Result<Bbcp, String> {
        if let Some(streams) = self.streams {
            // An invalid number becomes 0, which the check below refuses.
            bbcp.streams = u8::try_from(streams).unwrap_or(0);
        }
        if let Some(window) = &self.tcp_window {
            bbcp.window.clone_from(window);
        }
        if let Some(rate) = &self.max_rate {
            bbcp.max_rate.clone_from(rate);
        }
        let problems = bbcp.problems("links");
        if problems.is_empty() {
            return Ok(bbcp);
        }
        let lines: Vec<_> = problems.iter().map(ToString::to_string).collect();
        Err(lines.join("; "))
    }
}

/// A pause of a link: no copy starts while it lasts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct Pause {
    /// Start of the pause, by the database's clock.
    pub since: DateTime<Utc>,
    /// Operator who paused the link, as `login@host`.
    pub by: String,
    /// Reason for the pause.
    pub reason: String,
    /// True if the pause also stops running copies.
    pub stops_running: bool,
}

/// A link that currently accepts no further copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClosedLink {
    /// An operator has paused the link.
    Paused(PausedLink),
    /// The link has reached its limit.
    Full(FullLink),
}

/// A link that has reached its limit, or exceeds it because the limit was higher before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FullLink {
    /// Name of the link.
    pub name: LinkName,
    /// Limit at this time of the day.
    pub limit: u32,
    /// Number of copies that run over the link.
    pub copies: u64,
}

/// A paused link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PausedLink {
    /// Name of the link.
    pub name: LinkName,
    /// Start, operator and reason of the pause.
    pub pause: Pause,
}

/// Time windows of the day in which a link has another limit.
///
/// A text that cannot be parsed closes the link: no copy is better than a copy during an observation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capacity(Result<Vec<Window>, CapacityError>);

impl Default for Capacity {
    fn default() -> Self {
        Self(Ok(Vec::new()))
    }
}

impl Capacity {
    /// Parses the stored text, one window per line.
    #[must_use]
    pub fn stored(text: &str) -> Self {
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        Self(lines.map(str::parse).collect())
    }

    /// Creates the capacity from windows.
    #[must_use]
    pub fn of(windows: Vec<Window>) -> Self {
        Self(Ok(windows))
    }

    /// The error of the stored text, if it cannot be parsed.
    #[must_use]
    pub fn problem(&self) -> Option<&CapacityError> {
        self.0.as_ref().err()
    }

    /// The stored form: one window per line.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        let windows = self.0.as_deref().unwrap_or_default();
        windows.iter().map(ToString::to_string).collect()
    }

    /// Returns the limit at this time of the day: the lowest limit of overlapping windows, `None` outside of all
    /// windows.
    fn limit_at(&self, time: NaiveTime) -> Option<u32> {
        let Ok(windows) = &self.0 else {
            return Some(0);
        };
        let now = windows.iter().filter(|window| window.contains(time));
        now.map(|window| window.max_active).min()
    }
}

impl Serialize for Capacity {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.lines().serialize(serializer)
    }
}

/// A part of the day, in UTC, in which a link has its own limit: `18:00-06:00 UTC max_active=1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    from: NaiveTime,
    until: NaiveTime,
    max_active: u32,
}

/// Error for a text that is not a window.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text}` is not a window of the day: {problem}; write it as \"18:00-06:00 UTC max_active=1\""
)]
pub struct CapacityError {
    text: String,
    problem: &'static str,
}

impl Window {
    /// Returns true if `time` is in the window. The start belongs to the window, the end does not.
    fn contains(&self, time: NaiveTime) -> bool {
        if self.from < self.until {
            self.from <= time && time < self.until
        } else {
            // The window includes midnight, or ends at it.
            self.from <= time || time < self.until
        }
    }
}

impl FromStr for Window {
    type Err = CapacityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = |problem| CapacityError {
            // Limits the text to less than one line of a terminal.
            text: text.chars().take(60).collect(),
            problem,
        };
        let words: Vec<_> = text.split_ascii_whitespace().collect();
        let [times, zone, limit] = words[..] else {
            return Err(error("three words are needed"));
        };
        if zone != "UTC" {
            return Err(error("times are in UTC, and the word `UTC` is required"));
        }
        let (from, until) = times
            .split_once('-')
            .and_then(|(from, until)| Some((time_of_day(from)?, time_of_day(until)?)))
            .ok_or_else(|| error("times are hours and minutes from 00:00 to 24:00"))?;
        if from == until {
            return Err(error("it begins when it ends; the whole day is max_active"));
        }
        let max_active = limit
            .strip_prefix("max_active=")
            .and_then(|number| number.parse().ok())
            .ok_or_else(|| error("the limit is a number, 0 or above"))?;
        Ok(Self {
            from,
            until,
            max_active,
        })
    }
}

/// Parses hours and minutes; 24:00 is the midnight at the end of the day.
fn time_of_day(text: &str) -> Option<NaiveTime> {
    if text == "24:00" {
        return Some(NaiveTime::MIN);
    }
    let (hours, minutes) = text.split_once(':')?;
    // Digits only: `parse` would accept a sign.
    let is_number = |part: &str| part.len() == 2 && part.bytes().all(|b| b.is_ascii_digit());
    let digits = |part: &str| is_number(part).then(|| part.parse().ok()).flatten();
    NaiveTime::from_hms_opt(digits(hours)?, digits(minutes)?, 0)
}

impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}-{} UTC max_active={}",
            self.from.format("%H:%M"),
            self.until.format("%H:%M"),
            self.max_active
        )
    }
}

/// Returns transfers in the order in which they are sent: links of a higher priority first; links of the same priority
/// in turn, so that none waits for the backlog of another; for each link the oldest transfer first.
///
/// `queues` contains the priority and the transfers of each link, the oldest transfer first.
#[must_use]
pub fn in_turn<T>(mut queues: Vec<(i64, VecDeque<T>)>) -> Vec<T> {
    queues.sort_by_key(|(priority, _)| std::cmp::Reverse(*priority));
    let total = queues.iter().map(|(_, queue)| queue.len()).sum();
    let mut ordered = Vec::with_capacity(total);
    for equals in queues.chunk_by_mut(|a, b| a.0 == b.0) {
        loop {
            let before = ordered.len();
            ordered.extend(equals.iter_mut().filter_map(|(_, queue)| queue.pop_front()));
            if ordered.len() == before {
                break;
            }
        }
    }
    ordered
}

/// Returns the known name most similar to `name`, if its similarity is above 0.7 (Jaro-Winkler).
#[must_use]
pub fn nearest<'a>(name: &str, known: &'a [String]) -> Option<&'a str> {
    known
        .iter()
        .map(|other| (strsim::jaro_winkler(other, name), other.as_str()))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .filter(|(likeness, _)| *likeness > 0.7)
        .map(|(_, other)| other)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    fn at(link: &Link, time: &str) -> Option<u32> {
        let now = format!("2026-11-24T{time}:00Z");
        link.limit(now.parse().unwrap())
    }

    fn link(max_active: Option<u32>, windows: &[&str]) -> Link {
        let name = LinkName {
            origin: "ccat".into(),
            destination: "cologne".into(),
        };
        Link {
            max_active,
            capacity: Capacity::stored(&windows.join("\n")),
            ..Link::unlimited(name)
        }
    }

    #[test]
    fn a_window_goes_over_midnight() {
        let link = link(Some(4), &["18:00-06:00 UTC max_active=1"]);
        for (time, limit) in [
            ("17:59", 4),
            ("18:00", 1),
            ("23:59", 1),
            ("00:00", 1),
            ("05:59", 1),
            ("06:00", 4),
        ] {
            assert_eq!(at(&link, time), Some(limit), "{time}");
        }
    }

    #[rstest]
    #[case("19:30", Some("2026-11-25T06:00:00Z"))]
    #[case("05:59", Some("2026-11-24T06:00:00Z"))]
    #[case("12:00", None)]
    fn closed_link_opens_at_the_end_of_its_windows(
        #[case] time: &str,
        #[case] expected: Option<&str>,
    ) {
        let windows = [
            "18:00-24:00 UTC max_active=0",
            "23:00-06:00 UTC max_active=0",
            "20:00-21:00 UTC max_active=3",
        ];
        let closed_until = |link: &Link| {
            let now = format!("2026-11-24T{time}:00Z");
            link.closed_until(now.parse().unwrap())
        };
        let expected = expected.map(|time| time.parse().unwrap());
        assert_eq!(closed_until(&link(Some(4), &windows)), expected);
        assert_eq!(closed_until(&link(Some(0), &windows)), None);
        assert_eq!(closed_until(&link(Some(4), &["at night"])), None);
    }

    #[test]
    fn lowest_of_overlapping_windows_applies() {
        let windows = [
            "10:00-14:00 UTC max_active=8",
            "12:00-24:00 UTC max_active=2",
        ];
        let link = link(None, &windows);
        assert_eq!(at(&link, "09:00"), None);
        assert_eq!(at(&link, "10:00"), Some(8));
        assert_eq!(at(&link, "13:00"), Some(2));
        assert_eq!(at(&link, "23:59"), Some(2));
        assert_eq!(at(&link, "00:00"), None);
    }

    #[test]
    fn paused_and_invalid_links_are_closed() {
        let mut closed = link(None, &["at night"]);
        assert_eq!(at(&closed, "12:00"), Some(0));
        assert!(closed.capacity.problem().is_some());
        closed = link(Some(9), &[]);
        closed.pause = Some(Pause {
            since: crate::clock::now(),
            by: "me@here".into(),
            reason: "storm".into(),
            stops_running: false,
        });
        assert_eq!(at(&closed, "12:00"), Some(0));
    }

    #[rstest]
    #[case("18:00-06:00 max_active=1")]
    #[case("18:00-06:00 CET max_active=1")]
    #[case("18-6 UTC max_active=1")]
    #[case("18:00-25:00 UTC max_active=1")]
    #[case("24:00-24:00 UTC max_active=1")]
    #[case("18:00-18:00 UTC max_active=1")]
    #[case("+8:00-06:00 UTC max_active=1")]
    #[case("18:00-06:00 UTC max_active=-1")]
    #[case("18:00-06:00 UTC 1")]
    #[case("")]
    fn no_windows(#[case] text: &str) {
        assert!(text.parse::<Window>().is_err(), "{text}");
    }

    #[test]
    fn priorities_come_first_and_equals_take_turns() {
        let queue = |words: &str| words.split(' ').map(str::to_owned).collect();
        let queues = vec![
            (0, queue("a1 a2 a3 a4")),
            (5, queue("b1 b2")),
            (0, queue("c1")),
            (0, queue("d1 d2")),
            (-1, queue("e1")),
        ];
        assert_eq!(in_turn(queues).join(" "), "b1 b2 a1 c1 d1 a2 d2 a3 a4 e1");
        assert!(in_turn::<u8>(Vec::new()).is_empty());
    }

    #[rstest]
    #[case("colonge", Some("cologne"))]
    #[case("Ccat", Some("ccat"))]
    #[case("somewhere", None)]
    fn nearest_names(#[case] name: &str, #[case] expected: Option<&str>) {
        let known = ["ccat", "cologne", "us"].map(str::to_owned);
        assert_eq!(nearest(name, &known), expected);
    }

    proptest! {
        #[test]
        fn shown_window_is_parsed(from in 0_u32..1440, length in 1_u32..1440, max_active: u32) {
            let until = (from + length) % 1440;
            let clock = |minute: u32| format!("{:02}:{:02}", minute / 60, minute % 60);
            let text = format!("{}-{} UTC max_active={max_active}", clock(from), clock(until));
            let window: Window = text.parse().unwrap();
            prop_assert_eq!(window.to_string(), text);
            let minutes = (0..1440).filter(|minute| {
                window.contains(NaiveTime::from_hms_opt(minute / 60, minute % 60, 0).unwrap())
            });
            prop_assert_eq!(minutes.count(), length as usize);
        }

        #[test]
        fn every_transfer_gets_its_turn_in_its_links_order(
            lengths in prop::collection::vec((-2_i64..3, 0_usize..9), 0..9),
        ) {
            let queues: Vec<_> = lengths
                .iter()
                .enumerate()
                .map(|(n, (priority, length))| (*priority, (0..*length).map(|i| (n, i)).collect()))
                .collect();
            let ordered = in_turn(queues);
            prop_assert_eq!(ordered.len(), lengths.iter().map(|(_, length)| length).sum::<usize>());
            for n in 0..lengths.len() {
                let of_one: Vec<_> = ordered.iter().filter(|(m, _)| *m == n).map(|(_, i)| *i).collect();
                prop_assert!(of_one.is_sorted());
            }
            let priorities: Vec<_> = ordered.iter().map(|(n, _)| -lengths[*n].0).collect();
            prop_assert!(priorities.is_sorted());
        }

        #[test]
        fn any_text_is_read_without_panic(text in "\\PC{0,80}") {
            let _ = text.parse::<Window>();
        }
    }
}
