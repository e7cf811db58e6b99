"""The compiled part of the hand-off: `_fast*.c`, where it is built.

It is built with the package where there is a compiler, and does the usual message's way; whatever is not usual is done
by the Python beside it, which does all where it is missing, and with `PREFORK_PURE=1` in the environment.
"""

from __future__ import annotations

import os

FORMAT = 4  # as in _fast.c: what was built from another version of it is not taken

try:
    from prefork.worker import _fast
except ImportError:
    _fast = None  # type: ignore[assignment]

built = _fast if _fast is not None and _fast.FORMAT == FORMAT else None
compiled = built if os.environ.get("PREFORK_PURE") != "1" else None
