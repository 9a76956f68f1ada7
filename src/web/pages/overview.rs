//! The page that answers if the data arrives, and its sections, which also travel as events.

use std::sync::Arc;

use askama::Template;
use axum::http::StatusCode;
use axum::response::Response;

use super::super::model::{
    Level, Overview, ProblemGroup, ProgramCondition, ProgramState, Throughput,
};
use super::plot::Plot;
use super::{Page, answer, filters};

/// Programs that have ended are shown up to this number, the last first.
const SHOWN_ENDED: usize = 5;

/// The sections of the page that change while it is open.
#[derive(Debug, Clone)]
pub(in crate::web) struct Sections {
    verdict: Arc<str>,
    problems: Arc<str>,
    running: Arc<str>,
    links: Arc<str>,
    programs: Arc<str>,
    counts: Arc<str>,
}

impl Sections {
    /// Renders the sections.
    ///
    /// # Errors
    /// A template cannot be rendered.
    pub(in crate::web) fn render(base: &str, overview: &Overview) -> askama::Result<Self> {
        let level = LevelText::of(overview.verdict.level);
        let (actions, waits) = overview
            .problems
            .iter()
            .partition(|group| group.requires_action);
        let programs = overview.programs.as_deref().map(shown);
        let is_read = overview.at.is_some();
        Ok(Self {
            verdict: VerdictSection { overview, level }.render()?.into(),
            problems: ProblemsSection {
                base,
                is_read,
                is_counted: overview.counts.is_some(),
                actions,
                waits,
            }
            .render()?
            .into(),
            running: RunningSection { base, overview }.render()?.into(),
            links: LinksSection { base, overview }.render()?.into(),
            programs: ProgramsSection { is_read, programs }.render()?.into(),
            counts: CountsSection {
                base,
                overview,
                counts: counts(overview),
            }
            .render()?
            .into(),
        })
    }

    /// The sections with their ids in the page, which are also the names of their events.
    pub(in crate::web) fn by_id(&self) -> [(&'static str, &Arc<str>); 6] {
        [
            ("verdict", &self.verdict),
            ("problems", &self.problems),
            ("running", &self.running),
            ("links", &self.links),
            ("programs", &self.programs),
            ("counts", &self.counts),
        ]
    }
}

/// Those that run or are lost, and the last of those that have ended.
fn shown(programs: &[ProgramState]) -> Vec<&ProgramState> {
    let (mut ended, mut shown): (Vec<_>, Vec<_>) = programs
        .iter()
        .partition(|program| program.state == ProgramCondition::Ended);
    ended.sort_by_key(|program| std::cmp::Reverse(program.seen_at));
    ended.truncate(SHOWN_ENDED);
    shown.extend(ended);
    shown
}

/// A level as the class of the style sheet, and as words.
struct LevelText {
    class: &'static str,
    word: &'static str,
}

impl LevelText {
    fn of(level: Level) -> Self {
        let (class, word) = match level {
            Level::Ok => ("ok", "All is well"),
            Level::Waiting => ("waiting", "Some transfers wait"),
            Level::Action => ("action", "Action required"),
            Level::Unknown => ("unknown", "Unknown"),
        };
        Self { class, word }
    }
}

#[derive(Template)]
#[template(path = "sections/verdict.html")]
struct VerdictSection<'a> {
    overview: &'a Overview,
    level: LevelText,
}

#[derive(Template)]
#[template(path = "sections/problems.html")]
struct ProblemsSection<'a> {
    base: &'a str,
    is_read: bool,
    is_counted: bool,
    actions: Vec<&'a ProblemGroup>,
    waits: Vec<&'a ProblemGroup>,
}

#[derive(Template)]
#[template(path = "sections/running.html")]
struct RunningSection<'a> {
    base: &'a str,
    overview: &'a Overview,
}

#[derive(Template)]
#[template(path = "sections/links.html")]
struct LinksSection<'a> {
    base: &'a str,
    overview: &'a Overview,
}

#[derive(Template)]
#[template(path = "sections/programs.html")]
struct ProgramsSection<'a> {
    is_read: bool,
    programs: Option<Vec<&'a ProgramState>>,
}

#[derive(Template)]
#[template(path = "sections/counts.html")]
struct CountsSection<'a> {
    base: &'a str,
    overview: &'a Overview,
    counts: Vec<(&'static str, u64)>,
}

/// Numbers of transfers by status; none until they are counted for the first time.
fn counts(overview: &Overview) -> Vec<(&'static str, u64)> {
    overview.counts.map_or_else(Vec::new, |counts| {
        vec![
            ("PENDING", counts.pending),
            ("SCHEDULED", counts.scheduled),
            ("IN_PROGRESS", counts.in_progress),
            ("COMPLETED", counts.completed),
            ("FAILED", counts.failed),
        ]
    })
}

#[derive(Template)]
#[template(path = "overview.html")]
struct OverviewPage<'a> {
    page: Page<'a>,
    overview: &'a Overview,
    sections: &'a Sections,
    is_day_read: bool,
    plots: Vec<Plot<'a>>,
}

/// Renders the overview. `day` is the throughput of the last 24 hours.
pub(super) fn render(
    base: &str,
    overview: &Overview,
    sections: &Sections,
    day: Option<&Throughput>,
) -> Response {
    let mut plots = Vec::new();
    if let Some(day) = day {
        for (number, link) in day.links.iter().enumerate() {
            match Plot::of(day, link, number) {
                Ok(plot) => plots.push(plot),
                Err(error) => tracing::error!(%error, "cannot draw a plot"),
            }
        }
    }
    let page = OverviewPage {
        page: Page {
            base,
            current: "overview",
        },
        overview,
        sections,
        is_day_read: day.is_some(),
        plots,
    };
    answer(StatusCode::OK, page.render())
}
