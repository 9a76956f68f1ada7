#![doc = include_str!("../README.md")]
#![deny(missing_docs)]
#![warn(unreachable_pub)]

mod args;
mod options;
mod task;

use proc_macro::TokenStream;
use syn::parse_macro_input;

/// Turns an async function into a task, that is a type of the function's name which implements `Task`.
///
/// ```ignore
/// #[task(name = "tasks.add", acks_late, max_retries = 5)]
/// async fn add(x: i64, y: i64) -> TaskResult<i64> {
///     Ok(x + y)
/// }
/// ```
///
/// Options are `name`, `bind`, and the methods of `TaskOptions`: flags (`acks_late`, or `acks_late = false`), numbers of
/// seconds (`time_limit = 30`, `default_retry_delay = 1.5`), `max_retries = 5`, `rate_limit = "10/m"`, and the classes of
/// Python's exceptions `autoretry_for = ["OSError"]`, `dont_autoretry_for`. Without `name` the
/// task has the name of the function.
///
/// | parameter | meaning |
/// | --- | --- |
/// | `x: T` | required argument |
/// | `x: Option<T>` | optional argument; `None` by default |
/// | `#[default] x: T`, `#[default = expr] x: T` | optional argument with a default |
/// | `#[args] rest: Vec<T>` | `*rest`; parameters behind it are keyword-only |
/// | `#[keyword_only] x: T` | given by name only, as behind `*` in Python; together with `#[default]`, too |
/// | `#[kwargs] more: HashMap<String, T>` | `**more` |
/// | `cx: TaskContext` | context of the run; not part of the signature |
/// | `#[state] pool: &Pool`, `#[state] pool: Pool` | field of the task's type, borrowed or cloned for each run |
///
/// The macro also makes `add::s(1, 2)`, a signature of the task with checked argument types, which a client or another task sends.
/// A task without state is registered by its name, `.task(add)`; one with state as a value, `.task(add { pool })`.
#[proc_macro_attribute]
pub fn task(options: TokenStream, function: TokenStream) -> TokenStream {
    let options = parse_macro_input!(options as options::Options);
    let function = parse_macro_input!(function as syn::ItemFn);
    task::expand(&options, function)
        .unwrap_or_else(syn::Error::into_compile_error)
        .into()
}

/// Implements `TaskArgs` for a struct with named fields, which are the parameters of the task.
///
/// A field of type `Option<T>` is optional; `#[arg(default)]` and `#[arg(default = expr)]` give another field a default;
/// `#[arg(args)]` and `#[arg(kwargs)]` make it `*args` and `**kwargs`. Fields behind `*args`, and those with `#[arg(keyword_only)]`, are
/// keyword-only.
#[proc_macro_derive(TaskArgs, attributes(arg))]
pub fn derive_task_args(input: TokenStream) -> TokenStream {
    let input = parse_macro_input!(input as syn::DeriveInput);
    args::derive(&input)
        .unwrap_or_else(syn::Error::into_compile_error)
        .into()
}

#[cfg(test)]
mod tests;
