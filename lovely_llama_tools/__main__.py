"""The command line as a process: `lovely-llama`, or `python -m lovely_llama_tools`."""

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any, cast

import jax

from .commands import main


def end_on_interrupt() -> None:
    """Exit with 130 on Ctrl-C at once, even during a compilation.

    Python's own handlers wait until the compiler returns, but the signal's number is written to a pipe immediately.
    """
    import termios

    listen, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.signal(signal.SIGINT, lambda _, __: None)
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    terminal = termios.tcgetattr(0) if os.isatty(0) else None

    def wait() -> None:
        while os.read(listen, 1)[0] != signal.SIGINT:
            pass
        if terminal:
            termios.tcsetattr(0, termios.TCSANOW, terminal)
        os.write(2, b"\n")
        os._exit(130)

    threading.Thread(target=wait, daemon=True).start()


def run() -> int:
    """`main`, leaving on Ctrl-C, keeping compiled programs, and escaping what a stream's encoding cannot express."""
    end_on_interrupt()
    for stream in filter(None, cast(Any, (sys.stdout, sys.stderr))):  # None: closed
        stream.reconfigure(errors="backslashreplace")
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lovely-llama"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return main()


if __name__ == "__main__":
    sys.exit(run())
