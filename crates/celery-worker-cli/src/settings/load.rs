//! Layers of settings: defaults, a file, the environment.
//!
//! Every key that a layer sets is checked alone on top of the defaults, so that each invalid value is reported under
//! its own key. Only valid values are merged; rules that span keys check the merged result.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use figment::providers::{Format, Toml};
use figment::value::{Dict, Value};
use figment::{Profile, Provider};
use serde::de::DeserializeOwned;

use super::secrets::SECRETS;
use super::unsupported;
use super::{Problem, Problems, Secret, Settings, SettingsError};

/// Tables of this crate's sections whose keys are data, not names of settings.
const WHOLE: [&str; 3] = [
    "celery.task_names",
    "celery.task_queues",
    "celery.task_routes",
];

/// Settings that are URLs with `;` between them; a list of texts is accepted, too, as in Celery.
const URL_LISTS: [&str; 1] = ["celery.broker_url"];

/// Source of the settings of a program.
#[derive(Debug, Clone)]
pub struct Source {
    /// Defaults of all sections in TOML. Only keys that have a default exist.
    pub defaults: &'static str,
    /// Prefix of the program's environment variables; `__` separates section and key.
    pub prefix: Cow<'static, str>,
    /// Further prefixes, which are shared with other programs, each with the section that its variables set.
    pub section_prefixes: &'static [(&'static str, &'static str)],
    /// Further tables and lists whose keys are data. A layer replaces them as a whole.
    pub whole: &'static [&'static str],
    /// Further settings that are secrets.
    pub secrets: &'static [Secret],
}

/// The value that a layer sets for a key.
struct Setting {
    key: String,
    value: Value,
    source: String,
}

