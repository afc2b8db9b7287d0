"""`Tokenizer`, and what its makers share: texts, small files, and the containment of other libraries."""

import ctypes
import os
import re
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from lovely_llama import LlamaError, Sampling, check

# Special tokens that end an answer, or a text, in one Llama or another, besides the one called EOS.
ENDS = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>")
LARGEST = 2**26  # bytes of a tokenizer's file
STEAD = {
    b"version https://": "a pointer of Git LFS, not the file itself",
    b"<!doctype html": "a web page, in HTML",
    b"<html": "a web page, in HTML",
}
CLONE_FILES = 0x400  # Linux, sched.h


class Tokenizer(NamedTuple):
    """Text to ids and back."""

    encode: Callable[..., list[int]]  # (text, special=False): whether the names of special tokens in it mean those
    pieces: Sequence[bytes]  # what each id adds to a text; nothing for a control token
    specials: Mapping[str, int]
    stops: frozenset[int]
    bos: int | None
    adds_bos: bool
    prefix: bytes  # put before every text by the library, and removed again in decoding
    template: str | None  # the chat template, in jinja2
    eos: int | None = None
    templates: Mapping[str, str] = {}
    sampling: Sampling | None = None  # what the model recommends
    unstated: frozenset[str] = frozenset()  # fields of `sampling` that the model does not state, and `do_sample`
    settings: Mapping[str, Any] = {}  # what else tokenizer_config.json says, such as pad_token and model_max_length

    def __repr__(self) -> str:
        template = "with" if self.template else "without"
        return f"Tokenizer({len(self.pieces):,} pieces, {len(self.specials)} special, {template} a chat template)"

    def begin(self, text: str) -> list[int]:
        """The tokens of a plain prompt. BOS comes first where the model expects it, or where the text is empty."""
        bos = [self.bos] if self.bos is not None and (self.adds_bos or not text) else []
        return bos + self.encode(text, False)

    @property
    def pad(self) -> int | None:
        """The id for padding. It is stated by name, or by its id alone."""
        return self.specials.get(self.settings.get("pad_token", ""), self.settings.get("pad_token_id"))

    @property
    def stated(self) -> dict[str, Any]:
        """The fields of `sampling` that a checkpoint states; of a greedy choice, those that change it."""
        return self.differing(Sampling())

    def differing(self, usual: Sampling) -> dict[str, Any]:
        """The fields of `sampling` that a checkpoint states, or that differ from what is usual where it is read."""
        values, others = self.sampling._asdict() if self.sampling else {}, usual._asdict()
        if values.get("temperature") == 0:
            values = {name: values[name] for name in ("repetition_penalty", "temperature")}
        return {name: v for name, v in values.items() if name not in self.unstated or v != others[name]}

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; invalid UTF-8 becomes U+FFFD."""
        return b"".join(self.pieces[token] for token in tokens).removeprefix(self.prefix).decode("utf-8", "replace")


def fit(tokenizer: Tokenizer, vocab: int, file: object) -> Tokenizer:
    """The tokenizer for a model of this vocabulary. Ids that only the model has add nothing to a text; special tokens
    that it does not have, such as one for padding, are left out."""
    pieces, specials = tokenizer.pieces, tokenizer.specials
    beyond = {name: i for name, i in specials.items() if i >= vocab}
    needed = {tokenizer.bos, tokenizer.eos} & {*beyond.values()}
    if beyond and not needed and {*range(vocab, len(pieces))} <= {*beyond.values()}:
        pieces, specials = pieces[:vocab], {name: i for name, i in specials.items() if i < vocab}
        settings = {key: value for key, value in tokenizer.settings.items() if value not in [*beyond]}
        stops = frozenset(i for i in tokenizer.stops if i < vocab)
        tokenizer = tokenizer._replace(specials=specials, settings=settings, stops=stops)
    count = len(pieces)
    check("pieces", count, count <= vocab, f"at most {vocab}, the model's vocabulary", file)
    return tokenizer._replace(pieces=[*pieces, *[b""] * (vocab - count)])


def with_ends(tokenizer: Tokenizer, bos: int | None, eos: int | None, adds_bos: bool, file: object) -> Tokenizer:
    """The tokenizer with these ids for BOS and EOS. EOS, and special tokens that end answers elsewhere, are stops."""
    vocab = len(tokenizer.pieces)
    for name, i in (("bos_token_id", bos), ("eos_token_id", eos)):
        check(name, i, i is None or (type(i) is int and 0 <= i < vocab), f"an id from 0 to {vocab - 1}", file)
    check("bos_token_id", "none", bos is not None or not adds_bos, "an id, as BOS is to begin every text", file)
    tokenizer = tokenizer._replace(bos=bos, eos=eos, adds_bos=adds_bos)
    return tokenizer._replace(stops=usual_stops(tokenizer))


def usual_stops(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end an answer without being listed as such, special or found in every text."""
    named: dict[str, int] = {**getattr(tokenizer.encode, "words", {}), **tokenizer.specials}
    ends = {named[name] for name in ENDS if name in named}
    return frozenset(ends if tokenizer.eos is None else {*ends, tokenizer.eos})


