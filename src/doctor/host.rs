//! Checks of this host: settings, log directory, limits, ports, bbcp.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit};
use nix::unistd::{AccessFlags, eaccess};
use uuid::Uuid;

use super::{Check, Doctor, Finding, Outcome, Verdict};
use crate::settings::Settings;

/// Number of open files that a worker may need in addition to its transfers, and number for each transfer.
const FILES: (u64, u64) = (256, 32);

impl Doctor {
    pub(super) async fn check_this_host(&self) -> Vec<Finding> {
        let settings = self.settings.clone();
        let log_dir = settings.transfer.log_dir.clone();
        let ranges = port_ranges(&settings);
        let transfers = settings.celery.concurrency();
        let (log_dir, limits, ports) = tokio::join!(
            self.check(Check::LogDir, "", blocking(move || check_log_dir(&log_dir))),
            self.check(Check::Limits, "", async { check_limits(transfers) }),
            self.check(
                Check::Ports,
                "",
                blocking(move || check_ports(&ranges, transfers))
            ),
        );
        let rest = [log_dir, limits, ports].into_iter().flatten();
        self.check_settings().into_iter().chain(rest).collect()
    }

    /// The settings are valid, since loading them succeeded.
    fn check_settings(&self) -> Vec<Finding> {
        if self.options.skip.contains(&Check::Settings) {
            return Vec::new();
        }
        let finding = |verdict, found: String, advice| Finding {
            check: Check::Settings,
            subject: String::new(),
            verdict,
            found,
            advice,
        };
        let warnings = &self.settings.warnings;
        if warnings.is_empty() {
            return vec![finding(Verdict::Green, "they are valid".into(), None)];
        }
        let risky = |problem: &crate::settings::Problem| {
            let (what, remedy) = problem
                .message
                .rsplit_once("; ")
                .unwrap_or((&problem.message, "protect it from other users"));
            finding(
                Verdict::Yellow,
                format!("{}: {what}", problem.key),
                Some(remedy.to_owned()),
            )
        };
        warnings.iter().map(risky).collect()
    }
}

/// Runs work that may block, for example on a file server that does not answer.
async fn blocking(work: impl FnOnce() -> Outcome + Send + 'static) -> Outcome {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Outcome::red(error.to_string(), "report this: it is a bug"))
}

fn check_log_dir(directory: &Path) -> Outcome {
    let shown = directory.display();
    let advice = format!("make {shown} writable for this user, or set transfer.log_dir");
    if !directory.exists() {
        let parent = directory
            .ancestors()
            .skip(1)
            .map(|path| match path.as_os_str().is_empty() {
                true => Path::new("."),
                false => path,
            })
            .find(|path| path.exists())
            .unwrap_or(Path::new("/"));
        let allowed = match parent.is_dir() {
            true => eaccess(parent, AccessFlags::W_OK | AccessFlags::X_OK),
            false => Err(Errno::ENOTDIR),
        };
        return match allowed {
            Ok(()) => Outcome::green(format!("the first transfer will create {shown}")),
            Err(error) => Outcome::red(
                format!(
                    "{shown} is missing, and cannot be created in {}: {error}",
                    parent.display()
                ),
                advice,
            ),
        };
    }
    let path = directory.join(format!(".ccat-transfer-doctor-{}", Uuid::new_v4()));
    match try_writing(&path) {
        Ok(()) => Outcome::green(format!("{shown} can be written")),
        Err(error) => Outcome::red(format!("{shown} cannot be written: {error}"), advice),
    }
}

/// Makes a file that did not exist, and removes it.
fn try_writing(path: &PathBuf) -> io::Result<()> {
    OpenOptions::new().write(true).create_new(true).open(path)?;
    fs::remove_file(path)
}

fn check_limits(transfers: usize) -> Outcome {
    let needed = FILES.0 + FILES.1.saturating_mul(transfers as u64);
    match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((soft, _)) if soft < needed => Outcome::yellow(
            format!("{soft} files may be open at a time; {transfers} transfers may need {needed}"),
            format!("raise it: `ulimit -n {needed}`, or LimitNOFILE={needed} in the unit"),
        ),
        Ok((soft, _)) => Outcome::green(format!("{soft} files may be open at a time")),
        Err(error) => Outcome::yellow(
            format!("the limit of open files cannot be read: {error}"),
            format!("make sure that it is {needed} or more"),
        ),
    }
}

/// Returns the port ranges of the general settings and of the links, without duplicates.
fn port_ranges(settings: &Settings) -> BTreeSet<(u16, u16)> {
    let of_links = settings
        .routes
        .iter()
        .filter_map(|route| settings.link(&route.origin, &route.destination).ok())
        .map(|link| link.bbcp.port_range);
    std::iter::once(settings.bbcp.port_range.clone())
        .chain(of_links)
        .filter_map(|range| {
            let (first, last) = range.split_once(':')?;
            Some((first.parse().ok()?, last.parse().ok()?))
        })
        .collect()
}

fn check_ports(ranges: &BTreeSet<(u16, u16)>, transfers: usize) -> Outcome {
    if ranges.is_empty() {
        return Outcome::green("bbcp and the kernel choose (bbcp.port_range is empty)");
    }
    let mut findings = Vec::new();
    let mut worst = Verdict::Green;
    for &(first, last) in ranges {
        let all = usize::from(last - first) + 1;
        let mut free = 0;
        let mut why = None;
        for port in first..=last {
            match TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)) {
                Ok(_) => free += 1,
                Err(error) => why = Some(error),
            }
        }
        let why = why.map(|error| format!(" ({error})")).unwrap_or_default();
        findings.push(format!(
            "{free} of the {all} ports {first}:{last} are free{why}"
        ));
        let verdict = match free {
            0 => Verdict::Red,
            // Each transfer needs a port to listen on.
            _ if free < transfers => Verdict::Yellow,
            _ => Verdict::Green,
        };
        if verdict == Verdict::Red || worst == Verdict::Green {
            worst = verdict;
        }
    }
    let advice = (worst != Verdict::Green).then(|| {
        format!(
            "widen bbcp.port_range to more than {transfers} free ports above 1023, and open them in the firewall"
        )
    });
    Outcome::new(worst, findings.join("; "), advice)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_cannot_be_made_or_written_is_red() -> io::Result<()> {
        let folder = tempfile::tempdir()?;
        let verdict = |path: &Path| check_log_dir(path).verdict;
        assert_eq!(verdict(folder.path()), Verdict::Green);
        assert_eq!(verdict(&folder.path().join("a/b")), Verdict::Green);
        assert_eq!(fs::read_dir(folder.path())?.count(), 0);
        // Even root cannot make a directory there.
        assert_eq!(verdict(Path::new("/proc/self")), Verdict::Red);
        Ok(())
    }

    #[test]
    fn ports_in_use_are_reported() -> io::Result<()> {
        let taken = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        let port = taken.local_addr()?.port();
        let outcome = check_ports(&BTreeSet::from([(port, port)]), 1);
        assert_eq!(outcome.verdict, Verdict::Red, "{}", outcome.found);
        assert!(outcome.found.starts_with("0 of the 1 ports"));
        assert_eq!(check_ports(&BTreeSet::new(), 1).verdict, Verdict::Green);
        Ok(())
    }
}
