//! Parsers of service URLs: with examples of what people write, with hostile ones (`tests/corpus`), and with damaged
//! forms of both.

#![allow(clippy::expect_used, reason = "tests")]

use hostile_inputs::endures;
use service_connection::url;

#[test]
fn urls() {
    endures("urls", 1, |bytes| {
        let text = String::from_utf8_lossy(bytes);
        let redacted = url::redacted(&text);
        assert!(redacted.len() <= 10 * text.len());
        for line in text.lines().take(20).chain([&*text]) {
            let _ = url::list(line).map(|urls| urls.len());
            for parts in [url::kombu(line), url::sqlalchemy(line)]
                .into_iter()
                .flatten()
            {
                let parameters = parts.query.iter().map(|(name, value)| (&**name, &**value));
                let written = url::libpq(parameters);
                let read = url::sqlalchemy(&written).expect("it reads what it writes");
                assert_eq!(read.query, parts.query);
                if let Some(host) = parts.host.as_deref() {
                    assert!(url::host_and_port(host, 1).len() < host.len() + 5);
                }
            }
            let masked = url::masked(line);
            assert!(masked.len() <= 10 * line.len() + url::MASK.len());
            assert_eq!(url::masked(&masked), masked);
            if let Some(filled) = url::with_password(line, "p/w@") {
                assert_eq!(url::masked(&filled), url::masked(&url::masked(&filled)));
            }
        }
    });
}
