//! The ops-db's enums and how their labels are read.

use std::fmt;

use sea_orm::sea_query::{ArrayType, ColumnType, Nullable, StringLen, ValueType, ValueTypeErr};
use sea_orm::{ColIdx, QueryResult, TryGetError, TryGetable, Value};
use serde::{Serialize, Serializer};

/// An enum of the ops-db.
///
/// SQLAlchemy stores either the member's name (`PENDING`, its default) or its value (`pending`).
/// In all of these enums the value is the name in lower case.
pub trait DatabaseEnum: fmt::Debug + Copy + Eq + 'static {
    /// Every member, in the order in which Python declares them.
    const ALL: &'static [Self];
    /// The name that SQLAlchemy gives a native PostgreSQL type: the class in lower case.
    const TYPE_NAME: &'static str;

    /// The member's name, e.g. `IN_PROGRESS`.
    fn name(self) -> &'static str;

    /// The member's value, e.g. `in_progress`.
    fn value(self) -> String {
        self.name().to_ascii_lowercase()
    }

    /// The member that a label means; names and values are both understood, in any case.
    fn from_label(label: &str) -> Option<Self> {
        Self::ALL
            .iter()
            .copied()
            .find(|member| member.name().eq_ignore_ascii_case(label.trim()))
    }
}

macro_rules! database_enum {
    ($(#[$doc:meta])* $enum:ident as $type_name:literal {
        $($(#[$member_doc:meta])* $member:ident = $name:literal),+ $(,)?
    }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $enum {
            $($(#[$member_doc])* $member),+
        }

        impl DatabaseEnum for $enum {
            const ALL: &'static [Self] = &[$(Self::$member),+];
            const TYPE_NAME: &'static str = $type_name;

            fn name(self) -> &'static str {
                match self {
                    $(Self::$member => $name),+
                }
            }
        }

        impl fmt::Display for $enum {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.name())
            }
        }

        impl Serialize for $enum {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.name())
            }
        }
    };
}

database_enum! {
    /// State of an operation on a package, here of a transfer.
    Status as "status" {
        /// Waiting for the manager.
        Pending = "PENDING",
        /// A message was sent.
        Scheduled = "SCHEDULED",
        /// A worker is at it.
        InProgress = "IN_PROGRESS",
        /// Done.
        Completed = "COMPLETED",
        /// Given up.
        Failed = "FAILED",
    }
}

database_enum! {
    /// What a location is for.
    LocationType as "locationtype" {
        /// Instruments write here.
        Source = "SOURCE",
        /// Packages wait here for a transfer, or arrive here.
        Buffer = "BUFFER",
        /// Packages stay here.
        LongTermArchive = "LONG_TERM_ARCHIVE",
        /// Data are staged here.
        Processing = "PROCESSING",
    }
}

database_enum! {
    /// What a location is made of. bbcp reaches disks only.
    StorageType as "storagetype" {
        /// A file system.
        Disk = "DISK",
        /// An object store.
        S3 = "S3",
        /// A tape library.
        Tape = "TAPE",
    }
}

database_enum! {
    /// How a route leads from site to site.
    RouteType as "routetype" {
        /// Past the destination's buffer.
        Direct = "DIRECT",
        /// Through another site.
        Relay = "RELAY",
        /// From one certain location to another.
        Custom = "CUSTOM",
    }
}

database_enum! {
    /// State of a package.
    PackageState as "packagestate" {
        /// Not yet on its way.
        Waiting = "WAITING",
        /// On its way.
        Transferring = "TRANSFERRING",
        /// At its goal.
        Archived = "ARCHIVED",
        /// Given up.
        Failed = "FAILED",
    }
}

/// What an enum column of the ops-db holds.
///
/// The schema is not ours and may gain members; one row with a new one must not make a whole list
/// unreadable, so reading never fails.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Label<E> {
    /// A member that this program knows.
    Known(E),
    /// Something else, as it stands in the database.
    Unknown(String),
}

impl<E: DatabaseEnum> Label<E> {
    /// Reads a label; see [`DatabaseEnum::from_label`].
    pub fn parse(label: &str) -> Self {
        E::from_label(label).map_or_else(|| Self::Unknown(label.to_owned()), Self::Known)
    }

    /// The member, if it is a known one.
    pub fn known(&self) -> Option<E> {
        match self {
            Self::Known(member) => Some(*member),
            Self::Unknown(_) => None,
        }
    }

    /// Whether it means this member.
    pub fn means(&self, member: E) -> bool {
        self.known() == Some(member)
    }

    /// The member's name, or the unknown label.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Known(member) => member.name(),
            Self::Unknown(label) => label,
        }
    }
}

impl<E: DatabaseEnum> fmt::Display for Label<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl<E: DatabaseEnum> Serialize for Label<E> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<E: DatabaseEnum> TryGetable for Label<E> {
    fn try_get_by<I: ColIdx>(row: &QueryResult, index: I) -> Result<Self, TryGetError> {
        String::try_get_by(row, index).map(|label| Self::parse(&label))
    }
}

// What follows lets a `Label` be the type of a model's field. Labels are *written* by the
// program's `EnumColumn`, which knows the spelling and the type of the live column.

impl<E: DatabaseEnum> From<Label<E>> for Value {
    fn from(label: Label<E>) -> Self {
        label.as_str().into()
    }
}

impl<E: DatabaseEnum> Nullable for Label<E> {
    fn null() -> Value {
        String::null()
    }
}

impl<E: DatabaseEnum> ValueType for Label<E> {
    fn try_from(value: Value) -> Result<Self, ValueTypeErr> {
        <String as ValueType>::try_from(value).map(|label| Self::parse(&label))
    }

    fn type_name() -> String {
        "Label".to_owned()
    }

    fn array_type() -> ArrayType {
        ArrayType::String
    }

    fn column_type() -> ColumnType {
        ColumnType::String(StringLen::None)
    }
}
