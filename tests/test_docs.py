"""Runs the code blocks of README.md and docs/getting-started.md, so that what they say stays true.

Each page gets an empty folder of its own, and its blocks are run there from top to bottom. The words after a block's
language say what is done with it:

    ```python title="shop/tasks.py"     (any language) written to that file
    ```python                           run; the blocks of a page share one interpreter. With `>>>` it is a doctest,
                                        where `...` stands for anything
    ```sh                               run by bash, which stops at the first failure. Each block begins in the page's
                                        folder, with the commands of this environment on the PATH. When there are
                                        lines with the prompt `$ `, only those are run, and the others say what is
                                        printed
    ```sh background                    one command, started and left running; at the end of the page it gets SIGTERM,
                                        after which it must end with status 0
    ```sh checkout                      run in the checkout instead of the page's folder
    ```text output                      what the `sh` block before has printed, or, in the background, is to print
    ```sh no-run                        only shown, as are other languages without a title

In expected output a line `...` stands for any number of lines, and `...` within a line for any text.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/getting-started.md")
LIMIT_S = 300  # for one block: bin/demo is among them
OUTPUT_LIMIT_S = 30  # for a background block to print what it is to print
STOP_LIMIT_S = 20  # for a background block to end after SIGTERM
ROOT_IS_TOLD = "the tasks run as root"  # no reader's worker says so, unless the reader is root

FENCE = re.compile(r"^( {0,3})(`{3,}|~{3,})\s*(.*?)\s*$")
WORDS = {"background", "checkout", "no-run", "output"}
SHELLS = {"sh", "bash", "console", "shell"}

# Runs the Python blocks of a page in one namespace: reads one length-framed block after the other, answers each.
INTERPRETER = """
import doctest, sys, traceback
answers, sys.stdout = sys.stdout, sys.stderr
names = {"__name__": "__page__"}
source = sys.stdin.buffer
while head := source.readline():
    size, where = head.decode().split(" ", 1)
    text = source.read(int(size)).decode()
    good = True
    try:
        if ">>> " in text:
            test = doctest.DocTestParser().get_doctest(text, names, where.strip(), None, 0)
            runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
            good = not runner.run(test, out=sys.stderr.write, clear_globs=False).failed
            names.update(test.globs)
        else:
            exec(compile(text, where.strip(), "exec"), names)
    except BaseException:
        traceback.print_exc()
        good = False
    sys.stderr.flush()
    print("good" if good else "bad", file=answers, flush=True)
"""


class DocsError(AssertionError):
    """A block that cannot be read, or does not do what the page says."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    where: str  # page:line
    language: str
    words: frozenset[str]
    title: str
    text: str


def read_blocks(page: str, text: str) -> list[Block]:
    """The fenced blocks of a page. Raises DocsError for words that mean nothing."""
    blocks: list[Block] = []
    lines = iter(enumerate(text.splitlines(), 1))
    for number, line in lines:
        if not (fence := FENCE.match(line)):
            continue
        where, (indent, ticks, info) = f"{page}:{number}", fence.groups()
        body: list[str] = []
        for _, inner in lines:
            if inner.strip().startswith(ticks) and not inner.strip().strip(ticks[0]):
                break
            body.append(inner.removeprefix(indent))
        else:
            raise DocsError(f"{where}: this block is not closed")
        blocks.append(read_info(where, info, "".join(f"{inner}\n" for inner in body)))
    return blocks


def read_info(where: str, info: str, text: str) -> Block:
    """A block from its info string: the language and what is to be done with it."""
    language, *rest = shlex.split(info) or [""]
    title = ""
    words = set()
    for word in rest:
        if word.startswith("title="):
            title = word.removeprefix("title=")
        elif word in WORDS:
            words.add(word)
        else:
            raise DocsError(f"{where}: {word!r} means nothing here; the words are title=, {', '.join(sorted(WORDS))}")
    if language == "output":
        language, words = "text", {*words, "output"}
    return Block(where, language, frozenset(words), title, text)


def same_output(expected: str, printed: str) -> bool:
    """Whether the output is as the page says, with `...` for what it does not say."""
    pattern = ""
    for line in expected.strip("\n").splitlines():
        if line.strip() == "...":
            pattern += r"(?:.*\n)*?"
        else:
            pattern += ".*?".join(re.escape(part) for part in line.rstrip().split("...")) + r"[ \t]*\n"
    lines = (line for line in printed.strip("\n").splitlines() if ROOT_IS_TOLD not in line)
    text = "".join(f"{line}\n" for line in lines)
    return re.fullmatch(pattern, text) is not None


def commands_of(text: str) -> tuple[str, str | None]:
    """The script of a shell block and, if it has prompts, the output that stands between its commands."""
    if not re.search(r"^\$ ", text, re.MULTILINE):
        return text, None
    script, output, goes_on = "", "", False
    for line in text.splitlines(keepends=True):
        if line.startswith("$ ") or goes_on:
            command = line.removeprefix("$ ") if not goes_on else line.removeprefix("> ")
            script += command
            goes_on = command.rstrip("\n").endswith("\\")
        else:
            output += line
    return script, output


