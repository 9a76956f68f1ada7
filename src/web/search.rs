//! Parameters of requests.

use std::collections::BTreeSet;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use entity::{DatabaseEnum as _, Status};
use url::form_urlencoded;

use super::error::WebError;
use crate::transfer::id::TransferId;
use crate::transfer::repository::{Filter, Place, Search};

/// Maximum length of a value in characters.
const MAX_VALUE: usize = 2_000;

/// Maximum number of ids in a search.
const MAX_IDS: usize = 200;

/// Maximum number of transfers in one part of a result.
const MAX_LIMIT: u64 = 200;

/// Number of transfers in one part of a result, if the request does not say it.
const LIMIT: u64 = 50;

/// Seconds from 1970 to the end of the year 9999.
const LAST_SECOND: i64 = 253_402_300_799;

/// Time after which a search ends with what it has found.
const SEARCH_TIME: Duration = Duration::from_millis(40);

/// Parameters of a request: those with a value that is not empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Parameters(Vec<(String, String)>);

impl Parameters {
    /// Parses the part of a URL behind `?`.
    ///
    /// # Errors
    /// A value is too long, or contains a character that no database stores.
    pub fn parse(query: Option<&str>) -> Result<Self, WebError> {
        let query = query.unwrap_or_default();
        let mut parameters = Vec::new();
        for (name, value) in form_urlencoded::parse(query.as_bytes()) {
            let value = value.trim();
            if value.is_empty() {
                continue;
            }
            if value.chars().count() > MAX_VALUE {
                return Err(bad(&name, value, "it is too long"));
            }
            if value.contains('\0') {
                return Err(bad(&name, value, "it contains the character NUL"));
            }
            parameters.push((name.into_owned(), value.to_owned()));
        }
        Ok(Self(parameters))
    }

    /// Refuses parameters with other names.
    ///
    /// # Errors
    /// A parameter has another name.
    pub fn only(self, known: &[&str]) -> Result<Self, WebError> {
        match self.0.iter().find(|(name, _)| !known.contains(&&**name)) {
            None => Ok(self),
            Some((name, _)) => Err(WebError::BadRequest(format!(
                "there is no parameter `{}`; the parameters are {}",
                short(name),
                known.join(", ")
            ))),
        }
    }

    /// Returns the value of a parameter that may be given once.
    ///
    /// # Errors
    /// It is given more than once.
    pub fn value(&self, name: &str) -> Result<Option<&str>, WebError> {
        let mut values = self.all(name);
        let value = values.next();
        match values.next() {
            None => Ok(value),
            Some(_) => Err(WebError::BadRequest(format!(
                "the parameter `{name}` is given more than once"
            ))),
        }
    }

    /// Returns the values of a parameter that may be given several times, or with commas between the values.
    pub fn values(&self, name: &str) -> impl Iterator<Item = &str> {
        let values = self.all(name).flat_map(|value| value.split(','));
        values.map(str::trim).filter(|value| !value.is_empty())
    }

    fn all(&self, name: &str) -> impl Iterator<Item = &str> {
        let named = self.0.iter().filter(move |(other, _)| other == name);
        named.map(|(_, value)| value.as_str())
    }
}

/// A point of time in a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Moment {
    At(DateTime<Utc>),
    Ago(Duration),
}

impl Moment {
    fn time(self, now: DateTime<Utc>) -> DateTime<Utc> {
        let time = match self {
            Self::At(time) => time,
            Self::Ago(age) => TimeDelta::from_std(age)
                .ok()
                .and_then(|age| now.checked_sub_signed(age))
                .unwrap_or(DateTime::UNIX_EPOCH),
        };
        // The calendars of the databases are shorter than chrono's.
        let last = DateTime::from_timestamp(LAST_SECOND, 0).unwrap_or(DateTime::UNIX_EPOCH);
        time.clamp(DateTime::UNIX_EPOCH, last)
    }
}

/// A search for transfers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct TransferSearch {
    ids: BTreeSet<TransferId>,
    package: Option<String>,
    origin: Option<Place>,
    destination: Option<Place>,
    statuses: Vec<&'static str>,
    error: Option<String>,
    since: Option<Moment>,
    until: Option<Moment>,
    cursor: Option<TransferId>,
    limit: Option<u64>,
}

