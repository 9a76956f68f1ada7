//! Conversion between results and rows of the table.

use chrono::{DateTime, NaiveDateTime, Utc};
use sea_orm::{DbBackend, DbErr, QueryResult, TryGetable, Value as Cell};
use serde_json::{Map, Value, json};

use super::tables::Layout;
use super::{Database, NAME};
use crate::clock;
use crate::offload::{is_large, offload};
use celery_protocol::content::Serializer;
use celery_protocol::isoformat;
use celery_protocol::result::{self, Extended, NotReadable, ResultMeta, State};

/// Format of a time in SQLite, as SQLAlchemy writes it.
const SQLITE_TIME: &str = "%Y-%m-%d %H:%M:%S%.6f";

impl Database {
    /// The cell for a time: without time zone, in UTC.
    pub(super) fn time(&self, time: Option<DateTime<Utc>>) -> Cell {
        let naive = time.map(|time| time.naive_utc());
        match self.backend() {
            DbBackend::Postgres => naive.into(),
            _ => naive
                .map(|naive| naive.format(SQLITE_TIME).to_string())
                .into(),
        }
    }

    /// The cells of a result, without the columns that do not exist in the table.
    pub(super) fn cells(&self, meta: &ResultMeta, layout: &Layout) -> Vec<(&'static str, Cell)> {
        let mapping = offload(is_large(meta.values()), || meta.to_json());
        let bytes = |value: &Value| {
            let written = offload(is_large([value]), || self.serializer.write(value));
            Cell::from(written)
        };
        let date_done = match meta.state {
            // As SQLAlchemy's `onupdate` does for an existing row with STARTED. `cleanup` uses this time.
            State::Retry { .. } | State::Custom { .. } => Some(clock::now()),
            _ => meta.date_done,
        };
        let mut cells = vec![
            ("task_id", meta.task_id.clone().into()),
            ("status", meta.state.name().into()),
            ("result", bytes(&mapping["result"])),
            ("date_done", self.time(date_done)),
            (
                "traceback",
                mapping["traceback"].as_str().map(storable).into(),
            ),
            (
                "children",
                match meta.children.is_empty() {
                    true => Cell::Bytes(None),
                    false => bytes(&json!(meta.children)),
                },
            ),
        ];
        let extended = meta.extended.as_ref();
        let text = |of: fn(&Extended) -> Option<&str>| -> Cell {
            let text = extended.and_then(of);
            text.map(|text| storable(text).chars().take(NAME).collect::<String>())
                .into()
        };
        let json = |of: fn(&Extended) -> &Value| match extended {
            Some(extended) => bytes(of(extended)),
            None => Cell::Bytes(None),
        };
        cells.extend([
            ("name", text(|extended| Some(&extended.name))),
            ("args", json(|extended| &extended.args)),
            ("kwargs", json(|extended| &extended.kwargs)),
            ("worker", text(|extended| Some(&extended.worker))),
            (
                "retries",
                extended
                    .map(|extended| i32::try_from(extended.retries).unwrap_or(i32::MAX))
                    .into(),
            ),
            ("queue", text(|extended| extended.queue.as_deref())),
        ]);
        // A state without stamps keeps the stamps that an earlier state has stored.
        if let Some(stamps) = extended.and_then(stamps) {
            cells.push(("stamps", bytes(&stamps)));
        }
        cells.retain(|(column, _)| layout.columns.contains(*column));
        cells
    }

    /// The mapping for a row, as clients of Celery expect it.
    pub(super) fn mapping(&self, row: &QueryResult, layout: &Layout) -> Result<Value, RowError> {
        let serializer = self.serializer;
        let row = Row {
            row,
            layout,
            serializer,
        };
        let date_done = match self.backend() {
            DbBackend::Postgres => row.get::<NaiveDateTime>("date_done")?,
            _ => row
                .get::<String>("date_done")?
                .and_then(|text| NaiveDateTime::parse_from_str(&text, "%Y-%m-%d %H:%M:%S%.f").ok()),
        };
        let mut mapping = Map::new();
        let mut put = |key: &str, value: Value| mapping.insert(key.to_owned(), value);
        put("status", json!(row.get::<String>("status")?));
        put("result", row.value("result")?);
        put("traceback", json!(row.get::<String>("traceback")?));
        put(
            "children",
            match row.value("children")? {
                Value::Null => json!([]),
                children => children,
            },
        );
        put(
            "date_done",
            json!(date_done.map(|naive| isoformat(naive.and_utc()))),
        );
        if let Some(name) = row.get::<String>("name")? {
            put("name", json!(name));
            put("args", row.value("args")?);
            put("kwargs", row.value("kwargs")?);
            put("worker", json!(row.get::<String>("worker")?));
            put("retries", json!(row.get::<i32>("retries")?));
            put("queue", json!(row.get::<String>("queue")?));
            if let Value::Object(mut noted) = row.value("stamps")? {
                put(
                    "stamped_headers",
                    noted.remove("stamped_headers").unwrap_or_default(),
                );
                if let Some(Value::Object(stamps)) = noted.remove("stamps") {
                    for (header, stamp) in stamps {
                        put(&header, stamp);
                    }
                }
            }
        }
        put("task_id", json!(row.get::<String>("task_id")?));
        Ok(Value::Object(mapping))
    }
}

/// A row of the table of tasks.
struct Row<'a> {
    row: &'a QueryResult,
    layout: &'a Layout,
    serializer: Serializer,
}

pub(super) enum RowError {
    Database(DbErr),
    NotReadable(NotReadable),
}

impl From<DbErr> for RowError {
    fn from(error: DbErr) -> Self {
        Self::Database(error)
    }
}

impl Row<'_> {
    /// Value of a cell; none if the table does not have the column.
    fn get<T: TryGetable>(&self, column: &str) -> Result<Option<T>, DbErr> {
        match self.layout.columns.contains(column) {
            true => self.row.try_get("", column),
            false => Ok(None),
        }
    }

    /// The value in a cell; null for an empty cell.
    fn value(&self, column: &str) -> Result<Value, RowError> {
        match self.get::<Vec<u8>>(column)? {
            Some(bytes) => result::decode(&bytes, self.serializer).map_err(RowError::NotReadable),
            None => Ok(Value::Null),
        }
    }
}

/// `{"stamped_headers": …, "stamps": {…}}` for a task with stamps.
fn stamps(extended: &Extended) -> Option<Value> {
    let headers = extended.stamps.get("stamped_headers")?;
    let mut stamps = extended.stamps.clone();
    stamps.remove("stamped_headers");
    Some(json!({"stamped_headers": headers, "stamps": stamps}))
}

/// Removes NUL from a text, which PostgreSQL cannot store.
fn storable(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}
