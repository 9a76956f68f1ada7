use celery_worker::prelude::*;

struct Point {
    x: i64,
}

#[task]
async fn origin() -> TaskResult<Point> {
    Ok(Point { x: 0 })
}

fn main() {}