impl TransferSearch {
    /// Names of the parameters.
    pub const PARAMETERS: [&str; 10] = [
        "id",
        "package",
        "origin",
        "destination",
        "status",
        "error",
        "since",
        "until",
        "cursor",
        "limit",
    ];

    /// Reads the parameters of a search.
    ///
    /// # Errors
    /// A parameter has a value that it cannot have.
    pub fn read(parameters: &Parameters) -> Result<Self, WebError> {
        let id = |name: &str, text: &str| -> Result<TransferId, WebError> {
            text.parse()
                .map_err(|_| bad(name, text, "an id is a whole number"))
        };
        let ids: BTreeSet<_> = parameters
            .values("id")
            .map(|text| id("id", text))
            .collect::<Result<_, _>>()?;
        if ids.len() > MAX_IDS {
            return Err(WebError::BadRequest(format!(
                "`id` has {} values; at most {MAX_IDS} are allowed",
                ids.len()
            )));
        }
        let place = |name: &str| -> Result<Option<Place>, WebError> {
            let text = parameters.value(name)?;
            text.map(|text| text.parse())
                .transpose()
                .map_err(|error| WebError::BadRequest(format!("{name}: {error}")))
        };
        let text = |name: &str| Ok::<_, WebError>(parameters.value(name)?.map(str::to_owned));
        let moment = |name: &str| {
            let text = parameters.value(name)?;
            text.map(|text| parse_moment(name, text)).transpose()
        };
        let limit = parameters.value("limit")?.map(|text| {
            let limit = text.parse().ok();
            limit
                .filter(|limit| (1..=MAX_LIMIT).contains(limit))
                .ok_or_else(|| bad("limit", text, "it is a number from 1 to 200"))
        });
        let mut statuses: Vec<_> = parameters
            .values("status")
            .map(|text| parse_status(text).map(Status::name))
            .collect::<Result<_, _>>()?;
        statuses.sort_unstable();
        statuses.dedup();
        let cursor = parameters.value("cursor")?;
        Ok(Self {
            ids,
            package: text("package")?,
            origin: place("origin")?,
            destination: place("destination")?,
            statuses,
            error: text("error")?,
            since: moment("since")?,
            until: moment("until")?,
            cursor: cursor.map(|text| id("cursor", text)).transpose()?,
            limit: limit.transpose()?,
        })
    }

    /// The request to the repository, with times relative to `now`.
    pub(super) fn request(&self, now: DateTime<Utc>) -> Search {
        let ids = (!self.ids.is_empty()).then(|| self.ids.iter().copied().collect());
        let statuses = Status::ALL
            .iter()
            .copied()
            .filter(|status| self.statuses.contains(&status.name()));
        Search {
            filter: Filter {
                ids,
                file_name: self.package.clone(),
                origin: self.origin.clone(),
                destination: self.destination.clone(),
                statuses: statuses.collect(),
                error_code: self.error.clone(),
                changed_from: self.since.map(|since| since.time(now)),
                changed_before: self.until.map(|until| until.time(now)),
                ..Filter::default()
            },
            below: self.cursor,
            limit: self.limit.unwrap_or(LIMIT),
            time: SEARCH_TIME,
        }
    }
}

fn parse_status(text: &str) -> Result<Status, WebError> {
    let spelling = text.replace('-', "_");
    Status::from_label(&spelling).ok_or_else(|| {
        let names: Vec<_> = Status::ALL.iter().map(|status| status.name()).collect();
        bad(
            "status",
            text,
            &format!("it is one of {}", names.join(", ")),
        )
    })
}

