//! The plan of a copy that measures a link.

use super::{Attempt, LinkName, LinkSettings, Plan, Source, Target};

impl Plan {
    /// Creates the plan of a copy of `size` bytes that is never published. Nothing of it is kept.
    pub(in crate::transfer) fn of_trial(
        attempt: Attempt,
        link: LinkName,
        (source, target): (Source, Target),
        size: u64,
        settings: &LinkSettings,
    ) -> Self {
        Self {
            attempt,
            link,
            source,
            target,
            size,
            recorded: None,
            digest: settings.digest,
            bbcp: settings.bbcp.clone(),
            stall_timeout: settings.stall_timeout,
            slowness: settings.slowness,
            resume_above: None,
            by_ssh_up_to: 0,
            destination_host: String::new(),
        }
    }
}
