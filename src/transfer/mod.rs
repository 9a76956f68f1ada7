//! The domain code: leases, copies with bbcp, verification. It does not depend on Celery.
//!
//! A transfer passes through these modules in this order:
//!
//! | module | step |
//! | --- | --- |
//! | [`request`] | the request of a caller, and the result of the attempt |
//! | [`service`] | the two parts of an attempt: the lease, and the steps with it |
//! | [`acquire`] | the lease; waits if its holder may be dead |
//! | [`attempt`] | the order of the steps, the stop and the result of an attempt |
//! | [`lease_renewer`] | renews the lease while the attempt runs |
//! | [`attempt::prepare`](attempt) | rows, plan ([`plan`]), claim, checks of both ends ([`endpoint`]), removal of leftovers |
//! | [`attempt::copy`](attempt) | copy ([`copying`]) to a temporary name |
//! | [`attempt::verify`](attempt) | size and digest at both ends |
//! | [`attempt::publish`](attempt) | rename, commit of the row ([`repository`]) |
//! | [`attempt::removal`](attempt) | removal of files that no attempt will complete |
//! | [`failures`], [`retry`] | the consequence of a failed attempt |
//! | [`handover`] | the result of a task whose lease was lost |

mod acquire;
pub mod attempt;
pub mod copying;
pub mod database;
pub mod database_retry;
pub mod digest;
pub mod endpoint;
pub mod failures;
mod handover;
pub mod id;
pub(crate) mod inspection;
pub mod lease;
mod lease_renewer;
pub mod lines;
pub mod link;
pub(crate) mod link_probe;
pub mod plan;
pub mod report;
pub mod repository;
pub mod request;
pub mod retry;
pub(crate) mod routing;
pub mod schema;
pub mod service;
pub mod topology;
pub(crate) mod trace;
