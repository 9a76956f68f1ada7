//! Two directories and a database, with an own bbcp double.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ccat_transfer::notify::Notifier;
use ccat_transfer::settings::{self, EnumLabels, OpsDb, Settings};
use ccat_transfer::tasks::DataTransferTask;
use ccat_transfer::transfer::database::Database;
use ccat_transfer::transfer::id::TransferId;
use ccat_transfer::transfer::lease::{LeaseInfo, Phase, Snapshot};
use ccat_transfer::transfer::repository::{Repository, TransferRecord};
use ccat_transfer::transfer::request::{Failed, Request, Success};
use ccat_transfer::transfer::service::TransferService;
use ccat_transfer::transfer::topology::{self, NewTransfer, Topology};
use tempfile::TempDir;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::double::double;
use crate::ops_db::{Fixture, me, service};
use crate::proxy::Proxy;

pub(crate) const MB: u64 = 1 << 20;

/// Environment for whole attempts.
pub(crate) struct Bench {
    pub(crate) db: Fixture,
    pub(crate) settings: Settings,
    pub(crate) origin: PathBuf,
    pub(crate) destination: PathBuf,
    /// The database as reached by the attempts, if the test reaches it in another way.
    workers_view: Option<Repository>,
    directory: TempDir,
}

/// End of an attempt, after its row was settled.
pub(crate) enum Ended {
    Success(Success),
    Failed(Failed),
}

impl Ended {
    pub(crate) fn done(self) -> Success {
        match self {
            Self::Success(done) => done,
            Self::Failed(failed) => panic!("{failed:?}"),
        }
    }

    pub(crate) fn failed(self) -> Failed {
        match self {
            Self::Failed(failed) => failed,
            Self::Success(done) => panic!("{done:?}"),
        }
    }

    pub(crate) fn code(self) -> &'static str {
        self.failed().error.code()
    }
}

/// Result of an action during an attempt, and the time that the attempt took after it.
pub(crate) struct Meanwhile<T> {
    pub(crate) value: T,
    pub(crate) elapsed: Duration,
}

impl Bench {
    pub(crate) async fn sqlite() -> Self {
        Self::on(Fixture::sqlite().await).await
    }

    pub(crate) async fn postgres() -> Option<Self> {
        Some(Self::on(Fixture::postgres().await?).await)
    }

