//! The page `docs/failures.md`, made from the table of failures and from what the upper layers add to it. A unit test
//! and no xtask, since the table and the advice would have to be public for it.

use std::fmt::Write as _;

use super::exceptions::class_of;
use crate::advice;
use crate::transfer::failures::{FailureKind, Matcher, OutputSource, RetryRule, Scope, Wait};

/// The page.
const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/failures.md");

/// Environment variable that has the page rewritten.
const REWRITE: &str = "REWRITE_DOCS";

const INTRODUCTION: &str = "\
# What can go wrong, and what happens then

Every failure has a code. It stands in the log (`error_code`), in the history of attempts
(`ccat-transfer transfers show ID`), and here. What is said about retries is what the worker does by
itself; with the default settings, the waits are the ones that are written here.

This page is made from the worker's own table, `src/transfer/failures/table.rs`, and a test compares
the two. To rewrite it: `REWRITE_DOCS=1 cargo test --lib failures`.

## What holds for all of them

* Nothing is ever deleted or overwritten at the origin, and nothing of others at the destination. A
  package has its final name at the destination only when its content is proven to be the origin's.
* *Tried again* means: the row is PENDING with one more in `retry_count`, and the manager sends it
  when its time has come; `transfers show` tells when. The first wait is `transfer.retry_delay_first`
  (1 minute), each further one is twice as long, up to `transfer.retry_delay_max` (2 hours); where
  an operator has to make room first, it begins with `transfer.retry_delay_storage` (30 minutes). Each
  is shorter by up to a fifth, by chance.
* *Up to the limit* is `transfer.max_retries` (3). Some failures have a limit of their own.
* *Not counted* means that `retry_count` stays: nothing failed that is the transfer's fault.
* *Given up* means: the row is FAILED with the reason, and an administrator is notified.
  `ccat-transfer transfers retry ID` has it tried again; so does a row that is set to PENDING.
* To have a waiting transfer tried at once: `ccat-transfer transfers retry ID`, or its `retry_count`
  set to 0; or do it yourself with `ccat-transfer transfers run ID`.
* A Celery caller gets the Python exception, of `ccat_data_transfer.exceptions`.
* A text is taken for bbcp's, ssh's or a remote shell's by its form. Where bbcp itself says what is
  wrong, nothing that a start-up file at the other end prints can say otherwise.
* *Whose matter* is the place to look: `source` and `destination` are the two locations, `link` is
  what lies between, `agent` is the worker and its host, `request` is the message.

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
        RetryRule::NotOurs => "The row is left as it is.".into(),
    }
}

/// A matcher for a reader; none for an exit status, which has no text of its own in the output.
fn shown(matcher: &Matcher) -> Option<String> {
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
    parts.extend(matcher.holds.iter().map(|part| part.trim()));
    if matcher.ends != matcher.begins {
        parts.push(matcher.ends);
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
            "\n### `{code}`\n\n{description}\n\n* Then: {}\n* Whose matter: {scope}\n\
             * Python exception: `{class}`\n* What to do: {remedy}\n",
            consequence(*kind)
        )
        .unwrap();
        let matchers = kind.patterns().iter().flat_map(|pattern| pattern.matchers);
        let texts: Vec<String> = matchers.filter_map(shown).collect();
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
