"""Batches out of tokens on disk: windows of a text, or rows of documents; reading ahead."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from queue import SimpleQueue
from threading import Event, Semaphore, Thread
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from .token_files import Tokens

DEPTH = 3  # batches that are read ahead


class Batch(NamedTuple):
    """What a step learns from."""

    tokens: Int[np.ndarray, "batch seq"]
    targets: Int[np.ndarray, "batch seq"]  # −1 is ignored
    first: Int[np.ndarray, "batch seq"] | None  # of packed rows: where in its row each token's document begins


def random(seed: int, step: int) -> np.random.Generator:
    """Random numbers of a step, which depend on nothing but the seed and the step."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, step], np.uint64)))


@functools.lru_cache(4)
def permutation(seed: int, epoch: int, count: int) -> Int[np.ndarray, " rows"]:
    """The order of an epoch."""
    return random(seed, epoch).permutation(count)


class Split:
    """The tokens for training, or those for validation: `count` of them, in rows of `seq`."""

    def __init__(self, count: int, seq: int, rows: Sequence[int]) -> None:
        self.count, self.seq, self.rows = count, seq, rows

    def batch(self, seed: int, step: int, rows: int, own: Sequence[int] | None = None) -> Batch:
        """The batch of a step, or its own rows of it: a pure function of the arguments."""
        chosen = self.choose(seed, step, rows)
        return self.read(chosen if own is None else [chosen[row] for row in own], rows if own is None else len(own))

    def sweep(self, rows: int, limit: int | None = None) -> Iterator[Batch]:
        """All in order, or its first `limit` batches. The last is filled up with rows without targets."""
        for at in range(0, len(self.rows), rows)[:limit]:
            yield self.read(self.rows[at : at + rows], rows)

    def choose(self, seed: int, step: int, rows: int) -> Sequence[int]:
        """Which rows a step learns from."""
        raise NotImplementedError

    def read(self, chosen: Sequence[int], rows: int) -> Batch:
        """These rows, and as many without targets as are missing."""
        raise NotImplementedError


class Windows(Split):
    """A text as one sequence of tokens; a row is a window anywhere in it, and known by its first token."""

    def __init__(self, tokens: Tokens, start: int, stop: int, seq: int) -> None:
        super().__init__(stop - start, seq, range(start, stop - 1, seq))
        self.tokens, self.start, self.stop = tokens, start, stop

    def choose(self, seed: int, step: int, rows: int) -> Sequence[int]:
        """Windows at random, as nanoGPT chooses them."""
        return random(seed, step).integers(self.start, self.stop - self.seq, rows).tolist()

    def read(self, chosen: Sequence[int], rows: int) -> Batch:
        """Windows, of which the last in a text may be shorter."""
        tokens, targets = empty(rows, self.seq)
        for row, start in enumerate(chosen):
            ids = self.tokens.read(start, min(self.seq + 1, self.stop - start))
            tokens[row, : len(ids) - 1], targets[row, : len(ids) - 1] = ids[:-1], ids[1:]
        return Batch(tokens, targets, None)


class Documents(Split):
    """Documents, one in a row or several side by side; every epoch goes through all rows in another order.

    A document of n + 1 tokens takes n places: its last token is only a target.
    """

    def __init__(
        self, tokens: Tokens, answers: Tokens | None, starts: Int[np.ndarray, " docs"], sizes: Int[np.ndarray, " docs"],
        seq: int, packed: bool,
    ) -> None:  # fmt: skip
        self.tokens, self.answers, self.starts, self.sizes, self.packed = tokens, answers, starts, sizes, packed
        self.contents = pack(sizes.tolist(), seq) if packed else [[i] for i in range(len(sizes))]
        super().__init__(int(sizes.sum()) + len(sizes), seq, range(len(self.contents)))

    def choose(self, seed: int, step: int, rows: int) -> Sequence[int]:
        """The next rows of the epoch, and then those of the one after it."""
        count = len(self.contents)
        numbers = (divmod(number, count) for number in range(step * rows, (step + 1) * rows))
        return [int(permutation(seed, epoch, count)[at]) for epoch, at in numbers]

    def read(self, chosen: Sequence[int], rows: int) -> Batch:
        """Rows of documents, filled up with tokens that have no targets and see each other alone."""
        tokens, targets = empty(rows, self.seq)
        first = np.zeros_like(tokens)
        for row, number in enumerate(chosen):
            at = 0
            for i in self.contents[number]:
                start, size = int(self.starts[i]), int(self.sizes[i])
                ids, place = self.tokens.read(start, size + 1), slice(at, at + size)
                tokens[row, place], first[row, place], targets[row, place] = ids[:-1], at, ids[1:]
                if self.answers is not None:
                    targets[row, place][self.answers.read(start + 1, size) == 0] = -1
                at += size
            first[row, at:] = at
        return Batch(tokens, targets, first if self.packed else None)


def empty(rows: int, seq: int) -> tuple[Int[np.ndarray, "batch seq"], Int[np.ndarray, "batch seq"]]:
    """Tokens, and no targets."""
    return np.zeros((rows, seq), np.int32), np.full((rows, seq), -1, np.int32)


def pack(sizes: Sequence[int], seq: int) -> list[list[int]]:
    """Which documents share a row: the longest first, each into the fullest row that has room for it.

    Best fit decreasing. The bits of `spaces` say which numbers of free places some row has.
    """
    rows, by_space, spaces = list[list[int]](), [list[int]() for _ in range(seq + 1)], 0
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        room = spaces >> sizes[i]
        if room:
            space = sizes[i] + (room & -room).bit_length() - 1
            row = by_space[space].pop()
            spaces ^= 0 if by_space[space] else 1 << space
        else:
            space, row = seq, len(rows)
            rows.append([])
        rows[row].append(i)
        left = space - sizes[i]
        by_space[left].append(row)
        spaces |= 1 << left
    return rows


def ahead(batches: Callable[[int], Batch], steps: Iterable[int]) -> Iterator[Batch]:
    """The batches of steps, a few of which a thread reads ahead. What it raises is raised here; it ends with this."""
    ready, room, stopped = SimpleQueue[Batch | BaseException | None](), Semaphore(DEPTH), Event()

    def work() -> None:
        try:
            for step in steps:
                room.acquire()
                if stopped.is_set():
                    return
                ready.put(batches(step))
            ready.put(None)
        except BaseException as error:
            ready.put(error)

    thread = Thread(target=work, name="read ahead", daemon=True)
    thread.start()
    try:
        while (batch := ready.get()) is not None:
            if isinstance(batch, BaseException):
                raise batch
            room.release()
            yield batch
    finally:
        stopped.set()
        room.release()
        thread.join()
