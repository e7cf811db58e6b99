"""Workers with `signing_keys`: what was not enqueued by one who has a key reaches no task. And the change of a key."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import orjson
import pytest

from prefork import TaskResult
from prefork.signing import Signer
from tests.cli.command import as_json, prefork
from tests.conftest import Project, Worker, until
from tests.process.scene import key, place, state, wait_dead

OLD, NEW = "old-SECRET-" + "o" * 32, "new-SECRET-" + "n" * 53
TASKS = """
@app.task(max_retries=2, retry_delay=0)
def send(n):
    note("sent", n)
    if n == "again" and (here / "sent").read_text().split().count("again") < 2:
        raise ValueError("once more")
    return n

@app.task(takes_context=True)
def parent(context, queue):
    context.enqueue(send.using(queue_name=queue).s("follow"))
    send.enqueue("within")
"""


@pytest.fixture
def shop(project: Project) -> Iterator[Project]:
    project.add(TASKS)
    yield project
    logs = "".join(path.read_text() for path in project.folder.glob("worker*.log"))
    assert "SECRET" not in logs


def signed_by(shop: Project, *keys: str) -> Any:
    """The app of a producer that has these keys."""
    shop.tasks.app.signer = Signer(keys) if keys else None
    return shop.tasks.send


def dead(shop: Project, result: TaskResult[Any]) -> str:
    """Why it is a dead letter; it has to be one by its signature, and never to have been tried."""
    wait_dead(shop, result)
    known = state(shop, result)
    assert "attempts" not in known
    assert known["errors"][-1]["class"] == "prefork.BadSignature"
    return str(known["errors"][-1]["message"])


def rewrite(shop: Project, result: TaskResult[Any], old: bytes, new: bytes) -> None:
    raw = shop.server.client.hget(key("m"), result.id)
    assert isinstance(raw, bytes)
    assert old in raw
    shop.server.client.hset(key("m"), result.id, raw.replace(old, new))


def test_what_is_not_signed_or_was_altered_reaches_no_task(shop: Project) -> None:
    send = signed_by(shop, NEW)
    body, task, options, ranked, moved, good = (
        send.enqueue("body"), send.enqueue("task"), send.using(timeout=9).enqueue("options"),
        send.using(priority=5).enqueue("ranked"), send.using(queue_name="other").enqueue("moved"), send.enqueue("good"),
    )  # fmt: skip
    rewrite(shop, body, b'"body"', b'"evil"')
    rewrite(shop, task, b".send", b".nap")
    rewrite(shop, options, b'"timeout_s":9.0', b'"timeout_s":9e9')
    rewrite(shop, ranked, b" 5 {", b" 9 {")
    raw = shop.server.client.hget(key("m", "other"), moved.id)
    shop.server.client.hset(key("m"), moved.id, raw)  # a signed message, in a queue of other workers
    shop.server.client.rpush(key("pending"), moved.id)
    copied = TaskResult(shop.tasks.app, "0" * 32, "default", "", 0)  # and under another id
    shop.server.client.hset(key("m"), copied.id, shop.server.client.hget(key("m"), good.id))
    shop.server.client.rpush(key("pending"), copied.id)
    unsigned = signed_by(shop).enqueue("unsigned")
    unknown = signed_by(shop, OLD).enqueue("unknown")
    worker = shop.worker(f"signing_keys = {NEW}\nlog_level = debug")
    assert good.wait(60) == "good"
    for result in (body, task, options, ranked, copied):
        assert "does not match its signature by the key " in dead(shop, result)
    until(lambda: shop.server.client.zscore(key("dead"), moved.id), what="the moved one is dead")
    assert "is not signed, and this worker has signing_keys" in dead(shop, unsigned)
    said = dead(shop, unknown)
    assert f"is signed with the key {Signer([OLD]).ids[0]}, and this worker has {Signer([NEW]).ids[0]}" in said
    assert said in worker.log
    assert shop.lines("sent") == ["good"]
    shown = prefork("show", unknown.id, "--broker", shop.server.url)
    assert f"prefork.BadSignature: {said}" in shown
    assert "SECRET" not in shown
    for words in (("show", good.id), ("workers",), ("list", "default", "--state", "dead")):
        assert "SECRET" not in str(as_json(*words, "--broker", shop.server.url))


def test_a_retry_by_an_operator_signs_nothing_but_a_key_that_was_missing_can_be_added(shop: Project) -> None:
    altered, unknown = signed_by(shop, OLD).enqueue("a"), signed_by(shop, OLD).enqueue("b")
    rewrite(shop, altered, b'"a"', b'"evil"')
    worker = shop.worker(f"signing_keys = {NEW}")
    before = dead(shop, altered), dead(shop, unknown)
    keys = shop.folder / "retry.conf"
    keys.write_text(f"[prefork]\nbroker = {shop.server.url}\nsigning_keys = {NEW}\n")
    prefork("retry", altered.id, unknown.id, "-c", str(keys), "--yes")
    until(lambda: worker.log.count("; kept as a dead letter") == 4, what="both are dead again")
    assert (dead(shop, altered), dead(shop, unknown)) == before
    worker.stop()
    shop.worker(f"signing_keys = {NEW}, {OLD}")
    prefork("retry", "--dead", "default", "--broker", shop.server.url, "--yes")
    assert unknown.wait(60) == "b"
    assert "does not match" in dead(shop, altered)
    assert shop.lines("sent") == ["b"]


def test_retries_follow_ups_delays_and_what_a_task_enqueues_are_signed(shop: Project) -> None:
    send = signed_by(shop, NEW)
    again, later = send.enqueue("again"), send.using(run_after=0.05, expires=60).enqueue("later")
    for queue in ("default", "other"):
        shop.tasks.parent.enqueue(queue)
    many = shop.tasks.app.enqueue_many(send.s(n) for n in range(3))
    shop.worker(f"signing_keys = {NEW}\nqueues = default, other")
    assert [result.wait(60) for result in (again, later, *many)] == ["again", "later", 0, 1, 2]
    expected = sorted(["again", "again", "later", "0", "1", "2", *["follow"] * 2, *["within"] * 2])
    until(lambda: sorted(shop.lines("sent")) == expected, what=f"{expected}, not {shop.lines('sent')}")
    assert shop.server.client.zcard(key("dead")) == 0


def test_a_worker_without_keys_runs_what_is_signed(shop: Project) -> None:
    shop.worker()
    assert signed_by(shop, NEW).enqueue(1).wait(60) == 1


def test_the_keys_of_the_app_hold_where_the_configuration_has_none(shop: Project) -> None:
    shop.add(f"from prefork.signing import Signer\napp.signer = Signer([{NEW!r}])")
    shop.worker()
    assert shop.tasks.send.enqueue(1).wait(60) == 1
    assert "is not signed" in dead(shop, signed_by(shop).enqueue(2))


def test_a_key_is_changed_while_all_goes_on(shop: Project) -> None:
    """As docs/signing.md has it, with two workers that reload one after the other; nothing dies in between."""
    file = shop.folder / "signing.keys"
    file.write_text(OLD)
    workers = [shop.worker("signing_keys_file = signing.keys") for _ in range(2)]
    send, results = signed_by(shop, OLD), []

    def enqueue() -> None:
        results.extend(shop.tasks.app.enqueue_many(send.s(len(results) + n) for n in range(50)))
        results.append(send.using(run_after=0.3).enqueue("later"))

    def reload(*keys: str) -> None:
        file.write_text("\n".join(keys))
        for worker in workers:
            times = worker.log.count("is ready")
            enqueue()
            worker.send(signal.SIGHUP)
            until(lambda w=worker, n=times: w.log.count("is ready") > n, what="it has reloaded")  # type: ignore[misc]
            enqueue()

    reload(OLD, NEW)  # 1. all verify the new key too
    send = signed_by(shop, NEW, OLD)  # 2. producers sign with it
    reload(NEW, OLD)  # 3. so do the workers
    for result in results:  # 4. what the old key has signed has run
        result.wait(60)
    reload(NEW)  # 5. nobody needs the old one any more
    for result in results:
        result.wait(60)
    assert len(shop.lines("sent")) == len(results)
    assert shop.server.client.zcard(key("dead")) == 0


def test_the_operators_enqueue_signs(shop: Project) -> None:
    conf = f"app = {shop.module_name}:app\nsigning_keys = %(ENV_KEYS)s"
    worker = shop.worker(conf, KEYS=f"{NEW},{OLD}")
    without_app = shop.folder / "no-app.conf"
    without_app.write_text(f"[prefork]\nbroker = {shop.server.url}\nsigning_keys = {OLD}\n")
    name = shop.tasks.send.name
    id = prefork("enqueue", name, "--args", '["x"]', "-c", str(without_app)).strip()
    assert shop.tasks.app.result(id).wait(60) == "x"
    os.environ["KEYS"] = NEW
    try:
        assert prefork("enqueue", name, "--args", '["y"]', "-c", str(worker._conf), "--wait", "60").strip() == '"y"'
    finally:
        del os.environ["KEYS"]
    result = shop.tasks.app.result(prefork("enqueue", name, "--broker", shop.server.url).strip())
    assert "is not signed" in dead(shop, result)


BAD: dict[str, tuple[str, str]] = {
    "short": ("signing_keys = short-SECRET", "signing_keys: key 1 has 12 characters, 32 are the least; make one with"),
    "empty": (f"signing_keys = {NEW},", "signing_keys: key 2 has 0 characters"),
    "twice": (f"signing_keys = {NEW}, {NEW}", "signing_keys: key 2 is there twice; remove one"),
    "both": (f"signing_keys = {NEW}\nsigning_keys_file = keys", "signing_keys is given too; leave one of them out"),
    "no file": ("signing_keys_file = none", "none: signing_keys_file: cannot be read (No such file or directory)"),
    "empty file": ("signing_keys_file = /dev/null", "/dev/null: signing_keys_file: holds no key; make one with"),
    "no variable": ("signing_keys = %(ENV_NOT_SET)s", "the environment has no 'NOT_SET'"),
}


@pytest.mark.parametrize("name", BAD)
def test_keys_that_cannot_be_used_keep_the_worker_from_starting_and_are_not_quoted(shop: Project, name: str) -> None:
    conf, said = BAD[name]
    worker = shop.worker(conf, "--check", wait=False)
    assert worker.wait() == 78
    assert said in worker.log
    assert len(worker.log.splitlines()) == 1


def test_a_health_check_needs_no_keys(shop: Project) -> None:
    worker: Worker = shop.worker("signing_keys = %(ENV_KEYS)s\npidfile = w.pid", KEYS=NEW)
    conf = worker._conf.read_text().removeprefix("[prefork]\n")
    until(lambda: shop.worker(conf, "--ping", wait=False).wait() == 0)
    told = orjson.dumps(as_json("workers", "--broker", shop.server.url))
    assert b"SECRET" not in told
    assert place(shop, signed_by(shop, NEW).enqueue(1)) in ("pending", "active", "finished")
