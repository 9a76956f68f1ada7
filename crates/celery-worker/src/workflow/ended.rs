//! The consequences of the end of a task, after its final state is stored.

use super::unsent::UnsentTask;
use super::{Stopped, Workflow};
use celery_protocol::message::{Embed, TaskMessage};
use celery_protocol::result::State;

impl Workflow {
    /// Counts an ended task for its chord, which ends the chord after its last part. After a failure, it also stores
    /// the failure for the rest of the task's chain, and sends the errbacks.
    ///
    /// # Errors
    /// The worker stops.
    pub(crate) async fn ended(&self, message: &TaskMessage, state: &State) -> Result<(), Stopped> {
        if message.embed.chord.is_some() {
            let part = UnsentTask::new(part_of_chord(message), state.clone());
            // Boxed, here and below: most tasks have no chord and do not fail.
            Box::pin(self.count(vec![part])).await?;
        }
        if let State::Failure { .. } = state {
            Box::pin(self.fail_rest_of_chain(message, state)).await?;
            let call = self.call(message, "link_error");
            Box::pin(self.send_errbacks(&message.id, &message.embed.errbacks, &call)).await?;
        }
        Ok(())
    }

    /// Stores the failure of a task for the steps of its chain that do not run.
    async fn fail_rest_of_chain(
        &self,
        message: &TaskMessage,
        state: &State,
    ) -> Result<(), Stopped> {
        let Some(rest) = &message.embed.chain else {
            return Ok(());
        };
        let mut parts = Vec::new();
        for step in self.failed_steps(rest).await {
            parts.extend(self.fail(UnsentTask::new(step, state.clone())).await?);
        }
        // The last step may be a part of a chord.
        self.count(parts).await
    }
}

/// The values of a task that its chord needs: not the arguments, which can be large.
fn part_of_chord(message: &TaskMessage) -> TaskMessage {
    TaskMessage {
        id: message.id.clone(),
        root_id: message.root_id.clone(),
        group: message.group.clone(),
        group_index: message.group_index,
        embed: Embed {
            chord: message.embed.chord.clone(),
            ..Embed::default()
        },
        ..TaskMessage::default()
    }
}
