//! Options of `#[task(…)]`.

use std::time::Duration;

use proc_macro2::TokenStream;
use quote::quote;
use syn::parse::{Parse, ParseStream};
use syn::punctuated::Punctuated;
use syn::spanned::Spanned as _;
use syn::{Expr, ExprLit, Lit, Meta, Token};

const FLAGS: [&str; 7] = [
    "acks_late",
    "acks_on_failure",
    "acks_on_timeout",
    "ignore_result",
    "retry_jitter",
    "store_errors_even_if_ignored",
    "track_started",
];

const COOPERATIVE: &str = "cooperative";

/// Parsed options.
#[derive(Default)]
pub(crate) struct Options {
    /// Name in messages.
    pub(crate) name: Option<String>,
    /// `bind=True`.
    pub(crate) bind: bool,
    /// Calls of the setters of `TaskOptions`.
    pub(crate) setters: Vec<TokenStream>,
}

impl Parse for Options {
    fn parse(input: ParseStream<'_>) -> syn::Result<Self> {
        let mut options = Self::default();
        for meta in Punctuated::<Meta, Token![,]>::parse_terminated(input)? {
            options.add(&meta)?;
        }
        Ok(options)
    }
}

impl Options {
    fn add(&mut self, meta: &Meta) -> syn::Result<()> {
        let option = meta.path().require_ident()?;
        let name = option.to_string();
        let value = match meta {
            Meta::Path(_) => None,
            Meta::NameValue(pair) => Some(&pair.value),
            Meta::List(list) => {
                let text = format!("write `{name} = …`");
                return Err(syn::Error::new(list.span(), text));
            }
        };
        let needed = |what: &str| {
            let text = format!("`{name}` needs a value: {what}");
            value.ok_or_else(|| syn::Error::new(meta.span(), text))
        };
        let setter = match name.as_str() {
            "name" => {
                let value = needed("a string, e.g. `name = \"tasks.add\"`")?;
                let text = string(value)?;
                if text.is_empty() {
                    return Err(syn::Error::new(
                        value.span(),
                        "the name of a task must not be empty",
                    ));
                }
                self.name = Some(text);
                return Ok(());
            }
            "bind" => {
                self.bind = flag(value)?;
                return Ok(());
            }
            flag_name if flag_name == COOPERATIVE || FLAGS.contains(&flag_name) => {
                let value = flag(value)?;
                quote!(#option(#value))
            }
            "retry_backoff" => {
                // As `retry_backoff=True` in Python.
                let duration = value.map_or_else(
                    || Ok(quote!(::core::time::Duration::from_secs(1))),
                    duration,
                )?;
                quote!(#option(#duration))
            }
            "autoretry_for" | "dont_autoretry_for" => {
                let names = names(needed("names of exceptions, e.g. `[\"OSError\"]`")?)?;
                quote!(#option(&[#(#names),*]))
            }
            "time_limit" | "soft_time_limit" | "default_retry_delay" | "retry_backoff_max" => {
                let duration = duration(needed("seconds, e.g. `1.5`")?)?;
                quote!(#option(#duration))
            }
            "max_retries" => {
                let count = needed("a number, e.g. `5`")?;
                quote!(#option(#count))
            }
            "rate_limit" => {
                let value = needed("a rate, e.g. `\"10/m\"`")?;
                let rate = rate(value)?;
                quote!(#option(#rate))
            }
            _ => {
                let known = ["name", "bind", COOPERATIVE]
                    .into_iter()
                    .chain(FLAGS)
                    .chain([
                        "time_limit",
                        "soft_time_limit",
                        "default_retry_delay",
                        "max_retries",
                        "rate_limit",
                        "autoretry_for",
                        "dont_autoretry_for",
                        "retry_backoff",
                        "retry_backoff_max",
                    ]);
                let known = known.collect::<Vec<_>>().join(", ");
                let text = format!("unknown option `{name}`; the options are {known}");
                return Err(syn::Error::new(option.span(), text));
            }
        };
        self.setters.push(setter);
        Ok(())
    }
}

fn literal(value: &Expr) -> Option<&Lit> {
    match value {
        Expr::Lit(ExprLit { lit, .. }) => Some(lit),
        _ => None,
    }
}

fn string(value: &Expr) -> syn::Result<String> {
    match literal(value) {
        Some(Lit::Str(text)) => Ok(text.value()),
        _ => Err(syn::Error::new(value.span(), "expected a string")),
    }
}

fn names(value: &Expr) -> syn::Result<Vec<String>> {
    match value {
        Expr::Array(array) => array.elems.iter().map(string).collect(),
        _ => Err(syn::Error::new(
            value.span(),
            "expected an array of strings",
        )),
    }
}

fn flag(value: Option<&Expr>) -> syn::Result<bool> {
    match value.map(|value| (value, literal(value))) {
        None => Ok(true),
        Some((_, Some(Lit::Bool(flag)))) => Ok(flag.value),
        Some((value, _)) => Err(syn::Error::new(value.span(), "expected `true` or `false`")),
    }
}

/// A number of seconds as a constant expression of type `Duration`.
fn duration(value: &Expr) -> syn::Result<TokenStream> {
    let number = match literal(value) {
        Some(Lit::Int(number)) => number.base10_parse::<f64>().ok(),
        Some(Lit::Float(number)) => number.base10_parse::<f64>().ok(),
        _ => None,
    };
    let duration = number.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    let duration =
        duration.ok_or_else(|| syn::Error::new(value.span(), "expected a number of seconds"))?;
    let (seconds, nanoseconds) = (duration.as_secs(), duration.subsec_nanos());
    Ok(quote!(::core::time::Duration::new(#seconds, #nanoseconds)))
}

fn rate(value: &Expr) -> syn::Result<TokenStream> {
    let text = string(value)?;
    let (count, unit) = text.split_once('/').unwrap_or((&text, "s"));
    let count = count.trim().parse::<f64>().ok();
    let count = count.filter(|count| *count > 0.0 && count.is_finite());
    let constructor = match unit.trim() {
        "s" => quote!(per_second),
        "m" => quote!(per_minute),
        "h" => quote!(per_hour),
        _ => quote!(),
    };
    match count {
        Some(count) if !constructor.is_empty() => {
            Ok(quote!(::celery_worker::worker::RateLimit::#constructor(#count)))
        }
        _ => {
            let text = "expected a rate such as \"2/s\", \"10/m\" or \"1/h\"";
            Err(syn::Error::new(value.span(), text))
        }
    }
}
