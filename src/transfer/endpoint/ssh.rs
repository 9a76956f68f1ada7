//! Command-line options of ssh.

use crate::settings::Ssh;

/// Arguments between the program and the host, without the login.
///
/// Each is one word without blanks, since bbcp splits its start command at blanks. For an option given twice, ssh uses
/// the first value. The order is therefore: options that must not be changed, the operator's options, defaults that the
/// operator may change.
pub(in crate::transfer) fn options(ssh: &Ssh) -> Vec<String> {
    let mut words = vec![
        "-x".to_owned(),
        "-a".to_owned(),
        // Never ask for a password: the worker has no terminal.
        "-oBatchMode=yes".to_owned(),
        // A shared connection would outlive the process group that the worker kills.
        "-oControlMaster=no".to_owned(),
        "-oControlPath=none".to_owned(),
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
