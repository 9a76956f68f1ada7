//! Counting the parts of chords in a real Redis: duplicates, claims, workers that die.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod support;

use std::sync::Arc;

use celery_protocol::canvas::ResultNode;
use celery_protocol::message::TaskMessage;
use celery_protocol::result::State;
use celery_worker::results::chord::{ChordCounter, Claim, Counted};
use celery_worker::results::{ChordSupport, Redis, ResultBackend as _, ResultOptions};
use redis::AsyncCommands;
use redis::aio::MultiplexedConnection;
use serde_json::{Value, json};
use support::{service, unique, until};

/// Chords of 60 seconds, results of 120.
fn ordered() -> ResultOptions {
    let mut options = ResultOptions::new("");
    options.expires.results = 120;
    options.expires.chords = Some(60);
    options.redis.key_prefix = "prefix".into();
    options
}

/// Redis does not take shorter ones, so tests that wait for one take this long.
const CLAIM_SECONDS: u64 = 5;

/// A chord of some size, and the keys of its group.
struct Bench {
    redis: MultiplexedConnection,
    chords: Arc<dyn ChordCounter>,
    group_id: String,
}

impl Bench {
    async fn new(size: usize, options: ResultOptions) -> Option<Self> {
        let url = service("TEST_REDIS_URL")?;
        let client = redis::Client::open(url.as_str()).unwrap();
        let redis = client.get_multiplexed_async_connection().await.unwrap();
        let ChordSupport::Counted(chords) = Redis::new(&url, &options).unwrap().chords() else {
            panic!("Redis counts");
        };
        let group_id = unique("group");
        chords.begin(&group_id, size, &[]).await.unwrap();
        Some(Self {
            redis,
            chords,
            group_id,
        })
    }

    fn part(&self, index: i64) -> TaskMessage {
        TaskMessage {
            id: format!("task-{index}"),
            group: Some(self.group_id.clone()),
            group_index: Some(index),
            ..TaskMessage::default()
        }
    }

    async fn count(&self, index: i64, returned: Value) -> Counted {
        let (part, state) = (self.part(index), State::Success(returned));
        let counted = self.chords.count(&part, &state, CLAIM_SECONDS).await;
        counted.unwrap()
    }

    async fn last(&self, index: i64, returned: Value) -> Claim {
        match self.count(index, returned).await {
            Counted::Last(claim) => claim,
            other => panic!("{other:?}"),
        }
    }

    async fn results(&self, claim: &Claim) -> Vec<Value> {
        let parts = self.chords.parts(claim).await.unwrap();
        parts.into_iter().map(|part| part.result).collect()
    }

    fn key(&self, suffix: &str) -> String {
        format!("prefix_celery-taskset-meta-{}{suffix}", self.group_id)
    }

    async fn exists(&self, suffix: &str) -> bool {
        let mut redis = self.redis.clone();
        redis.exists(self.key(suffix)).await.unwrap()
    }
}

#[tokio::test]
async fn parts_count_once_and_come_in_order() {
    let Some(bench) = Bench::new(3, ordered()).await else {
        return;
    };
    assert_eq!(bench.count(2, json!("c")).await, Counted::NotLast);
    assert_eq!(bench.count(0, json!("a")).await, Counted::NotLast);
    // A second run, even with another outcome.
    assert_eq!(bench.count(0, json!("other")).await, Counted::NotLast);
    let claim = bench.last(1, json!("b")).await;
    assert_eq!(
        bench.results(&claim).await,
        [json!("a"), json!("b"), json!("c")]
    );

    let mut redis = bench.redis.clone();
    let (parts, claimed): (i64, i64) = (
        redis.ttl(bench.key(".j")).await.unwrap(),
        redis.ttl(bench.key(".c")).await.unwrap(),
    );
    assert!(
        (50..=60).contains(&parts) && (1..=5).contains(&claimed),
        "{parts} {claimed}"
    );

    assert!(bench.chords.finish(&claim, CLAIM_SECONDS).await.unwrap());
    for suffix in [".j", ".t", ".s", ".d"] {
        assert!(!bench.exists(suffix).await, "{suffix}");
    }
    let mark: String = redis.get(bench.key(".c")).await.unwrap();
    assert_eq!(mark, "done");
    // Late duplicates change nothing.
    assert_eq!(bench.count(1, json!("b")).await, Counted::NotLast);
    assert!(!bench.exists(".j").await);
}

