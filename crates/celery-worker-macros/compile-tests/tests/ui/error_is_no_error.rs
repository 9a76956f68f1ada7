use celery_worker::prelude::*;

#[task]
async fn parse(text: String) -> Result<i64, String> {
    text.parse().map_err(|_| "no number".to_owned())
}

fn main() {}
