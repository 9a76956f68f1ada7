//! The domain: leases, copies with bbcp, verification. Knows nothing of Celery.

pub mod bbcp;
pub mod digest;
pub mod endpoint;
pub mod error;
pub mod plan;
pub mod retry;
pub mod routing;
