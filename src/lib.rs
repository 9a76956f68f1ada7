//! A Celery-compatible worker and manager that move CCAT transfer packages between sites with bbcp.
//!
//! Layers, each knowing only those below it: [`cli`]; [`manager`], [`doctor`] and [`tasks`]; on one side [`transfer`]
//! (the domain, which knows nothing of Celery), on the other [`worker`] (which knows nothing of
//! transfers), [`broker`] and [`wire`]. [`settings`], [`telemetry`], [`process`], [`health`], [`notify`], [`pauses`],
//! [`pulse`], [`sql`], [`metrics`], [`traces`], [`sideport`] and [`faults`] are used from everywhere and know nothing of the layers.
//! `advice` names the commands of this program in the texts of failures, for all layers above [`transfer`].

pub(crate) mod advice;
pub mod cli;
pub(crate) mod doctor;
pub mod faults;
pub mod health;
pub mod manager;
pub mod metrics;
pub mod notify;
pub(crate) mod process;
pub mod settings;
pub mod sideport;
pub mod tasks;
pub mod telemetry;
pub mod transfer;

#[cfg(test)]
#[path = "../tests/support/mutations.rs"]
mod mutations;
