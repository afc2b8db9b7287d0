"""Case H9: data to train on."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from faults import Accepted, Case, TooLong, Unlike, Variant, World, refused

from lovely_llama_tools.data import prepare


def written(world: World, name: str, content: Any) -> Path:
    path = world.folder / name
    if isinstance(content, np.ndarray) and path.suffix == ".npy":
        np.save(path, content)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.tobytes())
    return path


def given(
    name: str, content: Any, field: str, says: str = "", end: type[BaseException] = Accepted,
    removed: dict[str, str] | None = None, **more: Any
) -> Variant:  # fmt: skip
    """A corpus of this one file."""
    more = {"seq": 4, "vocab": None if name.endswith(("txt", "jsonl")) else 11} | more
    return refused(
        lambda w: prepare([str(written(w, name, content))], w.folder / "data", **more), field, says, removed, end
    )


def changed(truncated: bool) -> Variant:
    """A token file that changes between two batches."""

    def act(world: World) -> None:
        path = written(world, "tokens.bin", IDS)
        split = prepare([str(path)], world.folder / "data", seq=4, vocab=11).train
        split.batch(0, 0, 4)
        if truncated:
            os.truncate(path, 0)
        else:
            path.write_bytes(bytes(2 * IDS.size))
            os.utime(path, (1, 1))
        split.batch(0, 1, 4)

    return refused(act, "size", r"tokens\.bin", end=ValueError if truncated else Accepted)


def missing(world: World) -> None:
    prepare([str(world.folder / "none.txt")], world.folder / "data", seq=4)


def fifo(world: World) -> None:
    if not (world.folder / "fifo.txt").exists():
        os.mkfifo(world.folder / "fifo.txt")
    prepare([str(world.folder / "fifo.txt")], world.folder / "data", seq=4)


def works(world: World) -> None:
    found = prepare([str(written(world, "tokens.bin", IDS))], world.folder / "data", seq=4, vocab=11)
    assert (found.train.count, found.vocab) == (180, 11)


IDS = np.arange(200, dtype=np.uint16) % 11
WRONG = np.where(np.arange(200) == 150, 11, IDS).astype(np.uint16)
WIDE = np.arange(200).reshape(20, 10).astype(np.uint16) % 11
ANY_ID = {"lovely_llama_tools.token_files:read_part": "lambda part, at, size, vocab: original(part, at, size, 2**31)"}
LOSSY = {"lovely_llama_tools.corpora:read_blocks": "lambda path: iter([path.read_text(errors='replace')])"}
OPEN = {"lovely_llama_tools.formats:open_file": "lambda path, *_: open(path, 'rb')"}

CASES: dict[str, Case] = {
    "H9": Case(
        "S", "data that are empty, short, wrong, or change during the run",
        {
            "short to train on": given("tokens.bin", IDS[:5], "tokens", "for training"),
            "short for validation": given("tokens.bin", IDS[:40], "tokens", "for validation"),
            "an empty text": given("a.txt", b"", "size", r"a\.txt", end=Unlike),
            "a float": given("a.npy", IDS.astype(np.float32), "dtype", r"a\.npy.*float32"),
            "two axes": given("a.npy", WIDE, "dtype", "2 axes", end=Unlike),
            "fraction 1": given("tokens.bin", IDS, "fraction", fraction=1, end=Unlike),
            "fraction -0.1": given("tokens.bin", IDS, "fraction", fraction=-0.1, end=Unlike),
            "truncated": changed(True), "replaced": changed(False),
            "an odd size": given("tokens.bin", IDS.tobytes() + b"\0", "size", "401 bytes", end=ValueError),
            "an id": given("tokens.bin", WRONG, "tokens", r"tokens\.bin.*11 at byte 300", removed=ANY_ID),
            "not UTF-8": given("a.txt", b"abc\xff" * 50, "text", "at byte 3", removed=LOSSY),
            "missing": refused(missing, "path", r"none\.txt", OPEN, FileNotFoundError),
            "a FIFO": refused(fifo, "path", r"fifo\.txt", OPEN, TooLong),
            "no messages": given("a.jsonl", b'{"text": "abc"}\n{"x": 1}\n', "messages", r"a\.jsonl:2", end=TypeError),
        },
        works,
    ),
}  # fmt: skip
