//! A worker with the tasks of Celery's own test suite (`t/integration` and `t/smoke`), which `scripts/celery-suite.sh` runs
//! against it.
//!
//! A task does what the suite expects of the task with its name. The settings are those of `celery worker`, with
//! `CELERY_SUITE_` as the prefix of their environment variables; `REDIS_HOST` and `REDIS_PORT` are the suite's own.

use std::error::Error;
use std::process::ExitCode;

use celery_worker::prelude::*;
use celery_worker_cli::{Program, WorkerParts, WorkerProgram};
use redis::aio::MultiplexedConnection;

mod canvas;
mod failures;
mod recorded;
mod requests;
mod values;

/// Python modules of the tasks.
const INTEGRATION: &str = "t.integration.tasks";
const SMOKE: &str = "t.smoke.tasks";

type Registered = Result<(), Box<dyn Error + Send + Sync>>;

/// Registers tasks of a Python module.
macro_rules! register {
    ($registry:ident, $module:ident: $($task:expr),* $(,)?) => { $(enter($registry, $module, $task)?;)* };
}

fn enter<T: Task>(registry: &mut Registry, module: &str, task: T) -> Registered {
    registry.register_as([format!("{module}.{}", T::NAME)], task)?;
    Ok(())
}

fn values(registry: &mut Registry) -> Registered {
    use values::*;
    register!(registry, INTEGRATION: identity, add, mul, add_ignore_result, add_with_result, delayed_sum,
        delayed_sum_with_soft_guard, tsum, xsum, print_unicode, return_exception, sleeping, add_pydantic,
        write_to_file_and_return_int, soft_time_limit_must_exceed_time_limit);
    register!(registry, SMOKE: noop, long_running_task, soft_time_limit_must_exceed_time_limit,
        soft_time_limit_lower_than_time_limit, self_termination_delay_timeout);
    let sums = [
        "t.integration.tasks.add_not_typed",
        "t.smoke.tasks.add_with_explicit_lazy_option",
    ];
    registry.register_as(sums, add_two)?;
    registry.register_as(["t.smoke.tasks.summarize_results"], tsum)?;
    let pydantic = ["t.integration.tasks.add_pydantic_string_annotations"];
    registry.register_as(pydantic, add_pydantic)?;
    Ok(())
}

fn failures(registry: &mut Registry) -> Registered {
    use failures::*;
    register!(registry, INTEGRATION: raise_error, fail, fail_unpickleable, fail_replaced, retry, retry_unpickleable,
        retry_with_args_after_kwargs, retry_with_kwargs_after_args, retry_once, retry_once_ignore_result,
        retry_once_with_result, retry_once_priority, retry_once_headers, store_success_then_reject,
        reject_then_succeed, reject_without_requeue);
    register!(registry, SMOKE: countdown_task_with_retry, non_eta_task_with_retries);
    registry.register(auto_retry_class_task)?;
    Ok(())
}

fn requests(registry: &mut Registry) -> Registered {
    use requests::*;
    register!(registry, INTEGRATION: ids, collect_ids, return_priority, return_request_eta, return_properties,
        return_request_time_limits, task_with_declared_time_limits);
    Ok(())
}

fn canvas(registry: &mut Registry) -> Registered {
    use canvas::*;
    register!(registry, INTEGRATION: chain_add, chord_add, add_replaced, add_replaced_with_chain,
        record_replaced_task_nesting, replace_with_chain, replace_with_chain_which_raises, replace_with_empty_chain,
        replace_with_chain_which_contains_a_group, add_to_all, add_to_all_to_chord, add_chord_to_chord,
        build_chain_inside_task, replaced_with_me, replace_with_stamped_task, rebuild_signature);
    register!(registry, SMOKE: replace_with_task);
    for (name, task) in nested() {
        registry.register_as([name], task)?;
    }
    Ok(())
}

/// Registers the tasks that write to the suite's Redis.
fn recorded(registry: &mut Registry, connection: &MultiplexedConnection) -> Registered {
    use recorded::*;
    let redis = || connection.clone();
    register!(registry, INTEGRATION: sum_and_record { redis: redis() }, redis_echo { redis: redis() },
        redis_echo_group_id { redis: redis() }, redis_count { redis: redis() },
        second_order_replace1 { redis: redis() }, second_order_replace2 { redis: redis() });
    // An errback of either style is sent as a message, with the id of the failed task.
    let errbacks = ["old", "new"].map(|style| format!("{INTEGRATION}.errback_{style}_style"));
    let with_args = errbacks.clone().map(|name| format!("{name}_with_args"));
    registry.register_as(errbacks, errback { redis: redis() })?;
    registry.register_as(with_args, errback_with_args { redis: redis() })?;
    Ok(())
}

async fn connect() -> redis::RedisResult<MultiplexedConnection> {
    let variable = |name, default: &str| std::env::var(name).unwrap_or_else(|_| default.to_owned());
    let host = variable("REDIS_HOST", "localhost");
    let port = variable("REDIS_PORT", "6379");
    let client = redis::Client::open(format!("redis://{host}:{port}/0"))?;
    client.get_multiplexed_async_connection().await
}

async fn tasks(_: WorkerParts) -> Result<Registry, Box<dyn Error + Send + Sync>> {
    let mut registry = Registry::default();
    values(&mut registry)?;
    failures(&mut registry)?;
    requests(&mut registry)?;
    canvas(&mut registry)?;
    recorded(&mut registry, &connect().await?)?;
    Ok(registry)
}

fn main() -> ExitCode {
    let program = Program::new("celery-suite", env!("CARGO_PKG_VERSION"));
    WorkerProgram::new(program).run(std::env::args_os(), tasks)
}
