//! The page of one link.

use askama::Template;
use axum::http::StatusCode;
use axum::response::Response;

use super::super::model::{LinkState, LinkThroughput, Overview, Throughput};
use super::plot::Plot;
use super::{Page, answer, filters};
use crate::transfer::link::LinkName;

#[derive(Template)]
#[template(path = "link.html")]
struct LinkPage<'a> {
    page: Page<'a>,
    origin: &'a str,
    destination: &'a str,
    link: Option<&'a LinkState>,
    plots: Vec<Plot<'a>>,
}

/// Renders the page of a link. `throughput` has the periods to plot.
pub(super) fn render(
    base: &str,
    name: &LinkName,
    overview: &Overview,
    throughput: &[Throughput],
) -> Response {
    let is_it =
        |origin: &str, destination: &str| origin == name.origin && destination == name.destination;
    let empty = LinkThroughput {
        origin: name.origin.clone(),
        destination: name.destination.clone(),
        buckets: Vec::new(),
    };
    let mut plots = Vec::new();
    for period in throughput {
        let found = period
            .links
            .iter()
            .find(|link| is_it(&link.origin, &link.destination));
        match Plot::of(period, found.unwrap_or(&empty), 0) {
            Ok(plot) => plots.push(plot),
            Err(error) => tracing::error!(%error, "cannot draw a plot"),
        }
    }
    let link = overview
        .links
        .iter()
        .find(|link| is_it(&link.origin, &link.destination));
    let page = LinkPage {
        page: Page { base, current: "" },
        origin: &name.origin,
        destination: &name.destination,
        link,
        plots,
    };
    answer(StatusCode::OK, page.render())
}
