//! Binding a call's arguments to a function's parameters, as CPython does.
//!
//! Producers see the `TypeError` that a Python worker would have stored. The texts are therefore those of CPython 3.11,
//! and so is the order of the checks: first keywords, then too many positional arguments, then missing ones.

use std::borrow::Cow;

use serde_json::Value;

/// Kind of a parameter, by the arguments that it accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParameterKind {
    /// By position or by name.
    Ordinary,
    /// By name only: a parameter behind `*` or `*args`.
    KeywordOnly,
    /// All further positional arguments: `*args`.
    VarArgs,
    /// All further keyword arguments: `**kwargs`.
    VarKwargs,
}

/// Parameter of a task function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parameter {
    /// Name.
    pub name: &'static str,
    /// Kind.
    pub kind: ParameterKind,
    /// True if each call must contain it. Ignored for `*args` and `**kwargs`.
    pub required: bool,
}

impl Parameter {
    const fn new(name: &'static str, kind: ParameterKind, required: bool) -> Self {
        Self {
            name,
            kind,
            required,
        }
    }

    /// A parameter that each call must contain.
    #[must_use]
    pub const fn required(name: &'static str) -> Self {
        Self::new(name, ParameterKind::Ordinary, true)
    }

    /// A parameter with a default.
    #[must_use]
    pub const fn optional(name: &'static str) -> Self {
        Self::new(name, ParameterKind::Ordinary, false)
    }

    /// `*name`.
    #[must_use]
    pub const fn var_args(name: &'static str) -> Self {
        Self::new(name, ParameterKind::VarArgs, false)
    }

    /// `**name`.
    #[must_use]
    pub const fn var_kwargs(name: &'static str) -> Self {
        Self::new(name, ParameterKind::VarKwargs, false)
    }

    /// The parameter, accepted by name only.
    #[must_use]
    pub const fn keyword_only(mut self) -> Self {
        self.kind = ParameterKind::KeywordOnly;
        self
    }

    fn is_positional(&self) -> bool {
        self.kind == ParameterKind::Ordinary
    }

    fn is_named(&self) -> bool {
        matches!(
            self.kind,
            ParameterKind::Ordinary | ParameterKind::KeywordOnly
        )
    }
}

/// Signature of a task function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FunctionSignature {
    /// Bare name of the function, the first word of CPython's messages.
    pub function: Cow<'static, str>,
    /// Parameters in order, without `self`.
    pub parameters: Cow<'static, [Parameter]>,
    /// True if the Python function takes `self` (`bind=True`), which CPython counts in its messages.
    pub bound: bool,
}

/// Arguments of a call, bound to the parameters of a function: names and values of the call, not copied.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct BoundArguments<'c> {
    /// Arguments of named parameters, without those that the call does not contain. Each name appears once.
    pub named: Vec<(&'c str, &'c Value)>,
    /// Arguments of `*args`.
    pub var_args: &'c [Value],
    /// Arguments of `**kwargs`.
    pub var_kwargs: Vec<(&'c str, &'c Value)>,
}

impl<'c> BoundArguments<'c> {
    /// The argument of a named parameter, if the call contains it.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&'c Value> {
        let (_, value) = self.named.iter().find(|(known, _)| *known == name)?;
        Some(value)
    }
}

