"""Celery's own tasks that call or send signatures: `map`, `starmap`, `chunks`, and the former tasks of groups, chains, chords."""

import uuid

import pytest
from celery import chain, group
from celery.result import result_from_tuple

from support import KINDS, Workers, backend_url, tasks_worker

BROKERS = ["rabbitmq"]
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def workers(tmp_path_factory, broker):
    directory, queue = tmp_path_factory.mktemp("canvas-tasks"), f"default{uuid.uuid4().hex[:8]}"
    # What a worker sends has no queue, and goes to the default queue.
    broker.declare(queue)
    settings = {"task_default_queue": queue}
    third = tasks_worker(directory, queue, broker, backend_url("redis"), **settings)
    workers = Workers(directory, broker, python=settings, rust=settings, pool="solo")
    yield workers
    workers.close()
    third.stop()
    broker.delete(queue)


def sent(workers, kind, signature):
    return signature.apply_async(queue=workers.queues[kind]).get(timeout=30)


def task(workers, name):
    return workers.app.signature(f"tasks.{name}")


def basemap(workers, name, called, items, **more):
    return workers.app.signature(f"celery.{name}", kwargs={"task": called, "it": items, **more}, immutable=True)


@pytest.mark.parametrize("kind", KINDS)
def test_map_and_starmap_call_the_task_in_the_worker(workers, kind):
    echoes = basemap(workers, "map", task(workers, "echo"), [1, "two", [3]])
    assert sent(workers, kind, echoes) == [1, "two", [3]]
    sums = basemap(workers, "starmap", task(workers, "add"), [(1, 2), (3, 4)])
    assert sent(workers, kind, sums) == [3, 7]
    # Within a group and a chain, with options of their own.
    assert sent(workers, kind, group(sums, echoes)) == [[3, 7], [1, "two", [3]]]
    queue = workers.queues[kind]
    steps = chain(echoes.clone().set(queue=queue), task(workers, "echo").set(queue=queue))
    assert sent(workers, kind, steps) == [1, "two", [3]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error, called", [
    (ValueError, ("map", "fail", ["wrong"])),
    (TypeError, ("starmap", "add", [[1, 2], [3]])),
    (TypeError, ("starmap", "add", [5])),
])
def test_the_failure_of_a_call_is_that_of_the_map(workers, kind, error, called):
    name, of, items = called
    with pytest.raises(error) as raised:
        sent(workers, kind, basemap(workers, name, task(workers, of), items))
    assert type(raised.value) is error


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_send_a_group(workers, kind):
    queue = workers.queues[kind]
    items = [(number, number) for number in range(5)]
    # In a chain the worker runs celery.chunks; a client would send the group.
    parts = basemap(workers, "chunks", task(workers, "add"), items, n=2)
    result = chain(task(workers, "echo").clone(args=(1,)).set(queue=queue), parts.set(queue=queue))
    tuples = result.apply_async().get(timeout=30)
    assert result_from_tuple(tuples, app=workers.app).get(timeout=30) == [[0, 2], [4, 6], [8]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_former_tasks_of_workflows(workers, kind):
    with pytest.raises(NotImplementedError, match="chain is not a real task"):
        sent(workers, kind, workers.app.signature("celery.chain", args=([],)))
    chord = workers.app.signature("celery.chord", args=(
        [task(workers, "add").clone(args=(1,)), task(workers, "add").clone(args=(2,))], task(workers, "echo"), (10,),
    ))
    body = result_from_tuple(sent(workers, kind, chord), app=workers.app)
    assert sorted(body.get(timeout=30)) == [11, 12]
    # A group with the ids of its tasks.
    tasks = [task(workers, "add").clone(args=(1,)), task(workers, "add").clone(args=(2,))]
    frozen = group(tasks, app=workers.app).freeze()
    as_task = workers.app.signature("celery.group", args=(tasks, frozen.as_tuple(), frozen.id, (10,)))
    returned = result_from_tuple(sent(workers, kind, as_task), app=workers.app)
    assert returned.id == frozen.id
    assert returned.get(timeout=30) == [11, 12]
