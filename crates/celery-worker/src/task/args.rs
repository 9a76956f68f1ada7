//! Arguments of a task.

use celery_protocol::arguments::{BoundArguments, FunctionSignature, Parameter};
use serde::de::DeserializeOwned;
use serde::de::value::{MapDeserializer, SeqDeserializer};
use serde_json::Value;

/// Typed arguments of a task, with the parameters of the Python function that callers believe to call.
///
/// `#[task]` and `#[derive(TaskArgs)]` implement it.
pub trait TaskArgs: Sized + Send {
    /// Parameters in order, without `self`.
    const PARAMETERS: &'static [Parameter];

    /// Converts the arguments of a call.
    ///
    /// # Errors
    /// A value has another type than its parameter.
    fn from_bound(bound: Arguments<'_>) -> Result<Self, serde_json::Error>;
}

impl TaskArgs for () {
    const PARAMETERS: &'static [Parameter] = &[];

    fn from_bound(_bound: Arguments<'_>) -> Result<Self, serde_json::Error> {
        Ok(())
    }
}

/// Arguments of one call, bound to the parameters of a task and not converted yet.
#[derive(Debug)]
pub struct Arguments<'c>(BoundArguments<'c>);

impl<'c> Arguments<'c> {
    /// Binds the arguments of a message.
    pub(crate) fn bind(
        signature: &FunctionSignature,
        args: &'c Value,
        kwargs: &'c Value,
    ) -> Result<Self, String> {
        signature.bind(args, kwargs).map(Self)
    }

    /// All named arguments, each name once.
    #[cfg(feature = "celery-crate")]
    pub(crate) fn into_named(self) -> Vec<(&'c str, &'c Value)> {
        self.0.named
    }

    /// Converts a required argument.
    ///
    /// # Errors
    /// The value has another type.
    pub fn required<T: DeserializeOwned>(&self, name: &str) -> Result<T, serde_json::Error> {
        T::deserialize(self.0.get(name).unwrap_or(&Value::Null))
    }

    /// Converts an optional argument.
    ///
    /// # Errors
    /// The value has another type.
    pub fn optional<T: DeserializeOwned>(
        &self,
        name: &str,
        default: impl FnOnce() -> T,
    ) -> Result<T, serde_json::Error> {
        match self.0.get(name) {
            Some(value) => T::deserialize(value),
            None => Ok(default()),
        }
    }

    /// Converts `*args`.
    ///
    /// # Errors
    /// A value has another type.
    pub fn var_args<T: DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        T::deserialize(SeqDeserializer::new(self.0.var_args.iter()))
    }

    /// Converts `**kwargs`.
    ///
    /// # Errors
    /// A value has another type.
    pub fn var_kwargs<T: DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        T::deserialize(MapDeserializer::new(self.0.var_kwargs.iter().copied()))
    }
}
