//! Layering and checking.
//!
//! Every key that a layer sets is tried alone on top of the defaults, so that each bad value is
//! reported under its own key and none hides another. Only what passed is merged; rules that span
//! keys see the merged result.

use std::collections::BTreeMap;
use std::path::Path;

use figment::providers::{Format, Toml};
use figment::value::{Dict, Value};
use figment::{Profile, Provider};
use serde::de::DeserializeOwned;

use super::exposure::exposures;
use super::secrets::SECRETS;
use super::{Problem, Settings, SettingsError};

/// `config.default.toml`, the embedded reference.
pub const DEFAULTS: &str = include_str!("../../config.default.toml");

/// Prefix of our own environment variables; `__` separates section and key.
const PREFIX: &str = "CCAT_DATA_TRANSFER_";

/// Prefix of the operations database's variables, shared with the Python packages.
const OPS_DB_PREFIX: &str = "CCAT_OPS_DB_";

/// Tables whose keys are data, not names of settings, and the list of routes: taken whole.
const WHOLE: [&str; 3] = ["celery.task_names", "celery.task_queues", "routes"];

/// A value of a key in some layer.
struct Setting {
    key: String,
    value: Value,
    source: String,
}

/// Loads the settings: the defaults, then `file`, then `environment` (as of [`std::env::vars`]).
///
/// # Errors
/// [`SettingsError`] with every unknown key, bad value and broken rule.
pub fn load(
    file: Option<&Path>,
    environment: impl IntoIterator<Item = (String, String)>,
) -> Result<Settings, SettingsError> {
    let mut problems = Vec::new();
    let defaults = parse(DEFAULTS).map_err(|message| SettingsError {
        problems: vec![problem("", message, "the embedded defaults")],
    })?;

    let mut given = Vec::new();
    if let Some(path) = file {
        match read(path) {
            Ok(dict) => flatten("", dict, &path.display().to_string(), &mut given),
            Err(message) => problems.push(problem("", message, &path.display().to_string())),
        }
    }
    given.extend(from_environment(&defaults, environment, &mut problems));

    let mut merged = defaults.clone();
    let mut sources = BTreeMap::new();
    for setting in given {
        if find(&defaults, &setting.key).is_none() && !WHOLE.contains(&setting.key.as_str()) {
            problems.push(problem(
                &setting.key,
                unknown(&defaults, &setting.key),
                &setting.source,
            ));
            continue;
        }
        let mut alone = defaults.clone();
        set(&mut alone, &setting.key, setting.value.clone());
        match extract::<Settings>(alone) {
            Ok(_) => {
                set(&mut merged, &setting.key, setting.value);
                sources.insert(setting.key, setting.source);
            }
            // Its message would show the value.
            Err(_) if SECRETS.iter().any(|secret| secret.key == setting.key) => {
                let message = "must be a text, in quotes".to_owned();
                problems.push(problem(&setting.key, message, &setting.source));
            }
            Err(message) => problems.push(problem(&setting.key, message, &setting.source)),
        }
    }

    let mut warnings = Vec::new();
    for secret in &SECRETS {
        let file = text_of(&merged, secret.file).to_owned();
        if file.is_empty() {
            continue;
        }
        let source = |key| sources.get(key).map_or("", String::as_str);
        let stated = sources
            .contains_key(secret.key)
            .then(|| (text_of(&merged, secret.key), source(secret.key)));
        match secret.filled(Path::new(&file), text_of(&merged, secret.key), stated) {
            Ok(filled) => {
                set(&mut merged, secret.key, filled.value.into());
                let warning = filled.warning.into_iter();
                warnings
                    .extend(warning.map(|text| problem(secret.file, text, source(secret.file))));
                sources.insert(secret.key.to_owned(), file);
            }
            Err(message) => problems.push(problem(secret.file, message, source(secret.file))),
        }
    }

    match extract::<Settings>(merged) {
        Ok(mut settings) => {
            problems.extend(settings.problems());
            warnings.extend(exposures(&settings));
            settings.warnings = warnings;
            if problems.is_empty() {
                Ok(settings)
            } else {
                Err(SettingsError { problems })
            }
        }
        Err(message) => {
            problems.push(problem("", message, ""));
            Err(SettingsError { problems })
        }
    }
}

fn problem(key: &str, message: String, source: &str) -> Problem {
    Problem {
        key: key.into(),
        message,
        source: source.into(),
    }
}

fn parse(text: &str) -> Result<Dict, String> {
    Toml::string(text)
        .data()
        .map(|mut profiles| profiles.remove(&Profile::Default).unwrap_or_default())
        .map_err(|e| without_excerpt(&e.to_string()))
}

