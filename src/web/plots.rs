//! Plots as SVG. They contain numbers and times only, no text from outside.

use std::io;
use std::ops::Range;

use chrono::{DateTime, Days, SubsecRound as _, TimeDelta, Utc};
use plotters::coord::Shift;
use plotters::prelude::*;

use super::model::{Bucket, Period};

const WIDTH: u32 = 400;
const HEIGHT: u32 = 190;
/// Height of the upper part, with what arrived. The lower part has the failures and the labels of the time axis.
const ARRIVALS_HEIGHT: i32 = 120;
const LEFT: i32 = 70;
const RIGHT: i32 = 22;
const FONT_SIZE: i32 = 13;

// The style sheet replaces these colours in dark mode.
const ARRIVED: RGBColor = RGBColor(0x0A, 0x6E, 0xBD);
const FAILED: RGBColor = RGBColor(0xB3, 0x26, 0x1E);
const TEXT: RGBColor = RGBColor(0, 0, 0);
const GRID: RGBColor = RGBColor(0x80, 0x80, 0x80);

/// A plot could not be drawn.
#[derive(Debug, thiserror::Error)]
#[error("cannot draw a plot")]
pub(super) struct PlotError(#[from] DrawingAreaErrorKind<io::Error>);

/// Draws the sizes that arrived in each step of a period, and below them the failures, on the same time axis.
///
/// # Errors
/// The plot cannot be drawn.
pub(super) fn throughput(
    period: Period,
    time: &Range<DateTime<Utc>>,
    buckets: &[Bucket],
) -> Result<String, PlotError> {
    let mut svg = String::with_capacity(8 << 10);
    {
        let root = SVGBackend::with_string(&mut svg, (WIDTH, HEIGHT)).into_drawing_area();
        let (upper, lower) = root.split_vertically(ARRIVALS_HEIGHT);
        let axis = TimeAxis::new(period, time);
        let bytes = buckets.iter().map(|bucket| (bucket.start, bucket.bytes));
        let arrived = Bars {
            axis: &axis,
            color: ARRIVED,
            scale: Scale::of_sizes(bytes.clone().map(|(_, bytes)| bytes).max()),
            bars: bytes.collect(),
            has_times: false,
        };
        arrived.draw(&upper)?;
        let failures = buckets.iter().map(|bucket| (bucket.start, bucket.failures));
        let failed = Bars {
            axis: &axis,
            color: FAILED,
            scale: Scale::of_counts(failures.clone().map(|(_, count)| count).max()),
            bars: failures.collect(),
            has_times: true,
        };
        failed.draw(&lower)?;
        root.present()?;
    }
    Ok(svg)
}

/// Time axis in seconds since the start.
struct TimeAxis {
    start: DateTime<Utc>,
    length: i64,
    step: TimeDelta,
    ticks: Vec<i64>,
    period: Period,
}

impl TimeAxis {
    fn new(period: Period, time: &Range<DateTime<Utc>>) -> Self {
        let (first, interval) = match period {
            Period::Day => (TimeDelta::hours(6), TimeDelta::hours(6)),
            Period::Week => (TimeDelta::days(1), TimeDelta::days(2)),
            Period::Month => (TimeDelta::days(1), TimeDelta::days(7)),
        };
        // The axis has whole seconds.
        let (start, end) = (time.start.trunc_subsecs(0), time.end.trunc_subsecs(0));
        // From a midnight before the start, so that a tick has the same place in the day everywhere.
        let midnight = start
            .date_naive()
            .checked_sub_days(Days::new(1))
            .and_then(|day| day.and_hms_opt(0, 0, 0))
            .map_or(start, |day| day.and_utc());
        let mut ticks = Vec::new();
        let mut tick = midnight + first;
        while tick <= end {
            if tick >= start {
                ticks.push((tick - start).num_seconds());
            }
            tick += interval;
        }
        Self {
            start,
            length: (end - start).num_seconds().max(1),
            step: TimeDelta::from_std(period.bucket()).unwrap_or_default(),
            ticks,
            period,
        }
    }

    /// Extent of the step that begins at `start`, within the axis and with a gap to the next one.
    fn extent(&self, start: DateTime<Utc>) -> (i64, i64) {
        let begin = (start - self.start).num_seconds();
        let end = begin + self.step.num_seconds() * 85 / 100;
        (begin.clamp(0, self.length), end.clamp(0, self.length))
    }

    fn label(&self, tick: i64) -> String {
        let time = self.start + TimeDelta::seconds(tick);
        let format = match self.period {
            Period::Day => "%H:%M",
            Period::Week | Period::Month => "%-d %b",
        };
        time.format(format).to_string()
    }
}

/// Vertical axis from 0, in thousandths of a unit that fits.
struct Scale {
    unit: &'static str,
    /// Size of the unit.
    factor: u64,
    /// Steps that have a label, from 0 to the end of the axis.
    ticks: Vec<i64>,
}

const THOUSANDTHS: u64 = 1_000;

impl Scale {
    fn of_sizes(largest: Option<u64>) -> Self {
        const UNITS: [&str; 6] = ["PiB", "TiB", "GiB", "MiB", "KiB", "B"];
        // An axis without bars is one of megabytes.
        let largest = largest.filter(|largest| *largest > 0).unwrap_or(1 << 20);
        let powers = (0..UNITS.len()).rev();
        let mut units = UNITS
            .into_iter()
            .zip(powers.map(|power| 1_u64 << (10 * power)));
        let (unit, factor) = units
            .find(|(_, factor)| largest >= *factor)
            .unwrap_or(("B", 1));
        let top = thousandths(largest, factor);
        let step = round_step(top.div_ceil(3));
        let ticks = (0..=top.div_ceil(step)).map(|n| signed(n * step));
        Self {
            unit,
            factor,
            ticks: ticks.collect(),
        }
    }

    fn of_counts(largest: Option<u64>) -> Self {
        let top = thousandths(largest.unwrap_or(0).max(1), 1);
        Self {
            unit: "failed",
            factor: 1,
            ticks: vec![0, signed(top)],
        }
    }

    fn top(&self) -> i64 {
        self.ticks.last().copied().unwrap_or(1)
    }

    fn place(&self, value: u64) -> i64 {
        signed(thousandths(value, self.factor))
    }

    fn label(&self, tick: i64) -> String {
        let thousandths = tick.unsigned_abs();
        let (whole, rest) = (thousandths / THOUSANDTHS, thousandths % THOUSANDTHS);
        let digits = format!("{whole}.{rest:03}");
        let digits = digits.trim_end_matches('0').trim_end_matches('.');
        match tick {
            0 => "0".to_owned(),
            _ => format!("{digits} {}", self.unit),
        }
    }
}

/// A value in thousandths of `factor`, up to a number that the axis can have.
fn thousandths(value: u64, factor: u64) -> u64 {
    const MOST: u128 = 1 << 62;
    let value = u128::from(value) * u128::from(THOUSANDTHS) / u128::from(factor);
    u64::try_from(value.min(MOST)).unwrap_or(u64::MAX)
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// Smallest of the numbers 1, 2, 5, 10, 20, … that is not below `least`.
fn round_step(least: u64) -> u64 {
    let mut power: u64 = 1;
    loop {
        for step in [1, 2, 5] {
            let step = power.saturating_mul(step);
            if step >= least {
                return step;
            }
        }
        power = power.saturating_mul(10);
    }
}

struct Bars<'a> {
    axis: &'a TimeAxis,
    color: RGBColor,
    scale: Scale,
    bars: Vec<(DateTime<Utc>, u64)>,
    has_times: bool,
}

impl Bars<'_> {
    fn draw(
        &self,
        area: &DrawingArea<SVGBackend<'_>, Shift>,
    ) -> Result<(), DrawingAreaErrorKind<io::Error>> {
        let below = if self.has_times { 20 } else { 0 };
        let mut chart = ChartBuilder::on(area)
            .margin_top(10)
            .margin_right(RIGHT)
            .margin_bottom(4)
            .set_label_area_size(LabelAreaPosition::Left, LEFT)
            .set_label_area_size(LabelAreaPosition::Bottom, below)
            .build_cartesian_2d(
                (0..self.axis.length).with_key_points(self.axis.ticks.clone()),
                (0..self.scale.top()).with_key_points(self.scale.ticks.clone()),
            )?;
        chart
            .configure_mesh()
            .bold_line_style(GRID)
            .light_line_style(TRANSPARENT)
            .axis_style(TEXT)
            .label_style(("sans-serif", FONT_SIZE).into_font().color(&TEXT))
            .x_label_formatter(&|tick| self.axis.label(*tick))
            .y_label_formatter(&|tick| self.scale.label(*tick))
            .draw()?;
        let bars = self.bars.iter().filter(|(_, value)| *value > 0);
        chart.draw_series(bars.map(|(start, value)| {
            let (begin, end) = self.axis.extent(*start);
            Rectangle::new(
                [(begin, 0), (end, self.scale.place(*value))],
                self.color.filled(),
            )
        }))?;
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use rstest::rstest;

    use super::*;

    fn plot(period: Period, values: &[(u64, u64)]) -> String {
        let end: DateTime<Utc> = "2026-12-01T05:07:09.7Z".parse().unwrap();
        let start = end - TimeDelta::from_std(period.length()).unwrap();
        let bucket = TimeDelta::from_std(period.bucket()).unwrap();
        let mut at = start - TimeDelta::minutes(7);
        let buckets: Vec<_> = values
            .iter()
            .map(|(bytes, failures)| {
                let bucket_start = at;
                at += bucket;
                Bucket {
                    start: bucket_start,
                    packages: 1,
                    bytes: *bytes,
                    failures: *failures,
                }
            })
            .collect();
        throughput(period, &(start..end), &buckets).unwrap()
    }

    #[rstest]
    #[case(Period::Day, &["12:00", "18:00", "00:00"])]
    #[case(Period::Week, &["26 Nov", "28 Nov", "30 Nov"])]
    #[case(Period::Month, &["8 Nov", "15 Nov", "22 Nov", "29 Nov"])]
    fn axes_have_labels(#[case] period: Period, #[case] labels: &[&str]) {
        let svg = plot(period, &[(3 << 30, 0), (0, 2), (5 << 29, 1)]);
        for label in [&["3 GiB", "2 failed"], labels].concat() {
            let text = format!(">\n{label}\n</text>");
            assert!(svg.contains(&text), "{label} in {svg}");
        }
    }

    #[test]
    fn each_value_is_a_bar() {
        let svg = plot(Period::Day, &[(1, 0), (0, 0), (7, 3)]);
        let bars = |color: &str| svg.matches(&format!("fill=\"{color}\"")).count();
        assert_eq!((bars("#0A6EBD"), bars("#B3261E")), (2, 1), "{svg}");
        assert!(!svg.contains("style="));
    }

    #[rstest]
    #[case(&[])]
    #[case(&[(0, 0)])]
    #[case(&[(u64::MAX, u64::MAX)])]
    fn extreme_values_are_drawn(#[case] values: &[(u64, u64)]) {
        for period in Period::ALL {
            let svg = plot(period, values);
            assert!(svg.ends_with("</svg>\n"), "{svg}");
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
    }

    #[rstest]
    #[case(0, &["0", "0.5 MiB", "1 MiB"])]
    #[case(1, &["0", "0.5 B", "1 B"])]
    #[case(1023, &["0", "500 B", "1000 B", "1500 B"])]
    #[case(1536, &["0", "0.5 KiB", "1 KiB", "1.5 KiB"])]
    #[case(3 << 40, &["0", "1 TiB", "2 TiB", "3 TiB"])]
    #[case(7_700 << 50, &["0", "5000 PiB", "10000 PiB"])]
    fn scales_fit(#[case] largest: u64, #[case] labels: &[&str]) {
        let scale = Scale::of_sizes(Some(largest));
        let shown: Vec<_> = scale.ticks.iter().map(|tick| scale.label(*tick)).collect();
        assert_eq!(shown, labels);
    }
}
