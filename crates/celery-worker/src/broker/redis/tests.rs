//! The scripts against a real Redis, compared with a model.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::collections::{BTreeMap, VecDeque};

use proptest::prelude::*;
use redis::aio::MultiplexedConnection;
use redis::cmd;
use tokio::runtime::Runtime;
use uuid::Uuid;

use super::scripts::{ClaimFrom, Claimed, End};
use super::*;
use celery_protocol::virtual_message::{self, BodyEncoding};
use celery_protocol::{Properties, RawMessage};

#[path = "../../../tests/support/service.rs"]
#[allow(unreachable_pub, reason = "shared with the integration tests")]
mod service;

const QUEUES: [&str; 2] = ["one", "two"];

/// Size of a large body, which is not sent to a worker.
const LARGE: usize = 20_000;

const LIMITS: MessageLimits = MessageLimits {
    max_body: 1000,
    max_waiting_body: 100,
};

/// A step of one of several programs that use the same database.
#[derive(Debug, Clone)]
enum Step {
    Publish {
        queue: usize,
        priority: u8,
        is_repeated: bool,
        is_large: bool,
    },
    PushGarbage {
        queue: usize,
    },
    Claim {
        first: usize,
        rooms: [usize; 2],
        most: usize,
        in_turns: bool,
    },
    Remove(prop::sample::Index),
    Return(prop::sample::Index, bool),
    Renew(prop::sample::Index),
    Sweep,
}

fn step() -> impl Strategy<Value = Step> {
    let index = any::<prop::sample::Index>;
    prop_oneof![
        4 => (0..2_usize, 0..10_u8, any::<bool>(), any::<bool>()).prop_map(
            |(queue, priority, is_repeated, is_large)| Step::Publish { queue, priority, is_repeated, is_large }
        ),
        1 => (0..2_usize).prop_map(|queue| Step::PushGarbage { queue }),
        4 => (0..2_usize, [0..3_usize, 0..3_usize], 1..5_usize, any::<bool>())
            .prop_map(|(first, rooms, most, in_turns)| Step::Claim { first, rooms, most, in_turns }),
        2 => index().prop_map(Step::Remove),
        2 => (index(), any::<bool>()).prop_map(|(which, next)| Step::Return(which, next)),
        1 => index().prop_map(Step::Renew),
        1 => Just(Step::Sweep),
    ]
}

/// Places of all messages; an element is the message's number, or none for garbage.
#[derive(Debug, Default, PartialEq, Eq)]
struct Model {
    /// By class and queue; the last element is the next one.
    lists: BTreeMap<(u8, usize), VecDeque<Option<usize>>>,
    /// Fields, queues and numbers; the latest claim is the last one.
    held: Vec<(String, usize, usize)>,
    parked: [usize; 2],
}

impl Model {
    fn list(&mut self, queue: usize, priority: u8) -> &mut VecDeque<Option<usize>> {
        self.lists.entry((priority / 3 * 3, queue)).or_default()
    }

    /// The claimed queues and numbers, in order.
    fn claim(
        &mut self,
        order: [usize; 2],
        mut rooms: [usize; 2],
        most: usize,
        in_turns: bool,
        fields: &[String],
    ) -> Vec<(usize, usize)> {
        let mut taken = Vec::new();
        for class in [0, 3, 6, 9] {
            loop {
                let before = taken.len();
                for queue in order {
                    while rooms[queue] > 0 && taken.len() < most {
                        let Some(next) = self.list(queue, class).pop_back() else {
                            break;
                        };
                        let Some(number) = next else {
                            self.parked[queue] += 1;
                            continue;
                        };
                        self.held.push((fields[taken.len()].clone(), queue, number));
                        taken.push((queue, number));
                        rooms[queue] -= 1;
                        if in_turns {
                            break;
                        }
                    }
                }
                if taken.len() == before {
                    break;
                }
            }
        }
        taken
    }
}

/// The programs, which share a prefix of keys.
struct Programs {
    connection: MultiplexedConnection,
    names: Names,
    maintenance: Maintenance,
    /// Priorities by number.
    published: Vec<u8>,
    model: Model,
    /// Every field that was ever used for a claim.
    fields: Vec<String>,
}

impl Programs {
    async fn new(url: &str) -> Self {
        let mut options = RedisBrokerOptions::new(url, "model");
        options.transport.global_keyprefix = format!("model-{}:", Uuid::new_v4());
        // Everything that is not renewed at this moment has expired.
        options.transport.visibility_timeout = 0;
        let connector = Arc::new(RedisConnector::new(&options).unwrap());
        let names = || Names::new(&options.transport, connector.db());
        let maintenance = Maintenance {
            commands: Arc::new(Commands::new(connector.clone())),
            names: Arc::new(names()),
            held: Held::new().0,
            options: options.transport.clone(),
        };
        Self {
            connection: connector.connect().await.unwrap().connection,
            names: names(),
            maintenance,
            published: Vec::new(),
            model: Model::default(),
            fields: Vec::new(),
        }
    }

