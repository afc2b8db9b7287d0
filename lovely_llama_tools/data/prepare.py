"""From a corpus to training and validation data: texts, conversations, or files of token ids."""

import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from lovely_llama import LlamaError, check, is_number, is_whole

from ..extras import counted, progress
from ..formats.files import publish
from ..formats.model import open_file
from ..strict_json import read_json, to_json
from ..tokens import Tokenizer, fit, folder_tokenizer, tokenizer_files
from ..tokens.base import small_file
from ..tokens.folders import CONFIG, SOURCES
from ..tokens.pipelines import as_object
from ..tokens.training import train_bpe, train_characters
from .batches import Batch as Batch
from .batches import Documents, Split, Windows
from .batches import ahead as ahead
from .corpora import DESCRIPTION, IDS, TOKENS, corpus_files, read_texts
from .encoding import Encoded, Notes, encode_file
from .records import is_records
from .token_files import Tokens, Writer, id_dtype, open_tokens

STARTS, ANSWERS = "documents.bin", "answers.bin"  # where documents start; 1 for tokens of answers, else 0


class Corpus(NamedTuple):
    """The data of a run."""

    train: Split
    validation: Split | None
    tokenizer: Tokenizer | None
    vocab: int
    fingerprints: Mapping[str, str]  # SHA-256 of the data and the tokenizer
    says: Sequence[str]  # what has been read, a line each


class Rows(NamedTuple):
    """How a corpus is divided into sequences."""

    seq: int
    fraction: float
    pack: bool


class Description(NamedTuple):
    """The contents of data.json, which describes the token files beside it."""

    dtype: str
    vocab: int
    tokens: int
    documents: int
    conversations: int
    sha256: dict[str, str]  # of the token files
    sources: str  # SHA-256 of the texts
    encoded: str  # the tokenizer and the vocabulary size


def prepare(
    paths: Sequence[str], folder: Path, *, tokenizer: Tokenizer | str | None = None, vocab: int | None = None,
    seq: int, fraction: float = 0.1, pack: bool = False, replace: bool = False, special: bool = False,
) -> Corpus:  # fmt: skip
    """Read a corpus: texts, rows of JSON with conversations or texts, folders of them; or token files.

    Texts are tokenized into the folder once, and reused if they have not changed. The tokenizer is given, or learned
    from the texts: "bpe" with `vocab` tokens, or "chars", the default. Token files (.bin as nanoGPT and llama2.c write
    them, or .npy) stay where they are. A folder with the tokens of other texts, or by another tokenizer, is refused
    unless `replace`. Without paths the corpus is the source code of Python's standard library.

    The last `fraction` of the tokens is held out for validation; of the documents, if sequences consist of documents:
    several per sequence with `pack`, or one conversation per sequence. In conversations only the assistant's answers
    are targets; a row without an answer that can be learned is left out. With `special`, names of special tokens in
    texts are those tokens.
    """
    check("seq", repr(seq), is_whole(seq) and 0 < seq < 2**31, "a whole number above 0")
    check("fraction", repr(fraction), is_number(fraction) and 0 <= fraction < 1, "a number from 0 to below 1")
    files, rows = corpus_files(paths), Rows(seq, fraction, pack)
    where = files[0] if len(files) == 1 else ", ".join(paths) or "Python's standard library"
    kinds = {file.suffix.lower() in TOKENS for file in files}
    check("path", "texts and token files", len(kinds) == 1, "the one or the other", where)
    if False in kinds:
        return prepare_texts(files, where, folder, tokenizer or "chars", vocab, rows, replace, special)
    if isinstance(tokenizer, str):
        raise LlamaError("arguments", "tokenizer", repr(tokenizer), "that of the token files, in its folder")
    said = describe(files[0].parent) if [file.name for file in files] == [IDS] else None
    if said and tokenizer is None:
        tokenizer = folder_tokenizer(files[0].parent)
    return open_corpus(files, where, tokenizer, vocab, said, rows)


# ---- Texts to tokens -------------------------------------------------------------------------------------------------


