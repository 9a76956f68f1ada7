//! Data connections of bbcp that could not be made: who listened, which address was announced, and why it was not reached.
//!
//! One end of a copy listens on a port and announces an address to the other end. By default that is the address of its
//! own host name, or the name itself, whichever name the settings contain. So the connection fails on hosts with several
//! addresses, behind address translation, and where `/etc/hosts` gives the own name a loopback address. bbcp reports only
//! that no connection arrived.

use std::fmt;
use std::net::IpAddr;

/// Data connections of one copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataConnection {
    /// Host that listens.
    pub listener: String,
    /// Host that connects.
    pub caller: String,
    /// Port of the listener, if bbcp printed it.
    pub port: Option<u16>,
    /// Address or name that the listener announced, if known.
    pub announced: Option<String>,
    /// Reason, as far as known.
    pub problem: Unreached,
    /// True if the listener has reported that no connection arrived in time.
    pub has_timed_out: bool,
}

/// Reason why an announced address was not reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unreached {
    /// No connection arrived.
    Silent,
    /// The error of the connecting bbcp.
    Stated(String),
    /// A loopback address was announced.
    Loopback,
    /// A name was announced that the connecting host does not know.
    UnknownName,
    /// Another address was announced than the one by which ssh reaches the listener, or by which it sees it.
    OtherAddress(IpAddr),
}

/// Addresses of the listener according to both hosts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::transfer) struct ListenerAddresses {
    /// Name of the listener on its own host.
    pub(in crate::transfer) own_name: Option<String>,
    /// Address of that name on its own host.
    pub(in crate::transfer) own_address: Option<IpAddr>,
    /// Address of that name on the host that connects.
    pub(in crate::transfer) address_for_caller: Option<IpAddr>,
    /// True if the host that connects has been asked for that address.
    pub(in crate::transfer) caller_was_asked: bool,
    /// Address of the listener in the connection of ssh.
    pub(in crate::transfer) address_of_ssh: Option<IpAddr>,
}

impl DataConnection {
    pub(in crate::transfer) fn new(listener: &str, caller: &str) -> Self {
        Self {
            listener: listener.to_owned(),
            caller: caller.to_owned(),
            port: None,
            announced: None,
            problem: Unreached::Silent,
            has_timed_out: false,
        }
    }

    /// Reads a line of bbcp. A line about something else changes nothing.
    pub(in crate::transfer) fn observe(&mut self, line: &str) {
        let Some(line) = line.strip_prefix("bbcp: ") else {
            return;
        };
        if let Some(port) = line.strip_prefix("Accept timed out on port ") {
            self.port = self.port.or(port.trim().parse().ok());
        } else if let Some((error, address)) = line.split_once(" unable to connect to port ") {
            // `[::ffff:10.0.0.2]:5031`
            let (host, port) = address.rsplit_once(':').unwrap_or((address, ""));
            self.port = self.port.or(port.parse().ok());
            let host = host.trim_matches(['[', ']']);
            self.announced = Some(match host.parse::<IpAddr>() {
                Ok(address) => address.to_canonical().to_string(),
                Err(_) => host.to_owned(),
            });
            self.problem = Unreached::Stated(error.to_owned());
        } else if let Some(rest) = line.strip_prefix("Unable to connect to ") {
            let (name, error) = rest.split_once(';').unwrap_or((rest, "unknown"));
            self.announced = Some(name.trim().to_owned());
            self.problem = Unreached::Stated(error.trim().to_owned());
        } else if line.starts_with("Unable to allocate more than 0 of ") {
            self.has_timed_out = true;
        } else if let Some((_, to)) = line.split_once(" redirect connection to ") {
            // The name is followed by its address, which bbcp damages.
            let name = to.split_whitespace().next();
            self.announced = self.announced.take().or(name.map(str::to_owned));
        }
    }

    /// Adds what the hosts know. With `no_dns` the listener announced the address of its own name, else the name.
    pub(in crate::transfer) fn explain(&mut self, known: ListenerAddresses, no_dns: bool) {
        let own_address = known.own_address.map(|address| address.to_string());
        let of_settings = if no_dns { own_address } else { known.own_name };
        if self.announced.is_none() {
            self.announced = of_settings;
        }
        let stated = self.announced.as_deref().map(str::parse::<IpAddr>);
        // The listener is bound to all its addresses, so only the address that the other end uses matters.
        let used = match stated {
            Some(Ok(address)) => Some(address),
            Some(Err(_)) => known.address_for_caller,
            None => None,
        };
        let is_name = matches!(stated, Some(Err(_)));
        self.problem = match (used, known.address_of_ssh) {
            (Some(used), _) if used.is_loopback() => Unreached::Loopback,
            (None, _) if is_name && known.caller_was_asked => Unreached::UnknownName,
            // A host may be reached by ssh over IPv6, and by bbcp over IPv4.
            (Some(used), Some(of_ssh)) if used.is_ipv4() == of_ssh.is_ipv4() && used != of_ssh => {
                Unreached::OtherAddress(of_ssh)
            }
            _ => return,
        };
    }
}

