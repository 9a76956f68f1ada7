//! Name of a copy until it is verified.
//!
//! Each attempt has a new name, because an orphaned sink of an earlier attempt may still unlink the name of *its*
//! attempt seconds later. Our names can be recognised, so that leftovers can be removed and no other file ever is. An
//! attempt that completes the partial copy of an earlier one renames that copy first.
//!
//! A copy that can be completed has a directory beside it, in which bbcp keeps its checkpoint. The names of both differ
//! only at the end.

use std::fmt;

use crate::transfer::id::{AttemptNumber, TransferId};
use uuid::Uuid;

const PREFIX: &str = ".ccat-transfer-";
const SUFFIX: &str = ".part";
const CHECKPOINTS: &str = ".ckpt";

/// `.ccat-transfer-{transfer id}-{attempt}-{8 hex of the lease token}.part`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TemporaryName {
    transfer_id: TransferId,
    attempt: AttemptNumber,
    token: u32,
}

impl TemporaryName {
    /// Creates the name for one attempt under one lease.
    pub fn new(transfer_id: TransferId, attempt: AttemptNumber, lease_token: Uuid) -> Self {
        let (token, ..) = lease_token.as_fields();
        Self {
            transfer_id,
            attempt,
            token,
        }
    }

    /// Recognises a directory entry with one of our names: a copy, or the directory of its checkpoints.
    pub fn of_entry(name: &str) -> Option<Self> {
        match name.strip_suffix(CHECKPOINTS) {
            Some(stem) => Self::parse(&format!("{stem}{SUFFIX}")),
            None => Self::parse(name),
        }
    }

    /// Name of the directory in which bbcp keeps its checkpoint.
    pub fn checkpoints(&self) -> String {
        let name = self.to_string();
        format!(
            "{}{CHECKPOINTS}",
            name.strip_suffix(SUFFIX).unwrap_or(&name)
        )
    }

    /// Recognises the name of a copy. Returns `None` for a name that [`fmt::Display`] would not produce.
    pub fn parse(name: &str) -> Option<Self> {
        let mut parts = name
            .strip_prefix(PREFIX)?
            .strip_suffix(SUFFIX)?
            .rsplitn(3, '-');
        let token = u32::from_str_radix(parts.next()?, 16).ok()?;
        let attempt = parts.next()?.parse().ok()?;
        let transfer_id = parts.next()?.parse().ok()?;
        let found = Self {
            transfer_id,
            attempt,
            token,
        };
        // For example leading zeros and signs: they parse too, but our names have none.
        (found.to_string() == name).then_some(found)
    }

    /// Transfer of the name.
    pub fn transfer_id(&self) -> TransferId {
        self.transfer_id
    }

    /// Attempt of the name.
    pub fn attempt(&self) -> AttemptNumber {
        self.attempt
    }
}

impl fmt::Display for TemporaryName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            transfer_id,
            attempt,
            token,
        } = self;
        write!(f, "{PREFIX}{transfer_id}-{attempt}-{token:08x}{SUFFIX}")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    #[test]
    fn form() {
        let token = Uuid::from_u128(0x00ab_cdef_0000_0000_0000_0000_0000_0000);
        let name = TemporaryName::new(TransferId::new(42), AttemptNumber::new(2), token);
        assert_eq!(name.to_string(), ".ccat-transfer-42-2-00abcdef.part");
    }

    #[rstest]
    #[case(".ccat-transfer-42-2-00abcdef.part.tar")]
    #[case(".ccat-transfer-42-2-abcdef.part")]
    #[case(".ccat-transfer-42-2-00ABCDEF.part")]
    #[case(".ccat-transfer-+42-2-00abcdef.part")]
    #[case(".ccat-transfer-42-00abcdef.part")]
    #[case(".ccat-transfer-42-2-00abcdef.part/../../x")]
    #[case("package.tar")]
    #[case("")]
    fn not_ours(#[case] name: &str) {
        assert_eq!(TemporaryName::parse(name), None);
    }

    proptest! {
        #[test]
        fn round_trip(id: i64, attempt in 0..=i32::MAX, token: u128) {
            let (id, attempt) = (TransferId::new(id), AttemptNumber::new(attempt));
            let name = TemporaryName::new(id, attempt, Uuid::from_u128(token));
            prop_assert_eq!(TemporaryName::parse(&name.to_string()), Some(name));
            prop_assert_eq!(TemporaryName::of_entry(&name.to_string()), Some(name));
            prop_assert_eq!(TemporaryName::of_entry(&name.checkpoints()), Some(name));
            prop_assert_eq!(TemporaryName::parse(&name.checkpoints()), None);
        }

        #[test]
        fn whatever_parses_is_one_plain_component(name in "\\PC*") {
            if TemporaryName::parse(&name).is_some() {
                prop_assert!(!name.contains('/'));
            }
        }
    }
}
