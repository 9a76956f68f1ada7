//! Tests of URLs. The expected meanings are those of kombu 5.7 and SQLAlchemy 2.1.

use proptest::prelude::*;
use rstest::rstest;

use super::*;

fn text(parts: &UrlParts) -> String {
    let UrlParts {
        user,
        password,
        host,
        port,
        path,
        ..
    } = parts;
    format!(
        "{}|{}|{}|{}|{path}",
        user.as_deref().unwrap_or_default(),
        password.as_deref().unwrap_or_default(),
        host.as_deref().unwrap_or_default(),
        port.unwrap_or_default()
    )
}

#[rstest]
#[case("amqp://", "|||0|")]
#[case("amqp:///", "|||0|")]
#[case("amqp://h", "||h|0|")]
#[case("amqp://h//", "||h|0|/")]
#[case("amqp://h///", "||h|0|//")]
#[case("amqp://h/%2F", "||h|0|/")]
#[case("amqp://h/a/b", "||h|0|a/b")]
#[case("amqp://h/%2Fa", "||h|0|/a")]
#[case("amqp://h/v?heartbeat=5", "||h|0|v")]
#[case("amqp://H/V", "||h|0|V")]
#[case("amqp://u@h", "u||h|0|")]
#[case("amqp://u:@h/", "u||h|0|")]
#[case("amqp://:p@h/", "|p|h|0|")]
#[case("amqp://u:p@[::1]:5673/v", "u|p|::1|5673|v")]
#[case("amqp://u:p@[::ffff:127.0.0.2]:5672/v", "u|p|::ffff:127.0.0.2|5672|v")]
#[case("amqp://[fe80::1%25eth0]/v", "||fe80::1%eth0|0|v")]
#[case("amqp://[fe80::1%eth0]/v", "||fe80::1%eth0|0|v")]
#[case("amqp://h:/", "||h|0|")]
#[case("amqp://h%61/", "||ha|0|")]
#[case("amqp://u:p@w@h/v", "u|p@w|h|0|v")]
#[case("amqp://u:p:w@h/v", "u|p:w|h|0|v")]
#[case("amqp://u:p%zz@h/v", "u|p%zz|h|0|v")]
#[case("amqp://u:a+b@h/v", "u|a+b|h|0|v")]
#[case("amqp://u%40x:p%2F%3B@h", "u@x|p/;|h|0|")]
#[case("amqp://127.1/", "||127.1|0|")]
#[case("amqp:///v", "|||0|v")]
#[case("amqp://h/v w", "||h|0|v w")]
#[case("PYAMQP://h", "||h|0|")]
fn kombu_reads(#[case] url: &str, #[case] expected: &str) {
    assert_eq!(kombu(url).map(|parts| text(&parts)), Ok(expected.into()));
}

#[rstest]
#[case("h", UrlError::NoScheme)]
#[case("u:p@h:1/v", UrlError::NoScheme)]
#[case("amqp://u:p/w@h/v", UrlError::Reserved)]
#[case("amqp://u:p#w@h/v", UrlError::Reserved)]
#[case("amqp://u:p?w@h/v", UrlError::Reserved)]
// For kombu the host is `u`, the port 12 and the rest of the password a fragment.
#[case("amqp://u:12#w@h/v", UrlError::Reserved)]
#[case("amqp://u:p@w/x@h/v", UrlError::Reserved)]
#[case("amqp://h/v#fragment", UrlError::Reserved)]
#[case("amqp://u:p;x", UrlError::Port)]
#[case("amqp://h:0/", UrlError::Port)]
#[case("amqp://h:65536/", UrlError::Port)]
#[case("amqp://h:+1/", UrlError::Port)]
#[case("amqp://h:x/", UrlError::Port)]
#[case("amqp://h:5672:/v", UrlError::Port)]
#[case("amqp://::1/v", UrlError::Port)]
#[case("amqp://[::1/v", UrlError::Ipv6)]
#[case("amqp://[h]/v", UrlError::Ipv6)]
#[case("amqp://[::1]x/v", UrlError::Ipv6)]
#[case("amqp://[fe80::1%]/v", UrlError::Ipv6)]
#[case("amqp://b\u{fc}cher/", UrlError::Host)]
#[case("amqp://b%C3%BCcher/", UrlError::Host)]
#[case("amqp://a b/", UrlError::Host)]
#[case("amqp://a,b/", UrlError::Host)]
#[case("amqp://u:%ff@h/", UrlError::Utf8)]
#[case("amqp://h/\u{1b}[2J", UrlError::Control)]
#[case(" amqp://h/", UrlError::Control)]
fn kombu_urls_are_refused(#[case] url: &str, #[case] why: UrlError) {
    assert_eq!(kombu(url).map(|parts| text(&parts)), Err(why));
}