#[tokio::test]
async fn extended_chord_waits_once_for_each_task_that_was_added() {
    let Some(bench) = Bench::new(1, ordered()).await else {
        return;
    };
    let grow = async |task_id: &str| bench.chords.grow(&bench.group_id, task_id).await.unwrap();
    grow("task-1").await;
    // The message of the task that adds it was delivered again.
    grow("task-1").await;
    grow("task-2").await;
    let mut redis = bench.redis.clone();
    let change: i64 = redis.get(bench.key(".t")).await.unwrap();
    assert_eq!(change, 2, "as Python counts");
    assert_eq!(bench.count(0, json!("a")).await, Counted::NotLast);
    assert_eq!(bench.count(1, json!("b")).await, Counted::NotLast);
    let claim = bench.last(2, json!("c")).await;
    assert_eq!(bench.results(&claim).await.len(), 3);
    assert!(bench.chords.finish(&claim, CLAIM_SECONDS).await.unwrap());
    assert!(!bench.exists(".a").await && !bench.exists(".t").await);
}

#[tokio::test]
async fn unordered_parts_are_in_order_of_arrival() {
    let mut options = ordered();
    options.expires.chords = Some(0);
    options.redis.chord_ordered = false;
    let Some(bench) = Bench::new(3, options).await else {
        return;
    };
    assert_eq!(bench.count(2, json!(1)).await, Counted::NotLast);
    // The same value twice is two results.
    assert_eq!(bench.count(1, json!(1)).await, Counted::NotLast);
    assert_eq!(bench.count(1, json!(1)).await, Counted::NotLast);
    let claim = bench.last(0, json!(0)).await;
    assert_eq!(bench.results(&claim).await, [json!(1), json!(1), json!(0)]);
    let ttl: i64 = bench.redis.clone().ttl(bench.key(".j")).await.unwrap();
    assert_eq!(ttl, -1, "for ever");
}

#[tokio::test]
async fn claim_of_a_dead_worker_is_taken_over() {
    let Some(bench) = Bench::new(1, ordered()).await else {
        return;
    };
    let lost = bench.last(0, json!(0)).await;
    // The message comes again while the claim holds, and after it.
    assert_eq!(bench.count(0, json!(0)).await, Counted::Held);
    let mut second = None;
    until("the claim ends", async || {
        match bench.count(0, json!(0)).await {
            Counted::Last(claim) => second = Some(claim),
            other => assert_eq!(other, Counted::Held),
        }
        second.is_some()
    })
    .await;
    let second = second.unwrap();
    // The first one, if it lives after all, has nothing to say any more.
    assert!(!bench.chords.keep(&lost, 60).await.unwrap());
    assert!(!bench.chords.finish(&lost, CLAIM_SECONDS).await.unwrap());
    assert!(bench.chords.keep(&second, 60).await.unwrap());
    assert!(bench.chords.finish(&second, CLAIM_SECONDS).await.unwrap());
}

#[tokio::test]
async fn expired_claim_is_taken_again() {
    let Some(bench) = Bench::new(1, ordered()).await else {
        return;
    };
    let claim = bench.last(0, json!(0)).await;
    let mut redis = bench.redis.clone();
    let _: () = redis.del(bench.key(".c")).await.unwrap();
    assert!(bench.chords.keep(&claim, 60).await.unwrap());
    // But not of a chord that is over.
    bench.chords.fail(&claim).await.unwrap();
    let _: () = redis.del(bench.key(".c")).await.unwrap();
    assert!(!bench.chords.keep(&claim, 60).await.unwrap());
    assert_eq!(bench.count(0, json!(0)).await, Counted::NotLast);
}

#[tokio::test]
async fn exactly_one_part_is_the_last() {
    const PARTS: i64 = 200;
    let Some(bench) = Bench::new(PARTS as usize, ordered()).await else {
        return;
    };
    let counted = (0..PARTS).map(|index| bench.count(index, json!(index)));
    let counted = futures_util::future::join_all(counted).await;
    let last = counted.iter().filter(|one| matches!(one, Counted::Last(_)));
    assert_eq!(last.count(), 1);
}

#[tokio::test]
async fn nested_groups_are_recorded() {
    let Some(bench) = Bench::new(2, ordered()).await else {
        return;
    };
    let inner = json!([["inner", null], [[["a", null], null], [["b", null], null]]]);
    let inner = ResultNode::parse(&inner).unwrap();
    bench
        .chords
        .begin(&bench.group_id, 2, &[inner])
        .await
        .unwrap();
    assert_eq!(bench.count(0, json!(0)).await, Counted::NotLast);
    let claim = bench.last(1, json!(1)).await;
    let saved = bench.chords.saved(&claim).await.unwrap().unwrap();
    assert_eq!(saved.id, bench.group_id);
    assert_eq!(saved.task_ids(), ["a", "b"]);
    let ttl: i64 = bench.redis.clone().ttl(bench.key("")).await.unwrap();
    assert!((100..=120).contains(&ttl), "as long as the results: {ttl}");
    let _: () = bench.redis.clone().del(bench.key("")).await.unwrap();
    assert_eq!(bench.chords.saved(&claim).await.unwrap(), None);
    // A part that is in no group is in no chord.
    let stray = TaskMessage::default();
    let counted = bench
        .chords
        .count(&stray, &State::Success(Value::Null), 5)
        .await;
    assert_eq!(counted.unwrap(), Counted::NotLast);
}
