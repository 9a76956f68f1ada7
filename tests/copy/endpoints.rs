//! Both kinds of ends: this host, and this host by a real sshd.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use ccat_transfer::settings::DigestAlgorithm;
use ccat_transfer::transfer::copying::bbcp;
use ccat_transfer::transfer::endpoint::{Facts, FileKind, ReadOptions, Target, TemporaryName};
use ccat_transfer::transfer::failures::{Role, TransferError};
use ccat_transfer::transfer::id::AttemptNumber;
use rstest::rstest;
use uuid::Uuid;

use crate::bench::{Bench, SIZE};

/// Host name that does not count as local.
pub(crate) const LOOPBACK: &str = "127.0.0.1";

/// Connection to an end.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Way {
    Local,
    Ssh,
}

/// Creates a bench that can reach [`LOOPBACK`]; `None` without an sshd for tests.
pub(crate) fn with_sshd() -> Option<Bench> {
    let variable = |name: &str| std::env::var(name).ok();
    let port = crate::service::service("TEST_SSHD_PORT")?;
    let mut bench = Bench::new(&[]);
    bench.link.ssh.port = port.parse().unwrap();
    bench.link.ssh.identity_file = variable("TEST_SSH_IDENTITY").unwrap_or_default();
    bench.link.ssh.known_hosts_file = variable("TEST_SSH_KNOWN_HOSTS").unwrap_or_default();
    bench.link.ssh.user = variable("TEST_SSH_USER").unwrap_or_default();
    Some(bench)
}

/// Creates a bench whose destination (or origin) is reached in this way.
pub(crate) fn bench(role: Role, way: Way) -> Option<Bench> {
    let mut bench = match way {
        Way::Local => Bench::new(&[]),
        Way::Ssh => with_sshd()?,
    };
    if way == Way::Ssh {
        bench.put(role, LOOPBACK);
    }
    Some(bench)
}

pub(crate) const READ_OPTIONS: ReadOptions<'static> = ReadOptions {
    algorithm: DigestAlgorithm::Sha256,
    size: SIZE,
    with_blocks: false,
    stall_timeout: Duration::from_secs(10),
    behind: None,
    is_growing: false,
    blocks: None,
};

/// Publishes the copy as it is now.
pub(crate) async fn publish(target: &Target) -> Result<(), TransferError> {
    let copy = target.inspect_temporary().await?.unwrap();
    target.publish(&copy).await
}

/// A name with characters that a shell, ssh or bbcp could misinterpret.
const ODD: &str = "-a b;c'd\"e$(touch oops)`f`*?[g]&|<>#~!{h}\\i:j@k é";

#[rstest]
#[tokio::test]
async fn source_is_inspected(#[values(Way::Local, Way::Ssh)] way: Way) {
    let Some(mut bench) = bench(Role::Origin, way) else {
        return;
    };
    let facts = bench.plan().source.inspect().await.unwrap();
    let metadata = fs::metadata(bench.path("origin/p.tar")).unwrap();
    assert_eq!(
        (facts.size, facts.kind, facts.readable),
        (SIZE, FileKind::File, true)
    );
    assert_eq!(facts.identity, Some((metadata.dev(), metadata.ino())));
    let modified = facts.modified.unwrap();
    assert_eq!(
        (modified.seconds, i64::from(modified.nanoseconds)),
        (metadata.mtime(), metadata.mtime_nsec())
    );
    assert_eq!(facts.names, Some(1));
    assert!(facts.boot.is_some());

    bench.file_name = "nothing".into();
    let error = bench.plan().source.inspect().await.unwrap_err();
    assert_eq!(error.code(), "origin_missing", "{error}");
    fs::create_dir(bench.path("origin/nothing")).unwrap();
    let error = bench.plan().source.inspect().await.unwrap_err();
    assert_eq!(error.code(), "origin_not_a_file", "{error}");
}

