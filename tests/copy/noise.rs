//! Remote shells whose start-up files print, fail or end. A stand-in for ssh runs the start-up commands and then the
//! command on this host.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use ccat_transfer::transfer::endpoint::{FileKind, ReadOptions};
use rstest::rstest;

use crate::bench::{Bench, SIZE};
use crate::endpoints::{READ_OPTIONS, publish};

/// Name of a host that is not local.
pub(crate) const FAR: &str = "far.example.org";

/// Creates a bench whose other end is a shell that runs `startup` first. `shell` runs the command.
pub(crate) fn behind(startup: &str, shell: &str) -> Bench {
    let mut bench = Bench::new(&[]);
    let ssh = bench.path("bin/ssh");
    let script = format!(
        "#!/bin/bash\n{startup}\nfor command; do :; done\nmkdir -p {home}\nln -sf \"$(command -v {shell})\" {home}/sh\n\
         PATH={home}:$PATH\neval \"$command\"\n",
        home = bench.path("bin/shell").display(),
    );
    fs::write(&ssh, script).unwrap();
    fs::set_permissions(&ssh, fs::Permissions::from_mode(0o755)).unwrap();
    bench.link.ssh.program = ssh;
    bench
}

#[rstest]
#[case::no_line_end("printf 'Welcome to far'")]
#[case::half_a_line("printf 'ccat-transfer '")]
#[case::like_an_answer("echo 'ccat-transfer made'; echo 'ccat-transfer 5 1 1 1 file yes'")]
#[case::much("head -c 300000 /dev/zero | tr '\\0' '\\n'; head -c 300000 /dev/zero | tr '\\0' x")]
#[case::on_both("echo 'bash: x: No such file or directory' >&2; echo Hello")]
#[tokio::test]
async fn output_of_start_up_files_is_not_an_answer(#[case] startup: &str) {
    let mut bench = behind(startup, "sh");
    bench.origin_host = Some(FAR);
    let plan = bench.plan();
    let facts = plan.source.inspect().await.unwrap();
    assert_eq!((facts.size, facts.kind), (SIZE, FileKind::File));
    let digest = plan.source.digest(READ_OPTIONS).await.unwrap();
    bench.origin_host = None;
    let local = bench.plan().source.digest(READ_OPTIONS).await.unwrap();
    assert_eq!(digest.whole, local.whole);

    bench.destination_host = Some(FAR);
    let target = bench.plan().target;
    target.ensure_directory().await.unwrap();
    assert!(target.free_space().await.unwrap() > 0);
    assert_eq!(target.temporaries().await.unwrap(), []);
    fs::write(target.temporary_path().as_path(), "new").unwrap();
    publish(&target).await.unwrap();
    assert_eq!(target.inspect().await.unwrap().unwrap().size, 3);
}

/// Exit codes have a meaning only if they come from our scripts.
#[rstest]
#[tokio::test]
async fn start_up_file_that_exits_is_not_an_answer(#[values(0, 1, 66, 69, 73, 77)] code: i32) {
    let mut bench = behind(&format!("echo 'not today' >&2; exit {code}"), "sh");
    bench.origin_host = Some(FAR);
    let error = bench.plan().source.inspect().await.unwrap_err();
    assert_eq!(error.code(), "remote_died", "{error}");
    assert!(error.to_string().contains("not today"), "{error}");
}

/// Only ssh's own output states the cause of a failed connection.
#[rstest]
#[case::noise(
    "echo 'motd: Connection refused by yesterday' >&2; exit 255",
    "remote_died"
)]
#[case::denied_elsewhere("echo 'mount: Permission denied (nfs)' >&2; exit 255", "remote_died")]
#[case::refused(
    "echo 'ssh: connect to host far port 22: Connection refused' >&2; exit 255",
    "network"
)]
#[case::login(
    "echo 'u@far: Permission denied (publickey).' >&2; exit 255",
    "ssh_denied"
)]
#[tokio::test]
async fn failure_of_ssh_is_explained_by_ssh_only(#[case] startup: &str, #[case] code: &str) {
    let mut bench = behind(startup, "sh");
    bench.origin_host = Some(FAR);
    let error = bench.plan().source.inspect().await.unwrap_err();
    assert_eq!(error.code(), code, "{error}");
}

/// A path can have the text of an error message.
#[tokio::test]
async fn file_names_are_not_errors() {
    let mut bench = behind("", "sh");
    bench.origin_host = Some(FAR);
    bench.relative_path = "ls: Permission denied/Read-only file system".into();
    let error = bench.plan().source.inspect().await.unwrap_err();
    assert_eq!(error.code(), "origin_missing", "{error}");

    bench.origin_host = None;
    bench.destination_host = Some(FAR);
    fs::write(
        bench.path("destination/ls: Permission denied"),
        "in the way",
    )
    .unwrap();
    let error = bench.plan().target.ensure_directory().await.unwrap_err();
    assert_eq!(error.code(), "storage", "{}", error.chain());
}

/// The scripts work in every POSIX shell.
#[rstest]
#[tokio::test]
async fn every_posix_shell_works(
    #[values("dash", "bash", "ksh", "mksh", "yash", "zsh")] shell: &str,
) {
    let found = std::process::Command::new("sh")
        .args(["-c", &format!("command -v {shell}")])
        .output();
    if !found.unwrap().status.success() {
        return eprintln!("skipped: there is no {shell}");
    }
    let mut bench = behind("", shell);
    bench.destination_host = Some(FAR);
    bench.relative_path = "a/b c".into();
    let [earlier, target] = [bench.plan().target, bench.plan().target];
    target.ensure_directory().await.unwrap();
    assert_eq!(earlier.begin_partial(None).await.unwrap(), 0);
    fs::write(earlier.temporary_path().as_path(), "par").unwrap();
    let checkpoint = format!("bbcp.h.0f.{}", earlier.temporary());
    fs::write(earlier.checkpoint_path().as_path().join(checkpoint), "c").unwrap();
    let name = earlier.temporary();
    assert_eq!(target.begin_partial(Some(name)).await.unwrap(), 3);
    assert_eq!(target.leftover_size(target.temporary()).await.unwrap(), 3);
    let growing = ReadOptions {
        size: 3,
        is_growing: true,
        ..READ_OPTIONS
    };
    let digest = target.digest_temporary(growing).await.unwrap().whole;
    publish(&target).await.unwrap();
    assert_eq!(target.digest(READ_OPTIONS).await.unwrap().whole, digest);
    target.remove_leftover(name).await.unwrap();
    assert_eq!(target.inspect().await.unwrap().unwrap().size, 3);
    let directory = bench.path("destination/a/b c");
    assert_eq!(fs::read_dir(directory).unwrap().count(), 1);
}
