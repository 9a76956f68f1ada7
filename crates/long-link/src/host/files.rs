//! Files of the hosts, below the private directory of the link.
//!
//! ```text
//! DIRECTORY/control           socket for requests
//!           fyst/data         /data of the host
//!                /home        home directory of root
//!                /log         /var/log
//!                /etc         files that replace those of the machine in /etc
//!                /root        mount point of the host's root directory; always empty for other processes
//!           koln/…
//! ```

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::HostName;
use crate::error::{Error, during};

/// Home directory of root on a host.
pub(super) const HOME: &str = "/host/home";
/// Log of the ssh server on a host.
pub(super) const SSH_LOG: &str = "/var/log/sshd.log";

/// Settings of the ssh server. All limits have their defaults, because tests measure what these do.
const SSH_SERVER_SETTINGS: &str = "\
HostKey /etc/ssh/ssh_host_ed25519_key
AuthorizedKeysFile /etc/ssh/authorized_keys
LogLevel VERBOSE
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
Subsystem sftp internal-sftp
";

/// Finds a program of this machine; those of servers may not be on `PATH`.
///
/// # Errors
/// There is none of this name.
pub(crate) fn program(name: &str) -> Result<PathBuf, Error> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|directory| directory.join(name))
        .find(|program| program.is_file())
        .ok_or_else(|| Error::Refused(format!("the program `{name}` is not installed")))
}

/// Writes the files of both hosts.
///
/// # Errors
/// A file cannot be written.
pub(crate) fn write_all(directory: &Path) -> Result<(), Error> {
    let hosts: String = HostName::ALL
        .map(|host| format!("{} {}\n", host.address(), host.as_str()))
        .concat();
    for host in HostName::ALL {
        let own = directory.join(host.as_str());
        for name in ["data", "home/.ssh", "log", "etc/ssh", "root"] {
            fs::create_dir_all(own.join(name)).map_err(during("create a directory"))?;
        }
        write(&own, "etc/hosts", &format!("127.0.0.1 localhost\n{hosts}"))?;
        write(&own, "etc/hostname", &format!("{}\n", host.as_str()))?;
        let users = fs::read_to_string("/etc/passwd").map_err(during("read /etc/passwd"))?;
        write(&own, "etc/passwd", &with_own_home(&users))?;
        // An account without a password that is not locked, for which sshd would refuse the key.
        write(&own, "etc/shadow", "root:*:19000:0:99999:7:::\n")?;
    }
    write_ssh(directory)
}

fn write(own: &Path, name: &str, text: &str) -> Result<(), Error> {
    fs::write(own.join(name), text).map_err(during(format!("write {name}")))
}

/// The user database with [`HOME`] as the home directory of root.
fn with_own_home(users: &str) -> String {
    let line = |line: &str| {
        let mut fields: Vec<_> = line.split(':').collect();
        if let ["root", _, _, _, _, home, shell] = fields.as_mut_slice() {
            (*home, *shell) = (HOME, "/bin/sh");
        }
        fields.join(":") + "\n"
    };
    users.lines().map(line).collect()
}

/// Writes keys and settings: `fyst` may log in at `koln`, and knows its key.
fn write_ssh(directory: &Path) -> Result<(), Error> {
    let [client, server] = HostName::ALL.map(|host| directory.join(host.as_str()));
    let identity = client.join("home/.ssh/id_ed25519");
    let host_key = server.join("etc/ssh/ssh_host_ed25519_key");
    let public = make_key(&identity)?;
    write(&server, "etc/ssh/authorized_keys", &public)?;
    let public = make_key(&host_key)?;
    let name = HostName::Koln.as_str();
    let address = HostName::Koln.address();
    let known = format!("{name},{address} {public}");
    write(&client, "etc/ssh/ssh_known_hosts", &known)?;
    write(&server, "etc/ssh/sshd_config", SSH_SERVER_SETTINGS)
}

/// Creates a key; returns its public part.
fn make_key(path: &Path) -> Result<String, Error> {
    let done = Command::new("ssh-keygen")
        .args(["-q", "-t", "ed25519", "-N", "", "-C", "long-link", "-f"])
        .arg(path)
        .stdin(Stdio::null())
        .status()
        .map_err(during("run ssh-keygen"))?;
    if !done.success() {
        return Err(Error::Refused(format!("ssh-keygen: {done}")));
    }
    fs::read_to_string(path.with_extension("pub")).map_err(during("read a public key"))
}

/// Creates the private directory. It must be new or empty.
///
/// # Errors
/// It cannot be created, or contains something.
pub(crate) fn make_directory(directory: &Path) -> Result<PathBuf, Error> {
    let task = || format!("create {}", directory.display());
    fs::create_dir_all(directory).map_err(during(task()))?;
    let directory = directory.canonicalize().map_err(during(task()))?;
    let mut entries = fs::read_dir(&directory).map_err(during(task()))?;
    if entries.next().is_some() {
        let path = directory.display();
        return Err(Error::Refused(format!("{path} is not empty")));
    }
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o700)).map_err(during(task()))?;
    Ok(directory)
}

/// Removes the private directory, unless something is mounted in it.
///
/// # Errors
/// It cannot be removed.
pub(crate) fn remove(directory: &Path) -> io::Result<()> {
    // The mounts of the hosts are in their own namespaces. If one were visible here, removal could reach the machine's
    // own directories.
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let is_below = |line: &str| {
        line.split(' ')
            .nth(4)
            .is_some_and(|mount_point| Path::new(mount_point).starts_with(directory))
    };
    if mounts.lines().any(is_below) {
        return Err(io::Error::other("something is mounted in it"));
    }
    for host in HostName::ALL {
        match fs::remove_dir(directory.join(host.as_str()).join("root")) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_has_another_home() {
        let users = "root:x:0:0:root:/root:/usr/bin/fish\nsshd:x:1:1::/run/sshd:/bin/false\n";
        let expected = "root:x:0:0:root:/host/home:/bin/sh\nsshd:x:1:1::/run/sshd:/bin/false\n";
        assert_eq!(with_own_home(users), expected);
    }
}
