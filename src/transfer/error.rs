//! Types of failures, for the layers above.

pub use super::failures::{
    BoxError as Cause, FailureKind, Interruption, Role, Scope, TransferError, Wait,
};
