"""Exit codes, as sysexits.h names them. docs/configuration.md tells users."""

from __future__ import annotations

from prefork.errors import (
    AppError,
    BrokerError,
    ConfigError,
    InvalidOption,
    NoPrivilege,
    PidfileTaken,
    PidfileUnusable,
    PreforkError,
)

EXIT_DOWN = EXIT_NOTHING = 1  # of --ping and --ready; of a command that found nothing of what it was given
EXIT_USAGE, EXIT_BROKER, EXIT_APP, EXIT_CANTCREATE, EXIT_TAKEN, EXIT_NOPERM, EXIT_CONFIG = 64, 69, 70, 73, 75, 77, 78
EXIT_INTERRUPTED = 130  # as shells have it: 128 and the number of INT
_CODES: tuple[tuple[type[PreforkError], int], ...] = (
    (ConfigError, EXIT_CONFIG), (AppError, EXIT_APP), (BrokerError, EXIT_BROKER), (InvalidOption, EXIT_CONFIG),
    (PidfileTaken, EXIT_TAKEN), (PidfileUnusable, EXIT_CANTCREATE), (NoPrivilege, EXIT_NOPERM),
)  # fmt: skip


def exit_code(error: PreforkError) -> int:
    """The exit code of a command that this error has ended; 1 for one that has none of its own."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), 1)
