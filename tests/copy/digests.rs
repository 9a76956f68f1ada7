//! Digests of files at both kinds of ends: what stops them, and what they wait for.

use std::fs;
use std::io::{Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use ccat_transfer::settings::DigestAlgorithm;
use ccat_transfer::transfer::digest::{FileDigest, KnownBlocks};
use ccat_transfer::transfer::endpoint::{BlockSender, Blocks, ReadOptions};
use ccat_transfer::transfer::failures::Role;
use rstest::rstest;
use tokio::sync::watch;

use crate::bench::{Bench, SIZE, eventually};
use crate::endpoints::{LOOPBACK, READ_OPTIONS, Way, bench, with_sshd};

#[tokio::test]
async fn hanging_reader_is_given_up() {
    let bench = Bench::new(&[]);
    let fifo = bench.path("origin/p.tar");
    fs::remove_file(&fifo).unwrap();
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let options = ReadOptions {
        stall_timeout: Duration::from_millis(200),
        ..READ_OPTIONS
    };
    let error = bench.plan().source.digest(options).await.unwrap_err();
    assert_eq!(error.code(), "stalled_storage", "{error}");
    // Lets the remaining thread end.
    drop(fs::OpenOptions::new().write(true).open(&fifo));
}

#[tokio::test]
async fn a_dropped_local_digest_stops() {
    let bench = Bench::new(&[]);
    let plan = endless(&bench);
    {
        let digest = std::pin::pin!(plan.source.digest(READ_OPTIONS));
        tokio::select! {
            _ = digest => panic!("it has no end"),
            () = eventually("it reads", we_read_zeros) => {}
        }
    }
    eventually("it has stopped", || !we_read_zeros()).await;
}

/// A reader at its maximum lead over the copy waits, and does not count as stalled. It is woken when the copy continues
/// or ends, and need not check at intervals.
#[rstest]
#[case::does_not_hang(Duration::from_secs(2))]
#[case::is_woken(Duration::from_secs(600))]
#[tokio::test]
async fn a_reader_stays_near_the_copy(#[case] stall_timeout: Duration) {
    const LEAD: u64 = 256 << 20;
    const BUFFER: u64 = 256 << 10;
    const PATIENCE: Duration = Duration::from_secs(60);
    let bench = Bench::new(&[]);
    let plan = bench.plan();
    let path = bench.path("origin/p.tar");
    let origin = fs::OpenOptions::new().write(true).open(&path).unwrap();
    let size = 2 * LEAD;
    origin.set_len(size).unwrap();
    drop(origin);
    let copied = watch::Sender::new(0);
    let behind = copied.subscribe();
    let options = ReadOptions {
        size,
        stall_timeout,
        behind: Some(&behind),
        ..READ_OPTIONS
    };
    let mut digest = std::pin::pin!(plan.source.digest(options));
    for done in [0, LEAD / 4] {
        copied.send_replace(done);
        // The reader has a low priority, and may be slow beside other tests.
        let ahead = tokio::time::timeout(PATIENCE, async {
            while read_until(&path).is_none_or(|at| at <= done + LEAD) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        tokio::select! {
            result = &mut digest => panic!("it did not hold back: {result:?}"),
            ahead = ahead => ahead.expect("it is ahead"),
        }
        tokio::select! {
            result = &mut digest => panic!("it did not hold back: {result:?}"),
            () = tokio::time::sleep(Duration::from_secs(3)) => {}
        }
        assert!(read_until(&path).is_some_and(|at| at <= done + LEAD + BUFFER));
    }
    drop(copied);
    let alone = plan.source.digest(ReadOptions {
        behind: None,
        ..options
    });
    let soon = tokio::time::timeout(PATIENCE, digest);
    assert_eq!(soon.await.unwrap().unwrap(), alone.await.unwrap());
}

/// Returns the position up to which this process has read a file.
fn read_until(path: &Path) -> Option<u64> {
    let open = fs::read_dir("/proc/self/fd").unwrap().flatten();
    let fd = open
        .filter(|fd| fs::read_link(fd.path()).is_ok_and(|to| to == path))
        .map(|fd| fd.file_name())
        .next()?;
    let info = fs::read_to_string(Path::new("/proc/self/fdinfo").join(fd)).ok()?;
    info.lines()
        .find_map(|line| line.strip_prefix("pos:")?.trim().parse().ok())
}

/// Returns a plan whose source is endless.
fn endless(bench: &Bench) -> ccat_transfer::transfer::plan::Plan {
    let origin = bench.path("origin/p.tar");
    fs::remove_file(&origin).unwrap();
    std::os::unix::fs::symlink("/dev/zero", &origin).unwrap();
    let mut plan = bench.plan();
    plan.size = SIZE;
    plan
}

/// Returns true if this process reads the endless source.
fn we_read_zeros() -> bool {
    read_until(Path::new("/dev/zero")).is_some()
}

/// Returns true if any process has this command line.
fn something_runs(command: &str) -> bool {
    fs::read_dir("/proc").unwrap().flatten().any(|process| {
        let words = fs::read_to_string(process.path().join("cmdline")).unwrap_or_default();
        words.trim_end_matches('\0').replace('\0', " ") == command
    })
}

/// A digest that hangs at the other end does not outlive the connection, and does not block other requests.
#[tokio::test]
async fn a_hanging_remote_digest_ends_with_the_connection() {
    let Some(mut bench) = with_sshd() else { return };
    bench.origin_host = Some(LOOPBACK);
    bench.link.ssh.sha256_command = vec!["sleep".into(), "45678".into()];
    let plan = bench.plan();
    let options = ReadOptions {
        size: 0,
        stall_timeout: Duration::from_secs(2),
        ..READ_OPTIONS
    };
    let error = plan.source.digest(options).await.unwrap_err();
    assert_eq!(error.code(), "operation_timeout", "{error}");
    assert!(something_runs("sleep 45678"));
    plan.source.inspect().await.unwrap();
    drop((plan, bench));
    eventually("it has stopped", || !something_runs("sleep 45678")).await;
}

/// bbcp withholds the permission to read a file until it is complete. Blocks that are known are not read again.
#[rstest]
#[case::local(Way::Local, true)]
#[case::ssh(Way::Ssh, false)]
#[tokio::test]
async fn a_copy_is_read_while_it_grows(#[case] way: Way, #[case] computes_whole: bool) {
    const BLOCK: u64 = 64 << 20;
    let Some(bench) = bench(Role::Destination, way) else {
        return;
    };
    let plan = bench.plan();
    let copied = watch::Sender::new(0);
    let behind = copied.subscribe();
    let (channel, mut read) = tokio::sync::mpsc::unbounded_channel();
    let end = entity::FileEnd::Destination;
    let mut blocks = Blocks {
        known: KnownBlocks::default(),
        read: BlockSender { end, channel },
    };
    let options = ReadOptions {
        size: BLOCK + 5,
        with_blocks: true,
        ..READ_OPTIONS
    };
    let growing = ReadOptions {
        is_growing: true,
        behind: Some(&behind),
        blocks: Some(&blocks),
        ..options
    };
    let path = plan.target.temporary_path();
    let writing = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let file = fs::File::create(path.as_path()).unwrap();
        file.set_permissions(fs::Permissions::from_mode(0o200))
            .unwrap();
        for size in [BLOCK / 2, BLOCK, BLOCK + 5] {
            file.set_len(size).unwrap();
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        drop(copied);
        file
    };
    let (remote, file) = tokio::join!(plan.target.digest_temporary(growing), writing);
    let remote = remote.unwrap();
    let found = (
        remote.whole.is_some(),
        remote.blocks.len(),
        remote.read_from,
    );
    assert_eq!(found, (computes_whole, 2, 0));
    let (_, first) = read.recv().await.unwrap();
    assert_eq!(first.digest, remote.blocks[0]);
    blocks.known = KnownBlocks::first(options.algorithm, 1, [first]);
    let resumed = ReadOptions {
        blocks: Some(&blocks),
        ..options
    };
    let resumed = plan.target.digest_temporary(resumed).await.unwrap();
    assert_eq!(resumed.read_from, BLOCK);
    assert_eq!(
        (&resumed.whole, &resumed.blocks),
        (&remote.whole, &remote.blocks)
    );
    let remote = FileDigest::of_blocks(remote.blocks, 0, remote.program);

    let mut origin = fs::File::create(bench.path("origin/p.tar")).unwrap();
    origin.set_len(BLOCK + 5).unwrap();
    let local = plan.source.digest(options).await.unwrap();
    assert_eq!(local.difference(&remote).unwrap(), None);
    origin.seek(SeekFrom::Start(BLOCK)).unwrap();
    origin.write_all(b"x").unwrap();
    let local = plan.source.digest(options).await.unwrap();
    let difference = local.difference(&remote).unwrap().unwrap();
    assert_eq!(difference.block, Some(1));
    drop(file);
}

/// The wait for more bytes ends with the copy, also if the file has vanished.
#[rstest]
#[tokio::test]
async fn a_copy_that_vanishes_ends_the_wait(#[values(Way::Local, Way::Ssh)] way: Way) {
    let Some(bench) = bench(Role::Destination, way) else {
        return;
    };
    let plan = bench.plan();
    let copied = watch::Sender::new(0);
    let behind = copied.subscribe();
    let options = ReadOptions {
        is_growing: true,
        behind: Some(&behind),
        ..READ_OPTIONS
    };
    drop(copied);
    let error = plan.target.digest_temporary(options).await.unwrap_err();
    assert_eq!(error.code(), "storage", "{error}");
}

#[tokio::test]
async fn missing_program_is_reported() {
    let Some(mut bench) = with_sshd() else { return };
    bench.origin_host = Some(LOOPBACK);
    let options = ReadOptions {
        algorithm: DigestAlgorithm::Blake3,
        ..READ_OPTIONS
    };
    match bench.plan().source.digest(options).await {
        Err(error) => assert_eq!(error.code(), "remote_program_missing", "{error}"),
        Ok(digest) => assert_eq!(digest.whole.unwrap().algorithm_name(), "blake3"),
    }
}
