use celery_worker::prelude::*;

#[task(acks_lat)]
async fn add(x: i64, y: i64) -> TaskResult<i64> {
    Ok(x + y)
}

fn main() {}
