"""Case H9: data to train on."""

import json
import os
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from faults import Accepted, Case, Done, TooLong, Unlike, Variant, World, ends, refused, unchecked
from small_runs import hasten, words

from lovely_llama_tools.data.prepare import prepare
from lovely_llama_tools.tokens import tokenizer_files
from lovely_llama_tools.tokens.characters import characters_tokenizer
from lovely_llama_tools.training import loop


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


def changed(how: Callable[[Path], object], end: type[BaseException] = Accepted, removed: Any = None) -> Variant:
    """A token file that changes between two batches."""

    def act(world: World) -> None:
        path = written(world, "tokens.bin", IDS)
        split = prepare([str(path)], world.folder / "data", seq=4, vocab=11).train
        split.batch(0, 0, 4)
        how(path)
        split.batch(0, 1, 4)

    return refused(act, "size", r"tokens\.bin", removed, end)


def truncated(path: Path) -> None:
    os.truncate(path, 0)


def rewritten(path: Path) -> None:
    path.write_bytes(bytes(2 * IDS.size))
    os.utime(path, (1, 1))


def renamed(path: Path) -> None:
    """Another file takes its name."""
    other = path.with_name("other.bin")
    other.write_bytes(bytes(2 * IDS.size))
    other.replace(path)


def disguised(path: Path) -> None:
    """It has the size and the time that it had."""
    before = path.stat()
    while path.stat().st_ctime_ns == before.st_ctime_ns:
        path.write_bytes(bytes(2 * IDS.size))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def conversation(*roles: str) -> bytes:
    """Twelve of one line each."""
    return 12 * (json.dumps([{"role": role, "content": "abc"} for role in roles]) + "\n").encode()


def unanswered(world: World) -> None:
    """Conversations without a word of the assistant's."""
    path = written(world, "talk.jsonl", conversation("system", "user"))
    prepare([str(path)], world.folder / "data", seq=16, tokenizer=world.model.tokenizer)


def of_another_text(world: World) -> None:
    """A text with characters that the tokenizer was not learned from."""
    path, tokenizer = written(world, "a.txt", "abc é".encode() * 50), characters_tokenizer("abc ")
    prepare([str(path)], world.folder / "data", seq=4, tokenizer=tokenizer)


def commanded(
    name: str, content: Any, options: str, field: str, says: str, removed: dict[str, str],
    end: type[BaseException] = Accepted, how: Callable[[Path], object] | None = None,
) -> Variant:  # fmt: skip
    """The same through the command line; or what happens to the file while the second step is computed."""

    def act(world: World) -> Done:
        (world.folder / "abc").mkdir(exist_ok=True)
        for file, data in tokenizer_files(characters_tokenizer("abc ")).items():
            (world.folder / "abc" / file).write_bytes(data)
        path, steps = written(world, name, content), count(1)
        hasten(world.patch)
        step = loop.step

        def after_one(*given: Any) -> Any:
            if how and next(steps) == 2:
                how(path)
            return step(*given)

        world.patch.setattr(loop, "step", after_one)
        more = options.replace("TALKER", str(world.talker)).replace("FOLDER", str(world.folder))
        done = world.main(*words("--out", world.folder / "run", path, SIZES, more))
        return done._replace(err=done.err[done.err.find("error: ") :] if done.status else "")

    return ends(act, 2, field, says, removed, end)


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
ANY_ID = {".data.token_files:read_part": "lambda part, at, size, vocab: original(part, at, size, 2**31)"}
LOSSY = {".data.reading:read_blocks": "lambda path: iter([path.read_text(errors='replace')])"}
UNKNOWN = {".tokens.characters:Characters.__call__": "lambda self, text, _=False: [self.ids.get(c, 0) for c in text]"}
PASSED = {".data.records:as_record": "lambda row: row.get('text', 'abc' * 50)"}
SIZE_AND_TIME = {
    ".data.token_files:state_of": "lambda number: (os.fstat(number).st_size, os.fstat(number).st_mtime_ns)"
}
SIZES = "--layers 1 --heads 2 --dim 4 --hidden-dim 6 --ctx 4 --batch 2 --steps 9 --eval-batches 1 --sample 0"
OPEN = {".formats.model:open_file": "lambda path, *_: open(path, 'rb')"}

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
            "truncated": changed(truncated, ValueError), "rewritten": changed(rewritten),
            "another in its place": changed(renamed, removed=SIZE_AND_TIME),
            "its time set back": changed(disguised, removed=SIZE_AND_TIME),
            "an odd size": given("tokens.bin", IDS.tobytes() + b"\0", "size", "401 bytes", end=ValueError),
            "an id": given("tokens.bin", WRONG, "tokens", r"tokens\.bin.*11 at byte 300", removed=ANY_ID),
            "not UTF-8": given("a.txt", b"abc\xff" * 50, "text", "at byte 3", removed=LOSSY),
            "missing": refused(missing, "path", r"none\.txt", OPEN, FileNotFoundError),
            "a FIFO": refused(fifo, "path", r"fifo\.txt", OPEN, TooLong),
            "no messages": given("a.jsonl", b'{"text": "abc"}\n{"x": 1}\n', "keys", r"a\.jsonl:2", removed=PASSED),
            "no answers": refused(unanswered, "messages", r"talk\.jsonl:1.*none of an assistant", end=Unlike),
            "of another text": refused(of_another_text, "text", r"a\.txt.*'é'", UNKNOWN),
            "train: an id": commanded("t.bin", WRONG, "--vocab 11", "tokens", r"t\.bin.*11 at byte 300", ANY_ID),
            "train: a file in its place": commanded(
                "t.bin", IDS, "--vocab 11", "size", r"t\.bin.*changed", SIZE_AND_TIME, how=renamed
            ),
            "train: no answers": commanded(
                "t.jsonl", conversation("user"), "--tokenizer TALKER --ctx 16", "messages", r"t\.jsonl:1",
                unchecked("messages"), Unlike,
            ),
            "train: of another text": commanded(
                "a.txt", b"abcd" * 50, "--tokenizer FOLDER/abc", "text", r"a\.txt.*'d'", UNKNOWN
            ),
            "train: empty": commanded("a.txt", b"", "", "size", r"a\.txt", unchecked("size"), Unlike),
        },
        works,
    ),
}  # fmt: skip
