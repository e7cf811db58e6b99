"""A task: a function that a worker can run, and the ways to ask for it."""

from __future__ import annotations

import copy
import difflib
import functools
import inspect
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, Generic, ParamSpec, Self, TypeVar, cast

from prefork import options as check
from prefork.context import Context
from prefork.errors import InvalidArguments, InvalidOption
from prefork.invocation import Invocation, Sender
from prefork.message import Header, encode_body, new_id
from prefork.options import Duration, Moment, TaskOptions
from prefork.result import TaskResult

P = ParamSpec("P")
R = TypeVar("R")
Q = ParamSpec("Q")
T = TypeVar("T")
MOST_SHAPES = 256
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def known_options(using: Callable[Q, T]) -> Callable[Q, T]:
    """Let `using` refuse an option that it does not have as it refuses a bad value of one, with the remedy."""
    known = [name for name in inspect.signature(using).parameters if name != "self"]

    @functools.wraps(using)
    def checked(*args: Q.args, **options: Q.kwargs) -> T:
        for option in options.keys() - known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f"did you mean {near[0]}=?" if near else f"there are {', '.join(known)}"
            raise InvalidOption(f"{option}= is no option of using; {hint}")
        return using(*args, **options)

    return checked


class Task(Generic[P, R]):
    """A registered task with parameters P and return type R; made by `@app.task`.

    Calling it runs the function here, now. `enqueue` sends it to a worker.
    """

    def __init__(self, app: Sender, name: str, function: Callable[..., Any], options: TaskOptions) -> None:
        self.app, self.name, self.function, self.options = app, name, function, options
        self.is_async = inspect.iscoroutinefunction(function)
        self.queue_name, self.priority = options.queue_name, options.priority
        self._header_options = Header(name)
        self._header = self._header_options.encode()
        self._at = ""
        self._signature = _without_context(name, function, options.takes_context)
        self._positional = tuple(p.name for p in self._signature.parameters.values() if p.kind in POSITIONAL)
        self._arity = _plain_arity(self._signature)
        self._fitting: set[tuple[object, ...]] = set()
        functools.update_wrapper(self, function, updated=())

    def __repr__(self) -> str:
        return f"<task {self.name}>"

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the function here, now. A task that takes its context gets one of its own."""
        if not self.options.takes_context:
            return cast(R, self.function(*args, **kwargs))
        context = Context.local(self.name)
        returned = self.function(context, *args, **kwargs)
        if self.is_async:
            return cast(R, self._finish(returned, context))
        self.app.enqueue_follow_ups(context.id, context.follow_ups)
        return cast(R, returned)

    async def _finish(self, coroutine: Coroutine[Any, Any, R], context: Context) -> R:
        returned = await coroutine
        import asyncio  # whoever awaits this has it

        await asyncio.to_thread(self.app.enqueue_follow_ups, context.id, context.follow_ups)
        return returned

    def s(self, /, *args: P.args, **kwargs: P.kwargs) -> Invocation[R]:
        """The task with these arguments, to be enqueued later. Raises InvalidArguments, NotJSON, PayloadTooLarge."""
        self._check(args, kwargs)
        payload = self._header + b"\n" + encode_body(self.name, args, kwargs, self._positional)
        return Invocation(self.app, self.name, self.queue_name, self.priority, self._at, payload)

    def enqueue(self, /, *args: P.args, **kwargs: P.kwargs) -> TaskResult[R]:
        """Send it to a worker; when this returns, the broker has accepted it.

        Raises InvalidArguments, NotJSON, PayloadTooLarge; BrokerError if the broker can't be used within the limit.
        """
        invocation, id = self.s(*args, **kwargs), new_id()
        return invocation.result(id, self.app.client.enqueue(self.queue_name, [invocation.entry(id)]))

    async def aenqueue(self, /, *args: P.args, **kwargs: P.kwargs) -> TaskResult[R]:
        """As `enqueue`, without blocking the event loop. When it is cancelled, it may be sent all the same."""
        invocation, id = self.s(*args, **kwargs), new_id()
        entries = [invocation.entry(id)]
        return invocation.result(id, await self.app.client.in_thread(self.app.client.enqueue, self.queue_name, entries))

    @known_options
    def using(
        self,
        *,
        queue_name: str | None = None,
        priority: int | None = None,
        run_after: Moment | None = None,
        expires: Moment | None = None,
        max_retries: int | None = None,
        timeout: Duration | None = None,
        soft_timeout: Duration | None = None,
    ) -> Self:
        """The same task with other options, for the messages that are enqueued with it.

        `run_after`, `expires`: seconds or a timedelta from now, or an aware datetime. Raises InvalidOption.
        """
        changed = copy.copy(self)
        if queue_name is not None:
            changed.queue_name = check.queue_name(queue_name)
        if priority is not None:
            changed.priority = check.priority(priority)
        header = self._header_options
        if run_after is not None:
            delay_s, due_ms = check.moment("run_after", run_after, least=0)
            header = replace(header, delay_s=delay_s, due_ms=due_ms)
            changed._at = f"+{round(delay_s * 1000)}" if delay_s is not None else str(due_ms)
        if expires is not None:
            expires_s, expires_ms = check.moment("expires", expires, least=0.001)
            header = replace(header, expires_s=expires_s, expires_ms=expires_ms)
        if max_retries is not None:
            header = replace(header, max_retries=check.max_retries(max_retries))
        if timeout is not None:
            header = replace(header, timeout_s=check.seconds("timeout", timeout))
        if soft_timeout is not None:
            header = replace(header, soft_timeout_s=check.seconds("soft_timeout", soft_timeout))
        check.timeouts(
            self.options.timeout_s if header.timeout_s is None else header.timeout_s,
            self.options.soft_timeout_s if header.soft_timeout_s is None else header.soft_timeout_s,
        )
        changed._header_options, changed._header = header, header.encode()
        return changed

    def _check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        least, most = self._arity
        if not kwargs and least <= len(args) <= most:
            return
        shape = (len(args), *kwargs)  # whether arguments fit is a matter of their number and names alone
        if shape in self._fitting:
            return
        try:
            self._signature.bind(*args, **kwargs)
            if self.options.takes_context:  # a keyword may bear the name of the context
                inspect.signature(self.function).bind(None, *args, **kwargs)
        except TypeError as error:
            raise InvalidArguments(f"{self.name}{self._signature}: {error}") from None
        if len(self._fitting) < MOST_SHAPES:
            self._fitting.add(shape)


class AsyncTask(Task[P, R]):
    """A task that is an `async def`: a plain call returns its coroutine; the result of a worker's run is R."""

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:  # type: ignore[override]
        """The coroutine, to be awaited here."""
        return cast(Coroutine[Any, Any, R], super().__call__(*args, **kwargs))


def _without_context(name: str, function: Callable[..., Any], takes_context: bool) -> inspect.Signature:
    signature = inspect.signature(function)
    if not takes_context:
        return signature
    parameters = list(signature.parameters.values())
    if not parameters or parameters[0].kind not in POSITIONAL:
        raise InvalidOption(f"task {name}: takes_context=True, but it has no first parameter for the context")
    return signature.replace(parameters=parameters[1:])


def _plain_arity(signature: inspect.Signature) -> tuple[float, float]:
    """How many positional arguments fit a call without keywords: (least, most); (1, 0) if none can."""
    least, most = 0, 0.0
    for p in signature.parameters.values():
        if p.kind is p.VAR_POSITIONAL:
            most = float("inf")
        elif p.kind is p.KEYWORD_ONLY and p.default is p.empty:
            return 1, 0
        elif p.kind in POSITIONAL:
            most += 1
            least += p.default is p.empty
    return least, most
