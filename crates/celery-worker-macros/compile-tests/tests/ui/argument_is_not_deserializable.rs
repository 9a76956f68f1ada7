use celery_worker::prelude::*;

struct Point {
    x: i64,
}

#[task]
async fn plot(point: Point) -> TaskResult<i64> {
    Ok(point.x)
}

fn main() {}
