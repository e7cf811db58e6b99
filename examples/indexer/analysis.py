"""What there is to know about one Python file. Plain Python: nothing here knows of tasks."""

from __future__ import annotations

import ast
import io
import tokenize
import warnings
from pathlib import Path
from typing import TypedDict


class FileIndex(TypedDict):
    """The findings of one file. `parsed` is False, and all but the lines is empty, if it isn't valid Python."""

    parsed: bool
    lines: int
    tokens: int
    definitions: int
    longest: int  # lines of the longest function
    longest_name: str
    imports: list[str]  # top-level modules, sorted


def analyse(path: str) -> FileIndex:
    """Read and analyse one file, whatever is in it."""
    found = FileIndex(parsed=False, lines=0, tokens=0, definitions=0, longest=0, longest_name="", imports=[])
    try:
        source = Path(path).read_bytes()
        found["lines"] = len(source.splitlines())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old escapes and the like, which are not ours to mend
            tree = ast.parse(source)
        tokens = sum(1 for _ in tokenize.tokenize(io.BytesIO(source).readline))
    except (OSError, SyntaxError, ValueError, tokenize.TokenError, RecursionError, MemoryError):
        return found

    imports: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                found["definitions"] += 1
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > found["longest"]:
                    found["longest"], found["longest_name"] = length, node.name
            case ast.ClassDef():
                found["definitions"] += 1
            case ast.Import():
                imports |= {name.name.partition(".")[0] for name in node.names}
            case ast.ImportFrom(module=str(module), level=0):
                imports.add(module.partition(".")[0])
    found["parsed"], found["tokens"], found["imports"] = True, tokens, sorted(imports)
    return found