impl fmt::Display for DataConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            listener,
            caller,
            port,
            announced,
            problem,
            ..
        } = self;
        write!(f, "{caller} could not connect to bbcp's data port")?;
        if let Some(port) = port {
            write!(f, " {port}")?;
        }
        write!(f, " at {listener}")?;
        if let Some(announced) = announced {
            write!(f, ", which announced the address {announced}")?;
        }
        match problem {
            Unreached::Silent => f.write_str(
                "; no connection arrived, so a firewall discards the packets, or that address leads elsewhere",
            ),
            Unreached::Stated(error) => write!(f, "; {caller} got the error: {error}"),
            Unreached::Loopback => write!(
                f,
                "; that is a loopback address, which only {listener} itself can reach: correct the entry for its own \
                 name in /etc/hosts there"
            ),
            Unreached::UnknownName => write!(f, "; {caller} does not know that name"),
            Unreached::OtherAddress(of_ssh) => {
                write!(f, "; in the connection of ssh {listener} has the address {of_ssh}")
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use rstest::rstest;

    use super::*;

    fn connection(announced: Option<&str>, problem: Unreached) -> DataConnection {
        DataConnection {
            listener: "koln".into(),
            caller: "this host".into(),
            port: Some(5031),
            announced: announced.map(Into::into),
            problem,
            has_timed_out: false,
        }
    }

    fn known(own: &str, for_caller: Option<&str>, of_ssh: Option<&str>) -> ListenerAddresses {
        let address = |text: &str| text.parse().unwrap();
        ListenerAddresses {
            own_name: Some("koln.example.org".into()),
            own_address: Some(address(own)),
            address_for_caller: for_caller.map(address),
            caller_was_asked: true,
            address_of_ssh: of_ssh.map(address),
        }
    }

    #[rstest]
    #[case(
        "bbcp: Accept timed out on port 5039",
        Some(5039),
        None,
        Unreached::Silent
    )]
    #[case(
        "bbcp: Connection refused unable to connect to port [::ffff:10.99.0.1]:5031",
        Some(5031), Some("10.99.0.1"), Unreached::Stated("Connection refused".into())
    )]
    #[case(
        "bbcp: Connection timed out unable to connect to port koln:5031",
        Some(5031), Some("koln"), Unreached::Stated("Connection timed out".into())
    )]
    #[case(
        "bbcp: Unable to connect to  koln.example.org ;  Temporary failure in name resolution",
        None, Some("koln.example.org"), Unreached::Stated("Temporary failure in name resolution".into())
    )]
    #[case(
        "bbcp: Host koln redirect connection to koln.example.org ?).",
        None,
        Some("koln.example.org"),
        Unreached::Silent
    )]
    #[case("Accept timed out on port 5039", None, None, Unreached::Silent)]
    #[case("bbcp: Accept timed out on port x", None, None, Unreached::Silent)]
    #[case(
        "bbcp:  unable to connect to port ",
        None,
        Some(""),
        Unreached::Stated(String::new())
    )]
    fn lines(
        #[case] line: &str,
        #[case] port: Option<u16>,
        #[case] announced: Option<&str>,
        #[case] problem: Unreached,
    ) {
        let mut found = DataConnection::new("koln", "this host");
        found.observe(line);
        assert_eq!(
            found,
            DataConnection {
                port,
                ..connection(announced, problem)
            }
        );
    }

    #[rstest]
    #[case::firewall(
        None,
        Unreached::Silent,
        known("10.0.0.2", None, Some("10.0.0.2")),
        true,
        "which announced the address 10.0.0.2; no connection arrived, so a firewall discards the packets"
    )]
    #[case::loopback(
        None,
        Unreached::Silent,
        known("127.0.1.1", None, Some("10.0.0.2")),
        true,
        "which announced the address 127.0.1.1; that is a loopback address, which only koln itself"
    )]
    #[case::loopback_of_the_name(
        None,
        Unreached::Silent,
        known("10.0.0.2", Some("127.0.0.1"), None),
        false,
        "which announced the address koln.example.org; that is a loopback address"
    )]
    #[case::refused_by_itself(
        Some("127.0.1.1"), Unreached::Stated("Connection refused".into()), known("127.0.1.1", None, None), true,
        "which announced the address 127.0.1.1; that is a loopback address"
    )]
    #[case::unknown_name(
        Some("koln.example.org"),
        Unreached::Silent,
        known("10.0.0.2", None, Some("10.0.0.2")),
        false,
        "which announced the address koln.example.org; this host does not know that name"
    )]
    #[case::several_addresses(
        None,
        Unreached::Silent,
        known("192.168.1.2", None, Some("10.0.0.2")),
        true,
        "which announced the address 192.168.1.2; in the connection of ssh koln has the address 10.0.0.2"
    )]
    #[case::another_family(
        None,
        Unreached::Silent,
        known("10.0.0.2", None, Some("2001:db8::2")),
        true,
        "which announced the address 10.0.0.2; no connection arrived"
    )]
    #[case::rejected(
        Some("10.0.0.2"), Unreached::Stated("Connection refused".into()), known("10.0.0.2", None, Some("10.0.0.2")), true,
        "which announced the address 10.0.0.2; this host got the error: Connection refused"
    )]
    #[case::nothing_known(
        None,
        Unreached::Silent,
        ListenerAddresses::default(),
        true,
        "could not connect to bbcp's data port 5031 at koln; no connection arrived"
    )]
    fn reasons(
        #[case] announced: Option<&str>,
        #[case] problem: Unreached,
        #[case] known: ListenerAddresses,
        #[case] no_dns: bool,
        #[case] expected: &str,
    ) {
        let mut connection = connection(announced, problem);
        connection.explain(known, no_dns);
        assert!(connection.to_string().contains(expected), "{connection}");
    }
}
