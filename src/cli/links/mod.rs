//! `links`: see, measure, limit, pause and resume the links between sites.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Duration;

use chrono::{DateTime, Utc};
use clap::{Args, Subcommand};
use serde::Serialize;

use super::operator::{operator, validated_reason};
use super::{CliError, Context, output};
use crate::settings::LinkSettings;
use crate::transfer::link::{Capacity, Link, LinkName, Window, nearest};
use crate::transfer::repository::{LinkChange, LinkError, Repository, Traffic};

mod probe;

#[derive(Debug, Subcommand)]
pub(super) enum LinksCommand {
    /// List the links: limits, numbers of running and waiting transfers, and which links are paused and by whom.
    List,
    /// Show the settings that apply to one link, and the source of each.
    Show(Name),
    /// Limit a link; options that are not given do not change.
    Set(Set),
    /// Pause a link: no copy starts until it is resumed. Transfers wait, and do not use up a retry.
    Pause {
        #[command(flatten)]
        name: Name,
        /// Reason; shown with the link.
        #[arg(long, value_name = "TEXT")]
        reason: String,
        /// Stop running copies, too: their transfers wait, and do not use up a retry either.
        #[arg(long)]
        now: bool,
    },
    /// Resume a link: copies start again.
    Resume(Name),
    Probe(probe::Probe),
}

/// A link, by its sites.
#[derive(Debug, Args)]
pub(super) struct Name {
    /// Short name of the site that copies come from.
    origin: String,
    /// Short name of the site that they go to.
    destination: String,
}

/// New values for a link. The word `default` leaves a value to the settings, or ends a limit.
#[derive(Debug, Args)]
#[command(
    after_help = "Example: ccat-transfer links set ccat cologne --max-active 4 --capacity \
                        '18:00-06:00 UTC max_active=1'"
)]
pub(super) struct Set {
    #[command(flatten)]
    name: Name,
    /// Maximum number of transfers that are SCHEDULED or IN_PROGRESS at the same time.
    #[arg(long, value_name = "N|default")]
    max_active: Option<OrDefault<u32>>,
    /// Links of a higher priority come first; 0 if none was set.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    priority: Option<i64>,
    /// A part of the day with another limit, e.g. "18:00-06:00 UTC max_active=1". May be given several times: together
    /// they replace the existing windows. `default` for none.
    #[arg(long, value_name = "WINDOW|default")]
    capacity: Vec<OrDefault<Window>>,
    /// bbcp's streams, 1 to 64, instead of bbcp.streams.
    #[arg(long, value_name = "N|default")]
    streams: Option<OrDefault<u8>>,
    /// bbcp's TCP window, e.g. 8m, instead of bbcp.window.
    #[arg(long, value_name = "SIZE|default")]
    window: Option<OrDefault<String>>,
    /// Maximum rate in bytes per second, e.g. 100m, instead of bbcp.max_rate.
    #[arg(long, value_name = "RATE|default")]
    max_rate: Option<OrDefault<String>>,
}

/// A value, or the word `default`, which removes it.
#[derive(Debug, Clone, PartialEq)]
enum OrDefault<T> {
    Value(T),
    Default,
}

impl<T: std::str::FromStr> std::str::FromStr for OrDefault<T> {
    type Err = T::Err;

    fn from_str(text: &str) -> Result<Self, T::Err> {
        match text {
            "default" => Ok(Self::Default),
            text => text.parse().map(Self::Value),
        }
    }
}

impl<T> OrDefault<T> {
    fn value(self) -> Option<T> {
        match self {
            Self::Value(value) => Some(value),
            Self::Default => None,
        }
    }
}

