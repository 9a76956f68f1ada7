//! Enums of the ops-db, and how their labels are parsed.

use std::fmt;

use sea_orm::sea_query::{ArrayType, ColumnType, Nullable, StringLen, ValueType, ValueTypeErr};
use sea_orm::{ColIdx, QueryResult, TryGetError, TryGetable, Value};
use serde::{Serialize, Serializer};

/// An enum of the ops-db.
///
/// SQLAlchemy stores either the name of a member (`PENDING`, the default) or its value (`pending`). In all of these
/// enums the value is the name in lower case.
pub trait DatabaseEnum: fmt::Debug + Copy + Eq + 'static {
    /// All members, in the order in which the Python package declares them.
    const ALL: &'static [Self];
    /// Name that SQLAlchemy gives to the native PostgreSQL type: the class name in lower case.
    const TYPE_NAME: &'static str;

    /// Name of the member, e.g. `IN_PROGRESS`.
    fn name(self) -> &'static str;

    /// Value of the member, e.g. `in_progress`.
    fn value(self) -> String {
        self.name().to_ascii_lowercase()
    }

    /// Returns the member for a label. Names and values are accepted, in upper or lower case.
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
        /// Waits for the manager to send a message.
        Pending = "PENDING",
        /// The manager has sent a message; no worker has taken it yet.
        Scheduled = "SCHEDULED",
        /// A worker runs an attempt.
        InProgress = "IN_PROGRESS",
        /// The file is at its destination.
        Completed = "COMPLETED",
        /// No further attempt is made.
        Failed = "FAILED",
    }
}

database_enum! {
    /// Purpose of a location.
    LocationType as "locationtype" {
        /// Instruments write their data here.
        Source = "SOURCE",
        /// Packages wait here for a transfer, or arrive here from one.
        Buffer = "BUFFER",
        /// Packages are stored here permanently.
        LongTermArchive = "LONG_TERM_ARCHIVE",
        /// Data are staged here for processing.
        Processing = "PROCESSING",
    }
}

database_enum! {
    /// Kind of storage of a location. bbcp can reach disks only.
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
    /// Kind of a route between two sites.
    RouteType as "routetype" {
        /// Bypasses the buffer of the destination site.
        Direct = "DIRECT",
        /// Leads through another site.
        Relay = "RELAY",
        /// Leads from one specific location to another.
        Custom = "CUSTOM",
    }
}

database_enum! {
    /// State of a package.
    PackageState as "packagestate" {
        /// The transfer has not started.
        Waiting = "WAITING",
        /// The transfer runs.
        Transferring = "TRANSFERRING",
        /// The package is at its final destination.
        Archived = "ARCHIVED",
        /// No further attempt is made.
        Failed = "FAILED",
    }
}

/// Value of an enum column of the ops-db.
///
/// The schema belongs to another project and may get new members. Parsing never fails, so that one row with a new
/// member does not make a whole list unreadable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Label<E> {
    /// A member that this program knows.
    Known(E),
    /// Any other text, unchanged.
    Unknown(String),
}

impl<E: DatabaseEnum> Label<E> {
    /// Parses a label; see [`DatabaseEnum::from_label`].
    pub fn parse(label: &str) -> Self {
        E::from_label(label).map_or_else(|| Self::Unknown(label.to_owned()), Self::Known)
    }

    /// Returns the member; `None` for an unknown label.
    pub fn known(&self) -> Option<E> {
        match self {
            Self::Known(member) => Some(*member),
            Self::Unknown(_) => None,
        }
    }

    /// Returns true if the label stands for this member.
    pub fn means(&self, member: E) -> bool {
        self.known() == Some(member)
    }

    /// Name of the member, or the unknown label.
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

// The following implementations allow `Label` as the type of a model's field. Labels are *written* with the program's
// `EnumColumn`, which knows the spelling and the type of the live column.

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
