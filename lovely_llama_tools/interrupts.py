"""What ends in place of the process when it is interrupted or terminated; and what it says to a parent."""

import os
import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PARENT = "LOVELY_LLAMA_PARENT"  # in the environment: the number of a socket whose other end the parent holds
HERE, JOINED = "here", "joined"  # what a process says to it, besides the line of an error
ENDING = list[Callable[[int], bool]]()  # the last one is asked first


@contextmanager
def ending(take: Callable[[int], bool]) -> Generator[None]:
    """Within, `take` is called with the number of a signal; where it is false, the process ends."""
    ENDING.append(take)
    try:
        yield
    finally:
        ENDING.remove(take)


def taken(number: int) -> bool:
    """Whether something ends on this signal, so that the process goes on."""
    return any(take(number) for take in reversed(ENDING))


def tell(line: str) -> bool:
    """Tell the parent; False where there is none."""
    number = os.environ.get(PARENT)
    if number:
        os.write(int(number), line.encode() + b"\n")
    return bool(number)


def tell_error(message: str, status: int) -> bool:
    """Tell the parent why this process ends, and with which status; False where there is none."""
    return tell(f"{status} error: {message}")
