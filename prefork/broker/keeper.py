"""The keeper of an embedded broker: a process that starts the server of one directory, minds it, and ends it.

It is run as a script, by its path and without site-packages, by the first user of a directory (see `embedded.py`):

1. It is born holding `keeper.lock`, which that user took and handed down: there is never a second keeper, and the
   kernel frees the lock when this one dies, however it dies. Its current directory is the broker's directory, so that
   a directory which was deleted and made anew is another place to it, and it cannot harm what lives there now.
2. It leaves the family of the user who started it, who therefore never gets a SIGCHLD for it nor has to reap it.
3. It takes the lock on the directory itself and starts the server, which inherits that lock: never two servers, even
   if somebody deletes the lock files. A server that has outlived its keeper is told to shut down first. On Linux the
   kernel tells it (PR_SET_PDEATHSIG), as soon as its keeper dies; elsewhere it lives on until the next keeper comes.
4. The server listens on `start.sock`. When it answers there, the keeper renames that to `valkey.sock`: where users
   find a socket, there was a server which had read all its data.
5. A server that dies later is started again, with a growing pause between crashes. One that dies before it has
   answered is not: the keeper gives up, and the user who is waiting for it shows the end of `valkey.log`.
6. All users hold `users.lock` shared. A thread waits to hold it alone, which the kernel grants when the last one has
   gone. Then the server is stopped. Who comes meanwhile waits for that lock and starts the next keeper.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import sys
import threading
import time

STARTING, SOCKET, USERS_LOCK, KEEPER_LOCK = "start.sock", "valkey.sock", "users.lock", "keeper.lock"
OPTIONS = (
    *("--port", "0", "--unixsocket", STARTING, "--unixsocketperm", "700", "--pidfile", "valkey.pid"),
    *("--appendonly", "yes", "--appendfsync", "everysec", "--save", ""),
)

TAKEOVER_S = 5.0  # for an old server to shut down
STOP_S = 3.0  # for ours, before it is killed: a newcomer waits 10 s by default
STEADY_S = 60.0  # a server that has lived so long is started again without a pause
LONGEST_PAUSE_S = 5.0
PR_SET_PDEATHSIG = 1


class GiveUp(Exception):
    """Nothing this keeper can do will bring a server up; the text goes to the log and from there to the user."""


class Bell:
    """Wakes the keeper: when a child has died, when it was told to stop, when the last user has gone."""

    def __init__(self) -> None:
        self.stop_because = ""
        self._heard, self._rope = os.pipe()
        for end in (self._heard, self._rope):
            os.set_blocking(end, False)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._rope)

    def ring(self) -> None:
        """The last user has gone."""
        os.write(self._rope, b"\0")

    def wait(self, seconds: float | None) -> None:
        """Return when something has happened, or after `seconds`; `stop_because` then says whether to stop."""
        if not select.select([self._heard], [], [], seconds)[0]:
            return
        for number in os.read(self._heard, 512):
            if number == 0:
                self.stop_because = "the last user has gone"
            elif number != signal.SIGCHLD:
                self.stop_because = f"told to by {signal.Signals(number).name}"


def keep(binary: str, keeper_lock: int) -> None:
    """Have a server in the current directory until the last user has gone."""
    bell = Bell()
    users = os.open(USERS_LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    end_the_orphan()
    server = start_server(binary)
    threading.Thread(target=wait_for_last_user, args=(users, bell), daemon=True).start()
    pause = 0.0
    while True:
        born, answered, status = time.monotonic(), False, None
        while status is None:
            if bell.stop_because:
                say(f"stopping the server: {bell.stop_because}")
                return stop_server(server, bell)
            if not answered and ask(STARTING, b"PING\r\n").startswith(b"+PONG"):
                say(f"the server is up (pid {server})")
                os.rename(STARTING, SOCKET)
                answered = True
            bell.wait(None if answered else 0.005)
            status = reap(server)
        if is_superseded(keeper_lock):
            return say(f"the server {describe(status)}; not starting it again: the directory is not mine any more")
        remove(SOCKET)
        if not answered:
            raise GiveUp(f"the server {describe(status)} before it had answered")
        lived = time.monotonic() - born
        pause = 0.0 if lived >= STEADY_S else min(max(0.1, 2 * pause), LONGEST_PAUSE_S)
        say(f"the server {describe(status)} after {lived:.1f} s; starting it again in {pause:.1f} s")
        if pause:
            bell.wait(pause)
        if bell.stop_because:
            return say(f"not starting it again: {bell.stop_because}")
        server = start_server(binary)


def is_superseded(keeper_lock: int) -> bool:
    """Whether somebody has deleted the lock file, or the directory: who comes now starts another keeper."""
    try:
        return not os.path.samestat(os.fstat(keeper_lock), os.stat(KEEPER_LOCK))
    except FileNotFoundError:
        return True


def end_the_orphan() -> None:
    """Tell the server of a dead keeper to shut down, if there is one and if it listens.

    By its socket and not by its pid, which might be somebody else's by now, or belong to another container's count.
    """
    ask(STARTING, b"SHUTDOWN NOSAVE\r\n")


def start_server(binary: str) -> int:
    """Start the server, as the holder of the lock on the directory. Its pid."""
    keeper, lock = os.getpid(), lock_directory()
    if sys.platform == "linux":
        import ctypes  # before the fork: between fork and exec is no time to load a library

        prctl = ctypes.CDLL(None).prctl
    server = os.fork()
    if server:
        os.close(lock)
        return server
    try:
        # Until exec a handler of ours would swallow the very signal that the kernel may send when the keeper dies.
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if sys.platform == "linux":
            prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != keeper:
                os._exit(1)
        log = os.open("valkey.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.set_inheritable(lock, True)
        # The title is what `ps` shows; without it, it would be the socket by its first name.
        os.execv(binary, [binary, *OPTIONS, "--proc-title-template", f"{{title}} embedded, keeper {keeper}"])
    except BaseException as error:
        os.write(2, f"cannot run {binary}: {error}\n".encode())
    finally:
        os._exit(127)


def lock_directory() -> int:
    """Lock the current directory for a server. Waits for what is left of the last one (a rewrite of its file, say)."""
    lock = os.open(".", os.O_RDONLY)
    deadline = time.monotonic() + TAKEOVER_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise GiveUp("another server is at work here and does not end (its pid: valkey.pid); end it") from None
            time.sleep(0.01)


def stop_server(server: int, bell: Bell) -> None:
    """Have the server write what it has and end; kill it if it does not."""
    # First the door, then the server: nobody is to be let in by one that is about to leave.
    with contextlib.suppress(FileNotFoundError):
        os.rename(SOCKET, STARTING)
    os.kill(server, signal.SIGTERM)
    deadline = time.monotonic() + STOP_S
    while (status := reap(server)) is None and time.monotonic() < deadline:
        bell.wait(deadline - time.monotonic())
    if status is None:
        say(f"the server has not stopped within {STOP_S:g} s: killing it")
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
    remove(STARTING)


def reap(server: int) -> int | None:
    """Its exit code (negative: the signal that killed it) if it has ended."""
    pid, status = os.waitpid(server, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None


def describe(status: int) -> str:
    """How it ended, for a human."""
    if status == -signal.SIGKILL:
        return "was killed by SIGKILL (out of memory?)"
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"


def wait_for_last_user(users: int, bell: Bell) -> None:
    """Ring when nobody is left. `users.lock` is then held alone until this process ends: nobody comes in between."""
    fcntl.flock(users, fcntl.LOCK_EX)
    bell.ring()


def ask(path: str, command: bytes) -> bytes:
    """The server's answer, or nothing if there is none to be had."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(1.0)
            connection.connect(path)
            connection.sendall(command)
            return connection.recv(512)
    except OSError:
        return b""


def remove(path: str) -> None:
    """Remove a file that may not be there."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def say(text: str) -> None:
    """A line to `keeper.log`, which is this process's output."""
    with contextlib.suppress(OSError):  # a full disk is no reason to take the server down
        os.write(1, f"{time.strftime('%Y-%m-%d %H:%M:%S')} keeper[{os.getpid()}] {text}\n".encode())


def main(binary: str, keeper_lock: int) -> int:
    """Be the keeper of the current directory, holding the lock that was handed down."""
    if os.fork():
        os._exit(0)
    os.set_inheritable(keeper_lock, False)
    os.ftruncate(keeper_lock, 0)
    os.write(keeper_lock, f"{os.getpid()}\n".encode())
    os.umask(0o077)
    # A user may have blocked signals in the thread that started us; server and keeper are stopped by them.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    try:
        keep(binary, keeper_lock)
    except GiveUp as reason:
        say(f"giving up: {reason}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