    async fn on(db: Fixture) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        for name in ["bin", "origin", "destination"] {
            fs::create_dir(path(name)).unwrap();
        }
        symlink(double(), path("bin/bbcp")).unwrap();
        let place = |name: &str| path(name).display().to_string();
        let topology = format!(
            "[[sites]]\nname = 'Here'\nshort_name = 'here'\n\
             [[sites.locations]]\nname = 'from'\ntype = 'buffer'\nstorage = 'disk'\npath = '{}'\n\
             [[sites.locations]]\nname = 'to'\ntype = 'buffer'\nstorage = 'disk'\npath = '{}'\n\
             [[routes]]\norigin = 'here'\ndestination = 'here'\nmethod = 'bbcp'\ntype = 'direct'\n",
            place("origin"),
            place("destination"),
        );
        topology::seed(&db.repository, &topology.parse::<Topology>().unwrap())
            .await
            .unwrap();
        let mut settings = settings::load(None, []).unwrap();
        settings.bbcp.program = path("bin/bbcp");
        settings.bbcp.kill_after = Duration::from_millis(300);
        settings.transfer.log_dir = path("logs");
        settings.transfer.free_space_margin = 0;
        settings.transfer.lease_renew_interval = Duration::from_millis(300);
        settings.transfer.stall_timeout = Duration::from_secs(20);
        settings.ssh.max_package_bytes = 0;
        let bench = Self {
            db,
            settings,
            origin: path("origin"),
            destination: path("destination"),
            workers_view: None,
            directory,
        };
        bench.double(&[]);
        bench
    }

    /// Makes attempts keep partial copies of packages of any size.
    pub(crate) fn resume(&mut self) {
        self.settings.transfer.resume_above = 0;
    }

    /// Puts a proxy between the attempts and their database; the test keeps its direct connection.
    pub(crate) async fn behind_a_proxy(&mut self) -> Proxy {
        let server = self.db.test.settings.clone();
        let proxy = Proxy::start(server.database_postgresql_port).await;
        let settings = OpsDb {
            database_postgresql_host: "127.0.0.1".into(),
            database_postgresql_port: proxy.port(),
            acquire_timeout: Duration::from_millis(500),
            ..server
        };
        let database = Database::connect(&settings).await.unwrap();
        let repository = Repository::open(database, EnumLabels::Names).await.unwrap();
        self.workers_view = Some(repository);
        proxy
    }

    /// Reaches the destination by ssh. Returns false without an ssh server for tests.
    pub(crate) async fn by_ssh(&mut self) -> bool {
        let Some(port) = service("TEST_SSHD_PORT") else {
            return false;
        };
        let variable = |name: &str| std::env::var(name).unwrap_or_default();
        let ssh = &mut self.settings.ssh;
        ssh.port = port.parse().unwrap();
        ssh.identity_file = variable("TEST_SSH_IDENTITY");
        ssh.known_hosts_file = variable("TEST_SSH_KNOWN_HOSTS");
        ssh.user = variable("TEST_SSH_USER");
        let path = self.destination.display();
        let sql = format!("UPDATE disk_data_location SET host = '127.0.0.1' WHERE path = '{path}'");
        assert_eq!(self.db.sql(&sql).await, 1);
        true
    }

    /// Reaches the destination by a stand-in for ssh, which runs the command on this host without the named programs.
    pub(crate) async fn by_a_shell_without(&mut self, programs: &[&str]) {
        use std::os::unix::fs::PermissionsExt;
        let folder = self.directory.path().join("shell");
        fs::create_dir(&folder).unwrap();
        let write = |path: &Path, text: String| {
            fs::write(path, text).unwrap();
            fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
        };
        for name in programs {
            write(&folder.join(name), "#!/bin/sh\nexit 127\n".into());
        }
        let ssh = self.directory.path().join("bin/ssh");
        let script = format!(
            "#!/bin/sh\nfor command; do :; done\nPATH={}:$PATH\neval \"$command\"\n",
            folder.display()
        );
        write(&ssh, script);
        self.settings.ssh.program = ssh;
        let path = self.destination.display();
        let host = "far.example.org";
        let sql = format!("UPDATE disk_data_location SET host = '{host}' WHERE path = '{path}'");
        assert_eq!(self.db.sql(&sql).await, 1);
    }

    /// Changes the directory of the destination's location.
    pub(crate) async fn move_destination(&mut self, to: PathBuf) {
        let sql = format!(
            "UPDATE disk_data_location SET path = '{}' WHERE path = '{}'",
            to.display(),
            self.destination.display()
        );
        assert_eq!(self.db.sql(&sql).await, 1);
        self.destination = to;
    }

    /// Sets the double's knobs (without their prefix).
    pub(crate) fn double(&self, knobs: &[(&str, &str)]) {
        let log = self.directory.path().join("record").display().to_string();
        let knobs: String = [("LOG", log.as_str()), ("TICK", "0.05"), ("POLL", "0.2")]
            .iter()
            .chain(knobs)
            .map(|(name, value)| format!("BBCP_DOUBLE_{name}={value}\n"))
            .collect();
        fs::write(self.directory.path().join("bin/bbcp-double.env"), knobs).unwrap();
    }

    /// Writes a package; the content depends on the seed.
    pub(crate) fn write_origin(&self, name: &str, size: u64, seed: u64) {
        let path = self.origin.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let content: Vec<u8> = (0..size)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state >> 32) as u8
            })
            .collect();
        fs::write(path, content).unwrap();
    }

    /// Writes a package and creates a PENDING transfer of it.
    pub(crate) async fn package(&self, name: &str, size: u64) -> TransferId {
        self.write_origin(name, size, 1);
        self.transfer(name, None).await
    }

    /// Creates a further transfer of a package.
    pub(crate) async fn again(&self, name: &str) -> TransferId {
        self.transfer(name, None).await
    }

    pub(crate) async fn transfer(&self, name: &str, checksum: Option<String>) -> TransferId {
        let new = NewTransfer {
            relative_path: name.into(),
            size_bytes: None,
            checksum,
            origin: "here/from".parse().unwrap(),
            destination: "here/to".parse().unwrap(),
        };
        let created = topology::create_transfer(&self.db.repository, &new).await;
        created.unwrap().into()
    }

    /// Creates a row of another transfer, with a package name that no producer of ours uses.
    pub(crate) async fn renamed(&self, id: TransferId, name: &str) -> TransferId {
        let sql = |text: &str| format!("'{}'", text.replace('\'', "''"));
        let file_name = name.rsplit('/').find(|part| !part.is_empty()).unwrap();
        self.db
            .sql(&format!(
                "UPDATE data_transfer_package SET relative_path = {}, file_name = {} WHERE id = \
                 (SELECT data_transfer_package_id FROM data_transfer WHERE id = {id})",
                sql(name),
                sql(file_name)
            ))
            .await;
        self.db.set_status(id, "PENDING").await;
        id
    }

    pub(crate) async fn forget_delay(&self, id: TransferId) {
        self.db.repository.forget_delay(id).await.unwrap();
    }

    fn request(id: TransferId) -> Request {
        Request {
            id,
            task_id: Uuid::new_v4().to_string(),
            cancelled: CancellationToken::new(),
            terminated: CancellationToken::new(),
            no_new_attempt: CancellationToken::new(),
            redelivered: false,
            by_hand: false,
            snapshots: watch::Sender::new(Snapshot::default()),
        }
    }

    fn task(&self) -> (DataTransferTask, Notifier) {
        let service = TransferService::new(
            self.workers_view
                .as_ref()
                .unwrap_or(&self.db.repository)
                .clone(),
            Arc::new(self.settings.clone()),
            me(),
        );
        let notifier = Notifier::start(&self.settings.notifications);
        (
            DataTransferTask::new(service).with_notifier(notifier.clone()),
            notifier,
        )
    }

    /// Runs one attempt and settles its row.
    pub(crate) async fn attempt(&self, id: TransferId) -> Ended {
        self.carry_out(&Self::request(id)).await
    }

    async fn carry_out(&self, request: &Request) -> Ended {
        let (task, notifier) = self.task();
        // On the heap, as in a worker: without optimisation, several futures would fill the stack of a test thread.
        let ended = match Box::pin(task.run(request)).await {
            Ok(done) => Ended::Success(done),
            Err(failed) => {
                let settling = Request {
                    cancelled: CancellationToken::new(),
                    ..request.clone()
                };
                Box::pin(task.on_failure(&settling, &failed)).await;
                Ended::Failed(failed)
            }
        };
        notifier.close().await;
        ended
    }

    /// Runs one attempt, and stops it when this many bytes have been copied.
    pub(crate) async fn attempt_stopped_at(&self, id: TransferId, bytes: u64) -> Ended {
        let request = Self::request(id);
        let stopping = async {
            copied(&request, bytes).await;
            request.cancelled.cancel();
        };
        tokio::join!(self.carry_out(&request), stopping).0
    }

    /// Runs one attempt, and a second action when this many bytes have been copied.
    pub(crate) async fn attempt_while<T>(
        &self,
        id: TransferId,
        bytes: u64,
        other: impl AsyncFnOnce(&Self) -> T,
    ) -> (Ended, Meanwhile<T>) {
        let request = Self::request(id);
        let doing = async {
            copied(&request, bytes).await;
            (other(self).await, Instant::now())
        };
        let attempt = async { (self.carry_out(&request).await, Instant::now()) };
        let ((ended, end), (value, changed)) = tokio::join!(attempt, doing);
        let elapsed = end.saturating_duration_since(changed);
        (ended, Meanwhile { value, elapsed })
    }

    pub(crate) async fn record(&self, id: TransferId) -> TransferRecord {
        self.db.repository.transfer(id).await.unwrap().unwrap()
    }

    /// Returns a transfer's lease as shown to operators.
    pub(crate) async fn lease(&self, id: TransferId) -> Option<LeaseInfo> {
        self.db.repository.show(id).await.unwrap().unwrap().lease
    }

    /// Returns bbcp's output in an attempt.
    pub(crate) async fn log(&self, id: TransferId, attempt: usize) -> String {
        let detail = self.db.repository.show(id).await.unwrap().unwrap();
        let path = detail.attempts[attempt - 1].log_path.as_ref().unwrap();
        String::from_utf8_lossy(&fs::read(path).unwrap()).into_owned()
    }

    /// Returns copies under temporary names, and directories of checkpoints.
    pub(crate) fn leftovers(&self) -> (Vec<PathBuf>, Vec<PathBuf>) {
        fn walk(directory: &Path, found: &mut Vec<PathBuf>) {
            for entry in fs::read_dir(directory).unwrap() {
                let path = entry.unwrap().path();
                if path
                    .file_name()
                    .unwrap()
                    .to_string_lossy()
                    .starts_with(".ccat-transfer-")
                {
                    found.push(path);
                } else if path.is_dir() {
                    walk(&path, found);
                }
            }
        }
        let mut found = Vec::new();
        walk(&self.destination, &mut found);
        found.into_iter().partition(|path| path.is_file())
    }

    pub(crate) async fn assert_moved(&self, id: TransferId, name: &str) {
        assert_eq!(self.db.status(id).await, "COMPLETED");
        let [sent, arrived] =
            [&self.origin, &self.destination].map(|place| fs::read(place.join(name)).unwrap());
        assert!(sent == arrived, "{name} differs");
        self.assert_clean().await;
    }

    /// Checks that the destination has no file, not even under the final name.
    pub(crate) async fn assert_nothing_at_destination(&self, id: TransferId) {
        let record = self.record(id).await;
        let name = record.package.unwrap().relative_path;
        assert!(!self.destination.join(name).exists());
        self.assert_clean().await;
    }

    async fn assert_clean(&self) {
        let (copies, checkpoints) = self.leftovers();
        assert!(
            copies.is_empty() && checkpoints.is_empty(),
            "{copies:?} {checkpoints:?}"
        );
        assert_eq!(self.db.leases().await, "0");
    }

    /// Returns the double's records of its copies.
    fn records(&self) -> Vec<serde_json::Value> {
        let text = fs::read_to_string(self.directory.path().join("record")).unwrap_or_default();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    pub(crate) fn copies(&self) -> usize {
        self.records().len()
    }

    /// Returns the last argument of each command line.
    pub(crate) fn targets(&self) -> Vec<String> {
        let last = |record: &serde_json::Value| {
            let argv = record["argv"].as_array().unwrap();
            argv.last().unwrap().as_str().unwrap().to_owned()
        };
        self.records().iter().map(last).collect()
    }

    /// Returns the command lines of processes that still use this bench's directories.
    pub(crate) fn no_bbcp_left(&self) -> Vec<String> {
        let here = self.directory.path().display().to_string();
        fs::read_dir("/proc")
            .unwrap()
            .flatten()
            .filter_map(|entry| fs::read_to_string(entry.path().join("cmdline")).ok())
            .filter(|line| line.contains(&here))
            .collect()
    }
}

/// Waits until this many bytes have been copied.
async fn copied(request: &Request, bytes: u64) {
    let mut snapshots = request.snapshots.subscribe();
    let arriving = snapshots.wait_for(|snapshot| {
        snapshot.phase == Phase::Copying && snapshot.progress.bytes_done >= bytes
    });
    let waited = tokio::time::timeout(Duration::from_secs(20), arriving).await;
    waited.expect("in time").expect("the attempt goes on");
}
