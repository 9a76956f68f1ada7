//! Notices to administrators: always in the log, and by a program and a webhook if the settings name them.
//!
//! No caller waits for a notification, and none can fail or delay a transfer. If many notices come in a short time (a
//! link is down, and all its transfers fail), the first is sent at once, and the others together at the end of the
//! interval.

use std::io;
use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout};

use crate::process::{Group, command, find_program};
use crate::settings::Notifications;
use service_connection::error_chain::chain;

/// Maximum number of notices in one notification; for further ones, it has only their number.
const MAX_NOTICES_IN_A_MESSAGE: usize = 20;

/// Capacity of the queue to the sender, in notices.
const QUEUE: usize = 256;

/// A message for the administrators.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    /// Subject in one line.
    pub subject: String,
    /// Text with all facts that an administrator needs to act.
    pub text: String,
}

/// Failure of a notification. It contains no secret, although a webhook's address often is one.
#[derive(Debug, thiserror::Error)]
enum NotifyError {
    #[error("`{0}` does not exist; correct `notifications.command`")]
    Missing(String),
    #[error("cannot run `{program}`")]
    Run { program: String, source: io::Error },
    #[error("`{program}` ended with {status}")]
    Failed { program: String, status: String },
    #[error("no end within {}", humantime::format_duration(*.0))]
    Late(Duration),
    #[error("the webhook did not accept it: {0}")]
    Webhook(String),
}

/// Sends notices. Clones share one queue.
#[derive(Debug, Clone)]
pub struct Notifier(Arc<Sending>);

#[derive(Debug)]
struct Sending {
    close_timeout: Duration,
    queue: Mutex<Option<mpsc::Sender<Notice>>>,
    task: Mutex<Option<JoinHandle<()>>>,
}

impl Notifier {
    /// Starts the sender with these settings. Requires a Tokio runtime.
    #[must_use]
    pub fn start(settings: &Notifications) -> Self {
        let (queue, notices) = mpsc::channel(QUEUE);
        let task = tokio::spawn(send_all(settings.clone(), notices));
        Self(Arc::new(Sending {
            close_timeout: settings.timeout.saturating_mul(2),
            queue: Mutex::new(Some(queue)),
            task: Mutex::new(Some(task)),
        }))
    }

    /// Logs a notice, and queues it for the sender.
    pub fn notify(&self, notice: Notice) {
        let Notice { subject, text } = &notice;
        tracing::warn!(subject, text, "notice to the administrators");
        let queue = self.0.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let sent = queue.as_ref().map(|queue| queue.try_send(notice));
        if !matches!(sent, Some(Ok(()))) {
            tracing::warn!("too many notices; this one is only logged");
        }
    }

    /// Sends the waiting notices at once, and ends the sender. Waits for at most twice the time limit of a
    /// notification.
    pub async fn close(&self) {
        drop(take(&self.0.queue));
        let Some(task) = take(&self.0.task) else {
            return;
        };
        if timeout(self.0.close_timeout, task).await.is_err() {
            tracing::warn!("the last notices could not be sent in time");
        }
    }
}

fn take<T>(from: &Mutex<Option<T>>) -> Option<T> {
    from.lock().unwrap_or_else(PoisonError::into_inner).take()
}

/// Sends notices until the queue is closed.
async fn send_all(settings: Notifications, mut notices: mpsc::Receiver<Notice>) {
    let mut next = Instant::now();
    let mut waiting = PendingNotices::default();
    loop {
        tokio::select! {
            biased;
            notice = notices.recv() => match notice {
                Some(notice) => waiting.add(notice),
                None => break,
            },
            () = sleep_until(next), if !waiting.is_empty() => {
                deliver(&settings, &waiting.take()).await;
                next = Instant::now() + settings.min_interval;
            }
        }
    }
    if !waiting.is_empty() {
        deliver(&settings, &waiting.take()).await;
    }
}

/// Notices that are sent together.
#[derive(Debug, Default)]
struct PendingNotices {
    notices: Vec<Notice>,
    further: usize,
}

impl PendingNotices {
    fn add(&mut self, notice: Notice) {
        if self.notices.len() < MAX_NOTICES_IN_A_MESSAGE {
            self.notices.push(notice);
        } else {
            self.further += 1;
        }
    }

    fn is_empty(&self) -> bool {
        self.notices.is_empty()
    }

    /// Takes all notices, combined to one.
    fn take(&mut self) -> Notice {
        let Self { notices, further } = std::mem::take(self);
        let count = notices.len() + further;
        let mut texts: Vec<String> = notices
            .iter()
            .map(|notice| format!("{}\n\n{}", notice.subject, notice.text.trim_end()))
            .collect();
        if further > 0 {
            texts.push(format!("and {further} more; see the log"));
        }
        let subject = match notices.into_iter().next() {
            Some(first) if count == 1 => first.subject,
            _ => format!("{count} notices"),
        };
        Notice {
            subject,
            text: texts.join("\n\n----\n\n") + "\n",
        }
    }
}

async fn deliver(settings: &Notifications, notice: &Notice) {
    let outcomes = [
        match settings.command.split_first() {
            Some((program, arguments)) => run(settings.timeout, program, arguments, notice).await,
            None => Ok(()),
        },
        match settings.webhook_url.expose_secret() {
            "" => Ok(()),
            _ => post(settings, notice).await,
        },
    ];
    for error in outcomes.into_iter().filter_map(Result::err) {
        tracing::error!(subject = notice.subject, error = %chain(&error), "notice not delivered");
    }
}

