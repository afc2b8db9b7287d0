"""Batches of token ids read from disk: windows of one long text, or documents; and reading ahead."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from queue import SimpleQueue
from threading import Event, Semaphore, Thread
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from .token_files import Tokens

DEPTH = 3  # batches read ahead


class Batch(NamedTuple):
    """The inputs and targets of a step."""

    tokens: Int[np.ndarray, "batch seq"]
    targets: Int[np.ndarray, "batch seq"]  # −1: no target
    first: (
        Int[np.ndarray, "batch seq"] | None
    )  # in packed sequences, the position at which each token's document starts


def random(seed: int, step: int) -> np.random.Generator:
    """A generator that depends on the seed and the step alone, so that a resumed run draws the same."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, step], np.uint64)))


@functools.lru_cache(4)
def permutation(seed: int, epoch: int, count: int) -> Int[np.ndarray, " rows"]:
    """The order of the sequences in an epoch."""
    return random(seed, epoch).permutation(count)


class Split:
    """The training or the validation data: `count` tokens in sequences of `seq`."""

    def __init__(self, count: int, seq: int, rows: Sequence[int]) -> None:
        self.count, self.seq, self.rows = count, seq, rows

    def batch(self, seed: int, step: int, rows: int, own: Sequence[int] | None = None) -> Batch:
        """The batch of a step, or its rows `own`: a pure function of the arguments."""
        chosen = self.choose(seed, step, rows)
        return self.read(chosen if own is None else [chosen[row] for row in own], rows if own is None else len(own))

    def sweep(self, rows: int, limit: int | None = None) -> Iterator[Batch]:
        """All data in order, at most `limit` batches. The last is padded with sequences without targets."""
        for at in range(0, len(self.rows), rows)[:limit]:
            yield self.read(self.rows[at : at + rows], rows)

    def choose(self, seed: int, step: int, rows: int) -> Sequence[int]:
        """The sequences of a step."""
        raise NotImplementedError

    def read(self, chosen: Sequence[int], rows: int) -> Batch:
        """Read sequences, padded to `rows` with ones without targets."""
        raise NotImplementedError

    def first(self) -> tuple[list[int], list[bool]]:
        """The ids of the first sequence, and which of them are learned."""
        raise NotImplementedError


class Windows(Split):
    """One long text. A sequence is a window of it, identified by the position of its first token."""

    def __init__(self, tokens: Tokens, start: int, stop: int, seq: int) -> None:
        super().__init__(stop - start, seq, range(start, stop - 1, seq))
        self.tokens, self.start, self.stop = tokens, start, stop

    def first(self) -> tuple[list[int], list[bool]]:
        """The first window, all of which is learned but its first token."""
        ids = self.tokens.read(self.start, min(self.seq + 1, self.stop - self.start)).tolist()
        return ids, [False, *[True] * (len(ids) - 1)]

    def choose(self, seed: int, step: int, rows: int) -> Sequence[int]:
        """Windows at random positions, as nanoGPT chooses them."""
        return random(seed, step).integers(self.start, self.stop - self.seq, rows).tolist()

    def read(self, chosen: Sequence[int], rows: int) -> Batch:
        """Read windows; the last one of the text may be shorter."""
        tokens, targets = empty(rows, self.seq)
        for row, start in enumerate(chosen):
            ids = self.tokens.read(start, min(self.seq + 1, self.stop - start))
            tokens[row, : len(ids) - 1], targets[row, : len(ids) - 1] = ids[:-1], ids[1:]
        return Batch(tokens, targets, None)


class Documents(Split):
    """Documents, one per sequence or packed; each epoch visits all sequences in a new order.

    A document of n + 1 tokens takes n positions: its last token is only a target.
    """

    def __init__(
        self, tokens: Tokens, answers: Tokens | None, starts: Int[np.ndarray, " docs"], sizes: Int[np.ndarray, " docs"],
        seq: int, packed: bool,
    ) -> None:  # fmt: skip
        self.tokens, self.answers, self.starts, self.sizes, self.packed = tokens, answers, starts, sizes, packed
        self.contents = pack(sizes.tolist(), seq) if packed else [[i] for i in range(len(sizes))]
        super().__init__(int(sizes.sum()) + len(sizes), seq, range(len(self.contents)))

    def first(self) -> tuple[list[int], list[bool]]:
        """The first sequence, with a document's first token not learned."""
        ids, learned = list[int](), list[bool]()
        for start, size in ((int(self.starts[i]), int(self.sizes[i])) for i in self.contents[0]):
            ids += self.tokens.read(start, size + 1).tolist()
            answers = (
                [True] * size if self.answers is None else self.answers.read(start + 1, size).astype(bool).tolist()
            )
            learned += [False, *answers]
        return ids, learned

    def choose(self, seed: int, step: int, rows: int) -> Sequence[int]:
        """The next sequences of the epoch, continued in the next epoch."""
        count = len(self.contents)
        numbers = (divmod(number, count) for number in range(step * rows, (step + 1) * rows))
        return [int(permutation(seed, epoch, count)[at]) for epoch, at in numbers]

    def read(self, chosen: Sequence[int], rows: int) -> Batch:
        """Read documents. Padding has no targets and, in packed sequences, is a document of its own."""
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
    """Padding tokens, without targets."""
    return np.zeros((rows, seq), np.int32), np.full((rows, seq), -1, np.int32)


def pack(sizes: Sequence[int], seq: int) -> list[list[int]]:
    """Assign documents to sequences by best fit, longest first: each to the fullest sequence that has room for it.

    Bit n of `spaces` is set if some sequence has n free positions.
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
    """Iterate over the batches of steps, read ahead by a thread, which ends with the iterator. Its errors are raised
    here."""
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
