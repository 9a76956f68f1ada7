//! The API: the data of the pages as JSON, and its description.

use std::sync::Arc;

use axum::Router;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, RawQuery, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde::Serialize;
use utoipa::OpenApi;
use utoipa::openapi::server::Server;

use super::Web;
use super::error::WebError;
use super::model::{
    ErrorMessage, Links, Overview, Period, Problems, Programs, Throughput, Transfer, Transfers,
};
use super::search::{Parameters, TransferSearch};
use crate::transfer::id::TransferId;

/// Description of the API.
#[derive(Debug, OpenApi)]
#[openapi(
    info(
        title = "ccat-transfer",
        description = "State of the transfers, as on the status page. All requests only read. Times are in UTC, sizes in \
                       bytes, rates in bytes per second. If the server has a token, each request must contain it as \
                       `Authorization: Bearer TOKEN`.",
        license(name = "MIT OR Apache-2.0")
    ),
    paths(overview, links, throughput, problems, programs, transfers, transfer)
)]
struct Description;

/// Routes of the API below `prefix`.
pub(super) fn routes(prefix: &str) -> Router<Arc<Web>> {
    let at = |path: &str| format!("{prefix}/api/v1/{path}");
    Router::new()
        .route(&at("overview"), get(overview))
        .route(&at("links"), get(links))
        .route(&at("throughput"), get(throughput))
        .route(&at("problems"), get(problems))
        .route(&at("programs"), get(programs))
        .route(&at("transfers"), get(transfers))
        .route(&at("transfers/{id}"), get(transfer))
        .route(&at("openapi.json"), get(openapi))
}

/// A response with a value as JSON.
pub(super) fn json(value: &impl Serialize) -> Response {
    let json = HeaderValue::from_static("application/json");
    match serde_json::to_vec(value) {
        Ok(body) => ([(header::CONTENT_TYPE, json)], body).into_response(),
        Err(error) => {
            tracing::error!(
                error = %error,
                "response of the API could not be written"
            );
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

/// State of the whole system.
#[utoipa::path(
    get,
    path = "/api/v1/overview",
    responses(
        (status = 200, description = "The state; without a database, that of the last time, and since when", body = Overview),
        (status = 401, description = "The request does not contain the token", body = ErrorMessage)
    )
)]
async fn overview(
    State(web): State<Arc<Web>>,
    RawQuery(query): RawQuery,
) -> Result<Response, WebError> {
    Parameters::parse(query.as_deref())?.only(&[])?;
    Ok(json(&*web.snapshots().overview().await))
}

/// State of the links.
#[utoipa::path(
    get,
    path = "/api/v1/links",
    responses((status = 200, description = "The links", body = Links))
)]
async fn links(
    State(web): State<Arc<Web>>,
    RawQuery(query): RawQuery,
) -> Result<Response, WebError> {
    Parameters::parse(query.as_deref())?.only(&[])?;
    let overview = web.snapshots().overview().await;
    Ok(json(&Links {
        at: overview.at,
        unreachable: overview.unreachable.clone(),
        links: overview.links.clone(),
    }))
}

/// Transfers that require an action or wait for another attempt, by cause.
#[utoipa::path(
    get,
    path = "/api/v1/problems",
    responses((status = 200, description = "The problems", body = Problems))
)]
async fn problems(
    State(web): State<Arc<Web>>,
    RawQuery(query): RawQuery,
) -> Result<Response, WebError> {
    Parameters::parse(query.as_deref())?.only(&[])?;
    let overview = web.snapshots().overview().await;
    Ok(json(&Problems {
        at: overview.at,
        unreachable: overview.unreachable.clone(),
        problems: overview.problems.clone(),
    }))
}

/// Workers and managers.
#[utoipa::path(
    get,
    path = "/api/v1/programs",
    responses((status = 200, description = "The workers and managers of the last days", body = Programs))
)]
async fn programs(
    State(web): State<Arc<Web>>,
    RawQuery(query): RawQuery,
) -> Result<Response, WebError> {
    Parameters::parse(query.as_deref())?.only(&[])?;
    let overview = web.snapshots().overview().await;
    Ok(json(&Programs {
        at: overview.at,
        unreachable: overview.unreachable.clone(),
        programs: overview.programs.clone(),
    }))
}

