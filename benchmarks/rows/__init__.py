"""All rows of the table, each in the file that measures it, with what is to come out."""

from __future__ import annotations

from benchmarks.rows import (
    backlog,
    enqueue,
    idle,
    kept,
    latency,
    memory,
    pace,
    payload,
    producers,
    scaling,
    scripts,
    start,
    throughput,
)

FILES = throughput, kept, latency, enqueue, pace, idle, memory, backlog, payload, scaling, start, producers, scripts
ROWS = {row.name: row for file in FILES for row in file.ROWS}
