//! The link: carries packets between two TUN devices.
//!
//! [`parameters`] and [`direction`] are pure, [`forwarder`] is the thread that reads and writes the devices, and
//! [`device`] creates a device in the namespace of a host.

mod device;
mod direction;
mod forwarder;
mod parameters;

pub(crate) use device::{Device, MTU};
pub(crate) use forwarder::Forwarder;
pub(crate) use parameters::{Setting, SettingError, duration};
