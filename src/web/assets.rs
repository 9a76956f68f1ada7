//! The style sheet and the script of the pages.

use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use xxhash_rust::xxh3::xxh3_64;

const STYLE: &str = include_str!("assets/page.css");
const SCRIPT: &str = include_str!("assets/page.js");

pub(super) async fn style(headers: HeaderMap) -> Response {
    asset(&headers, "text/css; charset=utf-8", STYLE)
}

pub(super) async fn script(headers: HeaderMap) -> Response {
    asset(&headers, "text/javascript; charset=utf-8", SCRIPT)
}

/// The answer with a file, or without it if the browser has it already.
fn asset(headers: &HeaderMap, content_type: &'static str, text: &'static str) -> Response {
    let tag = format!("\"{:016x}\"", xxh3_64(text.as_bytes()));
    let is_known = headers
        .get_all(header::IF_NONE_MATCH)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .any(|tags| tags.contains(&tag));
    // To be asked for with its tag each time, so that a new version of the program has its own files.
    let common = [
        (header::CACHE_CONTROL, "no-cache".to_owned()),
        (header::ETAG, tag),
    ];
    match is_known {
        true => (StatusCode::NOT_MODIFIED, common).into_response(),
        false => (common, [(header::CONTENT_TYPE, content_type)], text).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_known_file_is_not_sent_again() {
        let first = asset(&HeaderMap::new(), "text/css", STYLE);
        assert_eq!(first.status(), StatusCode::OK);
        let mut headers = HeaderMap::new();
        headers.insert(header::IF_NONE_MATCH, first.headers()[header::ETAG].clone());
        let status = |text| asset(&headers, "text/css", text).status();
        assert_eq!(status(STYLE), StatusCode::NOT_MODIFIED);
        assert_eq!(status(SCRIPT), StatusCode::OK);
    }

    #[test]
    fn the_files_name_nothing_of_other_servers() {
        for text in [STYLE, SCRIPT] {
            assert!(!text.contains("//cdn") && !text.contains("http:") && !text.contains("https:"));
            assert!(!text.contains("url(") && !text.contains("@import"));
        }
    }
}
