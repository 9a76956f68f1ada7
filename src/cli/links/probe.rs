//! `links probe`: measures a link, and recommends settings for it.

use std::fmt::Write as _;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::super::operator::{can_ask, is_confirmed};
use super::super::{CliError, Context, output};
use super::{Name, from_file, known};
use crate::advice;
use crate::settings::Settings;
use crate::transfer::copying::bbcp;
use crate::transfer::failures::TransferError;
use crate::transfer::link::{LinkName, Overrides};
use crate::transfer::link_probe::{
    ASSUMED_RATE, KernelLimits, LinkProbe, Measured, ProbeError, Recommendation, TrialLimits,
    TrialResult, needed_buffers, stream_limit,
};
use crate::transfer::plan::{Hosts, LocalHost};
use crate::transfer::repository::Repository;
use celery_worker_cli::Signals;
use celery_worker_cli::node::host;

/// Measure a link: round-trip time, limits of the kernels, and the rates of short trial copies. Recommends streams and
/// window.
///
/// Run it on the host of a worker. Two trials copy zeros to a temporary file in a directory of the destination, one with a
/// single stream and one with the configured streams; the file is removed after each. Nothing is written in a directory
/// of the origin, and no transfer is changed. Copies that run at the same time reduce the rates, and the reverse.
#[derive(Debug, Args)]
pub(in crate::cli) struct Probe {
    #[command(flatten)]
    name: Name,
    /// Maximum time of each trial.
    #[arg(long, default_value = "10s", value_parser = humantime::parse_duration)]
    duration: Duration,
    /// Maximum size of each trial in bytes. A trial also keeps transfer.free_space_margin.
    #[arg(long, value_name = "BYTES", default_value_t = 4 << 30, value_parser = clap::value_parser!(u64).range(1..))]
    size: u64,
    /// Do not ask before the trials.
    #[arg(long, short)]
    yes: bool,
}

/// Measurements of a link, as printed.
#[derive(Serialize)]
struct Measurement {
    link: LinkName,
    /// Hosts of origin and destination.
    hosts: [String; 2],
    /// Directory of the trials.
    directory: String,
    round_trip_s: f64,
    kernel: KernelOfEnds,
    /// Copies that ran over the link before the trials.
    active_copies: u64,
    trials: Vec<TrialResult>,
    /// Rate that the link is expected to have.
    expected_rate_bytes_per_s: u64,
    /// Largest number of bytes on their way with the recommended streams; null if unknown.
    limit_bytes: Option<u64>,
    recommended: Recommendation,
    /// Lines for the settings file.
    settings: String,
    notes: Vec<String>,
}

#[derive(Serialize)]
struct KernelOfEnds {
    origin: KernelLimits,
    destination: KernelLimits,
}

/// A link that can be measured, and what is known about it without the trials.
struct Prepared {
    link: LinkName,
    overrides: Overrides,
    probe: LinkProbe,
    limits: TrialLimits,
    active_copies: u64,
    round_trip: Duration,
    kernel: KernelOfEnds,
    /// Size of a trial in bytes.
    bytes: u64,
}

