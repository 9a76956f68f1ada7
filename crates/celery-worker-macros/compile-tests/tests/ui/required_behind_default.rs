use celery_worker::prelude::*;

#[task]
async fn add(#[default = 1] x: i64, y: i64) -> TaskResult<i64> {
    Ok(x + y)
}

fn main() {}
