"""The app: which tasks there are, and where the broker is."""

from __future__ import annotations

import difflib
import inspect
import os
import sys
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar, overload

from prefork import options as check
from prefork.broker.client import Client
from prefork.broker.durability import parse as parse_durability
from prefork.context import Context
from prefork.errors import AppError, InvalidArguments, InvalidOption, ResultUnavailable
from prefork.invocation import Invocation
from prefork.message import derived_id, new_ids
from prefork.options import DAY_S, Duration, TaskOptions
from prefork.result import TaskResult
from prefork.results import TaskResults
from prefork.retry import RetryDelay
from prefork.signing import Signer
from prefork.task import AsyncTask, Task

P = ParamSpec("P")
R = TypeVar("R")
Hook = TypeVar("Hook", bound=Callable[[], object])
Exceptions = type[BaseException] | tuple[type[BaseException], ...]

BATCH = 200  # messages in one command of enqueue_many, so that the server does other things every two milliseconds
BATCH_BYTES = 1 << 19  # unless one alone is larger


class Prefork:
    """An app: a registry of tasks and the broker that they are sent to.

    `broker`: a URL (docs/configuration.md); without one, $PREFORK_BROKER holds. `prefix`: of all keys in the broker.
    `limit_s`: what an enqueue may take before it is an error. `durability`: what it waits for beside the broker's word,
    `fsync` or `replicas:N` (docs/reliability.md). `signing_keys`: secrets; the first one signs what is enqueued, and a
    worker runs nothing that none of them has signed (docs/signing.md). Making one connects nowhere. Raises
    InvalidOption.
    """

    def __init__(
        self, name: str, broker: str | None = None, *, prefix: str = "prefork", limit_s: float = 5.0,
        durability: str | None = None, signing_keys: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        self.name, self.prefix, self.limit_s = name, check.prefix(prefix), check.seconds("limit_s", limit_s, least=0.1)
        if broker is not None and not isinstance(broker, str):
            raise InvalidOption(f"broker={broker!r}: give a URL, such as redis://localhost:6379/0")
        try:
            self._durability = parse_durability(durability)
        except ValueError as error:
            raise InvalidOption(f"durability {error}") from None
        self.broker = broker
        self.signer: Signer | None = None
        if signing_keys is not None:
            if isinstance(signing_keys, str):
                raise InvalidOption("signing_keys= takes a list of keys, not one text")
            try:
                self.signer = Signer(signing_keys)
            except (ValueError, TypeError) as error:
                raise InvalidOption(f"signing_keys: {error}") from None
        self.tasks: dict[str, Task[..., Any]] = {}
        self.child_start_hooks: list[Callable[[], object]] = []
        self._client: Client | None = None

    def __repr__(self) -> str:
        return f"<prefork app {self.name}, {len(self.tasks)} tasks>"

    @property
    def client(self) -> Client:
        """The connection to the broker. Raises InvalidOption when no broker is named anywhere."""
        if self._client is None:
            url = self.broker or os.environ.get("PREFORK_BROKER")
            if not url:
                raise InvalidOption(
                    f"app {self.name} has no broker: pass broker= to Prefork, or set PREFORK_BROKER, "
                    f"for example to redis://localhost:6379/0"
                )
            self._client = Client(url, self.prefix, self.limit_s, self._durability)
        return self._client

    def connect_to(self, broker: str | None, prefix: str | None) -> None:
        """Use another broker or prefix from now on, as a worker does whose configuration names one."""
        if self._client:
            self._client.close()
        self._client, self.broker, self.prefix = None, broker or self.broker, prefix or self.prefix

    @overload
    def task(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...
    @overload
    def task(self, function: Callable[P, R], /) -> Task[P, R]: ...
    @overload
    def task(
        self,
        *,
        takes_context: Literal[True],
        name: str | None = None,
        queue_name: str = "default",
        priority: int = 0,
        max_retries: int = 25,
        retry_delay: RetryDelay | None = None,
        retry_on: Exceptions = Exception,
        dont_retry_on: Exceptions = (),
        timeout: Duration | None = None,
        soft_timeout: Duration | None = None,
        expires: Duration | None = None,
        result_ttl: Duration = DAY_S,
    ) -> ContextDecorator: ...
    @overload
    def task(
        self,
        *,
        takes_context: Literal[False] = False,
        name: str | None = None,
        queue_name: str = "default",
        priority: int = 0,
        max_retries: int = 25,
        retry_delay: RetryDelay | None = None,
        retry_on: Exceptions = Exception,
        dont_retry_on: Exceptions = (),
        timeout: Duration | None = None,
        soft_timeout: Duration | None = None,
        expires: Duration | None = None,
        result_ttl: Duration = DAY_S,
    ) -> Decorator: ...

    def task(self, *function: Any, **options: Any) -> Any:
        """Register a function as a task: `@app.task` or `@app.task(max_retries=5, …)`. See docs/tasks.md.

        Raises InvalidOption, and AppError for a second task of the same name.
        """
        for option in options.keys() - OPTIONS:
            near = difflib.get_close_matches(option, OPTIONS, n=1)
            raise InvalidOption(
                f"{option}= is no option of a task; "
                + (f"did you mean {near[0]}=?" if near else f"there are {', '.join(OPTIONS)}")
            )
        if function:
            return self._register(*function, **options)
        return lambda function: self._register(function, **options)

    def _register(
        self,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        queue_name: str = "default",
        priority: int = 0,
        max_retries: int = 25,
        retry_delay: RetryDelay | None = None,
        retry_on: Exceptions = Exception,
        dont_retry_on: Exceptions = (),
        timeout: Duration | None = None,
        soft_timeout: Duration | None = None,
        expires: Duration | None = None,
        result_ttl: Duration = DAY_S,
        takes_context: bool = False,
    ) -> Task[..., Any]:
        if not callable(function):
            raise InvalidOption(f"{function!r} is not a function; write @app.task or @app.task(...)")
        name = _name_of(function) if name is None else name
        if not isinstance(name, str) or not name or len(name) > 200 or not name.isprintable() or " " in name:
            raise InvalidOption(f"name={name!r}: a task's name has 1 to 200 characters and no space")
        if name in self.tasks:
            there = getattr(inspect.unwrap(self.tasks[name].function), "__code__", None)
            where = f"at {there.co_filename}:{there.co_firstlineno}" if there else f"is {self.tasks[name].function!r}"
            raise AppError(f"two tasks are named {name}: one {where}; give one of them name=")
        checked = TaskOptions(
            queue_name=check.queue_name(queue_name),
            priority=check.priority(priority),
            max_retries=check.max_retries(max_retries),
            retry_delay=check.retry_delay(retry_delay),
            retry_on=check.exceptions("retry_on", retry_on),
            dont_retry_on=check.exceptions("dont_retry_on", dont_retry_on),
            timeout_s=check.maybe_seconds("timeout", timeout),
            soft_timeout_s=check.maybe_seconds("soft_timeout", soft_timeout),
            expires_s=check.maybe_seconds("expires", expires),
            result_ttl_s=check.seconds("result_ttl", result_ttl, least=0),
            takes_context=takes_context,
        )
        check.timeouts(checked.timeout_s, checked.soft_timeout_s)
        task: Task[..., Any] = Task(self, name, function, checked)
        if task.is_async:
            task = AsyncTask(self, name, function, checked)
        self.tasks[name] = task
        return task

    def on_child_start(self, hook: Hook) -> Hook:
        """Decorate a function that each child calls before its first task, to open connections of its own."""
        if inspect.iscoroutinefunction(hook):
            raise InvalidOption("on_child_start takes a plain function, not an async def; use asyncio.run within it")
        self.child_start_hooks.append(hook)
        return hook

    def enqueue_many(self, invocations: Iterable[Invocation[R]]) -> TaskResults[R]:
        """Enqueue many, in batches: `app.enqueue_many(task.s(n) for n in …)`. -> their results, in this order

        Raises BrokerError; what was enqueued before stays enqueued.
        """
        results: TaskResults[R] = TaskResults(self)
        batch: list[Invocation[R]] = []
        size = 0
        for invocation in _invocations(invocations):
            if len(batch) == BATCH or (batch and size + len(invocation.payload) > BATCH_BYTES):
                self._enqueue_batch(batch, list(new_ids(len(batch))), results)
                batch, size = [], 0
            batch.append(invocation)
            size += len(invocation.payload)
        if batch:
            self._enqueue_batch(batch, list(new_ids(len(batch))), results)
        return results

    def enqueue_follow_ups(self, parent_id: str, follow_ups: list[Invocation[Any]]) -> None:
        """Enqueue what a plain call has gathered in its context, under the ids that its results have."""
        if follow_ups:
            ids = [derived_id(parent_id, n) for n in range(len(follow_ups))]
            self._enqueue_batch(follow_ups, ids, TaskResults(self))

    def _enqueue_batch(self, batch: list[Invocation[R]], ids: list[str], results: TaskResults[R]) -> None:
        by_queue: dict[str, list[Any]] = {}
        for invocation, id in zip(batch, ids, strict=True):
            by_queue.setdefault(invocation.queue_name, []).append(invocation.entry(id))
        now_ms = {queue: self.client.enqueue(queue, some) for queue, some in by_queue.items()}
        results.add(ids, ((it.queue_name, it.task_name, now_ms[it.queue_name]) for it in batch))

    async def aenqueue_many(self, invocations: Iterable[Invocation[R]]) -> TaskResults[R]:
        """As `enqueue_many`, without blocking the event loop (the iterable is read in another thread)."""
        import asyncio  # whoever awaits this has it

        return await asyncio.to_thread(self.enqueue_many, invocations)  # each batch with a limit of its own

    def result(self, id: str) -> TaskResult[Any]:
        """What became of a task, by its id. Raises ResultUnavailable when nothing is known of it."""
        for queue in self.client.queues():
            if self.client.inspect(queue, id)[0]:
                found: TaskResult[Any] = TaskResult(self, id, queue, "", 0)
                found.refresh()
                return found
        raise ResultUnavailable(f"nothing is known of task {id}: its result has expired, or it never was")

    def result_ttl_ms(self, task_name: str) -> int:
        """How long results of a task are kept; 0 for none, a day for a task that is not registered here."""
        task = self.tasks.get(task_name)
        return round((task.options.result_ttl_s if task else DAY_S) * 1000)


OPTIONS = tuple(inspect.signature(Prefork._register).parameters)[2:]


def _invocations(given: Iterable[Invocation[R]]) -> Iterator[Invocation[R]]:
    if isinstance(given, Invocation):
        raise InvalidArguments(
            "enqueue_many takes many, as app.enqueue_many(task.s(n) for n in …); one: task.enqueue(…)"
        )
    for invocation in given:
        if not isinstance(invocation, Invocation):
            raise InvalidArguments(f"enqueue_many takes what task.s(…) returns, not {invocation!r:.80}")
        yield invocation


class Decorator(Protocol):
    """What `@app.task(...)` returns, for the type checker."""

    @overload
    def __call__(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> Task[P, R]: ...


class ContextDecorator(Protocol):
    """What `@app.task(takes_context=True, ...)` returns, for the type checker: the context is not a parameter."""

    @overload
    def __call__(self, function: Callable[Concatenate[Context, P], Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...
    @overload
    def __call__(self, function: Callable[Concatenate[Context, P], R], /) -> Task[P, R]: ...


def _name_of(function: Callable[..., Any]) -> str:
    qualname = getattr(function, "__qualname__", "")
    if "<" in qualname or not qualname:
        raise InvalidOption(
            f"{qualname or function!r} is made inside a function, so that workers can't tell it by its name; "
            f"move it to the module's top level, or give it name="
        )
    module = function.__module__
    if module == "__main__":  # the worker will import it by its real name
        main = sys.modules["__main__"]
        spec = getattr(main, "__spec__", None)
        module = spec.name if spec else os.path.splitext(os.path.basename(getattr(main, "__file__", "__main__")))[0]
    return f"{module}.{qualname}"
