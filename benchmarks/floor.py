"""What a start takes when none of it is Python: the same processes, server, scripts and pipes, in bare C.

    python -m benchmarks.floor [--gap-ms 20] [--rounds 5] [--count 200] [--json] [--server redis-server]

Nothing is encoded, decoded, decided or looked after: from before the producer's write to the child's read. No worker of
this shape starts tasks sooner on this machine, in whatever language. Beside it the same without scripts: a PUBLISH of a
message that nobody keeps. Needs a C compiler.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from pathlib import Path

from benchmarks.scene import TINY, Scene, bundled_server
from benchmarks.sides import prefork
from prefork.broker.verbs import SCRIPTS

STEPS = "to the master", "to the child", "in all"


def built(folder: str) -> str:
    """The program. Raises SystemExit without a compiler."""
    program = f"{folder}/floor"
    try:
        subprocess.run(["cc", "-O2", "-o", program, Path(__file__).with_suffix(".c")], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"floor.py: it cannot be compiled: {error}") from None
    return program


def measured(program: str, port: int, scripts: tuple[str, str], gap_ms: float, count: int) -> list[float]:
    """-> the median of each step, in microseconds"""
    command = [program, str(port), *scripts, str(round(gap_ms * 1000)), str(count)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60 + count * gap_ms / 500)
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"floor.py: {error.stderr.strip() or error}") from None
    return [float(word) for word in done.stdout.split()]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.floor", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--gap-ms", type=float, default=20.0, help="between two messages (%(default)g)")
    parser.add_argument("--rounds", type=int, default=5, help="of each, in turn (%(default)s)")
    parser.add_argument("--count", type=int, default=200, help="messages in a round (%(default)s)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--server", default="", help="a redis-server or valkey-server in place of the bundled one")
    options = parser.parse_args()
    ways = {"with our scripts": (str(SCRIPTS / "enqueue.lua"), str(SCRIPTS / "claim.lua")), "PUBLISH alone": ("", "")}
    rounds: dict[str, list[list[float]]] = {name: [] for name in ways}
    binary = options.server or bundled_server()
    with tempfile.TemporaryDirectory() as folder, Scene(prefork(), TINY, binary) as scene:
        program = built(folder)
        for _ in range(options.rounds):
            for name, scripts in ways.items():
                rounds[name].append(measured(program, scene.port, scripts, options.gap_ms, options.count))
    told = {
        name: {step: [round(us) for us in steps] for step, steps in zip(STEPS, zip(*took, strict=True), strict=True)}
        for name, took in rounds.items()
    }
    if options.json:
        print(json.dumps(told))
        return
    for name, steps in told.items():
        print(f"{name}:")
        for step, us in steps.items():
            print(f"  {step:14} {statistics.median(us):5.0f} µs ({min(us)} to {max(us)})")


if __name__ == "__main__":
    main()