class Page:
    """One page being run, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        home = folder.parent / "home"
        home.mkdir(exist_ok=True)
        self.environ = {k: v for k, v in os.environ.items() if not k.startswith(("PREFORK", "PYTEST", "PYTHON"))}
        self.environ |= {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(home),
            "PREFORK_VENV": sys.prefix,  # for the commands in bin/
        }
        self.background: list[tuple[Block, subprocess.Popen[bytes], Path]] = []
        self.interpreter: subprocess.Popen[bytes] | None = None
        self.printed = ""  # by the last shell block; of one in the background, see its log

    def run(self, blocks: list[Block]) -> None:
        """All blocks in their order. Raises DocsError for the first that fails."""
        latest: Block | None = None  # the shell block that an output block speaks of
        for block in blocks:
            if block.title:
                path = self.folder / block.title
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.text)
            elif "output" in block.words:
                if latest is None:
                    raise DocsError(f"{block.where}: there is no sh block before this output")
                if "no-run" not in latest.words | block.words:
                    self.compare(block, latest, block.text)
            elif block.language in SHELLS:
                latest = block
                if "no-run" not in block.words:
                    self.run_shell(block)
            elif block.language == "python" and "no-run" not in block.words:
                self.run_python(block)

    def run_shell(self, block: Block) -> None:
        """Run it and compare what it prints, or start it in the background."""
        script, output = commands_of(block.text)
        if "background" in block.words:
            self.start(block, script)
        else:
            self.printed = self.finish(block, script)
        if output and output.strip():
            self.compare(block, block, output)

    def shell(self, block: Block, script: str, output: IO[bytes]) -> subprocess.Popen[bytes]:
        """Bash with this script, in a group of its own."""
        return subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=ROOT if "checkout" in block.words else self.folder,
            env=self.environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def finish(self, block: Block, script: str) -> str:
        """Run to the end. -> what was printed"""
        with tempfile.TemporaryFile() as output:
            process = self.shell(block, script, output)
            try:
                status: int | str = process.wait(LIMIT_S)
            except subprocess.TimeoutExpired:
                status = f"none after {LIMIT_S} s"
            finally:
                kill_group(process)
            output.seek(0)
            printed = output.read().decode(errors="replace")
        if status:
            raise self.error(block, f"ended with status {status} and printed", printed)
        return printed

    def start(self, block: Block, script: str) -> None:
        """Start it; it is stopped by `end`."""
        log = self.folder.parent / f"background-{len(self.background)}.log"
        # One simple command takes the place of the shell, so that SIGTERM comes to it.
        simple = len(script.splitlines()) == 1 and not re.search(r"[|&;<>()]", script)
        with open(log, "wb") as output:
            process = self.shell(block, f"exec {script}" if simple else script, output)
        self.background.append((block, process, log))

    def compare(self, block: Block, latest: Block, expected: str) -> None:
        """Compare what a shell block has printed; wait for it if that is in the background."""
        if "background" not in latest.words:
            if not same_output(expected, self.printed):
                raise self.error(block, "this is expected", expected, "and this was printed", self.printed)
            return
        _, process, log = next(entry for entry in self.background if entry[0] is latest)
        give_up = time.monotonic() + OUTPUT_LIMIT_S
        while not same_output(expected, printed := log.read_text(errors="replace")):
            if time.monotonic() > give_up or process.poll() is not None:
                raise self.error(block, "this is expected", expected, "and this was printed", printed)
            time.sleep(0.02)

    def run_python(self, block: Block) -> None:
        """Run it in the page's interpreter."""
        if self.interpreter is None:
            with open(self.folder.parent / "python.log", "wb") as output:
                self.interpreter = subprocess.Popen(
                    [sys.executable, "-c", INTERPRETER],
                    cwd=self.folder,
                    env=self.environ,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=output,
                    start_new_session=True,
                )
        process = self.interpreter
        assert process.stdin
        assert process.stdout
        log = self.folder.parent / "python.log"
        begin = log.stat().st_size
        text = block.text.encode()
        process.stdin.write(f"{len(text)} {block.where}\n".encode() + text)
        process.stdin.flush()
        with killed_after(process, LIMIT_S):
            answer = process.stdout.readline()
        if answer != b"good\n":
            raise self.error(block, "failed", log.read_bytes()[begin:].decode(errors="replace"))

    def end(self) -> None:
        """Stop what runs in the background. Raises DocsError when one of them doesn't end with status 0."""
        faults = []
        if self.interpreter:
            kill_group(self.interpreter)
        for block, process, log in reversed(self.background):
            early = process.poll() is not None
            if not early:
                process.send_signal(signal.SIGTERM)
            try:
                status: int | str = process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                status = f"none {STOP_LIMIT_S} s after SIGTERM"
            kill_group(process)
            if status or early:
                said = f"{'ended by itself,' if early else 'ended'} with status {status} and printed"
                faults.append(self.error(block, said, log.read_text(errors="replace")))
        if faults:
            raise faults[0]

    def error(self, block: Block, *parts: str) -> DocsError:
        """An error with the block, what happened, and what the background says."""
        said = [f"{block.where}: this block", block.text, *parts]
        for other, _, log in self.background:
            if other is not block:
                said += [f"in the background, {other.where} said", log.read_text(errors="replace")]
        return DocsError("\n".join(part.rstrip("\n") for part in said))


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all that it has started, and reap it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def killed_after(process: subprocess.Popen[bytes], seconds: int) -> Iterator[None]:
    """Kill the process when the block takes longer."""
    watchdog = subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -9 {process.pid}"], start_new_session=True)
    try:
        yield
    finally:
        kill_group(watchdog)