#[tokio::test]
async fn a_destination_that_is_the_source_is_refused() {
    let bench = Bench::new(&[]);
    let plan = bench.plan();
    let source = plan.source.inspect().await.unwrap();
    let path = plan.target.path().as_path();
    fs::copy(plan.source.path().as_path(), path).unwrap();
    let existing = plan.target.inspect().await.unwrap().unwrap();
    plan.refuse_same_file(&source, &existing).unwrap();
    fs::remove_file(path).unwrap();
    std::os::unix::fs::symlink(plan.source.path().as_path(), path).unwrap();
    let existing = plan.target.inspect().await.unwrap().unwrap();
    let error = plan.refuse_same_file(&source, &existing).unwrap_err();
    assert_eq!(error.code(), "same_place");

    // Each host has its own device numbers for mounts from other hosts.
    let exported = |facts: Facts| Facts {
        identity: facts.identity.map(|(device, inode)| (device + 1, inode)),
        boot: Some(Uuid::new_v4()),
        ..facts
    };
    let error = plan
        .refuse_same_file(&source, &exported(existing))
        .unwrap_err();
    assert_eq!(error.code(), "same_place");
    let other = Facts {
        changed: None,
        ..exported(existing)
    };
    plan.refuse_same_file(&source, &other).unwrap();
}

/// Properties of the origin that are compared before and after a copy.
#[rstest]
#[tokio::test]
async fn a_changed_source_is_noticed(#[values(Way::Local, Way::Ssh)] way: Way) {
    let Some(bench) = bench(Role::Origin, way) else {
        return;
    };
    let source = bench.plan().source;
    let path = bench.path("origin/p.tar");
    let before = source.inspect().await.unwrap();
    let moment = fs::metadata(&path).unwrap().modified().unwrap();
    let touch = |path: &Path, later: Duration| {
        let file = fs::File::options().append(true).open(path).unwrap();
        file.set_modified(moment + later).unwrap();
    };
    // A backup's hard link, a reader and a chmod do not count as a change.
    fs::hard_link(&path, bench.path("backup")).unwrap();
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o640)).unwrap();
    assert_eq!(before.difference(&source.inspect().await.unwrap()), None);

    touch(&path, Duration::from_nanos(1));
    let after = source.inspect().await.unwrap();
    assert_eq!(before.difference(&after), Some("its time of last change"));
    touch(&path, Duration::ZERO);
    assert_eq!(before.difference(&source.inspect().await.unwrap()), None);

    // Another file of the same size and time.
    fs::copy(&path, bench.path("replacement")).unwrap();
    touch(&bench.path("replacement"), Duration::ZERO);
    fs::rename(bench.path("replacement"), &path).unwrap();
    let after = source.inspect().await.unwrap();
    assert_eq!(before.difference(&after), Some("its device or inode"));
    fs::write(&path, "shorter").unwrap();
    let after = source.inspect().await.unwrap();
    assert_eq!(before.difference(&after), Some("its size"));
}

#[rstest]
#[tokio::test]
async fn digests_are_the_same_everywhere(#[values(Way::Local, Way::Ssh)] way: Way) {
    let Some(mut bench) = bench(Role::Origin, way) else {
        return;
    };
    bench.file_name = ODD.into();
    fs::write(bench.path("origin").join(ODD), "abc").unwrap();
    let source = bench.plan().source;
    assert_eq!(source.inspect().await.unwrap().size, 3);
    let digest = source.digest(READ_OPTIONS).await.unwrap();
    assert_eq!(
        digest.whole.unwrap().hex(),
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    );
    bench.file_name = "nothing".into();
    let error = bench.plan().source.digest(READ_OPTIONS).await.unwrap_err();
    assert_eq!(error.code(), "origin_missing", "{error}");
}

