//! The options that ssh is started with.

use crate::settings::Ssh;

/// Words that stand between the program and the host, without the login.
///
/// Each is one word without blanks, since bbcp splits its start command at blanks. ssh takes the
/// first value it meets for an option: ours that must hold come first, then the operator's, then
/// defaults that the operator may have changed.
pub(in crate::transfer) fn options(ssh: &Ssh) -> Vec<String> {
    let mut words = vec![
        "-x".to_owned(),
        "-a".to_owned(),
        // Never ask: nobody is there to answer.
        "-oBatchMode=yes".to_owned(),
        // A shared connection would outlive the process group that we kill.
        "-oControlMaster=no".to_owned(),
        "-oControlPath=none".to_owned(),
    ];
    words.extend(ssh.options.iter().map(|option| format!("-o{option}")));
    let connect_timeout = ssh.connect_timeout.as_secs().max(1);
    words.extend([
        format!("-oConnectTimeout={connect_timeout}"),
        // A host that vanished without a word is noticed after a minute.
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
