//! Routes of tasks by their names (`task_routes`).

use serde::{Deserialize, Serialize};

/// Destination of the tasks of a name, for messages that name none themselves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    untagged,
    deny_unknown_fields,
    expecting = "expected the name of a queue, { queue = … }, or { exchange = …, routing_key = … }"
)]
pub enum TaskRoute {
    /// A queue.
    Queue(String),
    /// A queue, in the form of a mapping.
    QueueOf {
        /// Name of the queue.
        queue: String,
    },
    /// An exchange, which must exist.
    Exchange {
        /// Name of the exchange.
        exchange: String,
        /// The routing key.
        routing_key: String,
    },
}

/// Routes by names of tasks, or by patterns in which `*` is any text of at least one character.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct TaskRoutes {
    /// The most specific one first.
    routes: Vec<(String, TaskRoute)>,
}

impl TaskRoutes {
    pub(crate) fn new<'a>(routes: impl IntoIterator<Item = (&'a String, &'a TaskRoute)>) -> Self {
        let mut routes: Vec<_> = routes
            .into_iter()
            .map(|(name, route)| (name.clone(), route.clone()))
            .collect();
        // A name before the patterns, a longer pattern before a shorter one.
        routes.sort_by_key(|(name, _)| (name.contains('*'), std::cmp::Reverse(name.len())));
        Self { routes }
    }

    /// The route of a task.
    pub(crate) fn find(&self, task: &str) -> Option<&TaskRoute> {
        let found = self.routes.iter().find(|(name, _)| matches(name, task));
        found.map(|(_, route)| route)
    }
}

/// True if a name, or a pattern with `*`, is that of a task.
fn matches(pattern: &str, task: &str) -> bool {
    let Some((start, rest)) = pattern.split_once('*') else {
        return pattern == task;
    };
    let Some(task) = task.strip_prefix(start) else {
        return false;
    };
    let mut ends = task.char_indices().map(|(at, char)| at + char.len_utf8());
    ends.any(|end| matches(rest, &task[end..]))
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("tasks.add", "tasks.add", true)]
    #[case("tasks.add", "tasks.adds", false)]
    #[case("tasks.*", "tasks.add", true)]
    #[case("tasks.*", "tasks.", false)]
    #[case("*.add", "tasks.sub.add", true)]
    #[case("t*.s*", "tasks.sub", true)]
    #[case("t*.s*", "tasks.add", false)]
    #[case("*", "å", true)]
    #[case("a.c", "abc", false)]
    fn patterns(#[case] pattern: &str, #[case] task: &str, #[case] expected: bool) {
        assert_eq!(matches(pattern, task), expected);
    }

    #[test]
    fn the_most_specific_route_applies() {
        let queue = |name: &str| TaskRoute::Queue(name.into());
        let routes = [
            ("*".to_owned(), queue("other")),
            ("tasks.*".to_owned(), queue("tasks")),
            ("tasks.add".to_owned(), queue("add")),
        ];
        let routes = TaskRoutes::new(routes.iter().map(|(name, route)| (name, route)));
        let found = ["tasks.add", "tasks.sub", "x"].map(|task| routes.find(task).cloned());
        assert_eq!(
            found,
            ["add", "tasks", "other"].map(|name| Some(queue(name)))
        );
        assert_eq!(TaskRoutes::default().find("x"), None);
    }
}