def prepare_texts(
    files: Sequence[Path], where: object, folder: Path, tokenizer: Tokenizer | str, vocab: int | None, rows: Rows,
    replace: bool, special: bool,
) -> Corpus:  # fmt: skip
    """Tokenize texts into a folder, unless it holds their tokens, and open it. The description is written last."""
    given = tokenizer if isinstance(tokenizer, str) else fingerprint(tokenizer)
    encoded = f"{given}, vocab {vocab}{', special tokens' if special else ''}"
    origin, notes = {"sources": digest_of(files), "encoded": encoded}, Notes()
    size = sum(os.path.getsize(file) for file in files)
    check("size", "0 bytes", size > 0, "a text", where)
    said = describe(folder)
    for name, value in origin.items() if said else ():
        stored = getattr(said, name)
        check(name, stored, replace or stored == value, f"{value}, or an empty folder", folder / DESCRIPTION)
    try:
        if replace and said and any(getattr(said, name) != value for name, value in origin.items()):
            said = discard(folder, [DESCRIPTION, *said.sha256, *SOURCES, CONFIG])
        if said and isinstance(tokenizer, str):
            tokenizer = folder_tokenizer(folder) or tokenizer
        folder.mkdir(parents=True, exist_ok=True)
        made = dict[str, bytes]()
        if isinstance(tokenizer, str):
            tokenizer = learn(files, tokenizer, vocab)
            made |= tokenizer_files(tokenizer)
        with ExitStack() as unless_complete:
            if not said:
                with progress("tokens", size, "B") as advance:
                    encode = partial(encode_file, tokenizer=tokenizer, notes=notes, special=special)
                    said = write_tokens(files, folder, encode, vocab or len(tokenizer.pieces), origin, advance)
                unless_complete.callback(discard, folder, [*said.sha256])
                check_rows(said, notes, where)
                made[DESCRIPTION] = to_json(said._asdict(), indent=2).encode()
            corpus = open_corpus([folder / IDS], where, tokenizer, vocab, said, rows)
            unless_complete.pop_all()
        for name, data in made.items():
            write_file(folder / name, data)
    except OSError as error:
        raise LlamaError(folder, "path", error.strerror, "a folder that can be written to") from error
    return corpus._replace(says=[*corpus.says, *(f"note: {line}" for line in notes.lines())])


def check_rows(said: Description, notes: Notes, where: object) -> None:
    """Refuse texts of which nothing is left."""
    if not said.tokens and notes.skipped:
        raise notes.skipped[0]
    check("rows", "none", said.tokens > 0, "texts or conversations", where)


def learn(files: Sequence[Path], kind: str, vocab: int | None) -> Tokenizer:
    """Train a tokenizer on the texts."""
    check("tokenizer", repr(kind), kind in ("chars", "bpe"), "chars, bpe, or a tokenizer")
    if kind == "chars":
        return train_characters(read_texts(files), vocab)
    check("vocab", "nothing", vocab is not None, "the number of tokens that bpe is to learn")
    return train_bpe(read_texts(files), vocab or 0)


def write_tokens(
    files: Sequence[Path], folder: Path, encode: Callable[[Path], Iterator[Encoded]], vocab: int,
    origin: Mapping[str, str], advance: Any,
) -> Description:  # fmt: skip
    """Write the tokens of texts, the starts of documents, and which tokens are answers."""
    dtype, conversations, writers = id_dtype(vocab), 0, list[Writer]()
    kinds = {IDS: dtype, STARTS: "uint64"} | ({ANSWERS: "uint8"} if any(map(is_records, files)) else {})
    try:
        for name, kind in kinds.items():
            writers.append(Writer(folder / name, kind))
        ids, starts, *answers = writers
        for file in files:
            for some in encode(file):
                starts.add([ids.count] if some.begins else [])
                ids.add(some.ids)
                for writer in answers:
                    writer.add([1] * len(some.ids) if some.answers is None else some.answers)
                conversations += some.answers is not None
            advance(os.path.getsize(file))
        for writer in writers:
            writer.publish()
    finally:
        for writer in writers:
            writer.discard()
    digests = {writer.path.name: writer.digest.hexdigest() for writer in writers}
    return Description(dtype, vocab, ids.count, starts.count, conversations, digests, **origin)


