//! The domain code: leases, copies with bbcp, verification. It does not depend on Celery.
//!
//! A transfer passes through these modules in this order:
//!
//! | module | step |
//! | --- | --- |
//! | [`service`] | the request of a caller, and the result of the attempt |
//! | [`acquire`] | the lease; waits if its holder may be dead |
//! | [`lease_renewer`] | renews the lease while the attempt runs |
//! | [`attempt`] | the order of the steps, and the stop of an attempt |
//! | [`attempt::prepare`](attempt) | rows, plan ([`plan`]), claim, checks of both ends ([`endpoint`]), removal of leftovers |
//! | [`attempt::copy`](attempt) | bbcp ([`bbcp`]) to a temporary name |
//! | [`attempt::verify`](attempt) | size and digest at both ends |
//! | [`attempt::publish`](attempt) | rename, commit of the row ([`repository`]) |
//! | [`attempt::leftovers`](attempt) | removal of a partial copy that nothing will complete |
//!
//! [`failures`] and [`retry`] then determine the consequence of a failed attempt.

mod acquire;
pub mod attempt;
pub mod bbcp;
pub mod database;
mod database_retry;
pub mod digest;
pub mod endpoint;
pub mod failures;
pub mod id;
pub(crate) mod inspection;
pub mod lease;
mod lease_renewer;
pub mod link;
pub mod plan;
pub mod repository;
pub mod retry;
pub(crate) mod routing;
pub mod schema;
pub mod service;
pub mod topology;
pub(crate) mod trace;