    async fn take(&mut self, step: &Step) {
        match step {
            Step::Publish {
                queue,
                priority,
                is_repeated,
                is_large,
            } => {
                self.publish(*queue, *priority, *is_repeated, *is_large)
                    .await;
            }
            Step::PushGarbage { queue } => {
                let list = self.names.list(QUEUES[*queue], 0);
                let _: () = self
                    .connection
                    .lpush(list, "{\"properties\": 1}")
                    .await
                    .unwrap();
                self.model.list(*queue, 0).push_front(None);
            }
            Step::Claim {
                first,
                rooms,
                most,
                in_turns,
            } => {
                self.claim(*first, *rooms, *most, *in_turns).await;
            }
            Step::Remove(which) => {
                let Some(field) = self.field(which) else {
                    return;
                };
                let removed = scripts::remove(
                    &mut self.connection,
                    &self.names,
                    std::slice::from_ref(&field),
                );
                let removed = removed.await.unwrap() == [1];
                let held = &mut self.model.held;
                let is_held = held.iter().any(|(known, ..)| *known == field);
                held.retain(|(known, ..)| *known != field);
                assert_eq!(removed, is_held);
            }
            Step::Return(which, is_next) => {
                let Some(field) = self.field(which) else {
                    return;
                };
                self.give_back(&field, *is_next).await;
            }
            Step::Renew(which) => {
                let Some(field) = self.field(which) else {
                    return;
                };
                let gone = scripts::renew(
                    &mut self.connection,
                    &self.names,
                    std::slice::from_ref(&field),
                );
                let gone = gone.await.unwrap();
                let held = &mut self.model.held;
                match held.iter().position(|(known, ..)| *known == field) {
                    Some(position) => {
                        let entry = held.remove(position);
                        held.push(entry);
                        assert!(gone.is_empty());
                    }
                    None => assert_eq!(gone, [field]),
                }
            }
            Step::Sweep => {
                self.maintenance.sweep().await;
                while let Some((_, queue, number)) = self.model.held.pop() {
                    let priority = self.published[number];
                    self.model.list(queue, priority).push_back(Some(number));
                }
            }
        }
    }

    fn field(&self, which: &prop::sample::Index) -> Option<String> {
        match self.fields.is_empty() {
            true => None,
            false => Some(which.get(&self.fields).clone()),
        }
    }

    async fn publish(&mut self, queue: usize, priority: u8, is_repeated: bool, is_large: bool) {
        let number = self.published.len();
        let width = if is_large { LARGE } else { 0 };
        self.published.push(priority);
        let message = RawMessage {
            headers: [("number".to_owned(), number.into())].into_iter().collect(),
            body: format!("{number:width$}").into_bytes(),
            properties: Properties {
                priority: Some(priority),
                ..Properties::default()
            },
        };
        let outgoing = scripts::PublishRequest {
            id: Uuid::new_v4().to_string(),
            text: virtual_message::encode(&message, ("", QUEUES[queue]), BodyEncoding::Base64),
            lists: vec![self.names.list(QUEUES[queue], priority)],
            expires_ms: 0,
            channel: None,
        };
        for _ in 0..=usize::from(is_repeated) {
            scripts::publish(&mut self.connection, &self.names, &outgoing)
                .await
                .unwrap();
        }
        self.model.list(queue, priority).push_front(Some(number));
    }

    async fn claim(&mut self, first: usize, rooms: [usize; 2], most: usize, in_turns: bool) {
        let order = [first, 1 - first];
        let from: Vec<ClaimFrom> = order
            .map(|queue| ClaimFrom {
                queue: QUEUES[queue].into(),
                room: rooms[queue],
                is_recorded: true,
            })
            .into();
        let fields: Vec<String> = (0..most).map(|_| Uuid::new_v4().to_string()).collect();
        let claimed = scripts::claim(
            &mut self.connection,
            &self.names,
            &from,
            in_turns,
            LIMITS,
            &fields,
        );
        let Claimed { messages, .. } = claimed.await.unwrap();
        for (one, field) in messages.iter().zip(&fields) {
            let connection = &mut self.connection;
            let queue = QUEUES[order[one.queue]];
            let whole = scripts::text(connection, &self.names, field, queue).await;
            let whole = whole.unwrap().unwrap();
            let read = |text: &[u8]| virtual_message::decode(text, usize::MAX).unwrap();
            let (mut whole, shown) = (read(&whole), read(&one.text));
            if let Some(size) = one.omitted {
                assert_eq!((size, whole.message.body.len()), (LARGE, LARGE));
                whole.message.body.clear();
            }
            assert_eq!(shown, whole);
        }
        let claimed: Vec<_> = messages
            .iter()
            .map(|one| (order[one.queue], number_of(&one.text)))
            .collect();
        let expected = self.model.claim(order, rooms, most, in_turns, &fields);
        assert_eq!(claimed, expected);
        self.fields.extend(fields);
    }