impl Source {
    /// Loads the settings: the defaults, then `file`, then `environment` (see [`std::env::vars`]). Returns the
    /// settings, with warnings about secrets that other users can read.
    ///
    /// # Errors
    /// [`SettingsError`] with every unknown key, invalid value and violated rule.
    pub fn load<S: Settings>(
        &self,
        file: Option<&Path>,
        environment: impl IntoIterator<Item = (String, String)>,
    ) -> Result<(S, Vec<Problem>), SettingsError> {
        let mut problems = Vec::new();
        let defaults = parse(self.defaults).map_err(|message| SettingsError {
            problems: vec![problem("", message, "the embedded defaults")],
        })?;

        let mut given = Vec::new();
        if let Some(path) = file {
            match read(path) {
                Ok(dict) => self.flatten("", dict, &path.display().to_string(), &mut given),
                Err(message) => problems.push(problem("", message, &path.display().to_string())),
            }
        }
        given.extend(self.read_environment(&defaults, environment, &mut problems));

        let mut merged = defaults.clone();
        let mut sources = BTreeMap::new();
        for setting in given {
            if find(&defaults, &setting.key).is_none() && !self.is_whole(&setting.key) {
                problems.push(problem(
                    &setting.key,
                    self.unknown(&defaults, &setting.key),
                    &setting.source,
                ));
                continue;
            }
            let is_url_list = URL_LISTS.contains(&&*setting.key);
            let value = match is_url_list {
                true => joined(setting.value),
                false => setting.value,
            };
            let mut alone = defaults.clone();
            set(&mut alone, &setting.key, value.clone());
            match extract::<S>(alone) {
                Ok(_) => {
                    set(&mut merged, &setting.key, value);
                    sources.insert(setting.key, setting.source);
                }
                // The original message would contain the value.
                Err(_) if self.secrets().any(|secret| secret.key == setting.key) => {
                    let message = match is_url_list {
                        true => "must be a text, in quotes, or a list of texts",
                        false => "must be a text, in quotes",
                    };
                    problems.push(problem(&setting.key, message.into(), &setting.source));
                }
                Err(message) => problems.push(problem(&setting.key, message, &setting.source)),
            }
        }

        let mut warnings = Vec::new();
        for secret in self.secrets() {
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
                    warnings.extend(
                        warning.map(|text| problem(secret.file, text, source(secret.file))),
                    );
                    sources.insert(secret.key.to_owned(), file);
                }
                Err(message) => problems.push(problem(secret.file, message, source(secret.file))),
            }
        }

        match extract::<S>(merged) {
            Ok(settings) => {
                let mut broken = Problems::default();
                settings.check(&mut broken);
                problems.extend(broken.into_vec());
                warnings.extend(settings.exposures());
                if problems.is_empty() {
                    Ok((settings, warnings))
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

    fn secrets(&self) -> impl Iterator<Item = &Secret> {
        SECRETS.iter().chain(self.secrets)
    }

    /// Returns true for tables and lists that a layer replaces as a whole.
    fn is_whole(&self, key: &str) -> bool {
        WHOLE.contains(&key) || self.whole.contains(&key)
    }

    /// Lists the leaves of a file's tables as dotted keys.
    fn flatten(&self, prefix: &str, dict: Dict, source: &str, into: &mut Vec<Setting>) {
        for (name, value) in dict {
            let key = if prefix.is_empty() {
                name
            } else {
                format!("{prefix}.{name}")
            };
            match value {
                Value::Dict(_, inner) if !self.is_whole(&key) => {
                    self.flatten(&key, inner, source, into);
                }
                value => into.push(Setting {
                    key,
                    value,
                    source: source.into(),
                }),
            }
        }
    }

    /// Reads the settings from the environment variables.
    ///
    /// Other programs may share the prefix, so a variable that names none of the sections is not an error.
    fn read_environment(
        &self,
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
                    // Variables for traces take precedence over variables for all signals.
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
                    if let Some(key) = self.shared_key(&name) {
                        if find(defaults, &key).is_none() {
                            continue;
                        }
                        (key, &mut shared)
                    } else if let Some(rest) = name.strip_prefix(&*self.prefix) {
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
            // A setting that is a text stays a text: a password of digits is not read as a number.
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

    /// The key that a variable with a shared prefix sets.
    fn shared_key(&self, name: &str) -> Option<String> {
        self.section_prefixes.iter().find_map(|(prefix, section)| {
            let rest = name.strip_prefix(prefix)?;
            Some(format!("{section}.{}", rest.to_lowercase()))
        })
    }

    /// Error message for an unknown key, with the most similar known key.
    fn unknown(&self, defaults: &Dict, key: &str) -> String {
        if let Some(reason) = unsupported::reason(key) {
            return format!("this option of Celery is not supported: {reason}");
        }
        let mut known = Vec::new();
        self.flatten("", defaults.clone(), "", &mut known);
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

/// Returns the message of a syntax error without the quoted lines of the file, which may contain a secret.
fn without_excerpt(message: &str) -> String {
    let is_excerpt = |line: &str| {
        line.trim_start_matches(|c: char| c.is_ascii_digit() || c == ' ')
            .starts_with('|')
    };
    let shown: Vec<_> = message
        .lines()
        .map(str::trim_end)
        .filter(|line| !line.is_empty() && !is_excerpt(line))
        .collect();
    shown.join(": ")
}

fn read(path: &Path) -> Result<Dict, String> {
    let text = std::fs::read_to_string(path).map_err(|e| format!("cannot read the file: {e}"))?;
    parse(&text)
}

/// Reads a value of type `T` from a table.
fn extract<T: DeserializeOwned>(dict: Dict) -> Result<T, String> {
    Value::from(dict)
        .deserialize()
        .map_err(|e| e.kind.to_string())
}

/// The setting that one of OpenTelemetry's own variables sets, with its value. None for a variable that is empty, which
/// counts as not set, that has no meaning here, or that the SDK reads itself.
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

/// Joins a list of texts by `;`. Another value is returned unchanged.
fn joined(value: Value) -> Value {
    let texts: Option<Vec<&str>> = value
        .as_array()
        .filter(|list| !list.is_empty())
        .map(|list| list.iter().map(Value::as_str).collect())
        .unwrap_or_default();
    match texts {
        Some(texts) => texts.join(";").into(),
        None => value,
    }
}

/// A text among the merged values; empty if the value is not a text.
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

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use secrecy::ExposeSecret;

    use super::*;
    use crate::settings::WorkerSettings;

    fn load(
        environment: impl IntoIterator<Item = (String, String)>,
    ) -> Result<WorkerSettings, SettingsError> {
        let loaded = WorkerSettings::source("TEST_").load(None, environment);
        loaded.map(|(settings, _)| settings)
    }

    fn traces(environment: &[(&str, &str)]) -> super::super::Traces {
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        load(environment.iter().map(owned)).unwrap().traces
    }

    fn load_file(text: &str) -> Result<WorkerSettings, SettingsError> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("settings.toml");
        std::fs::write(&path, text).unwrap();
        let loaded = WorkerSettings::source("TEST_").load(Some(&path), []);
        loaded.map(|(settings, _)| settings)
    }

    #[test]
    fn brokers_are_a_text_or_a_list() {
        for text in ["'amqp://a//;amqp://b//'", "['amqp://a//', 'amqp://b//']"] {
            let settings = load_file(&format!("[celery]\nbroker_url = {text}")).unwrap();
            assert_eq!(settings.celery.broker_url(), "amqp://a//;amqp://b//");
        }
        for text in ["['amqp://a//', 1]", "[]", "1"] {
            let error = load_file(&format!("[celery]\nbroker_url = {text}")).unwrap_err();
            assert!(error.to_string().contains("or a list of texts"), "{error}");
        }
    }

    #[test]
    fn schemes_for_redis_are_advised() {
        for (url, advice) in [
            ("valkey://h", "for Valkey it is redis"),
            ("redis+cluster://h", "Redis Cluster is not supported"),
        ] {
            let error = load_file(&format!("[celery]\nbroker_url = '{url}'")).unwrap_err();
            assert!(error.to_string().contains(advice), "{error}");
        }
    }

    #[test]
    fn unsupported_options_are_refused_with_a_reason() {
        let error = load_file("[celery]\ntimezone = 'Europe/Berlin'").unwrap_err();
        assert!(error.to_string().contains("written in UTC"), "{error}");
        for (option, reason) in [
            ("polling_interval = 1", "is not polled"),
            (
                "socket_keepalive_options = { 1 = 2 }",
                "are checked every few seconds",
            ),
            ("no_such_option = 1", "unknown key"),
        ] {
            let text = format!("[celery.broker_transport_options]\n{option}");
            let error = load_file(&text).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
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
    fn specific_trace_variables_override_general_ones() {
        let general = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://general:4318");
        let own = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://traces/x");
        let ours = ("TEST_TRACES__ENDPOINT", "http://ours/y");
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
    fn invalid_collector_is_reported() {
        let said = |name: &str, value: &str| {
            let set = [(format!("TEST_TRACES__{name}"), value.to_owned())];
            load(set).unwrap_err().to_string()
        };
        for (name, value, expected) in [
            (
                "ENDPOINT",
                "grpc://c:4317",
                "scheme `grpc` is not supported",
            ),
            (
                "ENDPOINT",
                "http://u:s3cret@c/",
                "traces.endpoint: must contain no login",
            ),
            ("HEADERS", "s3cret", "traces.headers: header 1 has no `=`"),
            ("RATIO", "1.5", "traces.ratio: must be between 0 and 1"),
            ("TIMEOUT", "1ms", "traces.timeout: must be 100ms or more"),
        ] {
            let error = said(name, value);
            assert!(
                error.contains(expected) && !error.contains("s3cret"),
                "{error}"
            );
        }
    }
}
