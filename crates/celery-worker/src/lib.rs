#![doc = include_str!("../README.md")]
#![deny(missing_docs)]
#![warn(unreachable_pub)]

/// Marks a step, or (without one) a moment, for fault injection.
#[cfg(not(feature = "fault-injection"))]
macro_rules! fault_point {
    ($point:ident, $step:expr) => {
        $step
    };
    ($point:ident) => {};
}

/// Marks a step, or (without one) a moment, for fault injection.
#[cfg(feature = "fault-injection")]
macro_rules! fault_point {
    ($point:ident, $step:expr) => {{
        use $crate::fault_injection::{Fault, Step, lose, reach};
        let done = $step;
        match reach(Step::$point) {
            Some(Fault::Fail(lost)) => {
                lose(done);
                Err(lost.into())
            }
            Some(Fault::Repeat) => {
                lose(done);
                $step
            }
            None | Some(Fault::Panic) => done,
        }
    }};
    ($point:ident) => {
        let _nothing_to_repeat =
            $crate::fault_injection::reach($crate::fault_injection::Step::$point);
    };
}

/// Marks a loop in which fault injection can cause a panic.
#[cfg(all(
    any(feature = "amqp", feature = "redis"),
    not(feature = "fault-injection")
))]
macro_rules! panic_point {
    ($point:ident) => {};
}

/// Marks a loop in which fault injection can cause a panic.
#[cfg(all(any(feature = "amqp", feature = "redis"), feature = "fault-injection"))]
macro_rules! panic_point {
    ($point:ident) => {{
        use $crate::fault_injection::{Fault, Step, reach};
        if let Some(Fault::Panic) = reach(Step::$point) {
            std::panic::resume_unwind(Box::new("fault injected".to_owned()));
        }
    }};
}

pub mod broker;
#[cfg(feature = "celery-crate")]
pub mod celery_crate;
pub mod client;
mod clock;
#[cfg(feature = "fault-injection")]
pub mod fault_injection;
pub mod liveness;
pub mod observer;
mod offload;
pub mod prelude;
mod product;
mod publication;
#[cfg(feature = "redis")]
mod redis;
pub mod remote_control;
pub mod results;
pub mod task;
pub mod worker;
mod workflow;

/// The protocol crate, whose types are part of this one's API.
pub use celery_protocol as protocol;
pub use celery_worker_macros::{TaskArgs, task};
pub use product::Product;

/// Paths that the macros use. Not part of the API.
#[doc(hidden)]
pub mod __private {
    pub use serde_json::Error as JsonError;

    pub use crate::task::TaskReturn;
}

// The macros name this crate by its public path, also within it.
extern crate self as celery_worker;