/// Runs the program with the text on its standard input.
async fn run(
    limit: Duration,
    program: &str,
    arguments: &[String],
    notice: &Notice,
) -> Result<(), NotifyError> {
    let trouble = |source| NotifyError::Run {
        program: program.into(),
        source,
    };
    let found =
        find_program(Path::new(program)).ok_or_else(|| NotifyError::Missing(program.into()))?;
    let mut child = command(&found)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(trouble)?;
    // Declared after the child, so that it is dropped first.
    let group = Group::of(&child).map_err(trouble)?;
    let stdin = child.stdin.take();
    let work = async {
        if let Some(mut stdin) = stdin {
            // A program need not read all of it; only its exit code counts.
            let _unread = stdin.write_all(notice.text.as_bytes()).await;
        }
        child.wait().await
    };
    let ended = timeout(limit, work).await;
    let ended = ended.map_err(|_| NotifyError::Late(limit));
    let status = ended?.map_err(trouble)?;
    group.end(Duration::ZERO).await;
    if status.success() {
        return Ok(());
    }
    Err(NotifyError::Failed {
        program: program.into(),
        status: status.to_string(),
    })
}

/// Posts the text as JSON, in the form that chat systems accept.
async fn post(settings: &Notifications, notice: &Notice) -> Result<(), NotifyError> {
    let body = json!({ "subject": notice.subject, "text": notice.text }).to_string();
    let (url, limit) = (settings.webhook_url.clone(), settings.timeout);
    tokio::task::spawn_blocking(move || post_blocking(&url, limit, &body))
        .await
        .unwrap_or_else(|error| Err(NotifyError::Webhook(error.to_string())))
}

fn post_blocking(url: &SecretString, limit: Duration, body: &str) -> Result<(), NotifyError> {
    let config = ureq::Agent::config_builder()
        .timeout_global(Some(limit))
        .build();
    let agent: ureq::Agent = config.into();
    agent
        .post(url.expose_secret())
        .header("Content-Type", "application/json")
        .send(body)
        .map(drop)
        .map_err(|error| {
            let text = error.to_string();
            NotifyError::Webhook(text.replace(url.expose_secret(), "(its address)"))
        })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::fs;
    use std::io::{Read, Write};
    use std::net::TcpListener;

    use super::*;

    fn settings() -> Notifications {
        crate::settings::load(None, []).unwrap().notifications
    }

    fn notice(n: usize) -> Notice {
        Notice {
            subject: format!("subject {n}"),
            text: format!("text {n}"),
        }
    }

    #[tokio::test]
    async fn a_program_gets_the_first_at_once_and_the_others_together() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sent");
        let script = r#"cat >>"$0"; echo END >>"$0""#;
        let settings = Notifications {
            command: ["sh", "-c", script, path.to_str().unwrap()]
                .map(String::from)
                .to_vec(),
            min_interval: Duration::from_secs(3600),
            ..settings()
        };
        let notifier = Notifier::start(&settings);
        notifier.notify(notice(0));
        let sent = || fs::read_to_string(&path).unwrap_or_default();
        while !sent().contains("END") {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(sent(), "subject 0\n\ntext 0\nEND\n");
        for n in 1..=30 {
            notifier.notify(notice(n));
        }
        assert!(!sent().contains("text 1"));
        notifier.close().await;
        let sent = sent();
        assert_eq!(sent.matches("END").count(), 2, "{sent}");
        assert!(
            sent.contains("text 20") && !sent.contains("text 21"),
            "{sent}"
        );
        assert!(sent.ends_with("and 10 more; see the log\nEND\n"), "{sent}");
    }

    #[tokio::test]
    async fn a_webhook_gets_json_and_its_address_stays_secret() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let serving = std::thread::spawn(move || {
            ["200 OK", "404 Not Found"].map(|status| {
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = Vec::new();
                let mut buffer = [0; 1024];
                while !request.ends_with(b"}") {
                    let n = stream.read(&mut buffer).unwrap();
                    request.extend_from_slice(&buffer[..n]);
                }
                let answer =
                    format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
                stream.write_all(answer.as_bytes()).unwrap();
                String::from_utf8(request).unwrap()
            })
        });
        let settings = Notifications {
            webhook_url: format!("http://{address}/hooks/SECRET").into(),
            ..settings()
        };
        post(&settings, &notice(1)).await.unwrap();
        let error = post(&settings, &notice(2)).await.unwrap_err();
        let text = chain(&error).to_string();
        assert!(text.contains("404") && !text.contains("SECRET"), "{text}");
        let [request, _] = serving.join().unwrap();
        assert!(request.starts_with("POST /hooks/SECRET "), "{request}");
        assert!(
            request.ends_with(r#"{"subject":"subject 1","text":"text 1"}"#),
            "{request}"
        );
    }

    #[tokio::test]
    async fn a_program_that_hangs_or_fails_is_an_error() {
        let limit = Duration::from_millis(200);
        let fails = run(limit, "false", &[], &notice(1)).await.unwrap_err();
        assert!(matches!(fails, NotifyError::Failed { .. }), "{fails}");
        let hangs = run(limit, "sleep", &["60".into()], &notice(1)).await;
        assert!(matches!(hangs, Err(NotifyError::Late(_))), "{hangs:?}");
        let missing = run(limit, "no-such-program", &[], &notice(1)).await;
        assert!(
            matches!(missing, Err(NotifyError::Missing(_))),
            "{missing:?}"
        );
    }
}
