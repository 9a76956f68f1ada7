//! The two processes that make a host.
//!
//! [`create`] runs outside: it leaves the namespaces of the machine and starts [`initialize`], which is the first process
//! of the new ones. Both inherit the standard input of a pipe that this program holds open. The host ends with it, however
//! this program ends.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::thread;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{chdir, chroot, sethostname};

use super::HostName;
use crate::error::{Error, during, permission};

/// Directories in the root directory of a host that are not those of the machine.
const OWN: [&str; 4] = ["proc", "run", "data", "host"];
/// Files and directories in `/etc` that are not those of the machine, where the machine has them.
const OWN_SETTINGS: [&str; 5] = ["hosts", "hostname", "passwd", "shadow", "ssh"];

const NONE: Option<&str> = None;

/// Creates the namespaces, starts the first process, prints its id, and waits for its end.
///
/// # Errors
/// This user may not create namespaces.
pub(crate) fn create(host: HostName, directory: &Path) -> Result<ExitCode, Error> {
    let all = CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWNET;
    // Before: the path of the running program belongs to the mounts of the machine.
    let program = std::env::current_exe().map_err(during("find this program"))?;
    unshare(all).map_err(permission("create namespaces"))?;
    // First of all: nothing that is mounted from here on may be visible to the machine.
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE).map_err(
        |errno| match errno {
            Errno::EINVAL => Error::Unavailable(
                "the root directory is not a mount point, as after chroot".into(),
            ),
            other => permission("make the mounts private")(other),
        },
    )?;
    let mut first = Command::new(program)
        .args(["initialize-host", host.as_str()])
        .arg(directory)
        .spawn()
        .map_err(during("start the first process"))?;
    println!("pid {}", first.id());
    let status = first.wait().map_err(during("wait for the first process"))?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(ExitCode::from(code.unwrap_or(1)))
}

/// First process of a host: gives it its name and its files, prints `ready`, and waits until standard input ends.
///
/// # Errors
/// A mount fails.
pub(crate) fn initialize(host: HostName, directory: &Path) -> Result<ExitCode, Error> {
    let mut ended_children = SigSet::empty();
    ended_children.add(Signal::SIGCHLD);
    ended_children
        .thread_block()
        .map_err(during("block a signal"))?;
    sethostname(host.as_str()).map_err(permission("set the host name"))?;
    enter_root(&directory.join(host.as_str()))?;
    println!("ready");
    thread::spawn(|| {
        // Nothing is ever sent.
        let _ = io::stdin().read(&mut [0]);
        std::process::exit(0);
    });
    // Orphans of the host are children of this process.
    loop {
        let _ = ended_children.wait();
        while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            if status == WaitStatus::StillAlive {
                break;
            }
        }
    }
}

/// Makes a root directory from those of the machine and the host's own, and enters it.
fn enter_root(own: &Path) -> Result<(), Error> {
    let root = own.join("root");
    tmpfs(&root, "mode=755")?;
    // A mount of the machine's directory that contains this one does not show it a second time.
    mount(NONE, &root, NONE, MsFlags::MS_UNBINDABLE, NONE).map_err(permission("mount"))?;
    let entries = fs::read_dir("/").map_err(during("read /"))?;
    for entry in entries.flatten() {
        let (from, to) = (entry.path(), root.join(entry.file_name()));
        if OWN.iter().any(|name| to.ends_with(name)) {
            continue;
        }
        let kind = entry.file_type().map_err(during("read /"))?;
        if kind.is_symlink() {
            fs::read_link(&from)
                .and_then(|target| symlink(target, &to))
                .map_err(during("create a symbolic link"))?;
        } else if kind.is_dir() {
            make_directory(&to)?;
            bind(&from, &to)?;
        }
    }
    for name in OWN {
        make_directory(&root.join(name))?;
    }
    tmpfs(&root.join("run"), "mode=755")?;
    make_directory(&root.join("run/sshd"))?;
    bind(&own.join("data"), &root.join("data"))?;
    make_directory(&root.join("host/home"))?;
    bind(&own.join("home"), &root.join("host/home"))?;
    bind(&own.join("log"), &root.join("var/log"))?;
    for name in OWN_SETTINGS {
        let place = root.join("etc").join(name);
        if place.exists() {
            bind(&own.join("etc").join(name), &place)?;
        }
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), &root.join("proc"), Some("proc"), flags, NONE)
        .map_err(permission("mount /proc"))?;
    chroot(&root).map_err(permission("change the root directory"))?;
    chdir("/data").map_err(during("enter /data"))
}

fn make_directory(path: &Path) -> Result<(), Error> {
    fs::create_dir(path).map_err(during(format!("create {}", path.display())))
}

fn bind(from: &Path, to: &Path) -> Result<(), Error> {
    let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
    mount(Some(from), to, NONE, flags, NONE)
        .map_err(permission(&format!("mount {}", from.display())))
}

fn tmpfs(place: &Path, options: &str) -> Result<(), Error> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("tmpfs"), place, Some("tmpfs"), flags, Some(options))
        .map_err(permission(&format!("mount {}", place.display())))
}
