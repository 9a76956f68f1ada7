//! Cost of a message without sockets and disks: parsing a task, writing its result and its events, and the digest of a
//! package.
//!
//! ```sh
//! cargo bench --bench wire
//! ```
#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    missing_docs,
    reason = "a failure ends the bench; criterion's macros write no comments"
)]

use std::hint::black_box;
use std::io::Cursor;

use ccat_transfer::settings::DigestAlgorithm;
use ccat_transfer::transfer::digest;
use celery_protocol::content::Accept;
use celery_protocol::event::{Event, Stamp};
use celery_protocol::message::{self, TaskMessage};
use celery_protocol::result::{ResultMeta, State};
use celery_protocol::{Properties, RawMessage};
use chrono::Utc;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use serde_json::json;

/// `tasks.add(2, 2)` as Celery 5.7 sends it.
fn task() -> RawMessage {
    let id = "91ee9000-6f0c-4f4e-9d0c-6a3f4b8a8a11";
    let headers = json!({
        "lang": "py", "task": "tasks.add", "id": id, "shadow": null, "eta": null, "expires": null,
        "group": null, "group_index": null, "retries": 0, "timelimit": [null, null], "root_id": id,
        "parent_id": null, "argsrepr": "(2, 2)", "kwargsrepr": "{}", "origin": "gen4711@station",
        "ignore_result": false, "replaced_task_nesting": 0, "stamped_headers": null, "stamps": {},
    });
    RawMessage {
        headers: serde_json::from_value(headers).unwrap_or_default(),
        properties: Properties {
            content_type: Some("application/json".into()),
            content_encoding: Some("utf-8".into()),
            correlation_id: Some(id.into()),
            reply_to: Some("5e0c1ad4-6d51-3b6c-8f0a-d4e7f6c5b4a3".into()),
            priority: Some(0),
            persistent: true,
            ..Properties::default()
        },
        body:
            br#"[[2, 2], {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]"#
                .to_vec(),
    }
}

fn read(raw: &RawMessage) -> TaskMessage {
    message::decode(raw, &Accept::json(4 << 20)).expect("a task")
}

fn messages(c: &mut Criterion) {
    let raw = task();
    let mut group = c.benchmark_group("message");
    group.bench_function("a task is read", |b| b.iter(|| read(black_box(&raw))));
    let message = read(&raw);
    group.bench_function("its result is written", |b| {
        b.iter_batched(
            || State::Success(json!(4)),
            |state| {
                ResultMeta::new(&message, state, Utc::now())
                    .to_json()
                    .to_string()
            },
            BatchSize::SmallInput,
        );
    });
    group.bench_function("its three events are written", |b| {
        let stamp = Stamp {
            hostname: "celery@station",
            pid: 4711,
            clock: 1,
            timestamp: 1_795_493_153.75,
            utcoffset: -1.0,
        };
        let four = json!(4);
        let succeeded = Event::TaskSucceeded {
            id: &message.id,
            result: &four,
            runtime: 0.25,
        };
        let events = [
            Event::TaskReceived(&message),
            Event::TaskStarted(&message.id),
            succeeded,
        ];
        b.iter(|| {
            events
                .each_ref()
                .map(|event| serde_json::to_string(&event.stamped(stamp)))
        });
    });
    group.finish();
}

fn digests(c: &mut Criterion) {
    let package: Vec<u8> = (0..16_u32 << 20).map(|at| (at % 251) as u8).collect();
    let mut group = c.benchmark_group("digest of 16 MiB");
    group
        .throughput(Throughput::Bytes(package.len() as u64))
        .sample_size(20);
    for (name, algorithm) in [
        ("sha256", DigestAlgorithm::Sha256),
        ("blake3", DigestAlgorithm::Blake3),
        ("xxh3", DigestAlgorithm::Xxh3),
        ("md5", DigestAlgorithm::Md5),
    ] {
        group.bench_function(name, |b| {
            b.iter(|| digest::of(algorithm, None, Cursor::new(&package), |_| true));
        });
    }
    group.finish();
}

criterion_group!(benches, messages, digests);
criterion_main!(benches);
