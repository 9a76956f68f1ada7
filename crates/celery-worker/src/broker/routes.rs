//! Routes of tasks by their names (`task_routes`).

use std::cmp::Reverse;
use std::collections::HashMap;

use celery_protocol::glob::Glob;
use serde::{Deserialize, Serialize};

/// Destination of the tasks of a name, for messages that name none themselves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Form", into = "Form")]
pub enum TaskRoute {
    /// A queue.
    Queue(String),
    /// An exchange, which must exist.
    Exchange {
        /// Name of the exchange.
        exchange: String,
        /// The routing key.
        routing_key: String,
    },
}

/// The forms of a route in settings.
#[derive(Serialize, Deserialize)]
#[serde(
    untagged,
    deny_unknown_fields,
    expecting = "expected the name of a queue, { queue = … }, or { exchange = …, routing_key = … }"
)]
enum Form {
    Name(String),
    Queue {
        queue: String,
    },
    Exchange {
        exchange: String,
        routing_key: String,
    },
}

impl From<Form> for TaskRoute {
    fn from(form: Form) -> Self {
        match form {
            Form::Name(queue) | Form::Queue { queue } => Self::Queue(queue),
            Form::Exchange {
                exchange,
                routing_key,
            } => Self::Exchange {
                exchange,
                routing_key,
            },
        }
    }
}

impl From<TaskRoute> for Form {
    fn from(route: TaskRoute) -> Self {
        match route {
            TaskRoute::Queue(queue) => Self::Name(queue),
            TaskRoute::Exchange {
                exchange,
                routing_key,
            } => Self::Exchange {
                exchange,
                routing_key,
            },
        }
    }
}

/// Routes by names of tasks, and by patterns. As in Celery, a text with `*` is a pattern, in which `?` and `[…]` have a
/// meaning as well.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct TaskRoutes {
    named: HashMap<String, TaskRoute>,
    /// The longest pattern first.
    patterns: Vec<(Glob, TaskRoute)>,
}

impl TaskRoutes {
    pub(crate) fn new<'a>(routes: impl IntoIterator<Item = (&'a String, &'a TaskRoute)>) -> Self {
        let (mut patterns, named): (Vec<_>, Vec<_>) =
            routes.into_iter().partition(|(name, _)| name.contains('*'));
        patterns.sort_by_key(|(pattern, _)| Reverse(pattern.len()));
        let compiled =
            |(pattern, route): (&String, &TaskRoute)| (Glob::new(pattern), route.clone());
        let owned = |(name, route): (&String, &TaskRoute)| (name.clone(), route.clone());
        Self {
            named: named.into_iter().map(owned).collect(),
            patterns: patterns.into_iter().map(compiled).collect(),
        }
    }

    /// The route of a task: that of its name, else that of the longest pattern.
    pub(crate) fn find(&self, task: &str) -> Option<&TaskRoute> {
        self.named.get(task).or_else(|| {
            let mut patterns = self.patterns.iter();
            let found = patterns.find(|(pattern, _)| pattern.matches(task));
            found.map(|(_, route)| route)
        })
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::{Value, json};

    use super::*;

    fn queue(name: &str) -> TaskRoute {
        TaskRoute::Queue(name.into())
    }

    #[test]
    fn the_most_specific_route_applies() {
        let routes = ["*", "tasks.*", "tasks.add", "tasks.?", "tasks.[st]*"]
            .map(|name| (name.to_owned(), queue(name)));
        let routes = TaskRoutes::new(routes.iter().map(|(name, route)| (name, route)));
        for (task, route) in [
            ("tasks.add", "tasks.add"),
            ("tasks.mul", "tasks.*"),
            ("tasks.", "tasks.*"),
            ("tasks.sub", "tasks.[st]*"),
            // Without `*` it is a name.
            ("tasks.x", "tasks.*"),
            ("tasks.?", "tasks.?"),
            ("x", "*"),
        ] {
            assert_eq!(routes.find(task), Some(&queue(route)), "{task}");
        }
        assert_eq!(TaskRoutes::default().find("x"), None);
    }

    #[rstest]
    #[case(json!("a"), Some(queue("a")))]
    #[case(json!({"queue": "a"}), Some(queue("a")))]
    #[case(
        json!({"exchange": "a", "routing_key": "b"}),
        Some(TaskRoute::Exchange { exchange: "a".into(), routing_key: "b".into() })
    )]
    #[case(json!({"queue": "a", "priority": 1}), None)]
    #[case(json!({"exchange": "a"}), None)]
    fn forms_of_a_route(#[case] given: Value, #[case] expected: Option<TaskRoute>) {
        let read = serde_json::from_value::<TaskRoute>(given).ok();
        assert_eq!(read, expected);
        if let Some(route) = read {
            let again = serde_json::to_value(&route).and_then(serde_json::from_value);
            assert_eq!(again.ok(), Some(route));
        }
    }
}