    async fn give_back(&mut self, field: &str, is_next: bool) {
        let outline = scripts::outline(&mut self.connection, &self.names, field)
            .await
            .unwrap();
        let position = self
            .model
            .held
            .iter()
            .position(|(known, ..)| known == field);
        let Some(position) = position else {
            assert!(outline.is_none());
            return;
        };
        let (_, queue, number) = self.model.held.remove(position);
        let (held, element) = outline.unwrap().returned().unwrap();
        assert!(held.text.len() < LARGE);
        let list = self.names.list(QUEUES[queue], held.priority);
        let end = match is_next {
            true => End::Next,
            false => End::Last,
        };
        // A second time has no effect.
        for expected in [true, false] {
            let moved = scripts::move_to(
                &mut self.connection,
                &self.names,
                field,
                (&list, end),
                &element,
            );
            assert_eq!(moved.await.unwrap(), expected);
        }
        let list = self.model.list(queue, self.published[number]);
        match is_next {
            true => list.push_back(Some(number)),
            false => list.push_front(Some(number)),
        }
    }

    /// The places of all messages as the server has them.
    async fn found(&mut self) -> Model {
        let mut found = Model::default();
        for (queue, name) in QUEUES.iter().enumerate() {
            let lists: Vec<_> = self.names.lists(name).collect();
            for (class, list) in [0, 3, 6, 9].into_iter().zip(lists) {
                let texts: Vec<Vec<u8>> = self.connection.lrange(list, 0, -1).await.unwrap();
                let numbers = texts
                    .iter()
                    .map(|text| match text.starts_with(b"{\"properties\"") {
                        true => None,
                        false => Some(number_of(text)),
                    });
                found.lists.insert((class, queue), numbers.collect());
            }
            found.parked[queue] = self.connection.llen(self.names.parked(name)).await.unwrap();
        }
        let fields: Vec<String> = self
            .connection
            .zrange(&self.names.unacked_index, 0, -1)
            .await
            .unwrap();
        for field in fields {
            let text: Vec<u8> = self
                .connection
                .hget(&self.names.unacked, &field)
                .await
                .unwrap();
            let held = virtual_message::held(&text).unwrap();
            let queue = QUEUES
                .iter()
                .position(|name| **name == held.routing_key)
                .unwrap();
            found
                .held
                .push((field, queue, number_of(held.text.as_bytes())));
        }
        let count: usize = self.connection.hlen(&self.names.unacked).await.unwrap();
        assert_eq!(count, found.held.len());
        found
    }

    async fn clean(&mut self) {
        let keys: Vec<String> = cmd("KEYS")
            .arg(format!("{}*", self.names.list("", 0)))
            .query_async(&mut self.connection)
            .await
            .unwrap();
        if !keys.is_empty() {
            let _: () = self.connection.del(keys).await.unwrap();
        }
    }
}

fn number_of(text: &[u8]) -> usize {
    let message = virtual_message::decode(text, usize::MAX).unwrap().message;
    let number = usize::try_from(message.headers["number"].as_u64().unwrap()).unwrap();
    // A body in a list or in the record is complete.
    if !message.body.is_empty() {
        let body = String::from_utf8(message.body).unwrap();
        assert_eq!(body.trim().parse(), Ok(number));
    }
    number
}

/// Claim, settlement, renewal and search for expired messages by several programs, in any order: every message is in
/// exactly one place, and in the expected one.
#[test]
fn scripts_keep_every_message_in_one_place() {
    let Some(url) = service::service("TEST_REDIS_URL") else {
        return;
    };
    let runtime = Runtime::new().unwrap();
    let steps = prop::collection::vec(step(), 1..60);
    proptest!(ProptestConfig::with_cases(64), |(steps in steps)| {
        runtime.block_on(async {
            let mut programs = Programs::new(&url).await;
            for step in &steps {
                programs.take(step).await;
            }
            let mut found = programs.found().await;
            found.lists.retain(|_, list| !list.is_empty());
            programs.model.lists.retain(|_, list| !list.is_empty());
            assert_eq!(found, programs.model, "after {steps:?}");
            programs.clean().await;
        });
    });
}
