//! A message's headers.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Map, Value};

/// Application headers. Clones share them until one clone is changed: a raw message and its decoded form have the same
/// headers, about twenty, and a worker processes thousands of messages per second.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(from = "Map<String, Value>")]
pub struct Headers(Arc<Map<String, Value>>);

impl Deref for Headers {
    type Target = Map<String, Value>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl DerefMut for Headers {
    fn deref_mut(&mut self) -> &mut Self::Target {
        Arc::make_mut(&mut self.0)
    }
}

impl From<Map<String, Value>> for Headers {
    fn from(headers: Map<String, Value>) -> Self {
        Self(Arc::new(headers))
    }
}

impl FromIterator<(String, Value)> for Headers {
    fn from_iter<I: IntoIterator<Item = (String, Value)>>(headers: I) -> Self {
        Map::from_iter(headers).into()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn changed_headers_do_not_affect_other_clones() {
        let one = Headers::from_iter([("id".to_owned(), json!("a"))]);
        let mut other = one.clone();
        other.insert("id".into(), json!("b"));
        assert_eq!(
            (one.get("id"), other.get("id")),
            (Some(&json!("a")), Some(&json!("b")))
        );
    }
}
