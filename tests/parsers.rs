//! Parsers of what other programs and people write: with examples of what bbcp, ssh and people write, with hostile
//! ones (`tests/corpus`), and with damaged forms of both. No parser panics, none takes more than a time in proportion
//! to the size of its input, and what is written is read as it was.
//!
//! Private parsers have a test of this kind beside them, with the same corpus: the remote shell's answers and the pid
//! file. Messages and URLs have theirs in `crates/celery-protocol` and `crates/service-connection`, AMQP frames in
//! `crates/celery-worker/src/broker/amqp/screen`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests"
)]

use std::io::Write as _;

use ccat_transfer::settings;
use ccat_transfer::transfer::copying::bbcp::outcome::{CopyPaths, Exit, FailureClassifier};
use ccat_transfer::transfer::copying::bbcp::output::{Event, parse};
use ccat_transfer::transfer::endpoint::{AbsolutePath, Host, TemporaryName, is_login};
use ccat_transfer::transfer::failures::Role;
use ccat_transfer::transfer::lines::Lines;
use ccat_transfer::transfer::link::Window;
use ccat_transfer::transfer::repository::Place;
use ccat_transfer::transfer::topology::{LocationName, Topology};
use celery_worker::worker::RateLimit;
use celery_worker_cli::traces::propagation;
use hostile_inputs::endures;
use serde_json::{Value, json};
use tracing::Span;

#[test]
fn output_of_bbcp() {
    let paths = CopyPaths {
        source: "/d/package.tar".into(),
        target: "/e/.t.part".into(),
        program: "/opt/bbcp".into(),
        remote: Some((Role::Destination, "h".into())),
        listener: Role::Destination,
    };
    endures("bbcp", 2, |bytes| {
        let mut lines = Lines::default();
        let mut classifier = FailureClassifier::new(paths.clone());
        let mut read = |line: &[u8]| match parse(line) {
            Event::Other(text) => {
                assert!(text.len() <= 3 * (8 << 10), "{} bytes", text.len());
                classifier.observe(&text);
            }
            Event::Progress { rate, average, .. } => {
                assert!([rate, average].into_iter().flatten().all(f64::is_finite));
            }
            _ => {}
        };
        for chunk in bytes.chunks(100) {
            lines.push(chunk, &mut read);
        }
        lines.finish(&mut read);
        let kept = format!("{classifier:?}").len();
        assert!(kept <= 20 * 4 * 510, "{kept} bytes are kept");
        let error = classifier.conclude(Exit::Code(7)).expect_err("no success");
        assert!(error.to_string().len() < 5000);
    });
}

#[test]
fn small_values() {
    endures("small", 1, |bytes| {
        let text = String::from_utf8_lossy(bytes);
        for line in text.lines().take(20).chain([&*text]) {
            if let Some(name) = TemporaryName::of_entry(line) {
                let entries = [name.to_string(), name.checkpoints()];
                assert!(entries.iter().any(|entry| entry == line), "{line}");
            }
            if let Ok(host) = Host::new(line) {
                assert_eq!(
                    Host::new(&host.as_bbcp()).map(|h| h.to_string()),
                    Ok(host.to_string())
                );
                assert!(!host.as_ssh().starts_with('-'));
            }
            if let Ok(path) = AbsolutePath::new(line) {
                assert_eq!(AbsolutePath::new(path.as_str()), Ok(path.clone()));
                assert!(!path.as_str().contains("/../"));
            }
            assert!(!is_login(line) || !line.starts_with('-'));
            if let Ok(place) = line.parse::<Place>() {
                assert_eq!(place.to_string().parse(), Ok(place));
            }
            if let Ok(name) = line.parse::<LocationName>() {
                assert_eq!(name.to_string(), line);
            }
            let _ = line.parse::<Window>();
            let _ = line.parse::<RateLimit>();
            let headers = ["traceparent", "tracestate"].map(|name| (name.to_owned(), json!(line)));
            let _ = propagation().extract(&Span::none(), &headers.into_iter().collect());
        }
    });
}

/// The headers of the messages that are read in `crates/celery-protocol`.
#[test]
fn trace_headers() {
    endures(
        "../../crates/celery-protocol/tests/corpus/messages",
        4,
        |bytes| {
            let line = bytes
                .split(|byte| *byte == b'\n')
                .next()
                .unwrap_or_default();
            let Ok(line) = serde_json::from_slice::<Value>(line) else {
                return;
            };
            let headers = line["headers"].as_object().cloned().unwrap_or_default();
            let _ = propagation().extract(&Span::none(), &headers);
        },
    );
}

/// The file of settings, the addresses in the environment, and the file of a topology.
#[test]
fn settings_files() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("settings.toml");
    endures("settings", 40, |bytes| {
        std::fs::File::create(&path)
            .unwrap()
            .write_all(bytes)
            .unwrap();
        let text = String::from_utf8_lossy(bytes);
        let line = text.lines().next().unwrap_or_default();
        let variables = [
            "CCAT_DATA_TRANSFER_BROKER_URL",
            "CCAT_DATA_TRANSFER_RESULT_BACKEND",
        ];
        let environment = variables.map(|name| (name.to_owned(), line.to_owned()));
        if let Err(error) = settings::load(Some(&path), environment) {
            assert!(error.to_string().len() < 10_000 + 1000 * bytes.len());
        }
        let _ = text.parse::<Topology>();
    });
}
