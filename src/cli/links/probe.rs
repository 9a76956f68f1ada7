//! `links probe`: measures a link, and recommends settings for it.

use std::fmt::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::super::operator::{can_ask, is_confirmed};
use super::super::{CliError, Context, output};
use super::{Name, from_file, known};
use crate::advice;
use crate::transfer::failures::TransferError;
use crate::transfer::link::LinkName;
use crate::transfer::link_probe::{
    ASSUMED_RATE, KernelLimits, LinkProbe, Measured, ProbeError, Recommendation, TrialLimits,
    TrialResult, size, stream_limit,
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

pub(super) async fn run(
    context: &Context,
    repository: &Repository,
    arguments: Probe,
) -> Result<ExitCode, CliError> {
    let mut signals = Signals::listen()?;
    let cancel = CancellationToken::new();
    let measuring = measure(context, repository, arguments, &cancel);
    tokio::pin!(measuring);
    let measurement = loop {
        tokio::select! {
            measured = &mut measuring => break measured?,
            // The trial's files are removed before the end.
            () = signals.any() => cancel.cancel(),
        }
    };
    match context.json {
        true => output::json(&measurement)?,
        false => output::print(&measurement.text())?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn measure(
    context: &Context,
    repository: &Repository,
    arguments: Probe,
    cancel: &CancellationToken,
) -> Result<Measurement, CliError> {
    let link = known(repository, arguments.name).await?;
    let overrides = repository.link(&link).await?.overrides;
    let settings = overrides
        .apply_to(from_file(context, &link)?)
        .map_err(CliError::configuration)?;
    let transfer = &context.settings.transfer;
    let further = transfer.local_hosts.iter().map(String::as_str);
    let hosts = Hosts::new(LocalHost::new(&host(), further));
    let map = repository.map().await?;
    let margin = transfer.free_space_margin;
    let probe = LinkProbe::new(&map, &link, settings, &hosts, margin).map_err(refused)?;
    let limits = TrialLimits {
        size: arguments.size,
        duration: arguments.duration,
    };
    let traffic = repository.traffic().await?;
    let active_copies = traffic.get(&link).map_or(0, |traffic| traffic.active);

    let round_trip = probe.round_trip().await.map_err(failed)?;
    let [origin, destination] = probe.kernel_limits().await.map_err(failed)?;
    let bytes = probe.trial_bytes(limits).await.map_err(failed)?;
    if !arguments.yes {
        confirm(&probe, bytes).await?;
    }
    let streams = probe.settings().bbcp.streams;
    let mut trials = Vec::new();
    for streams in [1, streams] {
        let trial = probe.trial(streams, bytes, limits, &transfer.log_dir, cancel);
        trials.push(trial.await.map_err(failed)?);
    }
    let rate = |n: usize| trials.get(n).map_or(0.0, |trial| trial.rate_bytes_per_s);
    let bbcp = &probe.settings().bbcp;
    let expected = size(&bbcp.max_rate).unwrap_or(ASSUMED_RATE);
    let measured = Measured {
        round_trip,
        one_stream: rate(0),
        all_streams: rate(1),
        streams,
        expected,
    };
    let recommended = measured.recommend();
    let per_stream = stream_limit(&origin, &destination, &recommended.window);
    let limit_bytes = per_stream.map(|limit| limit.saturating_mul(recommended.streams.into()));
    let has_entry = |route: &crate::settings::RouteOverride| {
        route.origin == link.origin && route.destination == link.destination
    };
    let mut notes = Vec::new();
    if active_copies > 0 {
        notes.push(format!(
            "{active_copies} copies used the link at the same time: its full rate is higher"
        ));
    }
    if limit_bytes.is_some_and(|limit| limit < recommended.bandwidth_delay_bytes) {
        notes.push(format!(
            "the buffers of the kernels are too small for this rate: raise the last number of net.ipv4.tcp_wmem at the \
             origin and of net.ipv4.tcp_rmem at the destination to {} or more",
            buffer(&recommended)
        ));
    }
    if context.settings.routes.iter().any(has_entry) {
        notes.push("the settings have [[routes]] for this link already: change that entry".into());
    }
    if overrides.streams.is_some() || overrides.tcp_window.is_some() {
        notes.push(format!(
            "`links set` has set streams or window, which overrides the settings; `ccat-transfer links set {} {} --streams \
             default --window default` ends that",
            link.origin, link.destination
        ));
    }
    Ok(Measurement {
        hosts: probe.hosts(),
        directory: probe.directory().to_string(),
        round_trip_s: round_trip.as_secs_f64(),
        kernel: KernelOfEnds {
            origin,
            destination,
        },
        active_copies,
        trials,
        expected_rate_bytes_per_s: expected,
        limit_bytes,
        settings: recommended.settings(&link.origin, &link.destination),
        recommended,
        notes,
        link,
    })
}

/// Buffer in bytes that each of the recommended streams needs at the receiver, where half of it is usable.
fn buffer(recommended: &Recommendation) -> u64 {
    let share = recommended.bandwidth_delay_bytes / u64::from(recommended.streams).max(1);
    share.saturating_mul(4).next_power_of_two()
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