def prefix_of(encode: Callable[[str, bool], list[int]], pieces: Sequence[bytes]) -> bytes:
    """The space that a library puts before every text, where it does: seen by encoding a letter."""
    for letter in "aeiothe0.":
        try:
            return b" " if pieces[encode(letter, False)[0]].startswith(b" ") else b""
        except (LlamaError, IndexError):  # not in the vocabulary
            continue
    return b""


@cache
def note(text: str) -> None:
    """Tell something on stderr, once."""
    print(f"note: {text}", file=sys.stderr)


# ---- Texts -----------------------------------------------------------------------------------------------------------


def check_text(field: str, text: str) -> None:
    """Refuse lone surrogates, which is how Python decodes command-line arguments that are not UTF-8."""
    check(field, "bytes that are not UTF-8", not re.search("[\ud800-\udfff]", text), "text")


def segments(text: str, specials: Mapping[str, int]) -> Iterator[tuple[str, int | None]]:
    """The text before each name of a special token, with that token; at last, the text after all of them, with none.

    Of names that begin at the same place the longest counts.
    """
    names, end = sorted(specials, key=len, reverse=True), 0
    for found in re.finditer("|".join(map(re.escape, names)) or "(?!)", text):
        yield text[end : found.start()], specials[found[0]]
        end = found.end()
    yield text[end:], None


# ---- Other libraries, and files --------------------------------------------------------------------------------------

Result = TypeVar("Result")


def apart(work: Callable[[], Result]) -> Result:
    """Run in a thread with file descriptors of its own, among which 2 leads nowhere.

    A panic in Rust writes there whatever Python does. Where the system gives a thread none (Linux alone does, and not
    in every container), it is seen.
    """
    done = Future[Result]()

    def run() -> None:
        try:
            if sys.platform == "linux" and ctypes.CDLL(None).unshare(CLONE_FILES) == 0:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    return done.result()


@contextmanager
def contained(file: object, field: str, got: str, expected: str) -> Generator[None]:
    """Whatever a library raises within becomes a LlamaError, a panic of Rust too, which is no Exception."""
    try:
        yield
    except LlamaError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise LlamaError(file, field, got, expected) from error


def check_inside(path: Path, folder: Path) -> None:
    """Refuse a link that leads out of a folder, but for those of the hub's cache: from snapshots/… into blobs."""
    real, target = Path(os.path.realpath(folder)), os.path.realpath(path)
    roots = [real, *(parent.parent / "blobs" for parent in real.parents if parent.name == "snapshots")]
    inside = any(Path(target).is_relative_to(root) for root in roots)
    check("path", f"a link to {target}", inside, f"a file in {folder}", path)


def open_file(path: Path, folder: Path | None = None, *, text: bool = False) -> BinaryIO:
    """Open a regular file; pipes and devices could block. A file that belongs to a folder must be inside it.

    A path that the user has named belongs to none, and may be a link to anywhere. What a server or git has put in the
    place of the file is called that, unless it may hold any text.
    """
    try:
        check("path", "no such file", path.exists(), "a file", path)
        check("path", "not a regular file", path.is_file(), "a regular file", path)
        if folder is not None:
            check_inside(path, folder)
        if not text:
            with open(path, "rb") as file:
                head = file.read(16).lower()
            stead = next((what for start, what in STEAD.items() if head.startswith(start)), "")
            check("contents", stead, not stead, "the file itself", path)
        return open(path, "rb")
    except OSError as error:
        raise LlamaError(path, "path", error.strerror, "a file that can be read") from error


def small_file(path: Path, folder: Path | None = None) -> bytes | None:
    """The contents of a tokenizer's file, or None where there is none."""
    try:
        if not path.exists() and not path.is_symlink():
            return None
        with open_file(path, folder) as file:
            size = os.fstat(file.fileno()).st_size
            check("size", f"{size} bytes", size <= LARGEST, f"at most {LARGEST}", path)
            return file.read(size)
    except OSError as error:
        raise LlamaError(path, "path", error.strerror, "a file that can be read") from error
