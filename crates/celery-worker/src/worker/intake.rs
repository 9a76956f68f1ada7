//! Reading of deliveries.

use crate::broker::Delivery;
use celery_protocol::content::Accept;
use celery_protocol::message::{self, Reason, Refused, TaskMessage};

/// Reads a delivery's task message.
///
/// # Errors
/// [`Refused`] for a message that is not a task, or whose body or properties were left out.
pub(super) fn read(delivery: &Delivery, accept: &Accept) -> Result<TaskMessage, Refused> {
    match left_out(delivery, accept) {
        Some(reason) => Err(message::refused(&delivery.message, reason)),
        None => message::decode(&delivery.message, accept),
    }
}

fn left_out(delivery: &Delivery, accept: &Accept) -> Option<Reason> {
    let damage = delivery.damage.as_deref()?;
    if let Some(why) = damage.unreadable {
        return Some(Reason::Properties(why));
    }
    damage
        .body_bytes
        .filter(|_| !damage.is_early)
        .map(|bytes| Reason::TooLarge {
            size: usize::try_from(bytes).unwrap_or(usize::MAX),
            limit: accept.max_body_bytes,
        })
}