def discard(folder: Path, names: Iterable[str]) -> None:
    """Delete files of a folder."""
    for name in names:
        (folder / name).unlink(missing_ok=True)


def write_file(path: Path, data: bytes) -> None:
    """Write a small file atomically."""
    part = path.with_name(f".{path.name}.part{os.getpid()}")
    part.write_bytes(data)
    publish(part, path)


def describe(folder: Path) -> Description | None:
    """The description in a folder's data.json; None if there is none."""
    path = folder / DESCRIPTION
    data = small_file(path)
    if data is None:
        return None
    said = read_json(data, path)
    check("fields", ", ".join(said), said.keys() == {*Description._fields}, ", ".join(Description._fields), path)
    check("dtype", said["dtype"], said["dtype"] in ("uint16", "uint32"), "uint16 or uint32", path)
    for name in ("vocab", "tokens", "documents", "conversations"):
        right = is_whole(said[name]) and 0 <= said[name] < 2**48
        check(name, repr(said[name]), right, "a whole number", path)
    digests = as_object(said["sha256"])
    check("sha256", repr(digests), {IDS, STARTS} <= {*digests} <= {IDS, STARTS, ANSWERS}, "one for each file", path)
    return Description(**said)


# ---- Tokens to splits ------------------------------------------------------------------------------------------------


def open_corpus(
    files: Sequence[Path], where: object, tokenizer: Tokenizer | None, vocab: int | None, said: Description | None,
    rows: Rows,
) -> Corpus:  # fmt: skip
    """Open token files, check every id, and split them into training and validation data."""
    if vocab is None:
        vocab = len(tokenizer.pieces) if tokenizer else said.vocab if said else None
    if vocab is None:
        raise LlamaError(where, "vocab", "nothing", "the number of tokens, or the tokenizer of the token files")
    tokenizer = tokenizer and fit(tokenizer, vocab, where)
    tokens = open_tokens(files, said.dtype if said else id_dtype(vocab), vocab)
    digests, learned = {files[0]: tokens.digest()}, tokens.count
    if rows.pack or (said and said.conversations):
        if said:
            beside = [files[0].with_name(name) for name in said.sha256 if name != IDS]
            digests |= {path: digest_of([path]) for path in beside}
            starts = np.fromfile(files[0].with_name(STARTS), "<u8").astype(np.int64)
        else:
            starts = find_documents(tokens, tokenizer, where)
        answers = open_tokens([files[0].with_name(ANSWERS)], "uint8", 2) if said and said.conversations else None
        learned = sum(int(block.sum()) for _, block in answers.blocks()) if answers else learned
        train, validation = split_documents(tokens, starts, answers, where, rows)
    else:
        train, validation = split_tokens(tokens, where, rows)
    if said:
        for path, digest in digests.items():
            check("sha256", digest, digest == said.sha256[path.name], said.sha256[path.name], path)
    prints = {"data": hashlib.sha256("".join(digests.values()).encode()).hexdigest()}
    prints |= {"tokenizer": fingerprint(tokenizer)} if tokenizer else {}
    rows_read = f"{counted(said.documents, 'row' if said.conversations else 'text', ',')}, " if said else ""
    says = f"data: {rows_read}{counted(tokens.count, 'token', ',')}, {learned:,} of them to learn from"
    return Corpus(train, validation, tokenizer, vocab, prints, [says])


def find_documents(tokens: Tokens, tokenizer: Tokenizer | None, where: object) -> Int[np.ndarray, " docs"]:
    """Where documents start in token files: at every BOS or, if the tokenizer adds none, after every EOS."""
    bos = tokenizer.bos if tokenizer and tokenizer.adds_bos else None
    mark = bos if bos is not None else tokenizer.eos if tokenizer else None
    if mark is None:
        raise LlamaError(where, "pack", "token files", "a tokenizer with BOS or EOS, to find the documents in them")
    found = [np.flatnonzero(ids == mark) + at + (bos is None) for at, ids in tokens.blocks()]
    starts = np.unique(np.concatenate([np.zeros(1, np.int64), *found]))
    return starts[starts < tokens.count]