#[rstest]
#[case("postgresql://u@/db?host=/dir", "u|||0|db")]
#[case("postgresql+psycopg2://u:p@h:7/d", "u|p|h|7|d")]
#[case("postgresql:///db", "|||0|db")]
#[case("postgresql://", "|||0|")]
#[case("postgresql://u:p@[::1]:5/db", "u|p|::1|5|db")]
#[case("postgresql://u:p/w@h/db", "u|p/w|h|0|db")]
#[case("postgresql://u:p#w@h/db", "u|p#w|h|0|db")]
#[case("postgresql://u:p?w@h/db", "u|p?w|h|0|db")]
#[case("postgresql://u:p:w@h/db", "u|p:w|h|0|db")]
#[case("postgresql://u:p%40w@h/db", "u|p@w|h|0|db")]
#[case("postgresql://u+a:p+b@h/db", "u+a|p+b|h|0|db")]
#[case("postgresql://h/d%2Fb", "||h|0|d/b")]
#[case("postgresql://h/d/b", "||h|0|d/b")]
#[case("postgresql://u@%2Fdir:7/db", "u||/dir|7|db")]
#[case("sqlite:///x.db", "|||0|x.db")]
#[case("sqlite:////abs/x.db?timeout=5", "|||0|/abs/x.db")]
#[case("sqlite:///x%20y.db", "|||0|x y.db")]
#[case("sqlite:///x#y;z.db", "|||0|x#y;z.db")]
#[case("sqlite:////me@h/x.db", "|||0|/me@h/x.db")]
fn sqlalchemy_reads(#[case] url: &str, #[case] expected: &str) {
    assert_eq!(
        sqlalchemy(url).map(|parts| text(&parts)),
        Ok(expected.into())
    );
}

#[rstest]
#[case("postgresql://u:p@w@h/db", UrlError::Reserved)]
#[case("postgresql://u@h:5432/d@b", UrlError::Reserved)]
#[case("postgresql://u:p@h:port/d", UrlError::Port)]
#[case("postgresql://h:65536/db", UrlError::Port)]
#[case("postgresql://b%C3%BC/db", UrlError::Host)]
#[case("postgresql:/db", UrlError::NoScheme)]
fn sqlalchemy_urls_are_refused(#[case] url: &str, #[case] why: UrlError) {
    assert_eq!(sqlalchemy(url).map(|parts| text(&parts)), Err(why));
}

#[test]
fn the_last_value_of_a_parameter_counts_and_empty_ones_do_not() {
    let parts = kombu("redis://h/0?db=1&db=2&db=&x=a%20b+c").unwrap_or_default();
    assert_eq!(parts.parameter("db"), Some("2"));
    assert_eq!(parts.parameter("x"), Some("a b c"));
}

#[rstest]
#[case("amqp://u:p@h//", "amqp://u:********@h//")]
#[case("redis://h/0", "redis://h/0")]
#[case(
    "db+postgresql://u@h/d?password=p",
    "db+postgresql://u@h/d?password=********"
)]
#[case(
    "db+postgresql://u:p/w@h/d?host=/dir",
    "db+postgresql://u:********@h/d?host=/dir"
)]
#[case("db+sqlite:////me@h/x;y.db", "db+sqlite:////me@h/x;y.db")]
#[case(
    "sentinel://:p@h;sentinel://:p@g",
    "sentinel://:********@h;sentinel://:********@g"
)]
#[case(
    "amqp://a:s1@h1//;amqp://b:s2@h2//",
    "amqp://a:********@h1//;amqp://b:********@h2//"
)]
#[case("amqp://a:s1@h1//;amqp://b:s2@h2:port//", "********")]
#[case("amqp://u:p@h:port/", "********")]
#[case("amqp://u:p", "********")]
#[case("s3cret", "********")]
#[case("redis://h/0?s3cret", "redis://h/0?********")]
#[case("redis://h/0?db=8&sentinel_kwargs={x}", "redis://h/0?db=8&********")]
#[case("rpc://", "rpc://")]
#[case("rpc", "rpc")]
#[case("", "")]
fn urls_are_masked(#[case] url: &str, #[case] shown: &str) {
    assert_eq!(masked(url), shown);
}

#[rstest]
#[case(
    "cannot open amqp://u:p@h//: no",
    "cannot open amqp://u:********@h//: no"
)]
#[case("`amqp://a:s1@h1//;amqp://b:s2@h2//`", "`amqp://a:********@h2//`")]
#[case("amqp://u:p/@#?;w@h", "amqp://u:********@h")]
#[case(
    "to redis://h/0?db=1&password=p or",
    "to redis://h/0?db=1&password=******** or"
)]
#[case("postgresql://ccat@h:5432/ops", "postgresql://ccat@h:5432/ops")]
#[case("no URL: a:b@c", "no URL: a:b@c")]
fn texts_are_redacted(#[case] text: &str, #[case] shown: &str) {
    assert_eq!(redacted(text), shown);
}

/// Each parameter was searched to the end of the text, which took the square of its length.
#[test]
fn long_texts_are_redacted_at_once() {
    for mark in [
        "?",
        "&",
        "?a",
        "?a=",
        "?password=",
        "=",
        ":",
        "@",
        "://",
        "?token?",
    ] {
        let text = format!("amqp://{}", mark.repeat(500_000));
        let began = std::time::Instant::now();
        let shown = redacted(&text).len();
        assert!(shown <= 9 * text.len());
        assert!(
            began.elapsed().as_secs() < 20,
            "{mark}: {:?}",
            began.elapsed()
        );
    }
}

