//! A Celery-compatible worker and manager that move CCAT transfer packages between sites with bbcp.

pub mod process;
pub mod settings;
pub mod transfer;