def run_page(page: str, text: str) -> None:
    """Run all blocks of a page in a new folder. Raises DocsError."""
    blocks = read_blocks(page, text)
    # Not below pytest's own temporary folder: its long name would leave no room for the path of a unix socket.
    folder = Path(tempfile.mkdtemp(prefix="docs-", dir="/tmp"))
    (folder / "page").mkdir()
    running = Page(folder / "page")
    try:
        try:
            running.run(blocks)
        except BaseException:
            with contextlib.suppress(DocsError):
                running.end()
            raise
        running.end()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("page", PAGES)
def test_the_code_blocks_of_a_page_do_what_it_says(page: str) -> None:
    if not (ROOT / page).exists():
        pytest.skip(f"{page} is not written yet")
    run_page(page, (ROOT / page).read_text())


GOOD = """
A page.

```python title="shop/tasks.py"
def double(n):
    return 2 * n
```

```ini title="shop.conf"
[shop]
```

```sh
test -f shop.conf
cat shop.conf
```

```text output
[shop]
```

```console
$ echo one; \\
>   echo two
one
two
$ seq 5
1
...
5
```

```sh background
exec python -u -c 'import signal; signal.signal(15, lambda *_: exit(0)); print("ready 17"); signal.pause()'
```

```text output
ready ...
```

```python
from shop.tasks import double
four = double(2)
```

```python
>>> double(four)
8
>>> double
<function double at ...>
```

```python
assert double(four) == 8
```

```sh no-run
git clone somewhere
```

```toml
not = run
```
"""


def test_a_page_whose_blocks_are_right_passes() -> None:
    run_page("page.md", GOOD)


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("```sh\ntrue\nfalse\ntrue\n```\n", "(?s)page.md:1: .*status 1"),
        ("```sh\nfalse | true\n```\n", "status 1"),
        ("```sh\nno-such-command-here\n```\n", "status 127"),
        ("```sh\necho one\n```\n\n```text output\ntwo\n```\n", "(?s)page.md:5: .*two.*one"),
        ("```console\n$ echo one\ntwo\n```\n", "(?s)two.*one"),
        ("```console\n$ echo one\none\n$ exit 3\n```\n", "status 3"),
        ("```python\nraise ValueError('no')\n```\n", "ValueError: no"),
        ("```python\nraise SystemExit\n```\n", "page.md:1"),
        ("```python\nimport os\nos._exit(0)\n```\n", "page.md:1"),
        ("```python\n>>> 1 + 1\n3\n```\n", "(?s)Expected:.*3.*Got:.*2"),
        ("```sh background\ntrue\n```\n```sh\nsleep 0.3\n```\n", "ended (by itself|with)"),
        ("```sh background\nsleep 60\n```\n```python\n1\n```\n", "status -15"),
        ("```sh background\nsleep 60\n```\n```output\nready\n```\n```sh\ntrue\n```\n", "ready"),
        ("```sh background\nfalse\n```\n```output\nready\n```\n", "ready"),
        ("```sh backgruond\ntrue\n```\n", "page.md:1: 'backgruond' means nothing here"),
        ("```text output\none\n```\n", "no sh block before"),
        ("```sh\ntrue\n", "page.md:1: this block is not closed"),
    ],
)
def test_a_page_with_a_wrong_block_fails_and_says_where(page: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "OUTPUT_LIMIT_S", 0.3)
    with pytest.raises(DocsError, match=said):
        run_page("page.md", page)


def test_three_dots_stand_for_what_is_not_said() -> None:
    assert same_output("a\n...\nz\n", "a\nz\n")
    assert same_output("a\n...\nz\n", "a\nb\nc\nz\n")
    assert same_output("took ... s\n", "took 1.25 s\n")
    assert not same_output("took ... s\n", "took 1\n.25 s\n")
    assert not same_output("a\n", "a\nb\n")
    assert not same_output("a.b\n", "axb\n")