#[rstest]
#[tokio::test]
async fn publishes_without_overwriting(#[values(Way::Local, Way::Ssh)] way: Way) {
    let Some(mut bench) = bench(Role::Destination, way) else {
        return;
    };
    bench.relative_path = format!("{ODD}/2026");
    bench.file_name = ODD.into();
    let target = bench.plan().target;
    let directory = bench.path("destination").join(ODD).join("2026");

    assert_eq!(target.temporaries().await.unwrap(), []);
    target.ensure_directory().await.unwrap();
    target.ensure_directory().await.unwrap();
    assert!(directory.is_dir());
    assert!(target.free_space().await.unwrap() > 0);
    assert_eq!(target.inspect().await.unwrap(), None);

    fs::write(target.temporary_path().as_path(), "new").unwrap();
    assert_eq!(target.temporaries().await.unwrap(), [target.temporary()]);
    let before = target.digest_temporary(READ_OPTIONS).await.unwrap();
    publish(&target).await.unwrap();
    assert_eq!(fs::read(directory.join(ODD)).unwrap(), b"new");
    assert_eq!(target.inspect_temporary().await.unwrap(), None);
    assert_eq!(target.digest(READ_OPTIONS).await.unwrap(), before);

    fs::write(target.temporary_path().as_path(), "newer").unwrap();
    let error = publish(&target).await.unwrap_err();
    assert_eq!(error.code(), "destination_exists", "{error}");
    assert_eq!(fs::read(directory.join(ODD)).unwrap(), b"new");
    assert_eq!(fs::read_dir(&directory).unwrap().count(), 2);

    // A copy that has changed is not published.
    fs::remove_file(directory.join(ODD)).unwrap();
    let mut verified = target.inspect_temporary().await.unwrap().unwrap();
    verified.modified.as_mut().unwrap().seconds -= 1;
    let error = target.publish(&verified).await.unwrap_err();
    assert_eq!(error.code(), "copy_changed");
    assert_eq!(target.inspect().await.unwrap(), None);
    fs::write(directory.join(ODD), "new").unwrap();

    // A publication that was interrupted half-way, so that both names are the file, is completed.
    fs::remove_file(directory.join(ODD)).unwrap();
    fs::hard_link(target.temporary_path().as_path(), directory.join(ODD)).unwrap();
    publish(&target).await.unwrap();
    assert_eq!(fs::read(directory.join(ODD)).unwrap(), b"newer");
    assert_eq!(fs::read_dir(&directory).unwrap().count(), 1);
}

/// An attempt takes over the partial copy of an earlier one, with bbcp's checkpoint.
#[rstest]
#[tokio::test]
async fn adopts_a_partial_copy(#[values(Way::Local, Way::Ssh)] way: Way) {
    let Some(mut bench) = bench(Role::Destination, way) else {
        return;
    };
    bench.relative_path = format!("{ODD}/2026");
    bench.file_name = ODD.into();
    let [earlier, target] = [bench.plan().target, bench.plan().target];
    target.ensure_directory().await.unwrap();
    let directory = bench.path("destination").join(ODD).join("2026");
    let checkpoint = |target: &Target| {
        let name = format!("bbcp.host name.0f.{}", target.temporary());
        target.checkpoint_path().as_path().join(name)
    };

    assert_eq!(earlier.begin_partial(None).await.unwrap(), 0);
    fs::write(earlier.temporary_path().as_path(), "par").unwrap();
    fs::write(checkpoint(&earlier), "0 f").unwrap();
    let name = earlier.temporary();
    assert_eq!(target.leftover_size(name).await.unwrap(), 3);
    assert_eq!(target.temporaries().await.unwrap(), [name]);

    assert_eq!(target.begin_partial(Some(name)).await.unwrap(), 3);
    assert_eq!(target.leftover_size(name).await.unwrap(), 0);
    assert_eq!(fs::read(target.temporary_path().as_path()).unwrap(), b"par");
    assert_eq!(fs::read(checkpoint(&target)).unwrap(), b"0 f");
    assert_eq!(fs::read_dir(&directory).unwrap().count(), 2);
    // A repetition after a lost answer.
    assert_eq!(target.begin_partial(Some(name)).await.unwrap(), 3);
    // An operation with the old name does not affect the copy.
    earlier.remove_temporary().await.unwrap();
    assert!(target.temporary_path().as_path().exists());

    publish(&target).await.unwrap();
    assert_eq!(fs::read(directory.join(ODD)).unwrap(), b"par");
    assert_eq!(
        fs::read_dir(&directory).unwrap().count(),
        1,
        "no checkpoints"
    );

    // A directory of checkpoints alone is a leftover too.
    fs::create_dir(earlier.checkpoint_path().as_path()).unwrap();
    fs::write(checkpoint(&earlier), "0 f").unwrap();
    assert_eq!(target.temporaries().await.unwrap(), [name]);
    target.remove_leftover(name).await.unwrap();
    assert_eq!(fs::read_dir(&directory).unwrap().count(), 1);
}

