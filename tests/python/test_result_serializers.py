"""`result_serializer`: results that one kind of worker writes, and the other kind and clients read."""

import json

import pytest
from celery import chord

from support import KINDS, Workers, backend_url

BROKERS = ["rabbitmq"]
pytestmark = pytest.mark.timeout(120)

SETUPS = [("msgpack", "redis"), ("msgpack", "rpc"), ("yaml", "redis"), ("yaml", "database")]
VALUES = [
    None,
    [True, False, [], {}],
    [0, -1, 255, 65536, -(2**63), 2**64 - 1],
    [0.0, -0.5, 1e5, 1e-7, 1.5e300, 1e22],
    ["", "yes", "null", "~", "2026-11-24", "1e5", "0x10", "a: b", "- a", "# a", "'\"\\"],
    ["né", "日本", "\U0001f600", "\x00\x07\x1b\x7f\x85", "a\r\n\tb \n", "\u2028\u2029\ufeff\ufffe\uffff"],
    {"é": {"b: c": [{"d": 1}]}, "": 2, "n\n": 3, "k" * 2000: "v" * 5000, "yes": 4, "?": 5},
]


@pytest.fixture(scope="module", params=SETUPS, ids="-".join)
def workers(request, tmp_path_factory, broker):
    serializer, backend = request.param
    directory = tmp_path_factory.mktemp(f"{serializer}-{backend}")
    url = f"db+sqlite:///{directory / 'results.sqlite'}" if backend == "database" else backend_url(backend)
    accepted = ["json", serializer]
    workers = Workers(
        directory,
        broker,
        backend=url,
        python={"result_serializer": serializer, "accept_content": accepted},
        rust={"result_serializer": serializer, "accept_content": json.dumps(accepted)},
        pool="solo",
        # The first one creates the tables.
        first="python",
    )
    workers.backend = backend
    yield workers
    workers.close()


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_failures_are_read_as_they_were(workers, kind):
    results = [workers.send(kind, "echo", value) for value in VALUES]
    assert [result.get(timeout=30) for result in results] == VALUES
    with pytest.raises(ValueError, match="wrong: né"):
        workers.send(kind, "fail", "wrong: né").get(timeout=30)


@pytest.mark.parametrize("kind", KINDS)
def test_a_chord_has_parts_in_both_kinds_of_worker(workers, kind):
    if workers.backend == "rpc":
        pytest.skip("rpc has no chords")

    def signature(kind, name, *args):
        return workers.app.signature(f"tasks.{name}", args=args, queue=workers.queues[kind])

    header = [signature(one, "echo", value) for one in KINDS for value in ("né", [1.5e300, None])]
    assert chord(header, signature(kind, "echo")).apply_async().get(timeout=30) == ["né", [1.5e300, None]] * 2
