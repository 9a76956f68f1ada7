//! The operator of an action, with the reason, which are recorded with it, and the confirmation.

use std::io::{IsTerminal as _, Write as _};

use nix::unistd::{Uid, User};

use super::CliError;
use celery_worker_cli::node::host;

/// Maximum length of `--reason`, in characters.
const REASON_CHARACTERS: usize = 500;

/// Login and host of the operator, `login@host`; under `sudo`, the login that called it.
pub(super) fn operator() -> String {
    let uid = Uid::current();
    let called = std::env::var("SUDO_USER").ok();
    let login = called
        .filter(|name| uid.is_root() && !name.is_empty() && !name.contains(char::is_control))
        .or_else(|| User::from_uid(uid).ok().flatten().map(|user| user.name))
        .unwrap_or_else(|| format!("uid {uid}"));
    format!("{login}@{}", host())
}

/// Checks that a reason fits in one line, and trims it.
pub(super) fn validated_reason(reason: &str) -> Result<String, CliError> {
    let reason = reason.trim();
    if reason.is_empty() || reason.contains(char::is_control) {
        return Err(CliError::usage("--reason: one line of text"));
    }
    if reason.chars().count() > REASON_CHARACTERS {
        return Err(CliError::usage(format!(
            "--reason: at most {REASON_CHARACTERS} characters"
        )));
    }
    Ok(reason.to_owned())
}

/// Returns true if a person can answer a question.
pub(super) fn can_ask() -> bool {
    std::io::stdin().is_terminal() && std::io::stderr().is_terminal()
}

/// Asks on the terminal. Returns true if the answer is yes.
pub(super) async fn is_confirmed(what: &str) -> Result<bool, CliError> {
    eprint!("{what}? [y/N] ");
    // A terminal that shows no question gives no answer either, which is reported.
    let _ = std::io::stderr().flush();
    let read = tokio::task::spawn_blocking(|| {
        let mut line = String::new();
        std::io::stdin().read_line(&mut line).map(|_| line)
    });
    let line = match read.await {
        Ok(Ok(line)) => line,
        Ok(Err(error)) => return Err(CliError::failed(format!("no answer: {error}"))),
        Err(error) => return Err(CliError::failed(format!("no answer: {error}"))),
    };
    Ok(matches!(line.trim(), "y" | "Y" | "yes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operator_has_a_name() {
        assert!(
            operator()
                .split_once('@')
                .is_some_and(|(login, host)| !login.is_empty() && !host.is_empty())
        );
    }

    #[test]
    fn a_reason_is_one_line() {
        assert_eq!(validated_reason(" storm ").ok().as_deref(), Some("storm"));
        for reason in ["", "  ", "a\nb", "a\u{1b}[2J", &"x".repeat(501)] {
            assert!(validated_reason(reason).is_err(), "{reason:?}");
        }
    }
}