#[rstest]
#[case("amqp://ccat@h//", "s3cret", Some("amqp://ccat:s3cret@h//"))]
#[case(
    "amqp://ccat@h:1/v?heartbeat=3",
    "a%40/b:c d\u{e9};",
    Some("amqp://ccat:a%2540%2Fb%3Ac%20d%C3%A9%3B@h:1/v?heartbeat=3")
)]
#[case("redis://h/0", "x", Some("redis://:x@h/0"))]
#[case(
    "sentinel://h/0;sentinel://g",
    "x",
    Some("sentinel://:x@h/0;sentinel://g")
)]
#[case(
    "amqp://u@h//;amqp://v:y@g//",
    "x",
    Some("amqp://u:x@h//;amqp://v:y@g//")
)]
#[case(
    "db+postgresql+psycopg2://u@h/d",
    "x",
    Some("db+postgresql+psycopg2://u:x@h/d")
)]
#[case(
    "db+postgresql://u@/d?host=/dir",
    "x",
    Some("db+postgresql://u:x@/d?host=/dir")
)]
#[case("rpc://", "x", None)]
#[case("db+sqlite:///x", "x", None)]
#[case("", "x", None)]
fn passwords_are_filled_in(#[case] url: &str, #[case] password: &str, #[case] whole: Option<&str>) {
    assert_eq!(with_password(url, password).as_deref(), whole);
}

/// Text around a mark, made of characters with a special meaning in URLs.
fn around() -> impl Strategy<Value = (String, String)> {
    ("[a-z@:/;%#?&=+ \\[\\]]{0,6}", "[a-z@:/;%#?&=+\\[\\]]{0,6}")
}

proptest! {
    /// A password is masked, whether it is encoded or not, or the text is not shown at all.
    #[test]
    fn no_password_is_shown(
        (before, after) in around(),
        encode: bool,
        shape in 0_usize..12,
    ) {
        let mark = "S3CRET";
        let password = format!("{before}{mark}{after}");
        let password = match encode {
            true => percent_encoding::utf8_percent_encode(&password, percent_encoding::NON_ALPHANUMERIC).to_string(),
            false => password,
        };
        let url = match shape {
            0 => format!("amqp://u:{password}@h:1//v"),
            1 => format!("amqp://a:{password}@h1//;amqp://b:{password}@h2//"),
            2 => format!("redis://:{password}@h/0"),
            3 => format!("redis://h/0?db=1&password={password}"),
            4 => format!("sentinel://:{password}@h;sentinel://:{password}@g/0"),
            5 => format!("db+postgresql+psycopg2://u:{password}@h/d"),
            6 => format!("db+postgresql://u@/d?host=/dir&sslpassword={password}"),
            7 => format!("redis+socket://:{password}@/r.sock?virtual_host=1"),
            8 => format!("amqp://u:{password}@h:port//"),
            9 => format!("amqp://u:{password}@[::1//"),
            10 => format!("sentinel://h/0?sentinel_kwargs={password}"),
            // Without a host.
            _ => format!("rediss://u:{mark}{after}"),
        };
        let readable = kombu(&url).map(|parts| format!("{parts:?}"));
        let readable = readable.unwrap_or_else(|error| error.to_string());
        let of_database = sqlalchemy(&url).map(|parts| format!("{parts:?}"));
        let of_database = of_database.unwrap_or_else(|error| error.to_string());
        prop_assert!(!readable.contains(mark) && !of_database.contains(mark));
        // A parameter ends where the next one begins; only its value is hidden.
        let in_query = matches!(shape, 3 | 6 | 10);
        if encode || !in_query {
            let shown = masked(&url);
            prop_assert!(!shown.contains(mark), "{url} as {shown}");
        }
        if !password.contains(' ') && !in_query && shape != 11 {
            let text = format!("cannot reach {url}: no route");
            let shown = redacted(&text);
            prop_assert!(!shown.contains(mark), "{url} as {shown}");
        }
    }

    #[test]
    fn any_text_is_read_without_panic(text: String) {
        let _ = (kombu(&text), sqlalchemy(&text), masked(&text), redacted(&text).len());
        let _ = with_password(&text, "x");
    }

    /// A password that was filled in is read back unchanged.
    #[test]
    fn every_password_can_be_filled_in(password in "[^\\p{Cc}]{1,12}") {
        let amqp = with_password("amqp://u@h//", &password).unwrap_or_default();
        let read = kombu(&amqp).unwrap_or_default();
        prop_assert_eq!(read.password.as_deref(), Some(password.as_str()));
        let database = with_password("db+postgresql://u@h/d", &password).unwrap_or_default();
        let read = sqlalchemy(database.trim_start_matches("db+")).unwrap_or_default();
        prop_assert_eq!(read.password.as_deref(), Some(password.as_str()));
    }
}
