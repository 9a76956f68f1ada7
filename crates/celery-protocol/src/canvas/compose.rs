//! Workflows of several signatures, by the rules of Python's `|`.
//!
//! A group with a following step becomes a chord, a step after a chord is added to its body, a group of one task
//! becomes the task, and nested chains become one chain.

use std::ops::BitOr;

use serde_json::{Map, Value};

use super::signature::listed;
use super::{Form, Signature};

/// Tasks that run one after the other, each with the result of the previous one.
///
/// ```
/// use celery_protocol::canvas::{Signature, chain};
///
/// let task = |name: &str| Signature::new(name);
/// let workflow = chain([task("tasks.fetch").arg("url"), task("tasks.parse"), task("tasks.store")]);
/// assert_eq!(workflow.to_json()["kwargs"]["tasks"][2]["task"], "tasks.store");
/// ```
#[must_use]
pub fn chain<T: Into<Signature>>(tasks: impl IntoIterator<Item = T>) -> Signature {
    let mut whole = Signature::compound("celery.chain", Form::Chain(Vec::new()), Map::new());
    for task in tasks {
        whole = whole.followed_by(task.into());
    }
    whole
}

/// Tasks that run concurrently; the result is the list of their results.
///
/// ```
/// use celery_protocol::canvas::{Signature, group};
///
/// let squares = group((0..10).map(|x| Signature::new("tasks.square").arg(x)));
/// assert_eq!(squares.to_json()["kwargs"]["tasks"][9]["args"][0], 9);
/// ```
#[must_use]
pub fn group<T: Into<Signature>>(tasks: impl IntoIterator<Item = T>) -> Signature {
    let tasks = tasks.into_iter().map(Into::into).collect();
    Signature::compound("celery.group", Form::Group(tasks), Map::new())
}

/// Tasks that run concurrently, the header, and a task that receives the list of their results, the body.
///
/// ```
/// use celery_protocol::canvas::{Signature, chord};
///
/// let squares = (0..10).map(|x| Signature::new("tasks.square").arg(x));
/// let sum = chord(squares, Signature::new("tasks.sum"));
/// assert_eq!(sum.to_json()["kwargs"]["body"]["task"], "tasks.sum");
/// ```
#[must_use]
pub fn chord<T: Into<Signature>>(
    header: impl IntoIterator<Item = T>,
    body: impl Into<Signature>,
) -> Signature {
    let form = Form::Chord {
        header: header.into_iter().map(Into::into).collect(),
        body: Box::new(body.into()),
    };
    Signature::compound("celery.chord", form, Map::new())
}

impl Signature {
    /// Runs `next` with the result of this signature; `|` does the same.
    ///
    /// ```
    /// use celery_protocol::canvas::{Signature, group};
    ///
    /// let (a, b, c) = (Signature::new("a"), Signature::new("b"), Signature::new("c"));
    /// assert_eq!(a.clone().then(&b), a.clone() | b.clone());
    /// // Something that follows a group waits for all of it.
    /// assert_eq!(group([a, b]).then(c).to_json()["subtask_type"], "chord");
    /// ```
    #[must_use]
    pub fn then(self, next: impl Into<Self>) -> Self {
        self.followed_by(next.into())
    }

    fn followed_by(mut self, next: Self) -> Self {
        if matches!(&next.form, Form::Group(tasks) if tasks.is_empty()) {
            return self;
        }
        match &mut self.form {
            Form::Group(header) => {
                let chord = chord(std::mem::take(header), next);
                self.replaced_by(chord)
            }
            Form::Chord { body, .. } => match unroll(next) {
                next if matches!(next.form, Form::Group(_) | Form::Chain(_)) => {
                    two_or_more(self, next)
                }
                next => {
                    extend_body(body, next);
                    self
                }
            },
            Form::Task => two_or_more(self, unroll(next)),
            Form::Chain(steps) => {
                move_links_to_steps(steps, &mut self.options);
                let mut next = unchained(unroll(next)).into_iter();
                while let Some(step) = next.next() {
                    match (steps.pop(), unroll(step)) {
                        // Python's rule: a chain that consists of one group is replaced by the group.
                        (None, step) if matches!(step.form, Form::Group(_)) => {
                            let group = self.replaced_by(step);
                            return next.fold(group, Self::followed_by);
                        }
                        (None, step) => steps.push(step),
                        (Some(last), step) => steps.extend(joined(last, step)),
                    }
                }
                self
            }
        }
    }

    /// Replaces this signature by another one, which keeps the error of this one.
    fn replaced_by(self, other: Self) -> Self {
        Self {
            defect: self.defect.or(other.defect),
            ..other
        }
    }
}

/// Joins the last step of a chain and the next one. They become one step if they are a group and its successor, or a
/// chord and a signature that is not a chord.
fn joined(mut last: Signature, next: Signature) -> Vec<Signature> {
    match &mut last.form {
        Form::Group(_) if !matches!(next.form, Form::Group(_)) => vec![last.followed_by(next)],
        Form::Chord { body, .. } if !matches!(next.form, Form::Chord { .. }) => {
            extend_body(body, next);
            vec![last]
        }
        _ => vec![last, next],
    }
}

fn extend_body(body: &mut Signature, next: Signature) {
    let before = std::mem::replace(body, chain::<Signature>([]));
    *body = before.followed_by(next);
}

/// A chain of a signature and its successor.
fn two_or_more(first: Signature, next: Signature) -> Signature {
    let mut steps = vec![first];
    steps.extend(unchained(next));
    Signature::compound("celery.chain", Form::Chain(steps), Map::new())
}

/// Returns the task of a group of one task.
fn unroll(mut signature: Signature) -> Signature {
    match &mut signature.form {
        Form::Group(tasks) if tasks.len() == 1 => match tasks.pop() {
            Some(only) => signature.replaced_by(only),
            None => signature,
        },
        _ => signature,
    }
}

/// The steps of a chain, with the chain's callbacks; any other signature is its own single step.
fn unchained(mut signature: Signature) -> Vec<Signature> {
    match &mut signature.form {
        Form::Chain(steps) => {
            let mut steps = std::mem::take(steps);
            move_links_to_steps(&mut steps, &mut signature.options);
            if let (Some(first), Some(defect)) = (steps.first_mut(), signature.defect) {
                first.defect.get_or_insert(defect);
            }
            steps
        }
        _ => vec![signature],
    }
}

/// Moves the callbacks of a chain to its last step, and its errbacks to each step.
fn move_links_to_steps(steps: &mut [Signature], options: &mut Map<String, Value>) {
    if steps.is_empty() {
        return;
    }
    for callback in listed(options.remove("link")).unwrap_or_default() {
        if let Some(last) = steps.last_mut() {
            last.add_callback(callback);
        }
    }
    for errback in listed(options.remove("link_error")).unwrap_or_default() {
        for step in &mut *steps {
            step.add_errback(&errback);
        }
    }
}

impl<T: Into<Signature>> BitOr<T> for Signature {
    type Output = Self;

    /// Runs `next` with the result of this signature, as Python's `|`.
    fn bitor(self, next: T) -> Self {
        self.then(next)
    }
}
