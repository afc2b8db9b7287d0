"""What ends in place of the process when it is interrupted or terminated."""

import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)
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