fn parse_moment(name: &str, text: &str) -> Result<Moment, WebError> {
    // A blank stands for the `+` of an offset that was not encoded in the URL.
    let with_sign = text.replace(' ', "+");
    if let Ok(time) = DateTime::parse_from_rfc3339(&with_sign) {
        return Ok(Moment::At(time.to_utc()));
    }
    // The value of an input field of a page, in UTC.
    for format in ["%Y-%m-%dT%H:%M", "%Y-%m-%dT%H:%M:%S"] {
        if let Ok(time) = chrono::NaiveDateTime::parse_from_str(text, format) {
            return Ok(Moment::At(time.and_utc()));
        }
    }
    if let Ok(day) = text.parse::<chrono::NaiveDate>() {
        return Ok(Moment::At(day.and_time(chrono::NaiveTime::MIN).and_utc()));
    }
    humantime::parse_duration(text)
        .map(Moment::Ago)
        .map_err(|_| {
            bad(
                name,
                text,
                "it is a time such as 2026-11-30T18:00:00Z, a day such as 2026-11-30, or a duration before now such as 24h",
            )
        })
}

/// Error for a value, with the value's beginning.
fn bad(name: &str, value: &str, rule: &str) -> WebError {
    WebError::BadRequest(format!(
        "`{}` cannot be `{}`: {rule}",
        short(name),
        short(value)
    ))
}

/// The beginning of a text from a request, in one line.
fn short(text: &str) -> String {
    let beginning: String = text.chars().take(60).collect();
    crate::display::clean(&beginning).into_owned()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    fn read(query: &str) -> Result<TransferSearch, WebError> {
        TransferSearch::read(&Parameters::parse(Some(query))?.only(&TransferSearch::PARAMETERS)?)
    }

    #[test]
    fn all_parameters_are_read() {
        let now = "2026-12-01T12:00:00Z".parse().unwrap();
        let query = "id=3,1&id=2&package=a%2Bb&origin=ccat&destination=cologne/buffer&status=failed,in-progress\
                     &error=stalled&since=24h&until=2026-12-01T10:00:00%2B01:00&cursor=9&limit=7";
        let search = read(query).unwrap().request(now);
        let ids: Vec<_> = search
            .filter
            .ids
            .unwrap()
            .iter()
            .map(|id| id.get())
            .collect();
        assert_eq!(ids, [1, 2, 3]);
        assert_eq!(search.filter.file_name.unwrap(), "a+b");
        assert_eq!(search.filter.origin.unwrap().to_string(), "ccat");
        assert_eq!(
            search.filter.destination.unwrap().to_string(),
            "cologne/buffer"
        );
        assert_eq!(search.filter.statuses, [Status::InProgress, Status::Failed]);
        assert_eq!(search.filter.error_code.unwrap(), "stalled");
        let time = |time: Option<DateTime<Utc>>| time.unwrap().to_rfc3339();
        assert_eq!(
            time(search.filter.changed_from),
            "2026-11-30T12:00:00+00:00"
        );
        assert_eq!(
            time(search.filter.changed_before),
            "2026-12-01T09:00:00+00:00"
        );
        assert_eq!((search.below.unwrap().get(), search.limit), (9, 7));
    }

    #[test]
    fn empty_values_are_ignored() {
        assert_eq!(
            read("id=&package=+&status=,&since=").unwrap(),
            read("").unwrap()
        );
    }

    #[rstest]
    #[case("id=x")]
    #[case("id=99999999999999999999")]
    #[case("status=done")]
    #[case("origin=/a")]
    #[case("since=yesterday")]
    #[case("since=2026-13-01T00:00:00Z")]
    #[case("limit=0")]
    #[case("limit=201")]
    #[case("limit=1&limit=2")]
    #[case("cursor=a")]
    #[case("package=a%00b")]
    #[case("colour=red")]
    fn wrong_values_are_explained(#[case] query: &str) {
        assert!(
            matches!(read(query), Err(WebError::BadRequest(_))),
            "{query}"
        );
    }

    proptest! {
        #[test]
        fn any_query_is_read_without_panic(query in "\\PC{0,80}", name in 0_usize..10, value in "\\PC{0,40}") {
            let _ = read(&query);
            let name = TransferSearch::PARAMETERS[name];
            let encoded: String = form_urlencoded::byte_serialize(value.as_bytes()).collect();
            if let Ok(search) = read(&format!("{name}={encoded}")) {
                let _ = search.request(crate::clock::now());
            }
        }
    }
}
