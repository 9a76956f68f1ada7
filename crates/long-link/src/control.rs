//! Requests over the control socket: one line of words, answered by one line of JSON.
//!
//! ```text
//! set [HOST] NAME=VALUE…     changes properties of the link; with HOST, only for packets that it sends
//! show                       answers the state of hosts and link
//! reboot HOST after=TIME     ends all processes of the host at once, and starts it again after TIME
//! ```

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::mpsc::{self, Sender};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::error::{Error, during};
use crate::host::HostName;
use crate::link::{MTU, Setting, duration};
use crate::session::Event;

/// Time limit for a client that sends nothing.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(5);

/// A request of a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Request {
    /// Changes properties of the link
    Set {
        /// Only for packets that this host sends
        host: Option<HostName>,
        settings: Vec<Setting>,
        /// Size of the largest packet that the hosts send
        mtu: Option<u32>,
    },
    /// Answers the state
    Show,
    /// Ends all processes of a host, and starts it again later
    Reboot { host: HostName, after: Duration },
}

impl FromStr for Request {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("set") => read_set(words.collect()),
            Some("show") => Ok(Self::Show),
            Some("reboot") => {
                let host = words.next().and_then(HostName::named);
                let after = words.next().and_then(|word| word.strip_prefix("after="));
                match (host, after) {
                    (Some(host), Some(after)) => Ok(Self::Reboot {
                        host,
                        after: duration(after).map_err(|problem| format!("{after}: {problem}"))?,
                    }),
                    _ => Err("expected: reboot HOST after=TIME".into()),
                }
            }
            _ => Err("expected a request: set, show or reboot".into()),
        }
    }
}

fn read_set(mut words: Vec<&str>) -> Result<Request, String> {
    let host = words.first().and_then(|word| HostName::named(word));
    if host.is_some() {
        words.remove(0);
    }
    let mut settings = Vec::new();
    let mut mtu = None;
    for word in words {
        match word.strip_prefix("mtu=") {
            Some(bytes) => {
                let size = bytes.parse().ok();
                let size = size.filter(|size: &u32| MTU.contains(&i64::from(*size)));
                let (least, most) = (MTU.start(), MTU.end());
                let expected = || format!("mtu: expected a size between {least} and {most}");
                mtu = Some(size.ok_or_else(expected)?);
            }
            None => settings.push(word.parse::<Setting>().map_err(|error| error.to_string())?),
        }
    }
    if host.is_some() && mtu.is_some() {
        return Err("mtu: both hosts have the same".into());
    }
    Ok(Request::Set {
        host,
        settings,
        mtu,
    })
}

/// Path of the socket in the private directory.
pub(crate) fn socket(directory: &Path) -> PathBuf {
    directory.join("control")
}

/// Starts the thread that receives requests.
///
/// # Errors
/// The socket cannot be created.
pub(crate) fn listen(directory: &Path, events: Sender<Event>) -> Result<(), Error> {
    let listener = UnixListener::bind(socket(directory)).map_err(during("create the socket"))?;
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let events = events.clone();
            // A client that has left needs no answer.
            thread::spawn(move || serve(client, &events));
        }
    });
    Ok(())
}

fn serve(client: UnixStream, events: &Sender<Event>) -> io::Result<()> {
    client.set_read_timeout(Some(CLIENT_TIMEOUT))?;
    let mut line = String::new();
    BufReader::new(&client).read_line(&mut line)?;
    let answer = match line.parse() {
        Ok(request) => {
            let (reply, replied) = mpsc::channel();
            let _ = events.send(Event::Request(request, reply));
            replied
                .recv()
                .unwrap_or_else(|_| json!({"error": "the link ends"}))
        }
        Err(problem) => json!({ "error": problem }),
    };
    writeln!(&client, "{answer}")
}

/// Sends a request to the link in `directory`; returns the answer.
///
/// # Errors
/// There is no link, or it refuses the request.
pub(crate) fn send(directory: &Path, request: &str) -> Result<Value, Error> {
    let socket = socket(directory);
    let exchange = || {
        let stream = UnixStream::connect(&socket)?;
        writeln!(&stream, "{request}")?;
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line)?;
        Ok::<Value, io::Error>(serde_json::from_str(&line)?)
    };
    let answer = exchange().map_err(during(format!("ask the link at {}", socket.display())))?;
    match answer.get("error").and_then(Value::as_str) {
        Some(problem) => Err(Error::Refused(problem.to_owned())),
        None => Ok(answer),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use rstest::rstest;

    use super::*;

    #[test]
    fn requests_are_read() {
        let set: Request = "set koln delay=5ms cut=yes".parse().unwrap();
        let settings = ["delay=5ms", "cut=yes"].map(|text| text.parse().unwrap());
        assert_eq!(
            set,
            Request::Set {
                host: Some(HostName::Koln),
                settings: settings.into(),
                mtu: None
            }
        );
        let mtu: Request = "set mtu=1500".parse().unwrap();
        assert_eq!(
            mtu,
            Request::Set {
                host: None,
                settings: Vec::new(),
                mtu: Some(1500)
            }
        );
        let reboot: Request = "reboot koln after=30s".parse().unwrap();
        assert_eq!(
            reboot,
            Request::Reboot {
                host: HostName::Koln,
                after: Duration::from_secs(30)
            }
        );
    }

    #[rstest]
    #[case("")]
    #[case("stop")]
    #[case("reboot koln")]
    #[case("reboot rome after=1s")]
    #[case("set koln mtu=1500")]
    #[case("set mtu=100")]
    #[case("set loss")]
    fn wrong_requests_are_refused(#[case] line: &str) {
        assert!(line.parse::<Request>().is_err());
    }
}
