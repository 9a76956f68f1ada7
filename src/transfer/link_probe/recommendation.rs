//! Streams and window for a link, from what was measured. Pure.

use std::time::Duration;

use serde::Serialize;

/// Rate in bytes per second that a link is assumed to have if its settings have no `max_rate`: 1 Gbit/s.
pub(crate) const ASSUMED_RATE: u64 = 125_000_000;

/// Fewest streams that are recommended, which is bbcp's own default: a lost packet slows down only one of them.
const LEAST_STREAMS: f64 = 4.0;

/// Most streams that bbcp accepts.
const MOST_STREAMS: f64 = 64.0;

/// Ratio of the recommended to the needed number of streams, and of the recommended window to the needed one: after a
/// lost packet a stream has half of its rate for a while.
const RESERVE: f64 = 2.0;

/// Share of the proportional increase from which the rate still counts as growing with the streams.
const GROWS: f64 = 0.5;

/// Smallest and largest recommended window, in MiB.
const WINDOWS_MIB: (u64, u64) = (1, 32);

/// Measured and assumed properties of a link.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Measured {
    /// Time of a round trip.
    pub(crate) round_trip: Duration,
    /// Rate of one stream, in bytes per second.
    pub(crate) one_stream: f64,
    /// Rate of the configured streams.
    pub(crate) all_streams: f64,
    /// Number of the configured streams.
    pub(crate) streams: u8,
    /// Expected rate of the link.
    pub(crate) expected: u64,
}

/// Recommended settings of a link.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Recommendation {
    /// Number of streams.
    pub(crate) streams: u8,
    /// TCP window, in bbcp's notation.
    pub(crate) window: String,
    /// Rate in bytes per second for which they are sufficient.
    pub(crate) rate_bytes_per_s: u64,
    /// Bytes on their way at that rate.
    pub(crate) bandwidth_delay_bytes: u64,
}

impl Measured {
    /// Computes the settings.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "casts saturate, and a recommendation needs no precision"
    )]
    pub(crate) fn recommend(&self) -> Recommendation {
        let one_stream = self.one_stream.max(1.0);
        let proportional = one_stream * f64::from(self.streams);
        // Where more streams still increase the rate, the link may be faster than what was measured.
        let is_growing = self.streams == 1 || self.all_streams >= GROWS * proportional;
        let measured = self.all_streams.max(one_stream);
        let rate = match is_growing {
            true => measured.max(self.expected as f64),
            false => measured,
        };
        let needed = rate / one_stream * RESERVE;
        let streams = needed.ceil().clamp(LEAST_STREAMS, MOST_STREAMS);
        let on_their_way = rate * self.round_trip.as_secs_f64();
        let window = on_their_way / streams * RESERVE / f64::from(1 << 20);
        let (least, most) = WINDOWS_MIB;
        let window = (window.ceil() as u64)
            .next_power_of_two()
            .clamp(least, most);
        Recommendation {
            streams: streams as u8,
            window: format!("{window}m"),
            rate_bytes_per_s: rate as u64,
            bandwidth_delay_bytes: on_their_way as u64,
        }
    }
}

impl Recommendation {
    /// The lines for the settings file.
    pub(crate) fn settings(&self, origin: &str, destination: &str) -> String {
        let Self {
            streams, window, ..
        } = self;
        // The names may contain any text; a JSON string is a TOML string.
        let quoted = |name: &str| serde_json::Value::from(name).to_string();
        format!(
            "[[routes]]\norigin = {}\ndestination = {}\nbbcp = {{ streams = {streams}, window = \"{window}\" }}\n",
            quoted(origin),
            quoted(destination)
        )
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    // One stream is limited by its send buffer of 4 MiB; sixteen are limited by the link.
    #[case::chile(240, 16e6, 93e6, 16, 12, "4m")]
    // Four streams are not enough for the link.
    #[case::too_few(240, 16e6, 62e6, 4, 16, "4m")]
    // The link is slower than one stream could be.
    #[case::slow_link(240, 5e6, 5.1e6, 16, 4, "1m")]
    #[case::near(1, 400e6, 900e6, 16, 5, "1m")]
    #[case::lossy(240, 1e5, 64e5, 64, 64, "1m")]
    #[case::nothing_measured(240, 0.0, 0.0, 16, 4, "1m")]
    #[case::only_one(240, 16e6, 16e6, 1, 16, "4m")]
    fn settings_follow_from_the_rates(
        #[case] round_trip_ms: u64,
        #[case] one_stream: f64,
        #[case] all_streams: f64,
        #[case] configured: u8,
        #[case] streams: u8,
        #[case] window: &str,
    ) {
        let measured = Measured {
            round_trip: Duration::from_millis(round_trip_ms),
            one_stream,
            all_streams,
            streams: configured,
            expected: ASSUMED_RATE,
        };
        let found = measured.recommend();
        assert_eq!(
            (found.streams, found.window.as_str()),
            (streams, window),
            "{found:?}"
        );
    }

    #[test]
    fn settings_can_be_pasted() -> Result<(), Box<dyn std::error::Error>> {
        let recommended = Recommendation {
            streams: 12,
            window: "4m".into(),
            rate_bytes_per_s: 0,
            bandwidth_delay_bytes: 0,
        };
        let text = recommended.settings("ccat", "col\"ogne");
        assert_eq!(
            text,
            "[[routes]]\norigin = \"ccat\"\ndestination = \"col\\\"ogne\"\nbbcp = { streams = 12, window = \"4m\" }\n"
        );
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("config.toml");
        std::fs::write(&file, text)?;
        let link = crate::settings::load(Some(&file), [])?.link("ccat", "col\"ogne")?;
        assert_eq!((link.bbcp.streams, link.bbcp.window.as_str()), (12, "4m"));
        Ok(())
    }
}
