"""Wrong calls: each line that ends in `E: code` is an error of that code for `mypy --strict`, and no other is one."""

from __future__ import annotations

from datetime import timedelta

from prefork import Context, Prefork, Task

app = Prefork("shop")


@app.task
def bare(order: int, *, copy: bool = False) -> str:
    return str(order)


@app.task(max_retries=5)
def options(order: int) -> list[str]:
    return [str(order)]


@app.task
async def fetch(url: str) -> int:
    return len(url)


@app.task(takes_context=True)
def contextual(context: Context, order: int) -> bool:
    return order > 1


@app.task(takes_context=True)
async def contextual_async(context: Context, order: int) -> bool:
    return order > 1


bare.enqueue()  # E: call-arg
bare.enqueue("7")  # E: arg-type
bare.enqueue(7, True)  # E: call-arg
bare.enqueue(7, copy="yes")  # E: arg-type
bare.enqueue(7, colour="red")  # E: call-arg
bare.s(None)  # E: arg-type
bare("7")  # E: arg-type
options.enqueue(order="7")  # E: arg-type
options.using(priority=3).enqueue("7")  # E: arg-type
fetch.enqueue(7)  # E: arg-type
fetch(7)  # E: arg-type
contextual.enqueue("7")  # E: arg-type
contextual.enqueue()  # E: call-arg
contextual.enqueue(7, 8)  # E: call-arg
contextual_async.s("7")  # E: arg-type


async def wait() -> None:
    await bare.aenqueue("7")  # E: arg-type
    await fetch.aenqueue()  # E: call-arg
    number: int = await bare(7)  # E: misc
    await bare.enqueue(7)  # E: misc
    text: str = await fetch("u")  # E: assignment
    print(number, text)


number: int = bare.enqueue(7).wait()  # E: assignment
text: str = fetch.enqueue("u").wait()  # E: assignment
flag: str = contextual.enqueue(7).return_value  # E: assignment
plain: int = fetch("u")  # E: assignment
numbers: list[int] = [it.wait() for it in app.enqueue_many([bare.s(1)])]  # E: misc

app.enqueue_many([bare])  # E: arg-type
app.enqueue_many(bare.s(1))  # E: arg-type
bare.using(priority="high")  # E: arg-type
bare.using(run_after="tomorrow")  # E: arg-type
bare.using(colour="red")  # E: call-arg
bare.using(timeout=timedelta(seconds=1), queue_name=3)  # E: arg-type


app.task(max_retry=5)  # E: call-overload
app.task(max_retries="5")  # E: call-overload
app.task(retry_on=OSError("an instance"))  # E: call-overload


@app.task(takes_context=True)  # E: arg-type
def without_context() -> None: ...


@app.task(takes_context=True)  # E: arg-type
def other_context(context: int, order: int) -> None: ...


other: Task[[str], str] = options  # E: assignment
