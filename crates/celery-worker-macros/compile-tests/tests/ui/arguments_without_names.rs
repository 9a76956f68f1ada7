use celery_worker::prelude::*;

#[derive(TaskArgs)]
struct AddArgs(i64, i64);

fn main() {}