impl FunctionSignature {
    /// Binds `args`, which should be a list, and `kwargs`, which should be a mapping.
    ///
    /// # Errors
    /// The text of CPython's `TypeError`.
    pub fn bind<'c>(
        &self,
        args: &'c Value,
        kwargs: &'c Value,
    ) -> Result<BoundArguments<'c>, String> {
        let Value::Array(args) = args else {
            return Err(self.type_error(format_args!(
                "argument after * must be an iterable, not {}",
                type_name(args)
            )));
        };
        let Value::Object(kwargs) = kwargs else {
            return Err(self.type_error(format_args!(
                "argument after ** must be a mapping, not {}",
                type_name(kwargs)
            )));
        };
        let positional = || self.parameters.iter().filter(|p| p.is_positional());
        let has = |kind| self.parameters.iter().any(|p| p.kind == kind);
        let mut bound = BoundArguments {
            named: positional()
                .map(|parameter| parameter.name)
                .zip(args)
                .collect(),
            ..BoundArguments::default()
        };

        let takes_any_keyword = has(ParameterKind::VarKwargs);
        for (name, value) in kwargs {
            let is_known = |p: &&Parameter| p.is_named() && p.name == *name;
            if !self.parameters.iter().any(|p| is_known(&p)) {
                if takes_any_keyword {
                    bound.var_kwargs.push((name, value));
                    continue;
                }
                return Err(
                    self.type_error(format_args!("got an unexpected keyword argument '{name}'"))
                );
            }
            if bound.get(name).is_some() {
                return Err(
                    self.type_error(format_args!("got multiple values for argument '{name}'"))
                );
            }
            bound.named.push((name, value));
        }
        let most = positional().count();
        if let Some(rest) = args.get(most..).filter(|rest| !rest.is_empty()) {
            if !has(ParameterKind::VarArgs) {
                return Err(self.too_many(args.len(), &bound));
            }
            bound.var_args = rest;
        }
        for (kind, text) in [
            (ParameterKind::Ordinary, "positional"),
            (ParameterKind::KeywordOnly, "keyword-only"),
        ] {
            let missing: Vec<&str> = self
                .parameters
                .iter()
                .filter(|p| p.kind == kind && p.required && bound.get(p.name).is_none())
                .map(|p| p.name)
                .collect();
            if !missing.is_empty() {
                return Err(self.missing(&missing, text));
            }
        }
        Ok(bound)
    }

    /// The text of a `TypeError` of this function: its name and a message.
    #[must_use]
    pub fn type_error(&self, message: impl std::fmt::Display) -> String {
        format!("{}() {message}", self.function)
    }

    /// The text for missing parameters of a kind (`positional` or `keyword-only`).
    #[must_use]
    pub fn missing(&self, names: &[&str], kind: &str) -> String {
        let quoted: Vec<String> = names.iter().map(|name| format!("'{name}'")).collect();
        let (plural, list) = match quoted.as_slice() {
            [one] => ("", one.clone()),
            [one, two] => ("s", format!("{one} and {two}")),
            [head @ .., last] => ("s", format!("{}, and {last}", head.join(", "))),
            [] => ("s", String::new()),
        };
        let count = names.len();
        self.type_error(format_args!(
            "missing {count} required {kind} argument{plural}: {list}"
        ))
    }

    fn too_many(&self, given: usize, bound: &BoundArguments<'_>) -> String {
        let own = usize::from(self.bound);
        let positional = || self.parameters.iter().filter(|p| p.is_positional());
        let most = positional().count() + own;
        let least = positional().filter(|p| p.required).count() + own;
        let given = given + own;
        let is_given =
            |p: &&Parameter| p.kind == ParameterKind::KeywordOnly && bound.get(p.name).is_some();
        let plural = |count| if count == 1 { "" } else { "s" };
        let keywords = self.parameters.iter().filter(is_given).count();
        let given_text = match keywords {
            0 => given.to_string(),
            _ => format!(
                "{given} positional argument{} (and {keywords} keyword-only argument{})",
                plural(given),
                plural(keywords)
            ),
        };
        let were = match given == 1 && keywords == 0 {
            true => "was",
            false => "were",
        };
        let takes = match least == most {
            true => format!("{most} positional argument{}", plural(most)),
            false => format!("from {least} to {most} positional arguments"),
        };
        self.type_error(format_args!("takes {takes} but {given_text} {were} given"))
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

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;
    use serde_json::json;

    const fn function(
        function: &'static str,
        parameters: &'static [Parameter],
    ) -> FunctionSignature {
        FunctionSignature {
            function: Cow::Borrowed(function),
            parameters: Cow::Borrowed(parameters),
            bound: false,
        }
    }

    const TRANSFER: FunctionSignature = FunctionSignature {
        function: Cow::Borrowed("transfer_files_bbcp"),
        parameters: Cow::Borrowed(&[
            Parameter::required("data_transfer_id"),
            Parameter::optional("session"),
        ]),
        bound: true,
    };
    const THREE: FunctionSignature = function(
        "f",
        &[
            Parameter::required("a"),
            Parameter::required("b"),
            Parameter::required("c"),
        ],
    );
    /// `def g(a, *rest, k, o=None, **more)`
    const ALL: FunctionSignature = function(
        "g",
        &[
            Parameter::required("a"),
            Parameter::var_args("rest"),
            Parameter::required("k").keyword_only(),
            Parameter::optional("o").keyword_only(),
            Parameter::var_kwargs("more"),
        ],
    );
    /// `def h(a, *, k)`
    const KEYWORD: FunctionSignature = function(
        "h",
        &[
            Parameter::required("a"),
            Parameter::required("k").keyword_only(),
        ],
    );

    fn bind(signature: &FunctionSignature, args: Value, kwargs: Value) -> Result<Value, String> {
        let bound = signature.bind(&args, &kwargs)?;
        let mapping = |pairs: Vec<(&str, &Value)>| -> Value {
            let owned = |(name, value): (&str, &Value)| (name.to_owned(), value.clone());
            pairs.into_iter().map(owned).collect()
        };
        Ok(json!([
            mapping(bound.named),
            bound.var_args,
            mapping(bound.var_kwargs)
        ]))
    }

    #[rstest]
    #[case(TRANSFER, json!([42]), json!({}), json!([{"data_transfer_id": 42}, [], {}]))]
    #[case(TRANSFER, json!([]), json!({"data_transfer_id": 42}), json!([{"data_transfer_id": 42}, [], {}]))]
    #[case(TRANSFER, json!([42, null]), json!({}), json!([{"data_transfer_id": 42, "session": null}, [], {}]))]
    #[case(TRANSFER, json!([42]), json!({"session": null}), json!([{"data_transfer_id": 42, "session": null}, [], {}]))]
    #[case(ALL, json!([1, 2, 3]), json!({"k": 4, "rest": 5, "x": 6}),
        json!([{"a": 1, "k": 4}, [2, 3], {"rest": 5, "x": 6}]))]
    #[case(ALL, json!([]), json!({"a": 1, "k": 2, "o": 3}), json!([{"a": 1, "k": 2, "o": 3}, [], {}]))]
    fn accepted_calls(
        #[case] signature: FunctionSignature,
        #[case] args: Value,
        #[case] kwargs: Value,
        #[case] bound: Value,
    ) {
        assert_eq!(bind(&signature, args, kwargs), Ok(bound));
    }

    // The texts come from a Celery 5.7 worker and from the interpreter of CPython 3.11.
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
    #[case(ALL, json!([]), json!({}), "g() missing 1 required positional argument: 'a'")]
    #[case(ALL, json!([1]), json!({}), "g() missing 1 required keyword-only argument: 'k'")]
    #[case(KEYWORD, json!([1, 2]), json!({}), "h() takes 1 positional argument but 2 were given")]
    #[case(KEYWORD, json!([1, 2]), json!({"k": 3}), "h() takes 1 positional argument but 2 positional arguments (and 1 keyword-only argument) were given")]
    #[case(KEYWORD, json!([1]), json!({"k": 3, "x": 4}), "h() got an unexpected keyword argument 'x'")]
    fn refused_calls(
        #[case] signature: FunctionSignature,
        #[case] args: Value,
        #[case] kwargs: Value,
        #[case] text: &str,
    ) {
        assert_eq!(bind(&signature, args, kwargs), Err(text.to_owned()));
    }
}
