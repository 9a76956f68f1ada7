//! Conditions under which a lost connection to a broker is opened again.

/// Conditions under which a lost connection is opened again.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Reconnect {
    /// True if a lost connection is opened again.
    pub retry: bool,
    /// True if the first connection is retried.
    pub on_startup: bool,
    /// Maximum number of consecutive failed attempts; 0 for no limit.
    pub max_retries: u32,
}

impl Default for Reconnect {
    fn default() -> Self {
        Self {
            retry: true,
            on_startup: true,
            max_retries: 0,
        }
    }
}

impl Reconnect {
    /// The option that forbids another attempt after `attempts` failed ones, if any.
    #[cfg(any(feature = "amqp", feature = "redis"))]
    pub(super) fn forbids(self, was_connected: bool, attempts: u32) -> Option<&'static str> {
        match was_connected {
            true if !self.retry => Some("reconnect.retry"),
            false if !self.on_startup => Some("reconnect.on_startup"),
            _ if self.max_retries > 0 && attempts > self.max_retries => {
                Some("reconnect.max_retries")
            }
            _ => None,
        }
    }
}