def split_tokens(tokens: Tokens, where: object, rows: Rows) -> tuple[Split, Split | None]:
    """Train on the first tokens, validate on the last, as nanoGPT splits TinyShakespeare."""
    cut = int(tokens.count * (1 - rows.fraction))
    train, validation = (0, cut), (cut, tokens.count)
    for (start, stop), what in ((train, "training"), (validation, "validation"))[: 2 if rows.fraction else 1]:
        need = f"at least {rows.seq + 1}, a row of {rows.seq} and one more"
        check("tokens", f"{stop - start} for {what}", stop - start > rows.seq, need, where)
    return Windows(tokens, *train, rows.seq), Windows(tokens, *validation, rows.seq) if rows.fraction else None


def split_documents(
    tokens: Tokens, starts: Int[np.ndarray, " docs"], answers: Tokens | None, where: object, rows: Rows
) -> tuple[Split, Split | None]:  # fmt: skip
    """Train on the first documents, validate on the last."""
    documents, ends, splits = len(starts), np.append(starts, tokens.count), list[Split]()
    cut = min(max(1, int(documents * (1 - rows.fraction))), documents - (rows.fraction > 0))
    check("documents", documents, cut > 0, "at least 2, one of them for validation", where)
    for part, what in ((ends[: cut + 1], "training"), (ends[cut:], "validation"))[: 2 if rows.fraction else 1]:
        begin, sizes = cut_documents(part, rows.seq, answers)
        check("tokens", f"no targets for {what}", len(sizes) > 0, f"answers within the first {rows.seq} tokens", where)
        splits.append(Documents(tokens, answers, begin, sizes, rows.seq, rows.pack))
    return splits[0], splits[1] if rows.fraction else None


def cut_documents(
    ends: Int[np.ndarray, " ends"], seq: int, answers: Tokens | None
) -> tuple[Int[np.ndarray, " pieces"], Int[np.ndarray, " pieces"]]:
    """The starts of documents, long ones cut into pieces, and the number of targets of each, at most seq.

    The last token of a piece is only a target, and starts the next piece. A conversation, recognized by its first
    token being no answer, is truncated to its first piece, and skipped if that has no targets.
    """
    starts, targets = ends[:-1], np.diff(ends) - 1
    pieces = -(-targets // seq)
    if answers is not None:
        places = np.stack([starts, np.minimum(targets, seq) + 1], axis=1).tolist()
        masks = [answers.read(start, size) for start, size in places]
        asked, useful = np.array([not mask[0] for mask in masks]), np.array([mask[1:].any() for mask in masks])
        pieces = np.where(asked, useful, pieces)
        if unused := int((asked & ~useful).sum()):
            where = f"the first {counted(seq, 'token')} of {counted(unused, 'conversation')}"
            print(f"note: no answer in {where}", file=sys.stderr)
    piece = np.arange(int(pieces.sum())) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    return np.repeat(starts, pieces) + piece * seq, np.minimum(np.repeat(targets, pieces) - piece * seq, seq)


# ---- Fingerprints ----------------------------------------------------------------------------------------------------


def fingerprint(tokenizer: Tokenizer) -> str:
    """The SHA-256 of a tokenizer's pieces and settings. How it splits texts is covered by that of the data."""
    digest = hashlib.sha256()
    ends = (tokenizer.bos, tokenizer.eos, sorted(tokenizer.stops), tokenizer.adds_bos, tokenizer.prefix)
    for part in (*tokenizer.pieces, sorted(tokenizer.specials.items()), ends, tokenizer.template):
        data = part if isinstance(part, bytes) else repr(part).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def digest_of(files: Sequence[Path]) -> str:
    """The SHA-256 of the concatenated contents of files."""
    digest = hashlib.sha256()
    for path in files:
        with open_file(path) as file:
            while data := file.read(2**20):
                digest.update(data)
    return digest.hexdigest()
