//! The status page: the state of the whole system for operators, as pages and as JSON.
//!
//! Nothing here changes anything: the database is opened for reading only, every method but GET and HEAD is refused, and
//! there are no cookies. All viewers share one set of queries, see [`snapshots`].
//!
//! | module | contents |
//! | --- | --- |
//! | [`model`] | the data of the pages and of the API |
//! | [`snapshots`] | the data as they are read from the database, for all viewers |
//! | [`overview`] | the overview from these data |
//! | [`search`] | the parameters of a search |
//! | [`api`] | the API and its description |
//! | [`pages`] | the pages as HTML |
//! | [`plots`] | the plots of the pages |
//! | [`events`] | changes of the overview, as server-sent events |
//! | [`assets`] | style sheet and script |
//! | [`server`] | token, headers, errors |

pub mod api;
mod assets;
pub mod error;
mod events;
pub mod model;
mod overview;
mod pages;
mod plots;
pub mod search;
mod server;
pub mod snapshots;

use std::sync::Arc;

use axum::Router;

use crate::settings::Settings;

use events::SectionCache;
pub use server::{BasePath, InvalidBasePath, Token, TokenError};
use snapshots::Snapshots;

/// State of the handlers.
#[derive(Debug)]
pub struct Web {
    snapshots: Snapshots,
    base_path: BasePath,
    token: Option<Token>,
    sections: SectionCache,
}

impl Web {
    /// Creates the state. The database is connected at the first request.
    #[must_use]
    pub fn new(settings: &Arc<Settings>, base_path: BasePath, token: Option<Token>) -> Arc<Self> {
        Arc::new(Self {
            snapshots: Snapshots::new(settings.clone()),
            base_path,
            token,
            sections: SectionCache::default(),
        })
    }

    /// The data.
    #[must_use]
    pub fn snapshots(&self) -> &Snapshots {
        &self.snapshots
    }

    /// The rendered sections of the overview.
    fn sections(&self) -> &SectionCache {
        &self.sections
    }

    /// Path below which a reverse proxy serves the pages; the prefix of every link.
    #[must_use]
    pub fn base_path(&self) -> &BasePath {
        &self.base_path
    }
}

/// Routes of the pages and of the API.
///
/// They exist below the base path and without it: a reverse proxy may pass the path on as it is, or without the base path.
pub fn router(web: Arc<Web>) -> Router {
    let mut routes = routes("");
    if !web.base_path.is_empty() {
        routes = routes.merge(self::routes(web.base_path.as_str()));
    }
    server::secured(routes, web)
}

fn routes(prefix: &str) -> Router<Arc<Web>> {
    api::routes(prefix).merge(pages::routes(prefix))
}
