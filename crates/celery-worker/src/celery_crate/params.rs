//! Conversion of a call's arguments to the parameters of a task of the `celery` crate.
//!
//! Only the type's `Deserialize` implementation knows which parameters may be missing. It reports a missing one by
//! [`serde::de::Error::missing_field`], whose name [`ParamsError`] keeps. The arguments themselves are deserialized
//! with serde_json's own error, so that a missing field inside an argument is not mistaken for a parameter.

use std::fmt;
use std::vec;

use serde::de::value::StrDeserializer;
use serde::de::{
    DeserializeOwned, DeserializeSeed, Deserializer, Error, IntoDeserializer, MapAccess, Visitor,
};
use serde::forward_to_deserialize_any;
use serde_json::Value;

/// Reason why arguments do not fit a task's parameters.
#[derive(Debug, thiserror::Error)]
pub(super) enum ParamsError {
    /// A required parameter is missing.
    #[error("missing parameter `{0}`")]
    Missing(&'static str),
    /// An argument has another type than its parameter.
    #[error(transparent)]
    Type(#[from] serde_json::Error),
}

impl Error for ParamsError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self::Type(serde_json::Error::custom(message))
    }

    fn missing_field(field: &'static str) -> Self {
        Self::Missing(field)
    }
}

/// Converts named arguments to a task's parameters.
///
/// # Errors
/// [`ParamsError`]
pub(super) fn from_named<P: DeserializeOwned>(
    named: Vec<(&str, &Value)>,
) -> Result<P, ParamsError> {
    P::deserialize(Named(named))
}

struct Named<'c>(Vec<(&'c str, &'c Value)>);

impl<'de> Deserializer<'de> for Named<'de> {
    type Error = ParamsError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ParamsError> {
        visitor.visit_map(NamedAccess {
            rest: self.0.into_iter(),
            value: &Value::Null,
        })
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ParamsError> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, ParamsError> {
        visitor.visit_newtype_struct(self)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple
        tuple_struct map struct enum identifier ignored_any
    }
}

struct NamedAccess<'c> {
    rest: vec::IntoIter<(&'c str, &'c Value)>,
    /// Value of the key that was read last.
    value: &'c Value,
}

impl<'de> MapAccess<'de> for NamedAccess<'de> {
    type Error = ParamsError;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, ParamsError> {
        let Some((key, value)) = self.rest.next() else {
            return Ok(None);
        };
        self.value = value;
        let key: StrDeserializer<'_, ParamsError> = key.into_deserializer();
        seed.deserialize(key).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(
        &mut self,
        seed: V,
    ) -> Result<V::Value, ParamsError> {
        Ok(seed.deserialize(self.value)?)
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.rest.len())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use serde::Deserialize;
    use serde_json::json;

    use super::*;

    #[derive(Debug, PartialEq, Deserialize)]
    enum Mode {
        Fast,
        Slow { factor: f64 },
    }

    #[derive(Debug, PartialEq, Deserialize)]
    struct Point {
        x: i64,
        y: u64,
    }

    #[derive(Debug, PartialEq, Deserialize)]
    struct Params {
        x: i64,
        point: Option<Point>,
        #[serde(default)]
        modes: Vec<Mode>,
    }

    fn read(arguments: Value) -> Result<Params, ParamsError> {
        let named = arguments.as_object().unwrap();
        from_named(named.iter().map(|(name, value)| (&**name, value)).collect())
    }

    #[test]
    fn arguments_are_read_as_serde_json_reads_them() {
        let full = json!({"x": -1, "point": {"x": 1, "y": 18_446_744_073_709_551_615_u64},
            "modes": ["Fast", {"Slow": {"factor": 0.5}}], "more": [1]});
        assert_eq!(
            read(full.clone()).unwrap(),
            serde_json::from_value(full).unwrap()
        );
        let least = json!({"x": 1});
        assert_eq!(
            read(least.clone()).unwrap(),
            serde_json::from_value(least).unwrap()
        );
    }

    #[test]
    fn an_absent_parameter_is_named() {
        let error = read(json!({"point": null})).unwrap_err();
        assert!(matches!(error, ParamsError::Missing("x")), "{error:?}");
    }

    #[test]
    fn a_field_within_an_argument_is_no_parameter() {
        let error = read(json!({"x": 1, "point": {"y": 2}})).unwrap_err();
        assert!(matches!(error, ParamsError::Type(_)), "{error:?}");
        assert_eq!(error.to_string(), "missing field `x`");
    }
}
