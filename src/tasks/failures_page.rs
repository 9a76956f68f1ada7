//! The page `docs/failures.md`, made from the table of failures and from what the upper layers add to it. A unit test
//! and no xtask, since the table and the advice would have to be public for it.

use std::fmt::Write as _;

use super::exceptions::class_of;
use crate::advice;
use crate::transfer::failures::{FailureKind, Matcher, OutputSource, RetryRule, Scope, Wait};

/// The page.
const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/failures.md");

/// Environment variable that makes the test write the page.
const REWRITE: &str = "REWRITE_DOCS";

const INTRODUCTION: &str = "\
# What can go wrong, and what happens then

Every failure of a transfer has a code. The code is in the log (`error_code`), in the history of attempts
(`ccat-transfer transfers show ID`), and on this page. Retries happen automatically. The delays on this page are those of the
default settings.

This page is generated from the table `src/transfer/failures/table.rs`, and a test compares the two. To generate it again:
`REWRITE_DOCS=1 cargo test -p ccat-transfer --lib failures`.

## Rules for all failures

* Nothing is ever deleted or overwritten at the origin, and no file of another program at the destination. A package gets its
  final name at the destination only when its content is proven to be that of the origin.
* *Tried again*: the row is PENDING, its `retry_count` is increased by one, and the manager sends it after a delay;
  `transfers show` shows the time. The first delay is `transfer.retry_delay_first` (1 minute). Each further delay is twice as
  long, up to `transfer.retry_delay_max` (2 hours). Where an operator has to make room first, the first delay is
  `transfer.retry_delay_storage` (30 minutes). A random part of up to a fifth is subtracted from each delay.
* *Up to the limit*: `transfer.max_retries` (3). Some failures have a limit of their own.
* *Not counted*: `retry_count` is unchanged, because the transfer is not the cause.
* *Given up*: the row is FAILED with the reason, and an administrator is notified. `ccat-transfer transfers retry ID` tries the
  transfer again, and so does setting its row to PENDING.
* To try a waiting transfer at once: `ccat-transfer transfers retry ID`, or set its `retry_count` to 0, or run it by hand with
  `ccat-transfer transfers run ID`.
* A Celery caller receives the Python exception, a class of `ccat_data_transfer.exceptions`.
* The form of an output line decides whether it comes from bbcp, from ssh or from a remote shell. If bbcp itself names the cause,
  no output of a start-up file at the other end changes the result.
* *Area* is the place of the cause: `source` and `destination` are the two locations, `link` is the connection between them,
  `agent` is the worker and its host, `database` is the operations database, and `request` is the message.

";

fn consequence(kind: FailureKind) -> String {
    let wait = match kind.row().wait {
        Wait::None => "",
        Wait::Backoff => ", after a wait",
        Wait::Storage => ", after a long wait",
    };
    match kind.row().retry {
        RetryRule::Never => "Given up at once.".into(),
        RetryRule::General => format!("Tried again{wait}, up to the limit."),
        RetryRule::AtMost(1) => format!("Tried again{wait}, once."),
        RetryRule::AtMost(n) => format!("Tried again{wait}, {n} times at most."),
        RetryRule::Uncounted => format!("Tried again{wait}; not counted."),
        RetryRule::NotOurs => "The row is unchanged.".into(),
    }
}

/// Describes a matcher for a reader; `None` for an exit status, which has no text in the output.
fn describe_matcher(matcher: &Matcher) -> Option<String> {
    let before = match (matcher.source, matcher.begins.is_empty()) {
        (OutputSource::Bbcp, true) => "bbcp: … ",
        (OutputSource::Bbcp, false) => "bbcp: ",
        (OutputSource::Ssh, true) => "user@host … ",
        (OutputSource::Ssh, false) => "",
        (OutputSource::Shell, true) => "(the shell's name): (bbcp) … ",
        (OutputSource::Shell, false) => "(the shell's name): … (bbcp) … ",
        (OutputSource::ExitStatus, _) => return None,
    };
    let mut parts = vec![matcher.begins];
    parts.extend(matcher.contains.iter().map(|part| part.trim()));
    if matcher.ends_with != matcher.begins {
        parts.push(matcher.ends_with);
    }
    parts.retain(|part| !part.is_empty());
    let mut shown = parts
        .iter()
        .map(|part| part.trim_end())
        .collect::<Vec<_>>()
        .join(" … ");
    if matcher.names_origin {
        shown.push_str(" … (the package)");
    }
    Some(format!("`{before}{shown}`"))
}

fn page() -> String {
    let mut page = INTRODUCTION.to_owned();
    page.push_str("## The failures\n");
    for kind in FailureKind::ALL {
        let row = kind.row();
        let scope = row.scope.map_or("the end in question", Scope::as_str);
        let (code, description) = (row.code, row.description);
        let (class, remedy) = (class_of(*kind), advice::remedy(*kind));
        write!(
            page,
            "\n### `{code}`\n\n{description}\n\n* Then: {}\n* Area: {scope}\n\
             * Python exception: `{class}`\n* What to do: {remedy}\n",
            consequence(*kind)
        )
        .unwrap();
        let matchers = kind.patterns().iter().flat_map(|pattern| pattern.matchers);
        let texts: Vec<String> = matchers.filter_map(describe_matcher).collect();
        if !texts.is_empty() {
            writeln!(page, "* Known by: {}", texts.join(", ")).unwrap();
        }
    }
    page
}

#[test]
fn agrees_with_the_table() {
    let page = page();
    if std::env::var_os(REWRITE).is_some() {
        std::fs::write(PAGE, &page).unwrap();
    }
    let committed = std::fs::read_to_string(PAGE).unwrap_or_default();
    assert!(
        committed == page,
        "docs/failures.md does not agree with the table; check the change and rewrite it \
         with {REWRITE}=1 cargo test --lib failures"
    );
}
