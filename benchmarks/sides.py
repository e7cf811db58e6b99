"""What is measured side by side: prefork, the bare limit, and peers, each in an environment of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
APPS = ROOT / "benchmarks" / "apps"
PREFORK, LIMIT = "prefork", "limit"


class BenchError(Exception):
    """What stops a measurement, in a line for people."""


@dataclass(frozen=True)
class Side:
    """One of those who are compared. `command` starts its worker; `{n}`, `{url}` and `{folder}` are filled in."""

    name: str
    adapter: str
    command: str
    python: Path = Path(sys.executable)
    path: tuple[Path, ...] = (APPS,)
    slow: int = 1  # gets so many times fewer tasks than the fastest, lest it take all day

    def env(self) -> dict[str, str]:
        """The environment of all its processes."""
        env = {key: value for key, value in os.environ.items() if not key.startswith(("BENCH_", "PREFORK_"))}
        env["PATH"] = f"{self.python.parent}:{env.get('PATH', '')}"
        env["PYTHONPATH"] = ":".join(map(str, self.path))
        return env | {"PYTHONDONTWRITEBYTECODE": "1", "BENCH_MODULES": str(self.python.parents[1] / "node_modules")}


def prefork(checkout: Path = ROOT, name: str = PREFORK) -> Side:
    """prefork as a checkout has it; of another one also its environment, if it has one. Raises BenchError."""
    if not (checkout / "prefork" / "worker").is_dir():
        raise BenchError(f"{checkout} is no checkout of prefork")
    python = checkout / ".venv" / "bin" / "python"
    if checkout == ROOT or not python.exists():
        python = Path(sys.executable)
    command = f"{python} -m prefork.cli.worker -c {{folder}}/bench.conf -n {{n}}"
    return Side(name, "prefork_app", command, python, (checkout, APPS))


def limit() -> Side:
    """The bare limit, with 16 messages ahead."""
    command = f"{sys.executable} {ROOT}/benchmarks/limit.py --url {{url}} --children {{n}} --depth 16 --stay"
    return Side(LIMIT, "limit_app", command, path=(ROOT, APPS))


@dataclass(frozen=True)
class Peer:
    """Another project: what is installed for it, and how its worker is started."""

    packages: tuple[str, ...]
    command: str
    slow: int = 1
    python: str = ""  # the version that it needs, such as 3.13; nothing: ours will do
    npm: tuple[str, ...] = field(default=())
    needs: str = ""  # a command that has to be there


_CELERY = "celery -A celery_app worker -P prefork -c {n} -l ERROR"
PEERS = {
    "celery": Peer(("celery[redis]==5.7.0",), _CELERY, slow=20),
    "dramatiq": Peer(("dramatiq[redis]==2.2.1",), "dramatiq dramatiq_app -p {n} -t 1", slow=20),
    "huey": Peer(("huey==3.5.4", "redis"), "huey_consumer huey_app.huey -w {n} -k process -q", slow=5),
    "rq": Peer(("rq==3.0.0",), "rq worker-pool default -n {n} -u {url} --logging-level ERROR", slow=200),
    "mayu": Peer(
        ("mayu==0.2.5",),
        "mayu worker mayu_app:app --mode process --processes {n} --log-level ERROR",
        slow=5,
        python="3.13",
    ),
    "ardiq": Peer(("ardiq[cli]==1.2.0",), "ardiq run -q ardiq_app:app", slow=10, python="3.13"),
    "bullmq": Peer(("redis",), f"node {APPS}/bullmq.mjs work {{n}}", 5, npm=("bullmq@6.7.0", "ioredis"), needs="node"),
    "sidekiq": Peer(
        ("redis[hiredis]",), f"sidekiq -r {APPS}/sidekiq.rb -c {{n}} -q default -e production", 5, needs="sidekiq"
    ),
}


def peer(name: str, cache: Path) -> Side:
    """A peer, installed when it is asked for the first time. Raises BenchError."""
    it = PEERS[name]
    if it.needs and not shutil.which(it.needs):
        raise BenchError(f"left out: {name} needs the command {it.needs!r}, which is not on the PATH")
    env = cache / name
    made = env / "ready"
    wanted = " ".join((*it.packages, *it.npm))
    if not made.exists() or made.read_text() != wanted:
        env.parent.mkdir(parents=True, exist_ok=True)
        run(name, find_python(name, it.python), "-m", "venv", "--clear", str(env))
        run(name, str(env / "bin" / "pip"), "install", "-q", "psutil", *it.packages)
        if it.npm:
            run(name, "npm", "install", "--silent", "--prefix", str(env), *it.npm)
        made.write_text(wanted)
    return Side(name, f"{name}_app", it.command, env / "bin" / "python", slow=it.slow)


def run(name: str, *command: str) -> None:
    """One step of an installation. Raises BenchError."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-3:]
        raise BenchError(f"left out: {name} cannot be installed: {' '.join(command[:4])} …: {'; '.join(said)}")


def find_python(name: str, version: str) -> str:
    """An interpreter of this version, from the PATH or pyenv's. Raises BenchError."""
    if not version:
        return sys.executable
    found = [shutil.which(f"python{version}"), *sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python3"))]
    for python in found:
        if python and subprocess.run([python, "-c", "import venv, ensurepip"], capture_output=True).returncode == 0:
            return str(python)
    raise BenchError(f"left out: {name} needs Python {version}: put python{version} on the PATH, or into ~/.pyenv")