pub(super) async fn run(context: &Context, command: LinksCommand) -> Result<ExitCode, CliError> {
    let repository = context.repository().await?;
    match command {
        LinksCommand::List => list(context, &repository).await?,
        LinksCommand::Show(name) => {
            let name = known(&repository, name).await?;
            show(context, &repository, &name).await?;
        }
        LinksCommand::Probe(probe) => return probe::run(context, &repository, probe).await,
        LinksCommand::Set(set) => self::set(context, &repository, set).await?,
        LinksCommand::Pause { name, reason, now } => {
            let name = known(&repository, name).await?;
            let reason = validated_reason(&reason)?;
            let paused = repository
                .pause_link(&name, &operator(), &reason, now)
                .await;
            let link = paused.map_err(refused)?;
            print_link(context, &link, || {
                let running = match now {
                    true => "running copies are stopped when their workers next renew a lease",
                    false => "running copies continue",
                };
                format!("{name} is paused; {running}")
            })?;
        }
        LinksCommand::Resume(name) => {
            let name = known(&repository, name).await?;
            let link = repository.resume_link(&name).await.map_err(refused)?;
            print_link(context, &link, || {
                format!("{name} is open; the manager's next pass schedules the transfers that wait")
            })?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn set(context: &Context, repository: &Repository, set: Set) -> Result<(), CliError> {
    let name = known(repository, set.name).await?;
    let windows = !set.capacity.is_empty();
    let capacity = set.capacity.into_iter().filter_map(OrDefault::value);
    let change = LinkChange {
        max_active: set.max_active.map(OrDefault::value),
        priority: set.priority,
        capacity: windows.then(|| Capacity::of(capacity.collect())),
        streams: set.streams.map(OrDefault::value),
        tcp_window: set.window.map(OrDefault::value),
        max_rate: set.max_rate.map(OrDefault::value),
    };
    let mut overrides = repository.link(&name).await?.overrides;
    change.apply_to(&mut overrides);
    overrides
        .apply_to(from_file(context, &name)?)
        .map_err(CliError::usage)?;
    let link = repository.set_link(&name, &change).await.map_err(refused)?;
    print_link(context, &link, || describe(&link))
}

/// Returns the link if the database has both sites.
async fn known(repository: &Repository, name: Name) -> Result<LinkName, CliError> {
    let sites = repository.site_names().await?;
    for site in [&name.origin, &name.destination] {
        require_site(site, &sites)?;
    }
    if name.origin == name.destination {
        return Err(CliError::usage("a link is between two sites"));
    }
    Ok(LinkName {
        origin: name.origin,
        destination: name.destination,
    })
}

/// Refuses a site that the database does not have.
pub(super) fn require_site(name: &str, sites: &[String]) -> Result<(), CliError> {
    if sites.iter().any(|site| site == name) {
        return Ok(());
    }
    let hint = match nearest(name, sites) {
        Some(site) => format!("; the nearest one is `{site}`"),
        None if sites.is_empty() => "; the database has none".into(),
        None => format!("; the database has {}", sites.join(", ")),
    };
    Err(CliError::NotFound(format!(
        "there is no site `{name}`{hint}"
    )))
}

fn refused(error: LinkError) -> CliError {
    match error {
        LinkError::NoTable => CliError::configuration(format!(
            "{error}; run `ccat-transfer db migrate`, and then restart workers and managers"
        )),
        LinkError::Paused { .. } | LinkError::NotPaused(_) => CliError::refused(error.to_string()),
        LinkError::Database(error) => error.into(),
    }
}

fn print_link(
    context: &Context,
    link: &Link,
    words: impl FnOnce() -> String,
) -> Result<(), CliError> {
    if context.json {
        return output::json(link);
    }
    output::print(&format!("{}\n", output::clean(&words())))
}

/// Describes a link in one line.
fn describe(link: &Link) -> String {
    let mut words = vec![match link.max_active {
        Some(limit) => format!("at most {limit} at once"),
        None => "no limit".into(),
    }];
    words.extend(link.capacity.lines());
    words.push(format!("priority {}", link.priority));
    let overrides = &link.overrides;
    words.extend(overrides.streams.map(|n| format!("{n} streams")));
    words.extend(overrides.tcp_window.as_ref().map(|w| format!("window {w}")));
    words.extend(overrides.max_rate.as_ref().map(|r| format!("rate {r}")));
    format!("{}: {}", link.name, words.join(", "))
}

/// A link with its traffic, as in the output of `links list`.
#[derive(Serialize)]
struct Listed {
    #[serde(flatten)]
    link: Link,
    /// Limit at this time of the day; null for no limit.
    limit_now: Option<u32>,
    #[serde(flatten)]
    traffic: Traffic,
}

async fn list(context: &Context, repository: &Repository) -> Result<(), CliError> {
    let now = repository.database().now().await?;
    let mut traffic = repository.traffic().await?;
    let links = repository.links().await?;
    let mut links: BTreeMap<_, _> = links.into_iter().map(|l| (l.name.clone(), l)).collect();
    // Includes links without a row, if transfers use them or a route exists.
    let routed = repository.routed_links().await?;
    let routed = routed.into_iter().map(|link| link.name);
    let others = traffic.keys().cloned().chain(routed);
    for name in others.collect::<Vec<_>>() {
        links
            .entry(name)
            .or_insert_with_key(|name| Link::unlimited(name.clone()));
    }
    let listed: Vec<_> = links
        .into_iter()
        .map(|(name, link)| Listed {
            limit_now: link.limit(now),
            traffic: traffic.remove(&name).unwrap_or_default(),
            link,
        })
        .collect();
    if context.json {
        return output::json(&listed);
    }
    let mut table = output::table(&[
        "FROM",
        "TO",
        "PRIORITY",
        "LIMIT",
        "ACTIVE",
        "SCHEDULED",
        "PENDING",
        "OLDEST",
        "STATE",
    ]);
    for Listed {
        link,
        limit_now,
        traffic,
    } in &listed
    {
        table.add_row([
            output::clean(&link.name.origin).into_owned(),
            output::clean(&link.name.destination).into_owned(),
            link.priority.to_string(),
            limit_now.map_or_else(|| "-".into(), |limit| limit.to_string()),
            traffic.active.to_string(),
            traffic.scheduled.to_string(),
            traffic.pending.to_string(),
            oldest(traffic, now),
            state(link, now),
        ]);
    }
    output::print(&format!("{table}\n"))
}

/// The transfer that has waited longest, with its waiting time.
fn oldest(traffic: &Traffic, now: DateTime<Utc>) -> String {
    let Some(id) = traffic.oldest_pending else {
        return "-".into();
    };
    let waited = traffic
        .pending_since
        .and_then(|since| (now - since).to_std().ok());
    match waited {
        // The age needs no fraction of a second.
        Some(waited) => {
            let waited = Duration::from_secs(waited.as_secs());
            format!("{id} ({})", humantime::format_duration(waited))
        }
        None => id.to_string(),
    }
}

/// Describes the state of a link: open, or the reason why no copy may start.
fn state(link: &Link, now: DateTime<Utc>) -> String {
    if let Some(pause) = &link.pause {
        let how = if pause.stops_running {
            "stopped"
        } else {
            "paused"
        };
        let since = pause.since.format("%Y-%m-%d %H:%M UTC");
        let text = format!("{how} since {since} by {}: {}", pause.by, pause.reason);
        return output::clean(&text).into_owned();
    }
    if let Some(problem) = link.capacity.problem() {
        return output::clean(&format!("closed: {problem}")).into_owned();
    }
    match link.limit(now) {
        Some(0) => "closed at this time".into(),
        _ => "open".into(),
    }
}

async fn show(context: &Context, repository: &Repository, name: &LinkName) -> Result<(), CliError> {
    let link = repository.link(name).await?;
    let now = repository.database().now().await?;
    let file = from_file(context, name)?;
    let effective = link.overrides.apply_to(file.clone());
    if context.json {
        let bbcp = effective.as_ref().ok().map(|settings| &settings.bbcp);
        let limit_now = link.limit(now);
        return output::json(&serde_json::json!({
            "link": link, "limit_now": limit_now, "bbcp": bbcp, "problem": effective.as_ref().err(),
        }));
    }
    let mut lines = vec![
        format!("link       {name}"),
        format!("state      {}", state(&link, now)),
        format!("priority   {}", link.priority),
    ];
    let max_active = link.max_active.map(|n| n.to_string());
    lines.push(format!(
        "max_active {}",
        max_active.as_deref().unwrap_or("no limit")
    ));
    for window in link.capacity.lines() {
        lines.push(format!("           {window}"));
    }
    let overrides = &link.overrides;
    for (key, set, file) in [
        (
            "streams",
            overrides.streams.map(|n| n.to_string()),
            file.bbcp.streams.to_string(),
        ),
        ("window", overrides.tcp_window.clone(), file.bbcp.window),
        ("max_rate", overrides.max_rate.clone(), file.bbcp.max_rate),
    ] {
        let file = if file.is_empty() { "none" } else { &file };
        lines.push(match set {
            Some(value) => {
                format!("{key:<10} {value} (set with `links set`; overrides {file} of the file)")
            }
            None => format!("{key:<10} {file} (from the settings)"),
        });
    }
    if let Err(problem) = effective {
        lines.push(format!("problem    {problem}"));
    }
    for line in lines {
        output::print(&format!("{}\n", output::clean(&line)))?;
    }
    Ok(())
}

/// Returns the settings of a link according to the settings file.
fn from_file(context: &Context, name: &LinkName) -> Result<LinkSettings, CliError> {
    context
        .settings
        .link(&name.origin, &name.destination)
        .map_err(|problem| CliError::configuration(format!("the link {name}: {problem}")))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn default_removes_a_value() {
        assert_eq!("4".parse(), Ok(OrDefault::Value(4_u32)));
        assert_eq!("default".parse(), Ok(OrDefault::<u32>::Default));
        assert!("many".parse::<OrDefault<u32>>().is_err());
    }

    #[test]
    fn unknown_site_is_refused_with_the_nearest_name() {
        let sites = ["ccat", "cologne"].map(str::to_owned);
        assert!(require_site("ccat", &sites).is_ok());
        let error = require_site("colonge", &sites).unwrap_err();
        assert_eq!(
            error.to_string(),
            "there is no site `colonge`; the nearest one is `cologne`"
        );
        let error = require_site("x", &sites).unwrap_err();
        assert!(error.to_string().ends_with("has ccat, cologne"), "{error}");
    }
}