/// Packages that arrived, and failures, over a period.
#[utoipa::path(
    get,
    path = "/api/v1/throughput",
    params(
        ("period" = Option<Period>, Query, description = "Period, which ends now; `24h` without it"),
        ("origin" = Option<String>, Query, description = "Short name of the site to copy from"),
        ("destination" = Option<String>, Query, description = "Short name of the site to copy to")
    ),
    responses(
        (status = 200, description = "The packages by link and step", body = Throughput),
        (status = 400, description = "A parameter has a wrong value", body = ErrorMessage),
        (status = 503, description = "The database cannot be read", body = ErrorMessage)
    )
)]
async fn throughput(
    State(web): State<Arc<Web>>,
    RawQuery(query): RawQuery,
) -> Result<Response, WebError> {
    let parameters =
        Parameters::parse(query.as_deref())?.only(&["period", "origin", "destination"])?;
    let period = match parameters.value("period")? {
        None => Period::Day,
        Some(text) => text
            .parse()
            .map_err(|error| WebError::BadRequest(format!("period: {error}")))?,
    };
    let (origin, destination) = (
        parameters.value("origin")?,
        parameters.value("destination")?,
    );
    let throughput = web
        .snapshots()
        .throughput(period, origin, destination)
        .await?;
    Ok(json(&throughput))
}

/// Search for transfers, the newest first.
#[utoipa::path(
    get,
    path = "/api/v1/transfers",
    params(
        ("id" = Option<String>, Query, description = "Ids, with commas between them, at most 200"),
        ("package" = Option<String>, Query, description = "Part of the file name, in upper or lower case"),
        ("origin" = Option<String>, Query, description = "Site, or site/location, to copy from"),
        ("destination" = Option<String>, Query, description = "Site, or site/location, to copy to"),
        ("status" = Option<String>, Query, description = "PENDING, SCHEDULED, IN_PROGRESS, COMPLETED or FAILED; several with commas between them"),
        ("error" = Option<String>, Query, description = "Error code of the latest attempt"),
        ("since" = Option<String>, Query, description = "Last change at this time or later: a time as in RFC 3339, a day, or a duration before now such as `24h`"),
        ("until" = Option<String>, Query, description = "Last change before this time"),
        ("cursor" = Option<String>, Query, description = "`next_cursor` of the previous part"),
        ("limit" = Option<u64>, Query, description = "Maximum number of transfers, 1 to 200; 50 without it")
    ),
    responses(
        (status = 200, description = "A part of the transfers", body = Transfers),
        (status = 400, description = "A parameter has a wrong value", body = ErrorMessage),
        (status = 503, description = "The database cannot be read", body = ErrorMessage)
    )
)]
async fn transfers(
    State(web): State<Arc<Web>>,
    RawQuery(query): RawQuery,
) -> Result<Response, WebError> {
    let parameters = Parameters::parse(query.as_deref())?.only(&TransferSearch::PARAMETERS)?;
    let search = TransferSearch::read(&parameters)?;
    Ok(json(&*web.snapshots().search(&search).await?))
}

/// One transfer with its whole history.
#[utoipa::path(
    get,
    path = "/api/v1/transfers/{id}",
    params(("id" = TransferId, Path, description = "Id of the transfer")),
    responses(
        (status = 200, description = "The transfer", body = Transfer),
        (status = 400, description = "The id is not a number", body = ErrorMessage),
        (status = 404, description = "The transfer does not exist", body = ErrorMessage),
        (status = 503, description = "The database cannot be read", body = ErrorMessage)
    )
)]
async fn transfer(
    State(web): State<Arc<Web>>,
    id: Result<Path<String>, PathRejection>,
    RawQuery(query): RawQuery,
) -> Result<Response, WebError> {
    Parameters::parse(query.as_deref())?.only(&[])?;
    let id = transfer_id(id)?;
    let found = web.snapshots().transfer(id).await?;
    let found = found.ok_or_else(|| WebError::NotFound(format!("there is no transfer {id}")))?;
    Ok(json(&*found))
}

/// The id in the path of a request.
pub(super) fn transfer_id(id: Result<Path<String>, PathRejection>) -> Result<TransferId, WebError> {
    let id = id.ok().and_then(|Path(id)| id.parse().ok());
    id.ok_or_else(|| WebError::BadRequest("the id of a transfer is a whole number".to_owned()))
}

/// The description of the API.
async fn openapi(State(web): State<Arc<Web>>) -> Response {
    let mut description = Description::openapi();
    description.info.version = crate::PROGRAM.version.to_owned();
    if !web.base_path().is_empty() {
        description.servers = Some(vec![Server::new(web.base_path().as_str())]);
    }
    json(&description)
}
