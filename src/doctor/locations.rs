//! Checks of the ends of the links: programs on other hosts, and the directories of the locations.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{DateTime, Utc};
use futures_util::future::{OptionFuture, join_all};
use humansize::{BINARY, format_size};

use super::database::compare_clocks;
use super::tcp_buffers::{CheckedLink, check_tcp_buffers};
use super::{Check, Doctor, Finding, Outcome, Verdict};
use crate::advice;
use crate::clock;
use crate::settings::{DigestAlgorithm, LinkSettings};
use crate::transfer::digest;
use crate::transfer::endpoint::Remote;
use crate::transfer::failures::{Role, TransferError};
use crate::transfer::inspection::{LocationProbe, bbcp_version, is_disk_at};
use crate::transfer::link::LinkName;
use crate::transfer::repository::LocationMap;

/// The only transfer method of this program.
const METHOD: &str = "bbcp";

/// Resolution of a remote clock: `date +%s` prints whole seconds.
const REMOTE_CLOCK_GRAIN: Duration = Duration::from_secs(1);

/// A host with the items to check there; this host if `remote` is `None`.
#[derive(Default)]
struct CheckedHost {
    remote: Option<Remote>,
    /// Command that starts bbcp there.
    program: String,
    digest: Option<DigestAlgorithm>,
    /// Links between this host and that one.
    links: Vec<CheckedLink>,
    places: Vec<NamedDirectory>,
}

/// A location's directory.
struct NamedDirectory {
    name: String,
    place: LocationProbe,
    /// Size in bytes of the largest package that waits for it.
    largest: u64,
    /// True if packages wait to be copied from the location.
    has_waiting: bool,
}

/// Hosts by a key of name, connection settings and programs. This host comes first.
type Hosts = BTreeMap<String, CheckedHost>;

impl Doctor {
    /// Makes the checks that need no database: only that of bbcp.
    pub(super) async fn check_bbcp_only(&self) -> Vec<Finding> {
        let (bbcp, _) = self.check_bbcp().await;
        let why = "locations and routes could not be read from the database";
        let rest = [
            Check::Links,
            Check::Ssh,
            Check::RemoteBbcp,
            Check::Digest,
            Check::TcpBuffers,
            Check::Origin,
            Check::Space,
            Check::Write,
        ];
        let skipped = rest.map(|check| self.skipped(check, "", why));
        bbcp.into_iter()
            .chain(skipped.into_iter().flatten())
            .collect()
    }

    pub(super) async fn check_locations(&self, map: &LocationMap) -> Vec<Finding> {
        let (links, hosts) = self.survey(map);
        let (bbcp, version) = self.check_bbcp().await;
        let checks = hosts
            .values()
            .map(|host| self.check_host(host, version.as_deref()));
        let places = join_all(checks).await;
        let bbcp = Vec::from_iter(bbcp);
        [vec![bbcp, links], places].concat().concat()
    }

    /// Checks bbcp on this host. Returns the finding, and the version for comparison with other hosts.
    async fn check_bbcp(&self) -> (Option<Finding>, Option<String>) {
        let program = &self.settings.bbcp.program;
        let mut version = None;
        let work = async {
            match bbcp_version(program).await {
                Ok(printed) => {
                    let outcome = Outcome::green(format!("{}, {printed}", program.display()));
                    version = Some(printed);
                    outcome
                }
                Err(error) => failed(&error),
            }
        };
        let finding = self.check(Check::Bbcp, "", work).await;
        (finding, version)
    }

    /// Collects the links with an end on this host, and the items to check for them.
    fn survey(&self, map: &LocationMap) -> (Vec<Finding>, Hosts) {
        let mut findings = Vec::new();
        let mut hosts = Hosts::new();
        let links = map.links.iter().filter(|link| {
            let method = link.method.as_deref().unwrap_or_default();
            method.trim().eq_ignore_ascii_case(METHOD)
                && (self.includes(&link.name.origin) || self.includes(&link.name.destination))
        });
        let mut any = false;
        for link in links.map(|link| &link.name) {
            any = true;
            let subject = link.to_string();
            match self.ends_by_host(map, link) {
                Ok(ends) if ends.is_empty() => findings.extend(self.skipped(
                    Check::Links,
                    subject,
                    "it has no end on this host; its transfers run elsewhere",
                )),
                Ok(ends) => {
                    for (key, host) in ends {
                        let known = hosts.entry(key).or_default();
                        known.remote = host.remote;
                        known.program = host.program;
                        known.digest = host.digest;
                        for link in host.links {
                            if !known.links.iter().any(|known| known.name == link.name) {
                                known.links.push(link);
                            }
                        }
                        for named in host.places {
                            let is_known = known.places.iter().any(|there| {
                                there.name == named.name && there.place.role() == named.place.role()
                            });
                            if !is_known {
                                known.places.push(named);
                            }
                        }
                    }
                }
                Err(problems) if self.options.skip.contains(&Check::Links) => drop(problems),
                Err(problems) => findings.extend(problems.iter().map(|error| Finding {
                    check: Check::Links,
                    subject: subject.clone(),
                    verdict: Verdict::Red,
                    found: error.chain(),
                    advice: Some(advice::remedy(error.kind()).to_owned()),
                })),
            }
        }
        if !any && !self.options.skip.contains(&Check::Links) {
            findings.push(Finding {
                check: Check::Links,
                subject: String::new(),
                verdict: Verdict::Yellow,
                found: "the database has no route by bbcp, so there is nothing to transfer".into(),
                advice: Some(
                    "add one to data_transfer_route (for tests: `ccat-transfer db seed`)".into(),
                ),
            });
        }
        (findings, hosts)
    }

