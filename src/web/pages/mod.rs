//! The pages as HTML, from the templates in `templates/`.
//!
//! All values are escaped by the templates. Texts from outside also pass the filter `clean`, which shows their invisible
//! characters. The pages are complete without a script; with one, they follow [`super::events`].

use std::sync::Arc;

use askama::Template;
use axum::Router;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, RawQuery, State};
use axum::http::StatusCode;
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;

use super::Web;
use super::api::transfer_id;
use super::error::WebError;
use super::model::Period;
use super::search::{Parameters, TransferSearch};
use super::{assets, events};
use crate::transfer::link::LinkName;

#[expect(unreachable_pub, reason = "the macro of askama makes public items")]
mod filters;
mod link;
mod overview;
mod plot;
mod transfer;
mod transfers;

pub(super) use overview::Sections;
use transfers::SearchForm;

/// Values that every page needs.
#[derive(Debug, Clone, Copy)]
struct Page<'a> {
    /// Path before all paths of the page, without a slash at its end.
    base: &'a str,
    /// Entry of the navigation that is this page.
    current: &'static str,
}

/// Routes of the pages below `prefix`.
pub(super) fn routes(prefix: &str) -> Router<Arc<Web>> {
    let at = |path: &str| format!("{prefix}{path}");
    Router::new()
        .route(&at("/"), get(overview_page))
        .route(&at("/transfers"), get(search_page))
        .route(&at("/transfers/{id}"), get(transfer_page))
        .route(&at("/links/{origin}/{destination}"), get(link_page))
        .route(&at("/events"), get(events_of_overview))
        .route(&at("/assets/page.css"), get(assets::style))
        .route(&at("/assets/page.js"), get(assets::script))
}

async fn overview_page(State(web): State<Arc<Web>>) -> Response {
    let (overview, day) = tokio::join!(
        web.snapshots().overview(),
        web.snapshots().throughput(Period::Day, None, None)
    );
    let base = web.base_path().as_str();
    let sections = match web.sections().of(base, &overview) {
        Ok(sections) => sections,
        Err(error) => return not_rendered(&error),
    };
    overview::render(base, &overview, &sections, day.ok().as_ref())
}

async fn events_of_overview(State(web): State<Arc<Web>>) -> Response {
    let read = move || {
        let web = web.clone();
        async move {
            let overview = web.snapshots().overview().await;
            let sections = web.sections().of(web.base_path().as_str(), &overview);
            sections.inspect_err(|error| log_failure(error)).ok()
        }
    };
    events::stream(read).into_response()
}

async fn search_page(State(web): State<Arc<Web>>, RawQuery(query): RawQuery) -> Response {
    let search = Parameters::parse(query.as_deref())
        .and_then(|parameters| parameters.only(&TransferSearch::PARAMETERS))
        .and_then(|parameters| TransferSearch::read(&parameters));
    let found = match search {
        Ok(search) => web.snapshots().search(&search).await,
        Err(error) => Err(error),
    };
    let form = SearchForm::parse(query.as_deref().unwrap_or_default());
    transfers::render(web.base_path().as_str(), &form, found.as_deref())
}

async fn transfer_page(
    State(web): State<Arc<Web>>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Response, WebError> {
    let id = transfer_id(id)?;
    let found = web.snapshots().transfer(id).await?;
    let found = found.ok_or_else(|| WebError::NotFound(format!("there is no transfer {id}")))?;
    Ok(transfer::render(web.base_path().as_str(), &found))
}

async fn link_page(
    State(web): State<Arc<Web>>,
    name: Result<Path<(String, String)>, PathRejection>,
) -> Result<Response, WebError> {
    let unknown = || WebError::NotFound("there is no such link".to_owned());
    let Path((origin, destination)) = name.map_err(|_| unknown())?;
    let name = LinkName {
        origin,
        destination,
    };
    let snapshots = web.snapshots();
    let throughput =
        |period| snapshots.throughput(period, Some(&name.origin), Some(&name.destination));
    let (overview, day, week, month) = tokio::join!(
        snapshots.overview(),
        throughput(Period::Day),
        throughput(Period::Week),
        throughput(Period::Month)
    );
    let periods: Vec<_> = [day, week, month].into_iter().flatten().collect();
    let is_known = overview.links.iter().any(|link| link.name() == name)
        || periods.iter().any(|period| !period.links.is_empty());
    // Without a database, nothing is known.
    if !is_known && overview.unreachable.is_none() {
        return Err(unknown());
    }
    Ok(link::render(
        web.base_path().as_str(),
        &name,
        &overview,
        &periods,
    ))
}

/// A page with a message instead of data.
#[derive(Template)]
#[template(path = "error.html")]
struct ErrorPage<'a> {
    page: Page<'a>,
    title: &'a str,
    text: &'a str,
}

/// Renders a page that explains why the requested one cannot be shown.
pub(super) fn error(base: &str, status: StatusCode, text: &str) -> Response {
    let title = match status {
        StatusCode::BAD_REQUEST => "This address has a wrong value",
        StatusCode::NOT_FOUND => "Not found",
        StatusCode::UNAUTHORIZED => "A token is required",
        StatusCode::SERVICE_UNAVAILABLE => "The database does not answer",
        _ => "The page cannot be shown",
    };
    let page = Page { base, current: "" };
    answer(status, ErrorPage { page, title, text }.render())
}

/// The answer with a rendered page.
fn answer(status: StatusCode, rendered: askama::Result<String>) -> Response {
    match rendered {
        Ok(html) => (status, Html(html)).into_response(),
        Err(error) => not_rendered(&error),
    }
}

fn not_rendered(error: &askama::Error) -> Response {
    log_failure(error);
    StatusCode::INTERNAL_SERVER_ERROR.into_response()
}

fn log_failure(error: &dyn std::error::Error) {
    tracing::error!(%error, "page could not be rendered");
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, reason = "tests")]
mod tests;
