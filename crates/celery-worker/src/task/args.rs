//! Arguments of a task.

use celery_protocol::arguments::{BoundArguments, FunctionSignature, Parameter};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

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
    fn from_bound(bound: Arguments) -> Result<Self, serde_json::Error>;
}

impl TaskArgs for () {
    const PARAMETERS: &'static [Parameter] = &[];

    fn from_bound(_bound: Arguments) -> Result<Self, serde_json::Error> {
        Ok(())
    }
}

/// Arguments of one call, bound to the parameters of a task and not converted yet.
#[derive(Debug)]
pub struct Arguments(BoundArguments);

impl Arguments {
    /// Binds the arguments of a message.
    pub(crate) fn bind(
        signature: &FunctionSignature,
        args: &Value,
        kwargs: &Value,
    ) -> Result<Self, String> {
        signature.bind(args, kwargs).map(Self)
    }

    /// All named arguments as a mapping.
    #[cfg(feature = "celery-crate")]
    pub(crate) fn into_named(self) -> Map<String, Value> {
        self.0.named
    }

    /// Takes a required argument.
    ///
    /// # Errors
    /// The value has another type.
    pub fn required<T: DeserializeOwned>(&mut self, name: &str) -> Result<T, serde_json::Error> {
        serde_json::from_value(self.0.named.remove(name).unwrap_or_default())
    }

    /// Takes an optional argument.
    ///
    /// # Errors
    /// The value has another type.
    pub fn optional<T: DeserializeOwned>(
        &mut self,
        name: &str,
        default: impl FnOnce() -> T,
    ) -> Result<T, serde_json::Error> {
        match self.0.named.remove(name) {
            Some(value) => serde_json::from_value(value),
            None => Ok(default()),
        }
    }

    /// Takes `*args`.
    ///
    /// # Errors
    /// A value has another type.
    pub fn var_args<T: DeserializeOwned>(&mut self) -> Result<T, serde_json::Error> {
        serde_json::from_value(std::mem::take(&mut self.0.var_args).into())
    }

    /// Takes `**kwargs`.
    ///
    /// # Errors
    /// A value has another type.
    pub fn var_kwargs<T: DeserializeOwned>(&mut self) -> Result<T, serde_json::Error> {
        let kwargs: Map<String, Value> = std::mem::take(&mut self.0.var_kwargs);
        serde_json::from_value(kwargs.into())
    }
}
