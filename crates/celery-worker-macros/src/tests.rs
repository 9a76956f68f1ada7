//! Messages for incorrect tasks that the macros find themselves. Those that the compiler finds, and the places that all of
//! them point at, are tested by `compile-tests`.

use rstest::rstest;

use super::{args, options, task};

/// Message for a task; empty for a correct one.
fn of_task(options: &str, function: &str) -> String {
    let expanded = syn::parse_str::<options::Options>(options)
        .and_then(|options| task::expand(&options, syn::parse_str(function)?));
    expanded.map_or_else(|error| error.to_string(), |_| String::new())
}

#[rstest]
#[case(
    "fn add(x: i64) -> TaskResult<i64> { Ok(x) }",
    "a task is an `async fn`; put blocking work into `tokio::task::spawn_blocking`"
)]
#[case(
    "async fn sell(&self, item: String) -> TaskResult<()> { Ok(()) }",
    "a task has no `self`: use `#[state]` parameters, or implement `Task` for a type"
)]
#[case(
    "async fn greet(name: &str) -> TaskResult<()> { Ok(()) }",
    "an argument comes from a message, so it is an owned value: use `String` for `&str`, `Vec<T>` for `&[T]`"
)]
#[case(
    "async fn echo<T>(value: T) -> TaskResult<T> { Ok(value) }",
    "a task has one signature: generic parameters and lifetimes are not possible"
)]
#[case(
    "async fn add((x, y): (i64, i64)) -> TaskResult<i64> { Ok(x + y) }",
    "a parameter of a task is a name, not a pattern"
)]
#[case(
    "async fn add(#[default = 1] x: i64, y: i64) -> TaskResult<i64> { Ok(x + y) }",
    "a required parameter cannot follow one with a default: give it a default too, or move it"
)]
#[case(
    "async fn add(#[defaults] x: i64) -> TaskResult<i64> { Ok(x) }",
    "expected `#[default]`, `#[args]`, `#[kwargs]`, `#[keyword_only]` or `#[state]`"
)]
#[case(
    "async fn add(#[keyword_only] x: i64, y: i64) -> TaskResult<i64> { Ok(x) }",
    "a parameter behind a keyword-only one is `#[keyword_only]`, too"
)]
#[case(
    "async fn add(#[keyword_only] x: i64, #[args] y: Vec<i64>) -> TaskResult<i64> { Ok(x) }",
    "`#[args]` stands before the keyword-only parameters"
)]
#[case(
    "async fn add(#[args] #[keyword_only] x: Vec<i64>) -> TaskResult<i64> { Ok(1) }",
    "`#[keyword_only]` is for a parameter with a name of its own"
)]
#[case(
    "async fn add(#[keyword_only] #[default = 1] x: i64, #[keyword_only] y: i64) -> TaskResult<i64> { Ok(x) }",
    ""
)]
#[case(
    "async fn two(a: TaskContext, b: TaskContext) -> TaskResult<()> { Ok(()) }",
    "a task has one context"
)]
#[case("async fn add(x: i64) -> TaskResult<i64> { Ok(x) }", "")]
fn a_function_that_is_no_task(#[case] function: &str, #[case] message: &str) {
    assert_eq!(of_task("", function), message);
}

#[rstest]
#[case("acks_lat", "unknown option `acks_lat`; the options are name, bind,")]
#[case("name", "`name` needs a value: a string, e.g. `name = \"tasks.add\"`")]
#[case("name = \"\"", "the name of a task must not be empty")]
#[case("acks_late = 1", "expected `true` or `false`")]
#[case("time_limit = \"1m\"", "expected a number of seconds")]
#[case("autoretry_for = \"OSError\"", "expected an array of strings")]
#[case(
    "rate_limit = \"often\"",
    "expected a rate such as \"2/s\", \"10/m\" or \"1/h\""
)]
fn an_option_that_cannot_be(#[case] options: &str, #[case] message: &str) {
    let shown = of_task(options, "async fn add(x: i64) -> TaskResult<i64> { Ok(x) }");
    assert!(shown.starts_with(message), "{shown}");
}

#[rstest]
#[case(
    "struct Add(i64, i64);",
    "arguments have names: use a struct with named fields"
)]
#[case(
    "enum Add { A }",
    "arguments must be a struct, with a field for each parameter of the task"
)]
#[case(
    "struct Add<T> { x: T }",
    "arguments have no generic parameters: a task has one signature"
)]
#[case(
    "struct Add { #[arg(optional)] x: i64 }",
    "expected `default`, `default = …`, `args`, `kwargs` or `keyword_only`"
)]
fn a_struct_that_is_no_arguments(#[case] input: &str, #[case] message: &str) {
    let derived = syn::parse_str(input).and_then(|input| args::derive(&input));
    let shown = derived.map_or_else(|error| error.to_string(), |_| String::new());
    assert_eq!(shown, message);
}
