//! The future results of a signature, in the form of `as_tuple()`.

use serde_json::{Value, json};

/// Maximum number of parent results that are kept. Each takes two levels of JSON, and readers accept about a hundred
/// levels.
const MAX_PARENTS: usize = 32;

/// The result of a task or of a group.
#[derive(Debug, Clone, PartialEq)]
pub struct ResultNode {
    /// Id of the task or of the group.
    pub id: String,
    /// The previous result: of the previous step in a chain, or of a chord's header.
    pub parent: Option<Box<ResultNode>>,
    /// The results of a group's tasks; `None` for a task.
    pub members: Option<Vec<ResultNode>>,
}

impl ResultNode {
    pub(super) fn task(id: impl Into<String>) -> Self {
        Self {
            id: id.into(),
            parent: None,
            members: None,
        }
    }

    pub(super) fn group(id: impl Into<String>, members: Vec<Self>) -> Self {
        Self {
            members: Some(members),
            ..Self::task(id)
        }
    }

    /// Puts `parent` before the first result of this one. It is omitted beyond [`MAX_PARENTS`], because readers of JSON
    /// limit the levels.
    pub(super) fn after(&mut self, parent: Self) {
        let mut first = &mut self.parent;
        let mut steps = 0;
        while let Some(earlier) = first {
            first = &mut earlier.parent;
            steps += 1;
        }
        if steps < MAX_PARENTS {
            *first = Some(Box::new(parent));
        }
    }

    /// The result in the form of `as_tuple()`.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let members = self.members.as_ref().map(|members| {
            let members = members.iter().map(Self::to_json);
            members.collect::<Vec<_>>()
        });
        let parent = self.parent.as_deref().map(Self::to_json);
        json!([[self.id, parent], members])
    }

    /// Parses a tuple and ignores its parents. `None` if the value is not such a tuple.
    #[must_use]
    pub fn parse(value: &Value) -> Option<Self> {
        Self::parse_within(value, super::MAX_DEPTH)
    }

    fn parse_within(value: &Value, depth: usize) -> Option<Self> {
        let depth = depth.checked_sub(1)?;
        let [id, members] = value.as_array()?.as_slice() else {
            return None;
        };
        let id = match id {
            Value::Array(pair) => pair.first()?.as_str()?,
            id => id.as_str()?,
        };
        let members = match members {
            Value::Null => None,
            Value::Array(members) => Some(
                members
                    .iter()
                    .map(|member| Self::parse_within(member, depth))
                    .collect::<Option<Vec<_>>>()?,
            ),
            _ => return None,
        };
        Some(Self {
            id: id.to_owned(),
            parent: None,
            members,
        })
    }

    /// The ids of all tasks, from the left.
    pub fn task_ids(&self) -> Vec<&str> {
        match &self.members {
            None => vec![&self.id],
            Some(members) => members.iter().flat_map(Self::task_ids).collect(),
        }
    }

    /// Collects the value of each task, in lists that are nested like the groups.
    ///
    /// # Errors
    /// The first error of `value`, from the left.
    pub fn collect<E>(&self, value: &mut impl FnMut(&str) -> Result<Value, E>) -> Result<Value, E> {
        match &self.members {
            None => value(&self.id),
            Some(members) => members.iter().map(|member| member.collect(value)).collect(),
        }
    }
}
