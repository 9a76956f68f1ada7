//! The operator and the reason of an action, which are recorded with it.

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
