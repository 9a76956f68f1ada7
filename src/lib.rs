//! A Celery-compatible worker and manager that move CCAT transfer packages between sites with bbcp.
//!
//! Layers; each depends only on those below it: [`cli`]; [`manager`], `doctor` and [`tasks`]; [`transfer`],
//! the domain, which depends neither on Celery nor on the commands of this program. The worker and its process are the
//! crates `celery-worker` and `celery-worker-cli`. [`settings`], `process`, [`heartbeats`], [`notify`], [`metrics`] and
//! [`faults`] are used by all layers. `advice` adds the commands of this program to the texts of failures.

#![warn(unreachable_pub)]

use celery_worker_cli::Program;

pub(crate) mod advice;
pub mod cli;
pub(crate) mod clock;
pub(crate) mod display;
pub(crate) mod doctor;
pub(crate) mod explanation;
pub mod faults;
pub mod heartbeats;
pub mod manager;
pub mod metrics;
pub mod notify;
pub(crate) mod process;
pub mod settings;
pub(crate) mod signs_of_life;
pub mod tasks;
pub mod transfer;
pub mod web;

/// This program.
pub(crate) const PROGRAM: Program = Program::new("ccat-transfer", env!("CARGO_PKG_VERSION"));
