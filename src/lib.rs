//! A Celery-compatible worker and manager that move CCAT transfer packages between sites with bbcp.

pub mod broker;
pub mod cli;
pub mod manager;
pub mod pauses;
pub mod process;
pub mod settings;
pub mod tasks;
pub mod telemetry;
pub mod transfer;
pub mod wire;
pub mod worker;
