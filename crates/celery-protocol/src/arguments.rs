//! Binding a call's arguments to a function's parameters, as CPython does.
//!
//! Producers see the `TypeError` that a Python worker would have stored, so the texts are
//! CPython 3.11's, and so is the order in which the rules are tried: keywords first, then too
//! many positional arguments, then missing ones.

use serde_json::{Map, Value};

/// One parameter of a task function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parameter {
    /// Its name.
    pub name: &'static str,
    /// Whether a call must give it; otherwise its default is `None`.
    pub required: bool,
}

impl Parameter {
    /// One that a call must give.
    #[must_use]
    pub const fn required(name: &'static str) -> Self {
        let required = true;
        Self { name, required }
    }

    /// One whose default is `None`.
    #[must_use]
    pub const fn optional(name: &'static str) -> Self {
        let required = false;
        Self { name, required }
    }
}

/// The signature of a task function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Signature {
    /// The bare function name, which CPython's messages begin with.
    pub function: &'static str,
    /// The parameters in order, without `self`.
    pub parameters: &'static [Parameter],
    /// Whether the function takes `self` (`bind=True`), which counts in CPython's messages.
    pub bound: bool,
}

impl Signature {
    /// Binds `args`, which should be a list, and `kwargs`, which should be a mapping; parameters
    /// that are not given are left out.
    ///
    /// # Errors
    /// The text of CPython's `TypeError`.
    pub fn bind(&self, args: &Value, kwargs: &Value) -> Result<Map<String, Value>, String> {
        let Value::Array(args) = args else {
            return Err(self.says(format!(
                "argument after * must be an iterable, not {}",
                type_name(args)
            )));
        };
        let Value::Object(kwargs) = kwargs else {
            return Err(self.says(format!(
                "argument after ** must be a mapping, not {}",
                type_name(kwargs)
            )));
        };
        let mut bound: Map<String, Value> = self
            .parameters
            .iter()
            .zip(args)
            .map(|(parameter, value)| (parameter.name.to_owned(), value.clone()))
            .collect();

        for (name, value) in kwargs {
            if !self.parameters.iter().any(|p| p.name == name) {
                return Err(self.says(format!("got an unexpected keyword argument '{name}'")));
            }
            if bound.insert(name.clone(), value.clone()).is_some() {
                return Err(self.says(format!("got multiple values for argument '{name}'")));
            }
        }
        if args.len() > self.parameters.len() {
            return Err(self.says(self.too_many(args.len())));
        }
        let missing: Vec<&str> = self
            .parameters
            .iter()
            .filter(|p| p.required && !bound.contains_key(p.name))
            .map(|p| p.name)
            .collect();
        if missing.is_empty() {
            Ok(bound)
        } else {
            Err(self.says(missing_text(&missing)))
        }
    }

    /// What [`Signature::bind`] bound in the form of a tuple: a list in the order of the parameters,
    /// with null for what was not given; and null for the empty tuple.
    #[must_use]
    pub fn in_order(&self, mut bound: Map<String, Value>) -> Value {
        if self.parameters.is_empty() {
            return Value::Null;
        }
        let value = |p: &Parameter| bound.remove(p.name).unwrap_or_default();
        self.parameters.iter().map(value).collect()
    }

    fn says(&self, message: String) -> String {
        format!("{}() {message}", self.function)
    }

    fn too_many(&self, given: usize) -> String {
        let own = usize::from(self.bound);
        let most = self.parameters.len() + own;
        let least = self.parameters.iter().filter(|p| p.required).count() + own;
        let given = given + own;
        let were = if given == 1 { "was" } else { "were" };
        let plural = if most == 1 { "" } else { "s" };
        if least == most {
            format!("takes {most} positional argument{plural} but {given} {were} given")
        } else {
            format!("takes from {least} to {most} positional arguments but {given} {were} given")
        }
    }
}

