//! Celery's node names.

/// The node name for `-n`: `celery@HOST` where none is given, `NAME@HOST` for a bare name; `%h` is
/// the host, `%n` its first label, `%d` the rest.
pub(super) fn node_name(given: Option<&str>, host: &str) -> String {
    let (label, domain) = host.split_once('.').unwrap_or((host, ""));
    let name = given
        .unwrap_or("celery")
        .replace("%h", host)
        .replace("%n", label)
        .replace("%d", domain)
        .replace("%%", "%");
    if name.contains('@') {
        name
    } else {
        format!("{name}@{host}")
    }
}

/// This host's name.
pub(super) fn host() -> String {
    nix::unistd::gethostname().map_or_else(
        |_| "unknown".to_owned(),
        |name| name.to_string_lossy().into_owned(),
    )
}

#[cfg(test)]
mod tests {
    use super::node_name;
    use rstest::rstest;

    #[rstest]
    #[case(None, "celery@a.b.c")]
    #[case(Some("w1"), "w1@a.b.c")]
    #[case(Some("w1@%h"), "w1@a.b.c")]
    #[case(Some("%n@%d"), "a@b.c")]
    fn names(#[case] given: Option<&str>, #[case] expected: &str) {
        assert_eq!(node_name(given, "a.b.c"), expected);
    }
}