/// A directory or a dangling link under the final name prevents the publication, like a file.
#[rstest]
#[tokio::test]
async fn publication_never_replaces_a_directory_or_link(#[values(Way::Local, Way::Ssh)] way: Way) {
    let Some(bench) = bench(Role::Destination, way) else {
        return;
    };
    let target = bench.plan().target;
    let path = target.path().as_path();
    fs::write(target.temporary_path().as_path(), "new").unwrap();
    fs::create_dir(path).unwrap();
    assert_eq!(
        publish(&target).await.unwrap_err().code(),
        "destination_exists"
    );
    fs::remove_dir(path).unwrap();
    std::os::unix::fs::symlink("/nowhere/at/all", path).unwrap();
    assert_eq!(
        publish(&target).await.unwrap_err().code(),
        "destination_exists"
    );
    assert!(target.temporary_path().as_path().exists());
}

#[rstest]
#[tokio::test]
async fn removes_only_what_is_ours(#[values(Way::Local, Way::Ssh)] way: Way) {
    let Some(bench) = bench(Role::Destination, way) else {
        return;
    };
    let target = bench.plan().target;
    let older = TemporaryName::new(7.into(), AttemptNumber::ZERO, Uuid::new_v4());
    let others = TemporaryName::new(77.into(), AttemptNumber::ZERO, Uuid::new_v4());
    let foreign = ".ccat-transfer-7-1-nonsense.part".to_owned();
    for name in [older.to_string(), others.to_string(), foreign.clone()] {
        fs::write(bench.path("destination").join(name), "x").unwrap();
    }
    fs::write(target.temporary_path().as_path(), "x").unwrap();

    let mut found = target.temporaries().await.unwrap();
    found.sort_by_key(TemporaryName::attempt);
    assert_eq!(found, [older, target.temporary()]);
    target.remove_leftover(older).await.unwrap();
    target.remove_temporary().await.unwrap();
    target.remove_temporary().await.unwrap();
    let mut left: Vec<String> = fs::read_dir(bench.path("destination"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    let mut expected = [foreign, others.to_string()];
    expected.sort();
    assert_eq!(left, expected);
}

#[rstest]
#[tokio::test]
async fn missing_location_is_not_created(#[values(Way::Local, Way::Ssh)] way: Way) {
    let Some(mut bench) = bench(Role::Destination, way) else {
        return;
    };
    bench.relative_path = "a/b".into();
    fs::write(bench.path("destination/a"), "in the way").unwrap();
    let error = bench.plan().target.ensure_directory().await.unwrap_err();
    assert_eq!(error.code(), "storage", "{}", error.chain());

    fs::remove_dir_all(bench.path("destination")).unwrap();
    let error = bench.plan().target.ensure_directory().await.unwrap_err();
    assert_eq!(error.code(), "destination_root_missing", "{error}");
    assert!(!bench.path("destination").exists());
}

/// A disk that is not mounted: no package of the location can be read, but none counts as missing.
#[rstest]
#[tokio::test]
async fn unmounted_origin_differs_from_missing_package(#[values(Way::Local, Way::Ssh)] way: Way) {
    let Some(bench) = bench(Role::Origin, way) else {
        return;
    };
    let source = bench.plan().source;
    let package = bench.path("origin/p.tar");
    let kept = bench.path("kept");
    fs::rename(&package, &kept).unwrap();
    let code = async || source.inspect().await.unwrap_err().code();
    assert_eq!(code().await, "origin_root_missing", "empty");
    let error = source.digest(READ_OPTIONS).await.unwrap_err();
    assert_eq!(error.code(), "origin_root_missing", "{error}");
    fs::write(bench.path("origin/.other"), "").unwrap();
    assert_eq!(code().await, "origin_missing");

    let mounted = bench.path("mounted");
    fs::rename(bench.path("origin"), &mounted).unwrap();
    assert_eq!(code().await, "origin_root_missing", "missing");
    fs::write(bench.path("origin"), "no directory").unwrap();
    assert_eq!(code().await, "origin_root_missing", "no directory");
    fs::remove_file(bench.path("origin")).unwrap();
    std::os::unix::fs::symlink("/nowhere/at/all", bench.path("origin")).unwrap();
    assert_eq!(code().await, "origin_root_missing", "a link to nothing");
    fs::remove_file(bench.path("origin")).unwrap();

    fs::rename(&mounted, bench.path("origin")).unwrap();
    fs::rename(&kept, &package).unwrap();
    source.inspect().await.unwrap();
}

#[rstest]
#[case("refused", "network")]
#[case("login", "ssh_denied")]
#[case("host_key", "ssh_host_key")]
#[case("unresolved", "network")]
#[case("no_ssh", "program_missing")]
#[tokio::test]
async fn failed_ssh_is_classified(#[case] trouble: &str, #[case] code: &str) {
    let Some(mut bench) = with_sshd() else { return };
    bench.destination_host = Some(LOOPBACK);
    match trouble {
        "refused" => bench.link.ssh.port = 1,
        "login" => bench.link.ssh.user = "nobody".into(),
        "host_key" => bench.link.ssh.known_hosts_file = "/dev/null".into(),
        "unresolved" => bench.destination_host = Some("no-such-host.invalid"),
        _ => bench.link.ssh.program = "no-such-ssh".into(),
    }
    let error = bench.plan().target.inspect().await.unwrap_err();
    assert_eq!(error.code(), code, "{error}");
    assert!(!matches!(error, TransferError::Storage { .. }));
}

/// The double is not an ssh client, but its record has the command that bbcp would run.
#[tokio::test]
async fn bbcp_gets_the_ssh_command() {
    let Some(mut bench) = with_sshd() else { return };
    bench.knobs(&[("ANYHOST", "1")]);
    bench.destination_host = Some(LOOPBACK);
    let user = bench.link.ssh.user.clone();
    let plan = bench.plan();
    bbcp::copy(&plan, &bench.path("log"), &bench.cancel, &bench.progress)
        .await
        .unwrap();
    let argv = bench.record()["argv"].clone();
    let words: Vec<&str> = argv
        .as_array()
        .unwrap()
        .iter()
        .map(|w| w.as_str().unwrap())
        .collect();
    let at = words.iter().position(|word| *word == "-T").unwrap();
    assert!(
        words[at + 1].starts_with("ssh -x -a -oBatchMode=yes"),
        "{words:?}"
    );
    assert!(
        words
            .last()
            .unwrap()
            .starts_with(&format!("{user}@127.0.0.1:/")),
        "{words:?}"
    );
    // The ssh of bbcp uses the open connection: with this command, nothing logs in.
    let socket = words[at + 1]
        .split(' ')
        .find_map(|word| word.strip_prefix("-oControlPath="))
        .unwrap();
    let mut arguments = words[at + 1].split(' ').skip(1);
    let check = std::process::Command::new("ssh")
        .args(arguments.by_ref().take_while(|word| *word != "-l"))
        .args(["-l", &user, "-O", "check", LOOPBACK])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&check.stderr);
    assert!(said.contains("Master running"), "{socket}: {said}");
}
