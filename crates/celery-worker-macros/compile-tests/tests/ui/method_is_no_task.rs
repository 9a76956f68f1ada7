use celery_worker::prelude::*;

struct Shop;

impl Shop {
    #[task]
    async fn sell(&self, item: String) -> TaskResult<String> {
        Ok(item)
    }
}

fn main() {}
