"""The command line as a process: signals, closed or ASCII streams, and the cache of compiled programs.

Nothing that takes time is imported before signal handlers are installed.
"""

import os
import re
import signal
import sys
import threading
from pathlib import Path
from typing import Any, cast

from .interrupts import PARENT, SIGNALS, taken

PROGRAMS = 2**28  # bytes of cached programs; the least recently used are deleted first


def leave_on_interrupt() -> None:
    """Exit at once with 130 on Ctrl-C and 143 on SIGTERM, even during a compilation, unless the signal is handled.

    Python's own handlers wait until the compiler returns, but the signal's number is written to a pipe immediately. A
    parent process passes signals on, so that one sent to both counts once.
    """
    import termios

    listen, tell = os.pipe()
    os.set_blocking(tell, False)
    for number in SIGNALS:
        signal.signal(number, lambda _, __: None)
    if parent := os.environ.get(PARENT):
        listen = int(parent)
    else:
        signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    terminal = termios.tcgetattr(0) if os.isatty(0) else None
    shown = os.dup(2) if cast(Any, sys.stderr) else os.open(os.devnull, os.O_WRONLY)  # while 2 itself may be redirected

    def wait() -> None:
        while said := os.read(listen, 1):
            if (number := said[0]) in SIGNALS and not taken(number):
                break
        else:
            if taken(number := signal.SIGTERM):  # the parent has ended, and will not say more
                return
        if terminal:
            termios.tcsetattr(0, termios.TCSANOW, terminal)
        if number == signal.SIGINT:  # whose ^C a terminal shows; nothing that is still being written comes after
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            os.write(shown, b"\n")
        os._exit(128 + number)

    threading.Thread(target=wait, daemon=True).start()


def start_enough_threads() -> None:
    """If a CPU is divided into several devices, let XLA start four threads for each.

    Its default is one. A thread that waits for other devices is blocked, and a program may wait for several transfers
    at a time, which would leave no thread to compute what all are waiting for.
    """
    devices = re.search(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    if devices and int(devices[1]) > 1:
        os.environ.setdefault("NPROC", str(max(4 * int(devices[1]), os.cpu_count() or 1)))


def keep_programs(folder: Path) -> None:
    """Cache compiled programs in a folder, written atomically, verified on reading, at most `PROGRAMS` bytes together.

    jax's own cache writes in place, and warns at every later start of a program that was cut short. Its limit,
    `jax_compilation_cache_max_size`, needs filelock and fails on an entry without its `-atime` file. The class to
    replace has no public name. If a program cannot be written, one line says so.
    """
    import contextlib
    import hashlib
    import importlib

    import jax

    caching: Any = importlib.import_module("jax._src.compilation_cache")
    warned = list[str]()

    def warn(error: OSError) -> None:
        if not warned:
            print(f"warning: {folder}: compiled programs are not kept: {error.strerror}", file=sys.stderr)
        warned.append(str(error))

    class CheckedCache(caching.LRUCache):
        """jax's cache, with a checksum before each program."""

        def get(self, key: str) -> bytes | None:
            path = folder / f"{key}-cache"
            try:
                content = path.read_bytes()
            except OSError:
                return None
            with contextlib.suppress(OSError):
                os.utime(path)
            good = hashlib.sha256(content[32:]).digest() == content[:32]
            return content[32:] if good else None

        def put(self, key: str, value: bytes) -> None:
            path, part = (folder / f"{key}-{name}" for name in ("cache", f"part{os.getpid()}"))
            try:
                part.write_bytes(hashlib.sha256(value).digest() + value)
                part.replace(path)
            except OSError as error:
                with contextlib.suppress(OSError):
                    part.unlink()
                warn(error)

    room, found = PROGRAMS, list[tuple[float, int, Path]]()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("*-cache"):
            with contextlib.suppress(OSError):  # another process has deleted it
                state = path.lstat()
                found.append((state.st_mtime, state.st_size, path))
    except OSError as error:
        warn(error)
        return
    for _, size, path in sorted(found, reverse=True):
        room -= size
        if room < 0:
            with contextlib.suppress(OSError):  # likewise, or it is a folder
                path.unlink()
    caching.get_file_cache = lambda path: (CheckedCache(path, max_size=-1), path)  # pyright: ignore
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def home() -> Path | None:
    """Where caches are, unless the user has no home."""
    try:
        return Path.home() / ".cache" if os.environ.get("HOME") != "" and Path.home().is_dir() else None
    except (RuntimeError, OSError):  # HOME is not set, and the user is in no list; or may not look there
        return None


def run() -> int:
    """The command line, as a program of its own."""
    leave_on_interrupt()
    start_enough_threads()
    from lovely_llama import LlamaError

    try:
        from .commands import main
        from .devices.cluster import leave
    except LlamaError as error:  # of a jax that is too old
        print(f"error: {error}", file=sys.stderr)
        return 2
    for stream in filter(None, cast(Any, (sys.stdout, sys.stderr))):  # None: closed
        stream.reconfigure(errors="backslashreplace")
    if caches := os.environ.get("XDG_CACHE_HOME") or home():
        keep_programs(Path(caches) / "lovely-llama")
    else:
        print("warning: no cache is kept: HOME is not set, or is no folder", file=sys.stderr)
    status = main()
    leave(status)
    return status


if __name__ == "__main__":
    sys.exit(run())