/// A syntax error without the lines of the file that it shows: a secret may be in them.
fn without_excerpt(message: &str) -> String {
    let is_excerpt = |line: &str| {
        line.trim_start_matches(|c: char| c.is_ascii_digit() || c == ' ')
            .starts_with('|')
    };
    let told: Vec<_> = message
        .lines()
        .map(str::trim_end)
        .filter(|line| !line.is_empty() && !is_excerpt(line))
        .collect();
    told.join(": ")
}

fn read(path: &Path) -> Result<Dict, String> {
    let text = std::fs::read_to_string(path).map_err(|e| format!("cannot read the file: {e}"))?;
    parse(&text)
}

/// Reads a type from merged values.
pub(super) fn extract<T: DeserializeOwned>(dict: Dict) -> Result<T, String> {
    Value::from(dict)
        .deserialize()
        .map_err(|e| e.kind.to_string())
}

/// Lists the leaves of a file's tables as dotted keys.
fn flatten(prefix: &str, dict: Dict, source: &str, into: &mut Vec<Setting>) {
    for (name, value) in dict {
        let key = if prefix.is_empty() {
            name
        } else {
            format!("{prefix}.{name}")
        };
        match value {
            Value::Dict(_, inner) if !WHOLE.contains(&key.as_str()) => {
                flatten(&key, inner, source, into);
            }
            value => into.push(Setting {
                key,
                value,
                source: source.into(),
            }),
        }
    }
}

/// The settings among the environment's variables.
///
/// The Python system's own `CCAT_DATA_TRANSFER_…` variables may be set beside ours, so a variable
/// that names none of our sections is not an error.
fn from_environment(
    defaults: &Dict,
    environment: impl IntoIterator<Item = (String, String)>,
    problems: &mut Vec<Problem>,
) -> Vec<Setting> {
    let mut general = Vec::new();
    let mut shared = Vec::new();
    let mut own = Vec::new();
    for (name, mut raw) in environment {
        let (key, list) = match name.as_str() {
            "CELERY_BROKER_URL" => ("celery.broker_url".to_owned(), &mut shared),
            "CELERY_RESULT_BACKEND" => ("celery.result_backend".to_owned(), &mut shared),
            _ if name.starts_with("OTEL_") => {
                let Some((key, value)) = opentelemetry(&name, &raw) else {
                    continue;
                };
                raw = value;
                // What is said of traces wins over what is said of everything.
                let is_general =
                    name.starts_with("OTEL_EXPORTER_OTLP_") && !name.contains("TRACES");
                (
                    key.to_owned(),
                    if is_general {
                        &mut general
                    } else {
                        &mut shared
                    },
                )
            }
            _ => {
                if let Some(rest) = name.strip_prefix(OPS_DB_PREFIX) {
                    let key = format!("ops_db.{}", rest.to_lowercase());
                    if find(defaults, &key).is_none() {
                        continue;
                    }
                    (key, &mut shared)
                } else if let Some(rest) = name.strip_prefix(PREFIX) {
                    let key = rest.to_lowercase().replace("__", ".");
                    let section = key.split('.').next().unwrap_or_default();
                    if !key.contains('.') || find(defaults, section).is_none() {
                        continue;
                    }
                    (key, &mut own)
                } else {
                    continue;
                }
            }
        };
        // Text stays text: a password of digits is no number.
        let value = match find(defaults, &key) {
            Some(Value::String(..)) => Ok(Value::from(raw)),
            _ => raw.parse::<Value>().map_err(|e| e.to_string()),
        };
        match value {
            Ok(value) => list.push(Setting {
                key,
                value,
                source: name,
            }),
            Err(message) => problems.push(problem(&key, message, &name)),
        }
    }
    general.append(&mut shared);
    general.append(&mut own);
    general
}

/// The setting that one of OpenTelemetry's own variables means, with its value; none for those that
/// are empty, which count as not set, and those that mean nothing here or are read by the SDK itself.
fn opentelemetry(name: &str, raw: &str) -> Option<(&'static str, String)> {
    let raw = raw.trim();
    let is_off = match name {
        "OTEL_SDK_DISABLED" => raw.eq_ignore_ascii_case("true"),
        "OTEL_TRACES_EXPORTER" => raw.eq_ignore_ascii_case("none"),
        _ => false,
    };
    if is_off {
        return Some(("traces.enabled", "false".into()));
    }
    let key = match name {
        _ if raw.is_empty() => return None,
        "OTEL_EXPORTER_OTLP_ENDPOINT" => {
            let address = format!("{}/v1/traces", raw.trim_end_matches('/'));
            return Some(("traces.endpoint", address));
        }
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT" => "traces.endpoint",
        "OTEL_EXPORTER_OTLP_HEADERS" | "OTEL_EXPORTER_OTLP_TRACES_HEADERS" => "traces.headers",
        "OTEL_SERVICE_NAME" => "traces.service_name",
        _ => return None,
    };
    Some((key, raw.to_owned()))
}

