//! A directory with a package, a destination and an own bbcp double.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use ccat_transfer::settings::{self, LinkSettings};
use ccat_transfer::transfer::copying::{self, CopyProgress, Report};
use ccat_transfer::transfer::failures::{Role, TransferError};
use ccat_transfer::transfer::id::AttemptNumber;
use ccat_transfer::transfer::plan::{
    Attempt, Hosts, LocalHost, Location, Package, Plan, PlanInput, plan,
};
use entity::StorageType;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::double::double;

/// Size of the package in bytes.
pub(crate) const SIZE: u64 = 4 << 20;

/// Environment for one copy.
pub(crate) struct Bench {
    pub(crate) directory: tempfile::TempDir,
    pub(crate) link: LinkSettings,
    pub(crate) cancel: CancellationToken,
    pub(crate) progress: watch::Sender<CopyProgress>,
    pub(crate) origin_host: Option<&'static str>,
    pub(crate) destination_host: Option<&'static str>,
    pub(crate) relative_path: String,
    pub(crate) file_name: String,
    pub(crate) hosts: Hosts,
}

impl Bench {
    /// Creates the environment with a package of [`SIZE`] and these knobs for the double (without their prefix).
    pub(crate) fn new(knobs: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        for name in ["bin", "origin", "destination"] {
            fs::create_dir(path.join(name)).unwrap();
        }
        symlink(double(), path.join("bin/bbcp")).unwrap();
        let content: Vec<u8> = (0..SIZE).map(|n| (n / 7) as u8).collect();
        fs::write(path.join("origin/p.tar"), content).unwrap();

        let settings = settings::load(None, []).unwrap();
        let mut link = settings.link("ccat", "cologne").unwrap();
        link.bbcp.program = path.join("bin/bbcp");
        link.bbcp.kill_after = Duration::from_millis(300);
        link.stall_timeout = Duration::from_secs(20);
        link.ssh.max_package_bytes = 0;
        let bench = Self {
            directory,
            link,
            cancel: CancellationToken::new(),
            progress: watch::Sender::new(CopyProgress::none(SIZE)),
            origin_host: None,
            destination_host: None,
            relative_path: String::new(),
            file_name: "p.tar".into(),
            hosts: Hosts::new(LocalHost::new("here", [])),
        };
        bench.knobs(knobs);
        bench
    }

    /// Puts one end on another host.
    pub(crate) fn put(&mut self, role: Role, host: &'static str) {
        match role {
            Role::Origin => self.origin_host = Some(host),
            Role::Destination => self.destination_host = Some(host),
        }
    }

    /// Sets the knobs of the double (without their prefix).
    pub(crate) fn knobs(&self, knobs: &[(&str, &str)]) {
        let log = self.path("record").display().to_string();
        let knobs: String = [("LOG", log.as_str()), ("TICK", "0.05")]
            .iter()
            .chain(knobs)
            .map(|(name, value)| format!("BBCP_DOUBLE_{name}={value}\n"))
            .collect();
        fs::write(self.path("bin/bbcp-double.env"), knobs).unwrap();
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn plan(&self) -> Plan {
        let location = |site: &str, host: Option<&str>, root: PathBuf| Location {
            site: site.into(),
            name: "buffer".into(),
            storage: StorageType::Disk,
            host: host.map(Into::into),
            root: root.display().to_string(),
        };
        let attempt = Attempt {
            transfer_id: 7.into(),
            number: AttemptNumber::new(1),
            lease_token: Uuid::new_v4(),
        };
        let package = Package {
            relative_path: self.relative_path.clone(),
            file_name: self.file_name.clone(),
            size: SIZE,
            checksum: None,
        };
        let input = PlanInput {
            origin: location("ccat", self.origin_host, self.path("origin")),
            destination: location("cologne", self.destination_host, self.path("destination")),
            package,
            method: Some("bbcp".into()),
        };
        plan(attempt, &input, &self.link, &self.hosts).unwrap()
    }

    pub(crate) async fn copy(&self, plan: &Plan) -> Result<Report, TransferError> {
        copying::copy(plan, &self.path("logs/7.log"), &self.cancel, &self.progress).await
    }

    /// Returns the content of the attempt's log file.
    pub(crate) fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.path("logs/7.log")).unwrap()).into_owned()
    }

    /// Returns the double's record of its last run.
    pub(crate) fn record(&self) -> serde_json::Value {
        let text = fs::read_to_string(self.path("record")).unwrap_or_default();
        let last = text.lines().last().unwrap_or("null");
        serde_json::from_str(last).unwrap()
    }

    /// Waits until the double has been started, and returns its process group.
    pub(crate) async fn group(&self) -> i64 {
        for _ in 0..200 {
            if let Some(group) = self.record()["pgid"].as_i64() {
                return group;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the double was not started");
    }
}

/// Returns the command lines of the living processes of a group.
pub(crate) fn living(group: i64) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else {
            continue;
        };
        let fields: Vec<&str> = stat
            .rsplit_once(')')
            .unwrap()
            .1
            .split_whitespace()
            .collect();
        if fields[2] == group.to_string() && fields[0] != "Z" {
            found.push(fs::read_to_string(entry.path().join("cmdline")).unwrap_or_default());
        }
    }
    found
}

/// Waits until `holds` returns true, and fails after some seconds.
pub(crate) async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(5);
    while !holds() {
        assert!(Instant::now() < end, "{what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
