use celery_worker::prelude::*;

#[task]
async fn greet(name: &str) -> TaskResult<String> {
    Ok(format!("Hello, {name}!"))
}

fn main() {}