    /// Returns the two ends of a link by host; the result is empty if neither is on this host.
    fn ends_by_host(
        &self,
        map: &LocationMap,
        link: &LinkName,
    ) -> Result<Vec<(String, CheckedHost)>, Vec<TransferError>> {
        let settings = self
            .settings
            .link(&link.origin, &link.destination)
            .and_then(|settings| map.overrides(link).apply_to(settings))
            .map_err(|problem| {
                vec![TransferError::LinkSettings {
                    origin: link.origin.clone(),
                    destination: link.destination.clone(),
                    problem,
                }]
            })?;
        let mut problems = Vec::new();
        let mut ends = Vec::new();
        for (role, site) in [
            (Role::Origin, &link.origin),
            (Role::Destination, &link.destination),
        ] {
            for location in map.locations.iter().filter(|l| is_disk_at(l, site)) {
                match LocationProbe::new(role, location, &settings.ssh, &self.hosts) {
                    Ok(place) => ends.push(NamedDirectory {
                        name: format!("{site}/{}", location.name),
                        place,
                        largest: map.largest_waiting.get(&location.id).copied().unwrap_or(0),
                        has_waiting: map.waiting_origins.contains(&location.id),
                    }),
                    Err(error) => problems.push(error),
                }
            }
        }
        if !problems.is_empty() {
            return Err(problems);
        }
        let is_here = |end: &NamedDirectory| end.place.remote().is_none();
        let here_at = |role| {
            ends.iter()
                .any(|end| end.place.role() == role && is_here(end))
        };
        let from_here = here_at(Role::Origin);
        let to_here = here_at(Role::Destination);
        // A copy has at least one end on this host, so a remote end matters only if the other end is here.
        ends.retain(|end| {
            is_here(end)
                || match end.place.role() {
                    Role::Origin => to_here,
                    Role::Destination => from_here,
                }
        });
        Ok(ends
            .into_iter()
            .map(|end| {
                let host = CheckedHost {
                    remote: end.place.remote().cloned(),
                    program: settings.bbcp.remote_program.display().to_string(),
                    digest: Some(settings.digest),
                    links: vec![CheckedLink {
                        name: link.to_string(),
                        is_push: end.place.role() == Role::Destination,
                        bbcp: settings.bbcp.clone(),
                    }],
                    places: Vec::new(),
                };
                let key = key(&end.place, &settings);
                let places = vec![end];
                (key, CheckedHost { places, ..host })
            })
            .collect())
    }

    async fn check_host(&self, host: &CheckedHost, version: Option<&str>) -> Vec<Finding> {
        let mut findings = Vec::new();
        if let Some(remote) = &host.remote {
            let name = remote.host.to_string();
            let mut clock = None;
            let ssh = if self.options.skip.contains(&Check::Ssh) {
                None
            } else {
                let login = async {
                    let asked = clock::now();
                    match remote.clock().await {
                        Ok(seconds) => {
                            clock = Some((seconds, asked, clock::now()));
                            Outcome::green("login without a password succeeded")
                        }
                        Err(error) => failed(&error),
                    }
                };
                self.check(Check::Ssh, name.clone(), login).await
            };
            let is_closed = ssh.as_ref().is_some_and(|f| f.verdict == Verdict::Red);
            findings.extend(ssh);
            if is_closed {
                let why = "ssh cannot log in";
                let of_host = [
                    Check::Clock,
                    Check::RemoteBbcp,
                    Check::Digest,
                    Check::TcpBuffers,
                ];
                for check in of_host {
                    findings.extend(self.skipped(check, name.clone(), why));
                }
                for named in &host.places {
                    for check in checks_of(named) {
                        findings.extend(self.skipped(*check, named.name.clone(), why));
                    }
                }
                return findings;
            }
            findings.extend(self.check_programs(host, remote, clock, version).await);
        }
        let checks = host.places.iter().map(|named| self.check_location(named));
        findings.extend(join_all(checks).await.concat());
        findings
    }