pub(super) async fn run(
    context: &Context,
    repository: &Repository,
    arguments: Probe,
) -> Result<ExitCode, CliError> {
    let is_confirmed = arguments.yes;
    let prepared = prepare(context, repository, arguments).await?;
    if !is_confirmed {
        confirm(&prepared.probe, prepared.bytes).await?;
    }
    // Only now: until here, a signal ends this process at once.
    let mut signals = Signals::listen()?;
    let cancel = CancellationToken::new();
    let trials = {
        let copying = prepared.run_trials(&context.settings.transfer.log_dir, &cancel);
        tokio::pin!(copying);
        loop {
            tokio::select! {
                trials = &mut copying => break trials.map_err(failed)?,
                // The trial's files are removed before the end.
                () = signals.any() => cancel.cancel(),
            }
        }
    };
    let measurement = prepared.measurement(&context.settings, trials);
    match context.json {
        true => output::json(&measurement)?,
        false => output::print(&measurement.text())?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Reads the link, and measures what needs no copy.
async fn prepare(
    context: &Context,
    repository: &Repository,
    arguments: Probe,
) -> Result<Prepared, CliError> {
    let link = known(repository, arguments.name).await?;
    let map = repository.map().await?;
    let overrides = map.overrides(&link);
    let settings = overrides
        .apply_to(from_file(context, &link)?)
        .map_err(CliError::configuration)?;
    let transfer = &context.settings.transfer;
    let hosts = Hosts::new(LocalHost::of_settings(&host(), transfer));
    let margin = transfer.free_space_margin;
    let probe = LinkProbe::new(&map, &link, settings, &hosts, margin).map_err(refused)?;
    let limits = TrialLimits {
        size: arguments.size,
        duration: arguments.duration,
    };
    let traffic = repository.traffic().await?;
    let round_trip = probe.round_trip().await.map_err(failed)?;
    let ([origin, destination], bytes) =
        tokio::try_join!(probe.kernel_limits(), probe.trial_bytes(limits)).map_err(failed)?;
    Ok(Prepared {
        active_copies: traffic.get(&link).map_or(0, |traffic| traffic.active),
        link,
        overrides,
        probe,
        limits,
        round_trip,
        kernel: KernelOfEnds {
            origin,
            destination,
        },
        bytes,
    })
}

impl Prepared {
    /// Copies with one stream, then with the configured streams.
    async fn run_trials(
        &self,
        log_dir: &Path,
        cancel: &CancellationToken,
    ) -> Result<[TrialResult; 2], TransferError> {
        let trial = |streams| {
            let (bytes, limits) = (self.bytes, self.limits);
            self.probe.trial(streams, bytes, limits, log_dir, cancel)
        };
        let one = trial(1).await?;
        Ok([one, trial(self.probe.settings().bbcp.streams).await?])
    }

    /// Adds the recommendation to what was measured.
    fn measurement(self, settings: &Settings, trials: [TrialResult; 2]) -> Measurement {
        let bbcp = &self.probe.settings().bbcp;
        let expected = bbcp::size(&bbcp.max_rate).unwrap_or(ASSUMED_RATE);
        let [one, all] = &trials;
        let measured = Measured {
            round_trip: self.round_trip,
            one_stream: one.rate_bytes_per_s,
            all_streams: all.rate_bytes_per_s,
            streams: all.streams,
            expected,
        };
        let recommended = measured.recommend();
        let KernelOfEnds {
            origin,
            destination,
        } = &self.kernel;
        let per_stream = stream_limit(origin, destination, &recommended.window);
        let limit_bytes = per_stream.map(|limit| limit.saturating_mul(recommended.streams.into()));
        Measurement {
            hosts: self.probe.hosts(),
            directory: self.probe.directory().to_string(),
            round_trip_s: self.round_trip.as_secs_f64(),
            active_copies: self.active_copies,
            trials: trials.into(),
            expected_rate_bytes_per_s: expected,
            limit_bytes,
            settings: recommended.settings(&self.link.origin, &self.link.destination),
            notes: self.notes(settings, &recommended, limit_bytes),
            recommended,
            kernel: self.kernel,
            link: self.link,
        }
    }

    fn notes(
        &self,
        settings: &Settings,
        recommended: &Recommendation,
        limit_bytes: Option<u64>,
    ) -> Vec<String> {
        let mut notes = Vec::new();
        if self.active_copies > 0 {
            notes.push(format!(
                "{} copies used the link at the same time: its full rate is higher",
                self.active_copies
            ));
        }
        let on_their_way = recommended.bandwidth_delay_bytes;
        if limit_bytes.is_some_and(|limit| limit < on_their_way) {
            let [from, to] = self.probe.hosts();
            let needed = needed_buffers(
                on_their_way,
                recommended.streams.into(),
                &recommended.window,
            );
            notes.push(format!(
                "the buffers of the kernels are too small for this rate: {}",
                needed.advice(&from, &to)
            ));
        }
        let LinkName {
            origin,
            destination,
        } = &self.link;
        if (settings.routes.iter())
            .any(|route| route.origin == *origin && route.destination == *destination)
        {
            notes.push(
                "the settings have [[routes]] for this link already: change that entry".into(),
            );
        }
        if self.overrides.streams.is_some() || self.overrides.tcp_window.is_some() {
            notes.push(format!(
                "`links set` has set streams or window, which overrides the settings; `ccat-transfer links set {origin} \
                 {destination} --streams default --window default` ends that"
            ));
        }
        notes
    }
}

async fn confirm(probe: &LinkProbe, bytes: u64) -> Result<(), CliError> {
    let [from, to] = probe.hosts();
    let what = format!(
        "Copy up to {} twice from {from} to {to}, to a temporary file in {}",
        bytes_text(bytes),
        probe.directory()
    );
    if !can_ask() {
        return Err(CliError::refused(format!(
            "{what}: there is no terminal to confirm it; add --yes"
        )));
    }
    match is_confirmed(&output::clean(&what)).await? {
        true => Ok(()),
        false => Err(CliError::refused("not confirmed; nothing was copied")),
    }
}

fn refused(error: ProbeError) -> CliError {
    match error {
        ProbeError::Transfer(error) => failed(error),
        error => CliError::refused(error.to_string()),
    }
}

#[expect(clippy::needless_pass_by_value, reason = "as `map_err` passes it")]
fn failed(error: TransferError) -> CliError {
    CliError::failed(format!(
        "{}\n{}",
        advice::explanation(&error),
        advice::remedy(error.kind())
    ))
}

fn bytes_text(bytes: u64) -> String {
    output::size(i64::try_from(bytes).unwrap_or(i64::MAX))
}

impl Measurement {
    fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = self.write(&mut text);
        text
    }

    fn write(&self, text: &mut String) -> std::fmt::Result {
        let clean = |text: &str| output::clean(text).into_owned();
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "casts saturate"
        )]
        let rate = |rate: f64| format!("{}/s", bytes_text(rate as u64));
        let [from, to] = &self.hosts;
        writeln!(text, "link         {}", clean(&self.link.to_string()))?;
        writeln!(
            text,
            "hosts        {from} → {to}, {}",
            clean(&self.directory)
        )?;
        writeln!(text, "round trip   {:.1} ms", self.round_trip_s * 1000.0)?;
        for (host, limits) in [(from, &self.kernel.origin), (to, &self.kernel.destination)] {
            writeln!(text, "kernel       {host}: {}", clean(&kernel_text(limits)))?;
        }
        for trial in &self.trials {
            let plural = if trial.streams == 1 { "" } else { "s" };
            let streams = format!("{} stream{plural}", trial.streams);
            writeln!(
                text,
                "{streams:<12} {} ({} arrived)",
                rate(trial.rate_bytes_per_s),
                bytes_text(trial.bytes)
            )?;
        }
        let recommended = &self.recommended;
        writeln!(
            text,
            "on their way {} at {}/s; the kernels allow {} in {} streams",
            bytes_text(recommended.bandwidth_delay_bytes),
            bytes_text(recommended.rate_bytes_per_s),
            self.limit_bytes
                .map_or_else(|| "an unknown number of bytes".into(), bytes_text),
            recommended.streams
        )?;
        for note in &self.notes {
            writeln!(text, "note         {}", clean(note))?;
        }
        write!(text, "\nRecommended settings:\n\n{}", self.settings)
    }
}

fn kernel_text(limits: &KernelLimits) -> String {
    let three = |values: Option<[u64; 3]>| {
        values.map_or_else(
            || "unknown".into(),
            |values| values.map(|n| n.to_string()).join(" "),
        )
    };
    let one = |value: Option<u64>| value.map_or_else(|| "unknown".into(), |n| n.to_string());
    format!(
        "tcp_rmem {}, tcp_wmem {}, rmem_max {}, wmem_max {}, {}",
        three(limits.tcp_rmem),
        three(limits.tcp_wmem),
        one(limits.rmem_max),
        one(limits.wmem_max),
        limits
            .congestion_control
            .as_deref()
            .unwrap_or("unknown congestion control")
    )
}
