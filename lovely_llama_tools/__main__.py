"""The command line as a process: signals, streams that are closed or ASCII, and compiled programs that are kept.

Until signals are taken care of, nothing is imported that takes time.
"""

import os
import re
import signal
import sys
import threading
from pathlib import Path
from typing import Any, cast

from .interrupts import PARENT, SIGNALS, taken

PROGRAMS = 2**28  # bytes of compiled programs that are kept; the least recently used go first


def leave_on_interrupt() -> None:
    """Exit with 130 on Ctrl-C and 143 on SIGTERM at once, even during a compilation, unless something else ends on it.

    Python's own handlers wait until the compiler returns, but the signal's number is written to a pipe immediately.
    Where there is a parent, it passes signals on, so that one that was sent to both counts once.
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
    """Where a CPU is divided into several devices, have XLA start four threads for each.

    By itself it starts one. A thread that waits for what other devices send is blocked, and a program may wait for
    several things at once: there would be none left to compute what all are waiting for.
    """
    devices = re.search(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    if devices and int(devices[1]) > 1:
        os.environ.setdefault("NPROC", str(max(4 * int(devices[1]), os.cpu_count() or 1)))


def keep_programs(folder: Path) -> None:
    """Keep compiled programs in a folder: each whole or not at all, and all within `PROGRAMS` bytes.

    jax writes them in place, and would warn of one that was cut short at every later start. Where a program cannot be
    written, one line says so.
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

    class Kept(caching.LRUCache):
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
                part.unlink(missing_ok=True)
                warn(error)

    try:
        folder.mkdir(parents=True, exist_ok=True)
        room = PROGRAMS
        for path in sorted(folder.glob("*-cache"), key=lambda path: -path.stat().st_mtime):
            room -= path.stat().st_size
            if room < 0:
                path.unlink()
    except OSError as error:
        warn(error)
        return
    caching.get_file_cache = lambda path: (Kept(path, max_size=-1), path)  # pyright: ignore
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def run() -> int:
    """The command line, as a program of its own."""
    leave_on_interrupt()
    start_enough_threads()
    from .cluster import leave
    from .commands import main

    for stream in filter(None, cast(Any, (sys.stdout, sys.stderr))):  # None: closed
        stream.reconfigure(errors="backslashreplace")
    keep_programs(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lovely-llama")
    status = main()
    leave(status)
    return status


if __name__ == "__main__":
    sys.exit(run())