/// Python's name of the type of a JSON value.
#[must_use]
pub fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "NoneType",
        Value::Bool(_) => "bool",
        Value::Number(n) if n.is_f64() => "float",
        Value::Number(_) => "int",
        Value::String(_) => "str",
        Value::Array(_) => "list",
        Value::Object(_) => "dict",
    }
}

fn missing_text(names: &[&str]) -> String {
    let quoted: Vec<String> = names.iter().map(|name| format!("'{name}'")).collect();
    let (plural, list) = match quoted.as_slice() {
        [one] => ("", one.clone()),
        [one, two] => ("s", format!("{one} and {two}")),
        [head @ .., last] => ("s", format!("{}, and {last}", head.join(", "))),
        [] => ("s", String::new()),
    };
    format!(
        "missing {} required positional argument{plural}: {list}",
        names.len()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;
    use serde_json::json;

    const TRANSFER: Signature = Signature {
        function: "transfer_files_bbcp",
        parameters: &[
            Parameter {
                name: "data_transfer_id",
                required: true,
            },
            Parameter {
                name: "session",
                required: false,
            },
        ],
        bound: true,
    };
    const THREE: Signature = Signature {
        function: "f",
        parameters: &[
            Parameter {
                name: "a",
                required: true,
            },
            Parameter {
                name: "b",
                required: true,
            },
            Parameter {
                name: "c",
                required: true,
            },
        ],
        bound: false,
    };

    fn bind(signature: Signature, args: Value, kwargs: Value) -> Result<Value, String> {
        signature.bind(&args, &kwargs).map(Value::Object)
    }

    #[rstest]
    #[case(json!([42]), json!({}), json!({"data_transfer_id": 42}))]
    #[case(json!([]), json!({"data_transfer_id": 42}), json!({"data_transfer_id": 42}))]
    #[case(json!([42, null]), json!({}), json!({"data_transfer_id": 42, "session": null}))]
    #[case(json!([42]), json!({"session": null}), json!({"data_transfer_id": 42, "session": null}))]
    fn good_calls(#[case] args: Value, #[case] kwargs: Value, #[case] bound: Value) {
        assert_eq!(bind(TRANSFER, args, kwargs), Ok(bound));
    }

    // The texts of CPython 3.11, from a Celery 5.7 worker.
    #[rstest]
    #[case(TRANSFER, json!([]), json!({}), "transfer_files_bbcp() missing 1 required positional argument: 'data_transfer_id'")]
    #[case(TRANSFER, json!([1, 2, 3]), json!({}), "transfer_files_bbcp() takes from 2 to 3 positional arguments but 4 were given")]
    #[case(TRANSFER, json!([1]), json!({"nope": 1}), "transfer_files_bbcp() got an unexpected keyword argument 'nope'")]
    #[case(TRANSFER, json!([1]), json!({"data_transfer_id": 1}), "transfer_files_bbcp() got multiple values for argument 'data_transfer_id'")]
    #[case(THREE, json!([1, 2, 3, 4]), json!({}), "f() takes 3 positional arguments but 4 were given")]
    #[case(THREE, json!([1]), json!({}), "f() missing 2 required positional arguments: 'b' and 'c'")]
    #[case(THREE, json!([]), json!({}), "f() missing 3 required positional arguments: 'a', 'b', and 'c'")]
    #[case(TRANSFER, json!(5), json!({}), "transfer_files_bbcp() argument after * must be an iterable, not int")]
    #[case(TRANSFER, json!([]), json!([]), "transfer_files_bbcp() argument after ** must be a mapping, not list")]
    #[case(THREE, json!([1, 2, 3, 4]), json!({"x": 1}), "f() got an unexpected keyword argument 'x'")]
    fn bad_calls(
        #[case] signature: Signature,
        #[case] args: Value,
        #[case] kwargs: Value,
        #[case] text: &str,
    ) {
        assert_eq!(bind(signature, args, kwargs), Err(text.to_owned()));
    }
}
