//! Command-line options of ssh.

use std::path::Path;

use crate::settings::Ssh;

/// Part of an ssh process in a shared connection.
#[derive(Debug, Clone, Copy)]
pub(super) enum Sharing<'a> {
    /// The process holds the connection, and lets others use it through this control socket.
    Master(&'a Path),
    /// The process uses the connection behind this control socket. Without such a connection it logs in itself.
    Client(&'a Path),
}

/// Arguments between the program and the host, without the login.
///
/// Each is one word without blanks, since bbcp splits its start command at blanks. For an option given twice, ssh uses
/// the first value. The order is therefore: options that must not be changed, the operator's options, defaults that the
/// operator may change.
pub(super) fn options(ssh: &Ssh, sharing: Sharing<'_>) -> Vec<String> {
    let (is_master, socket) = match sharing {
        Sharing::Master(socket) => ("yes", socket),
        Sharing::Client(socket) => ("no", socket),
    };
    let mut words = vec![
        "-x".to_owned(),
        "-a".to_owned(),
        // Never ask for a password: the worker has no terminal.
        "-oBatchMode=yes".to_owned(),
        format!("-oControlMaster={is_master}"),
        format!("-oControlPath={}", socket.display()),
        // The connection must end with its process.
        "-oControlPersist=no".to_owned(),
    ];
    words.extend(ssh.options.iter().map(|option| format!("-o{option}")));
    let connect_timeout = ssh.connect_timeout.as_secs().max(1);
    words.extend([
        format!("-oConnectTimeout={connect_timeout}"),
        // Detects a host that became unreachable after a minute.
        "-oServerAliveInterval=15".to_owned(),
        "-oServerAliveCountMax=4".to_owned(),
        format!("-oPort={}", ssh.port),
    ]);
    if !ssh.identity_file.is_empty() {
        words.push(format!("-oIdentityFile={}", ssh.identity_file));
        words.push("-oIdentitiesOnly=yes".to_owned());
    }
    if !ssh.known_hosts_file.is_empty() {
        words.push(format!("-oUserKnownHostsFile={}", ssh.known_hosts_file));
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_of_the_options() -> Result<(), Box<dyn std::error::Error>> {
        let mut ssh = crate::settings::load(None, [])?
            .link("ccat", "cologne")?
            .ssh;
        ssh.port = 2222;
        ssh.identity_file = "/k/id".into();
        ssh.known_hosts_file = "/k/known".into();
        ssh.options = vec!["ServerAliveInterval=5".into()];
        let socket = Path::new("/tmp/s");
        assert_eq!(
            options(&ssh, Sharing::Client(socket)).join(" "),
            "-x -a -oBatchMode=yes -oControlMaster=no -oControlPath=/tmp/s -oControlPersist=no \
             -oServerAliveInterval=5 -oConnectTimeout=15 -oServerAliveInterval=15 \
             -oServerAliveCountMax=4 -oPort=2222 -oIdentityFile=/k/id -oIdentitiesOnly=yes \
             -oUserKnownHostsFile=/k/known"
        );
        let master = options(&ssh, Sharing::Master(socket));
        assert!(master.contains(&"-oControlMaster=yes".to_owned()));
        Ok(())
    }
}
