//! The sections of the overview as server-sent events.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::response::sse::{Event, KeepAlive, Sse};
use futures_util::Stream;
use futures_util::stream::unfold;
use tokio::time::sleep;

use super::model::Overview;
use super::pages::Sections;

/// Pause between two looks at the data.
const INTERVAL: Duration = Duration::from_secs(2);
/// Interval of the comments that show both sides that the connection exists.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// The rendered sections of the latest overview, for all viewers.
#[derive(Debug, Default)]
pub(super) struct SectionCache {
    latest: Mutex<Option<(Arc<Overview>, Arc<Sections>)>>,
}

impl SectionCache {
    /// Returns the sections of an overview; renders them only for a new one.
    ///
    /// # Errors
    /// A template cannot be rendered.
    pub(super) fn of(&self, base: &str, overview: &Arc<Overview>) -> askama::Result<Arc<Sections>> {
        let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, sections)) = &*latest
            && Arc::ptr_eq(of, overview)
        {
            return Ok(Arc::clone(sections));
        }
        let sections = Arc::new(Sections::render(base, overview)?);
        *latest = Some((Arc::clone(overview), Arc::clone(&sections)));
        Ok(sections)
    }
}

/// The changes that one viewer has not received yet.
struct Viewer<F> {
    read: F,
    sent: Option<Arc<Sections>>,
    waiting: VecDeque<Event>,
}

/// Sends each section when it has changed, and all of them at first. `read` returns the current sections; `None` skips
/// a round.
pub(super) fn stream<F, R>(read: F) -> Sse<impl Stream<Item = Result<Event, Infallible>>>
where
    F: Fn() -> R + Send + 'static,
    R: Future<Output = Option<Arc<Sections>>> + Send,
{
    let viewer = Viewer {
        read,
        sent: None,
        waiting: VecDeque::new(),
    };
    let events = unfold(viewer, |mut viewer| async move {
        loop {
            if let Some(event) = viewer.waiting.pop_front() {
                return Some((Ok(event), viewer));
            }
            if viewer.sent.is_some() {
                sleep(INTERVAL).await;
            }
            match (viewer.read)().await {
                Some(sections) => viewer.add(sections),
                None => sleep(INTERVAL).await,
            }
        }
    });
    Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE))
}

impl<F> Viewer<F> {
    fn add(&mut self, sections: Arc<Sections>) {
        let sent = self.sent.as_ref().map(|sent| sent.by_id());
        for (number, (id, html)) in sections.by_id().into_iter().enumerate() {
            let is_known = sent.is_some_and(|sent| sent[number].1 == html);
            if !is_known {
                // Texts from outside contain no carriage returns, since those are control characters.
                let html = html.replace('\r', "");
                self.waiting
                    .push_back(Event::default().event(id).data(html));
            }
        }
        self.sent = Some(sections);
    }
}
