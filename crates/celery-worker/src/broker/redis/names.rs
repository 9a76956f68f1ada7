//! Names of keys and channels, as kombu writes them.

use super::options::{FanoutPrefix, RedisTransportOptions};
use crate::broker::Queue;

/// Namer of keys and channels.
#[derive(Debug)]
pub(super) struct Names {
    prefix: String,
    sep: String,
    /// Lowest priority of each class.
    steps: Vec<u8>,
    channel_prefix: String,
    has_patterns: bool,
    pub(super) unacked: String,
    pub(super) unacked_index: String,
}

impl Names {
    pub(super) fn new(options: &RedisTransportOptions, db: i64) -> Self {
        let prefix = &options.global_keyprefix;
        let channel_prefix = match &options.fanout_prefix {
            FanoutPrefix::Enabled(true) => format!("/{db}."),
            FanoutPrefix::Enabled(false) => String::new(),
            FanoutPrefix::Text(text) => text.replace("{db}", &db.to_string()),
        };
        Self {
            sep: options.sep.clone(),
            steps: options.priority_steps.clone(),
            channel_prefix: format!("{prefix}{channel_prefix}"),
            has_patterns: options.fanout_patterns,
            unacked: format!("{prefix}{}", options.unacked_key),
            unacked_index: format!("{prefix}{}", options.unacked_index_key),
            prefix: prefix.clone(),
        }
    }

    /// Number of classes of priorities.
    pub(super) fn classes(&self) -> usize {
        self.steps.len()
    }

    /// The list of a queue for messages of one priority.
    pub(super) fn list(&self, queue: &str, priority: u8) -> String {
        let class = self.steps.iter().rfind(|step| **step <= priority.min(9));
        self.class_list(queue, class.or(self.steps.first()).copied().unwrap_or(0))
    }

    /// The lists of a queue, in the order in which they are served.
    pub(super) fn lists(&self, queue: &str) -> impl Iterator<Item = String> {
        let classes = self.steps.iter();
        classes.map(move |class| self.class_list(queue, *class))
    }

    fn class_list(&self, queue: &str, class: u8) -> String {
        match class {
            0 => format!("{}{queue}", self.prefix),
            class => format!("{}{queue}{}{class}", self.prefix, self.sep),
        }
    }

    /// The list for elements of a queue that are not messages.
    pub(super) fn parked(&self, queue: &str) -> String {
        format!("{}celery-worker.parked.{queue}", self.prefix)
    }

    /// The list for entries of `unacked` that are not messages, or that no queue takes.
    pub(super) fn parked_entries(&self) -> String {
        format!("{}celery-worker.parked-entries", self.prefix)
    }

    /// The marker of a message that was published.
    pub(super) fn published(&self, id: &str) -> String {
        format!("{}celery-worker.published.{id}", self.prefix)
    }

    /// The set of the bindings of an exchange.
    pub(super) fn bindings(&self, exchange: &str) -> String {
        format!("{}_kombu.binding.{exchange}", self.prefix)
    }

    /// The set of the bindings of an exchange to queues that do not expire.
    pub(super) fn permanent_bindings(&self, exchange: &str) -> String {
        format!("{}_kombu.binding_permanent.{exchange}", self.prefix)
    }

    /// The times after which the bindings of exchanges expire.
    pub(super) fn binding_deadlines(&self) -> String {
        format!("{}_kombu.binding_deadlines", self.prefix)
    }

    /// The member of a set of bindings.
    pub(super) fn binding(&self, key: &str, pattern: &str, queue: &str) -> String {
        let sep = &self.sep;
        format!("{key}{sep}{pattern}{sep}{queue}")
    }

    /// Key, pattern and queue of a member of a set of bindings.
    pub(super) fn parse_binding<'a>(&self, member: &'a str) -> Option<(&'a str, &'a str, &'a str)> {
        let mut parts = member.splitn(3, self.sep.as_str());
        Some((parts.next()?, parts.next()?, parts.next()?))
    }

    /// The channel of a message.
    pub(super) fn channel(&self, exchange: &str, routing_key: &str) -> String {
        match routing_key.is_empty() || !self.has_patterns {
            true => format!("{}{exchange}", self.channel_prefix),
            false => format!("{}{exchange}/{routing_key}", self.channel_prefix),
        }
    }

    /// The pattern of the channels of a queue that is bound to a fanout exchange.
    pub(super) fn channel_pattern(&self, queue: &Queue) -> Option<String> {
        let binding = queue.binding.as_ref()?;
        Some(self.channel(&binding.exchange.name, &binding.key.replace('#', "*")))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use rstest::rstest;

    use super::*;
    use crate::broker::{Binding, Exchange};

    fn names(change: impl FnOnce(&mut RedisTransportOptions)) -> Names {
        let mut options = RedisTransportOptions::default();
        change(&mut options);
        Names::new(&options, 3)
    }

    #[rstest]
    #[case(0, "q")]
    #[case(2, "q")]
    #[case(3, "q\u{6}\u{16}3")]
    #[case(8, "q\u{6}\u{16}6")]
    #[case(9, "q\u{6}\u{16}9")]
    #[case(255, "q\u{6}\u{16}9")]
    fn lists_by_priority(#[case] priority: u8, #[case] expected: &str) {
        assert_eq!(names(|_| ()).list("q", priority), expected);
    }

    #[test]
    fn options_change_the_names() {
        let names = names(|options| {
            options.global_keyprefix = "P".into();
            options.sep = ":".into();
            options.priority_steps = vec![0, 5];
            options.unacked_key = "u".into();
        });
        assert_eq!(names.lists("q").collect::<Vec<_>>(), ["Pq", "Pq:5"]);
        assert_eq!(
            (&*names.unacked, &*names.unacked_index),
            ("Pu", "Punacked_index")
        );
        assert_eq!(names.bindings("celery"), "P_kombu.binding.celery");
        assert_eq!(names.channel("celery.pidbox", ""), "P/3.celery.pidbox");
        let member = names.binding("k", "", "q");
        assert_eq!(member, "k::q");
        assert_eq!(names.parse_binding(&member), Some(("k", "", "q")));
    }

    #[rstest]
    #[case(FanoutPrefix::Enabled(true), true, "/3.celeryev/worker.online")]
    #[case(FanoutPrefix::Enabled(false), true, "celeryev/worker.online")]
    #[case(FanoutPrefix::Enabled(true), false, "/3.celeryev")]
    #[case(FanoutPrefix::Text("x{db}-".into()), true, "x3-celeryev/worker.online")]
    fn channels(#[case] prefix: FanoutPrefix, #[case] patterns: bool, #[case] expected: &str) {
        let names = names(|options| {
            options.fanout_prefix = prefix;
            options.fanout_patterns = patterns;
        });
        assert_eq!(names.channel("celeryev", "worker.online"), expected);
    }

    #[test]
    fn subscriptions_are_patterns() {
        let queue = Queue {
            binding: Some(Binding {
                exchange: Exchange::events(),
                key: "worker.#".into(),
            }),
            ..Queue::tasks("q")
        };
        let pattern = names(|_| ()).channel_pattern(&queue).unwrap();
        assert_eq!(pattern, "/3.celeryev/worker.*");
    }
}
