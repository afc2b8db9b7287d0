"""Processes that work together, and their parent, which has no part in the work: they begin, stop and end together.

The parent holds a socket of each. Through it a process says that it is there, that it has joined the others, and the
line of an error; and when it ends, so does the socket. The parent passes signals on, through the socket too; and when
the parent ends, the processes save and end.
"""

import contextlib
import itertools
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import cast

from ..interrupts import HERE, JOINED, PARENT, SIGNALS, ending

PATH = os.pathsep.join(filter(None, sys.path))  # where a process is to find what its parent has found
WAIT = 25.0  # seconds
GRACE = 1.0  # seconds in which all must have ended once one has failed: they cannot go on, but perhaps say why
ENDED = (0, *(128 + number for number in SIGNALS))  # in order


def again(arguments: Sequence[str]) -> list[str]:
    """The command line with these arguments, as a new process."""
    return [sys.executable, "-P", "-m", "lovely_llama_tools", *arguments]


class Child:
    """A process, and what is known of it."""

    def __init__(self, index: int, command: Sequence[str], environment: Mapping[str, str], shown: bool) -> None:
        self.index, self.rest = index, b""
        self.here = self.joined = False
        self.error, self.ends = "", 0  # the line in which it says why it ends, and with which status
        self.status: int | None = None  # as subprocess has it: −n if signal n ended it
        self.round = 0  # in which of the parent's looks around it was found to have ended
        self.stopped = False  # by the parent
        self.socket, other = socket.socketpair()
        into = None if shown else subprocess.DEVNULL
        with other:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=into, stderr=into, pass_fds=[other.fileno()],
                process_group=0,  # Ctrl-C on a terminal is for the parent to pass on
                env=os.environ | environment | {"PYTHONPATH": PATH, PARENT: str(other.fileno())},
            )  # fmt: skip

    def listen(self) -> bool:
        """Take down what it says; False at its end."""
        try:
            said = self.socket.recv(2**16)
        except ConnectionResetError:
            said = b""
        *lines, self.rest = (self.rest + said).split(b"\n")
        for line in (line.decode(errors="backslashreplace") for line in lines):
            kind, _, rest = line.partition(" ")
            self.here = self.here or kind in (HERE, JOINED)
            if kind == JOINED:
                self.joined, self.index = True, int(rest)
            elif kind != HERE and not self.error:
                self.error, self.ends = rest, int(kind)
        if not said:
            self.status = self.process.wait()
            if self.error and self.status == -signal.SIGABRT:  # the runtime aborts the others once process 0 ends
                self.status = self.ends
        return bool(said)

    def tell(self, number: int) -> None:
        """Pass a signal on."""
        with contextlib.suppress(OSError):  # it has ended
            self.socket.send(bytes([number]))

    def stop(self) -> None:
        """End it at once. What it has saved is whole in any case."""
        if self.status is None:
            self.stopped = True
            self.process.kill()

    def close(self) -> None:
        """Leave nothing of it behind."""
        self.stop()
        self.process.wait()
        self.socket.close()


class Watch:
    """The processes, up to the end of the last."""

    def __init__(self, children: Sequence[Child], wait: float) -> None:
        self.children, self.wait = children, wait
        self.ended = list[Child]()  # the first to end comes first
        self.told = False  # to stop, by a signal
        self.since = dict[str, float]()  # when what sets a limit was first seen
        self.late: Child | None = None  # which did not join the others

    def take(self, number: int) -> bool:
        """Let all save and stop at a signal; at the second all end, and so does this process."""
        first, self.told = not self.told, True
        for child in self.children:
            if first:
                child.tell(number)
            else:
                child.stop()
        return first

    def run(self) -> None:
        """Listen, until all have ended. Where one fails or does not come, the others are stopped."""
        with selectors.DefaultSelector() as selector:
            for child in self.children:
                selector.register(child.socket, selectors.EVENT_READ, child)
            for number in itertools.count():
                if not selector.get_map():
                    break
                for key, _ in selector.select(0.1):
                    child = cast(Child, key.data)
                    child.round = number
                    if not child.listen():
                        selector.unregister(child.socket)
                        self.ended.append(child)
                if self.overdue():
                    for child in self.children:
                        child.stop()

    def overdue(self) -> bool:
        """Whether the others are to be stopped."""
        missing = sorted((child for child in self.children if not child.joined), key=lambda child: child.here)
        if missing and any(child.here for child in self.children) and self.passed("joining", self.wait):
            self.late = self.late or missing[0]
            return True
        failed = any(child.status not in ENDED for child in self.ended)
        return (failed and self.passed("failed", GRACE)) or (bool(self.ended) and self.passed("ended", self.wait))

    def passed(self, what: str, limit: float) -> bool:
        """Whether this has lasted for so many seconds."""
        return time.monotonic() - self.since.setdefault(what, time.monotonic()) > limit

    def verdict(self) -> int:
        """The exit status of all: that of the process which failed, with its line or one about it."""
        if not any(child.stopped for child in self.children) and all(child.status in ENDED for child in self.ended):
            return max(cast(int, child.status) for child in self.ended)
        failed = [child for child in self.ended if child.status and not child.stopped]
        if sys.stderr.isatty():
            print(file=sys.stderr)  # after the line that shows the progress
        if self.late and not failed:
            how = f"got no word in {self.wait:.0f} seconds, expected it to join the others"
            raise ChildProcessError(f"launch: process {self.late.index}: {how}")
        if not failed:
            stuck = next(child for child in self.children if child.stopped)
            how = f"got no end within {self.wait:.0f} seconds of process {self.ended[0].index}'s, expected one"
            raise ChildProcessError(f"launch: process {stuck.index}: {how}")
        culprit = min(failed, key=lambda child: (child.round, blame(child)))
        if culprit.error:
            print(culprit.error, file=sys.stderr)
            return 2 if culprit.status == 2 else 1
        status = cast(int, culprit.status)
        how = f"signal {-status}" if status < 0 else f"status {status}"
        silent = ", ".join(str(child.index) for child in self.children if child.stopped)
        if status == -signal.SIGABRT and not culprit.joined:
            how += " when not all came"
        elif status == -signal.SIGABRT and silent:
            how += f", of itself or for want of an answer by process {silent}"
        raise ChildProcessError(f"launch: process {culprit.index}: got {how}, expected status 0; --resume goes on")


def blame(child: Child) -> int:
    """Whom to blame first of those that ended at once: the runtime aborts processes whose others do not answer."""
    status = cast(int, child.status)
    return 2 if status == -signal.SIGABRT else 0 if status < 0 else 1


def watched(command: Sequence[str], environments: Sequence[Mapping[str, str]], wait: float = WAIT) -> int:
    """Run a command once in each of these environments. Only the first shows its output.

    Once one is there all must have joined in as many seconds as they may `wait`, and have ended once one has.
    """
    debug = "--debug" in command
    children = [Child(i, command, environment, debug or i == 0) for i, environment in enumerate(environments)]
    watch = Watch(children, wait)
    try:
        with ending(watch.take):
            watch.run()
    finally:
        for child in children:
            child.close()
    return watch.verdict()