fn find<'a>(dict: &'a Dict, key: &str) -> Option<&'a Value> {
    let (head, rest) = key
        .split_once('.')
        .map_or((key, None), |(h, r)| (h, Some(r)));
    match (dict.get(head)?, rest) {
        (value, None) => Some(value),
        (Value::Dict(_, inner), Some(rest)) => find(inner, rest),
        _ => None,
    }
}

/// A text among the merged values; empty where it is none.
fn text_of<'a>(dict: &'a Dict, key: &str) -> &'a str {
    match find(dict, key) {
        Some(Value::String(_, text)) => text,
        _ => "",
    }
}

fn set(dict: &mut Dict, key: &str, value: Value) {
    match key.split_once('.') {
        None => {
            dict.insert(key.into(), value);
        }
        Some((head, rest)) => {
            let mut inner = match dict.remove(head) {
                Some(Value::Dict(_, inner)) => inner,
                _ => Dict::new(),
            };
            set(&mut inner, rest, value);
            dict.insert(head.into(), inner.into());
        }
    }
}

/// Says that a key is unknown and which known one is nearest.
fn unknown(defaults: &Dict, key: &str) -> String {
    let mut known = Vec::new();
    flatten("", defaults.clone(), "", &mut known);
    let nearest = known
        .iter()
        .map(|setting| {
            (
                strsim::jaro_winkler(&setting.key, key),
                setting.key.as_str(),
            )
        })
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .filter(|(likeness, _)| *likeness > 0.8);
    match nearest {
        Some((_, name)) => format!("unknown key; the nearest one is `{name}`"),
        None => "unknown key".into(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use secrecy::ExposeSecret;

    use super::*;

    fn traces(environment: &[(&str, &str)]) -> super::super::Traces {
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        load(None, environment.iter().map(owned)).unwrap().traces
    }

    #[test]
    fn opentelemetrys_variables_count() {
        let traces = traces(&[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4318/"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "a=1"),
            ("OTEL_SERVICE_NAME", "s"),
            ("OTEL_SDK_DISABLED", "false"),
            ("OTEL_SOMETHING_NEW", "x"),
        ]);
        assert_eq!(traces.endpoint, "http://c:4318/v1/traces");
        assert_eq!(traces.headers.expose_secret(), "a=1");
        assert_eq!((traces.service_name.as_str(), traces.enabled), ("s", true));
    }

    #[test]
    fn what_is_said_of_traces_wins_and_what_is_ours_over_all() {
        let general = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://general:4318");
        let own = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://traces/x");
        let ours = ("CCAT_DATA_TRANSFER_TRACES__ENDPOINT", "http://ours/y");
        assert_eq!(traces(&[own, general]).endpoint, "http://traces/x");
        assert_eq!(traces(&[ours, own, general]).endpoint, "http://ours/y");
        assert_eq!(
            traces(&[(own.0, ""), general]).endpoint,
            "http://general:4318/v1/traces"
        );
    }

    #[test]
    fn traces_can_be_turned_off() {
        for (name, value) in [
            ("OTEL_SDK_DISABLED", "TRUE"),
            ("OTEL_TRACES_EXPORTER", "none"),
        ] {
            assert!(!traces(&[(name, value)]).enabled, "{name}");
        }
        assert!(traces(&[("OTEL_TRACES_EXPORTER", "otlp")]).enabled);
        assert!(
            traces(&[("OTEL_TRACES_EXPORTER", "otlp")])
                .endpoint
                .is_empty()
        );
    }

    #[test]
    fn a_bad_collector_is_told_of() {
        let said = |name: &str, value: &str| {
            let set = [(
                format!("CCAT_DATA_TRANSFER_TRACES__{name}"),
                value.to_owned(),
            )];
            load(None, set).unwrap_err().to_string()
        };
        for (name, value, told) in [
            (
                "ENDPOINT",
                "grpc://c:4317",
                "scheme `grpc` is not supported",
            ),
            (
                "ENDPOINT",
                "http://u:s3cret@c/",
                "traces.endpoint: must have no login",
            ),
            ("HEADERS", "s3cret", "traces.headers: header 1 has no `=`"),
            ("RATIO", "1.5", "traces.ratio: must be between 0 and 1"),
            ("TIMEOUT", "1ms", "traces.timeout: must be 100ms or more"),
        ] {
            let error = said(name, value);
            assert!(error.contains(told) && !error.contains("s3cret"), "{error}");
        }
    }
}