    /// Checks the programs on another host, and its clock, which was read between two readings of ours.
    async fn check_programs(
        &self,
        host: &CheckedHost,
        remote: &Remote,
        clock: Option<(i64, DateTime<Utc>, DateTime<Utc>)>,
        version: Option<&str>,
    ) -> Vec<Finding> {
        let name = || remote.host.to_string();
        let clock = clock.and_then(|(seconds, asked, answered)| {
            let theirs = DateTime::from_timestamp(seconds, 0)?;
            Some(async move { compare_clocks(theirs, asked, answered, REMOTE_CLOCK_GRAIN) })
        });
        let digest = host.digest.map(|algorithm| async move {
            match remote.digest_of_nothing(algorithm).await {
                Ok(program) => Outcome::green(format!(
                    "{} is computed by {program}",
                    digest::name(algorithm)
                )),
                Err(error) => failed(&error),
            }
        });
        let bbcp = self.check_remote_bbcp(remote, &host.program, version);
        let buffers = check_tcp_buffers(remote, &host.links);
        let (clock, bbcp, digest, buffers) = tokio::join!(
            OptionFuture::from(clock.map(|work| self.check(Check::Clock, name(), work))),
            self.check(Check::RemoteBbcp, name(), bbcp),
            OptionFuture::from(digest.map(|work| self.check(Check::Digest, name(), work))),
            self.check(Check::TcpBuffers, name(), buffers),
        );
        [clock.flatten(), bbcp, digest.flatten(), buffers]
            .into_iter()
            .flatten()
            .collect()
    }

    async fn check_remote_bbcp(
        &self,
        remote: &Remote,
        program: &str,
        here: Option<&str>,
    ) -> Outcome {
        match (remote.bbcp_version(program).await, here) {
            (Ok(there), Some(here)) if there != here => Outcome::yellow(
                format!("{program}, {there}, and {here} on this host; they may work together"),
                "install the same version at both ends",
            ),
            (Ok(there), _) => Outcome::green(format!("{program}, {there}")),
            (Err(error), _) => failed(&error),
        }
    }

    async fn check_location(&self, named: &NamedDirectory) -> Vec<Finding> {
        let name = || named.name.clone();
        if named.place.role() == Role::Origin {
            let origin = self.check(Check::Origin, name(), check_origin(named));
            return origin.await.into_iter().collect();
        }
        let mut free = None;
        let measuring = async {
            match named.place.free_space().await {
                Ok(bytes) => {
                    free = Some(bytes);
                    self.space_outcome(named, bytes)
                }
                Err(error) => failed(&error),
            }
        };
        let (mut space, write) = tokio::join!(
            self.check(Check::Space, name(), measuring),
            self.check(Check::Write, name(), check_writing(named)),
        );
        // Both checks fail for the same reason, and the second one explains it better.
        if free.is_none() && write.as_ref().is_some_and(|f| f.verdict == Verdict::Red) {
            space = self.skipped(Check::Space, name(), "it cannot be written");
        }
        [space, write].into_iter().flatten().collect()
    }

    fn space_outcome(&self, named: &NamedDirectory, free: u64) -> Outcome {
        let margin = self.settings.transfer.free_space_margin;
        let needed = named.largest.saturating_add(margin);
        let size = |bytes: u64| format_size(bytes, BINARY);
        let found = format!("{} are free at {}", size(free), named.place.root());
        if free >= needed {
            return Outcome::green(found);
        }
        Outcome::red(
            format!(
                "{found}; the largest package that waits has {}, and {} must stay free",
                size(named.largest),
                size(margin)
            ),
            "make room there, or lower transfer.free_space_margin",
        )
    }
}

fn key(place: &LocationProbe, settings: &LinkSettings) -> String {
    match place.remote() {
        None => String::new(),
        Some(remote) => {
            // If serialization failed, the host would only be checked twice.
            let ssh_settings = serde_json::to_string(&settings.ssh).unwrap_or_default();
            let program = settings.bbcp.remote_program.display();
            let digest = digest::name(settings.digest);
            format!("{} {ssh_settings} {program} {digest}", remote.host)
        }
    }
}

fn checks_of(named: &NamedDirectory) -> &'static [Check] {
    match named.place.role() {
        Role::Origin => &[Check::Origin],
        Role::Destination => &[Check::Space, Check::Write],
    }
}

async fn check_origin(named: &NamedDirectory) -> Outcome {
    match named.place.readable().await {
        Ok(()) => Outcome::green(format!("{} can be read", named.place.root())),
        // A new location may be empty.
        Err(TransferError::OriginRootMissing { empty: true, .. }) if !named.has_waiting => {
            Outcome::green(format!("{} can be read; it is empty", named.place.root()))
        }
        Err(error) => failed(&error),
    }
}

async fn check_writing(named: &NamedDirectory) -> Outcome {
    match named.place.writable().await {
        Ok(()) => Outcome::green(format!("{} can be written", named.place.root())),
        Err(error) => failed(&error),
    }
}

/// Converts an error to a finding, with the explanation and the remedy that a worker would report.
pub(super) fn failed(error: &TransferError) -> Outcome {
    Outcome::red(advice::explanation(error), advice::remedy(error.kind()))
}
