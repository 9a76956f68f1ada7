//! A plot with its text alternative.

use super::super::model::{Bucket, LinkThroughput, Period, Throughput};
use super::super::plots::{self, PlotError};

/// Values of `throughput.html`.
pub(super) struct Plot<'a> {
    /// Id of the caption in the page.
    pub(super) id: String,
    pub(super) origin: &'a str,
    pub(super) destination: &'a str,
    pub(super) period: &'static str,
    /// Length of a bar.
    pub(super) bucket: &'static str,
    pub(super) packages: u64,
    pub(super) bytes: u64,
    pub(super) failures: u64,
    /// Steps in which something arrived or failed.
    pub(super) busy: Vec<&'a Bucket>,
    pub(super) svg: String,
}

impl<'a> Plot<'a> {
    /// Draws the throughput of a link. `number` distinguishes the plots of a page.
    pub(super) fn of(
        throughput: &Throughput,
        link: &'a LinkThroughput,
        number: usize,
    ) -> Result<Self, PlotError> {
        let time = throughput.since..throughput.until;
        let (period, bucket) = match throughput.period {
            Period::Day => ("last 24 hours", "30 minutes"),
            Period::Week => ("last 7 days", "6 hours"),
            Period::Month => ("last 30 days", "one day"),
        };
        let is_busy = |bucket: &&Bucket| bucket.packages > 0 || bucket.failures > 0;
        let sum = |value: fn(&Bucket) -> u64| {
            let values = link.buckets.iter().map(value);
            values.fold(0, u64::saturating_add)
        };
        Ok(Self {
            id: format!("plot-{}-{number}", throughput.period),
            origin: &link.origin,
            destination: &link.destination,
            period,
            bucket,
            packages: sum(|bucket| bucket.packages),
            bytes: sum(|bucket| bucket.bytes),
            failures: sum(|bucket| bucket.failures),
            busy: link.buckets.iter().filter(is_busy).collect(),
            svg: plots::throughput(throughput.period, &time, &link.buckets)?,
        })
    }
}
