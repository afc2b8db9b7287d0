"""Corpora to batches: texts, conversations and token files, split into training and validation."""

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from lovely_llama import LlamaError, check, is_number, is_whole

from .batches import Batch as Batch
from .batches import Documents, Split, Windows
from .batches import ahead as ahead
from .chat import chat_prompt
from .corpora import TOKENS, corpus_files, read_documents, read_records, read_texts, size_of
from .extras import progress
from .files import publish
from .formats import blamed_on, open_file
from .strict_json import read_json
from .token_files import Tokens, Writer, id_dtype, open_part
from .tokens import Tokenizer, fit, folder_tokenizer, tokenizer_files
from .tokens.base import small_file
from .tokens.training import train_bpe, train_characters

IDS, STARTS, ANSWERS, DESCRIPTION = "tokens.bin", "documents.bin", "answers.bin", "data.json"


class Corpus(NamedTuple):
    """What a run learns from."""

    train: Split
    validation: Split | None
    tokenizer: Tokenizer | None
    vocab: int
    fingerprints: Mapping[str, str]  # SHA-256 of the data, and of the tokenizer


def prepare(
    paths: Sequence[str], folder: Path, *, tokenizer: Tokenizer | str | None = None, vocab: int | None = None,
    seq: int, fraction: float = 0.1, pack: bool = False,
) -> Corpus:  # fmt: skip
    """Read a corpus: texts, JSON lines of conversations or texts, and folders of them; or token files.

    Texts are encoded, and their tokens written into the folder; where they are there already, from the same texts,
    they are used again. The tokenizer is given, or "bpe" or "chars", learned from the texts; the last unless one is
    named. Token files stay where they are. Without paths the corpus is Python's standard library.

    The last `fraction` is for validation: of a text's tokens, or where rows consist of documents, of these. They do
    with `pack`, several in a row of `seq` tokens; and where there are conversations, a row each. Targets are then the
    assistant's answers alone.
    """
    check("seq", repr(seq), is_whole(seq) and 0 < seq < 2**31, "a whole number above 0")
    check("fraction", repr(fraction), is_number(fraction) and 0 <= fraction < 1, "a number from 0 to below 1")
    files = corpus_files(paths)
    where = files[0] if len(files) == 1 else ", ".join(paths) or "Python's standard library"
    kinds = {file.suffix in TOKENS for file in files}
    check("path", "texts and token files", len(kinds) == 1, "the one or the other", where)
    if True in kinds:
        check("tokenizer", repr(tokenizer), not isinstance(tokenizer, str), "a folder with the one of the token files")
        return open_corpus(files, where, None if isinstance(tokenizer, str) else tokenizer, vocab, seq, fraction, pack)
    folder.mkdir(parents=True, exist_ok=True)
    learned = write_corpus(files, where, folder, tokenizer or "chars", vocab)
    return open_corpus([folder / IDS], where, learned, vocab, seq, fraction, pack)


# ---- Texts to tokens -------------------------------------------------------------------------------------------------


def write_corpus(
    files: Sequence[Path], where: object, folder: Path, tokenizer: Tokenizer | str, vocab: int | None
) -> Tokenizer:  # fmt: skip
    """Write the tokens of texts into a folder, where they are not there yet, and return their tokenizer."""
    given = tokenizer if isinstance(tokenizer, str) else fingerprint(tokenizer)
    origin = {"sources": digest_of(files), "encoded": f"{given} {vocab}"}
    said = small_file(folder / DESCRIPTION)
    if said is not None:
        kept = read_json(said, folder / DESCRIPTION)
        for name, value in origin.items():
            check(name, kept.get(name), kept.get(name) == value, f"{value}, or another folder", folder / DESCRIPTION)
    if isinstance(tokenizer, str):
        there = folder_tokenizer(folder) if said is not None else None
        tokenizer = there or learn(files, where, tokenizer, vocab)
        if there is None:
            for name, data in tokenizer_files(tokenizer).items():
                write_file(folder / name, data)
    elif vocab is not None:
        tokenizer = fit(tokenizer, vocab, where)
    if said is None:
        write_tokens(files, folder, tokenizer, origin)
    return tokenizer


def write_tokens(files: Sequence[Path], folder: Path, tokenizer: Tokenizer, origin: Mapping[str, str]) -> None:
    """Write the tokens, where documents begin, and which tokens are answers."""
    vocab, conversations = len(tokenizer.pieces), 0
    writers = [Writer(folder / name, kind) for name, kind in ((IDS, id_dtype(vocab)), (STARTS, "<u8"), (ANSWERS, "u1"))]
    ids, starts, answers = writers
    try:
        with progress("tokens", size_of(files), "B") as advance:
            for file in files:
                for document in encode_file(file, tokenizer):
                    starts.add([ids.count] if document.begins else [])
                    ids.add(document.ids)
                    answers.add(document.answers or [1] * len(document.ids))
                    conversations += document.answers is not None
                advance(file.stat().st_size)
        for writer in writers:
            writer.publish()
    except OSError as error:
        raise LlamaError(folder, "path", error.strerror, "a folder that can be written to") from error
    finally:
        for writer in writers:
            writer.discard()
    description = {"dtype": id_dtype(vocab), "vocab": vocab, "tokens": ids.count, "documents": starts.count}
    description |= {"conversations": conversations, "sha256": ids.digest.hexdigest(), **origin}
    write_file(folder / DESCRIPTION, json.dumps(description, indent=2).encode())


def write_file(path: Path, data: bytes) -> None:
    """Write a small file, whole or not at all."""
    part = path.with_name(f".{path.name}.part{os.getpid()}")
    try:
        part.write_bytes(data)
        publish(part, path)
    except OSError as error:
        raise LlamaError(path, "path", error.strerror, "a file that can be written to") from error


def learn(files: Sequence[Path], where: object, kind: str, vocab: int | None) -> Tokenizer:
    """A tokenizer for texts, learned from them."""
    check("tokenizer", repr(kind), kind in ("chars", "bpe"), "chars, bpe, or a tokenizer")
    with blamed_on(where):
        if kind == "chars":
            return train_characters(read_texts(files))
        check("vocab", "nothing", vocab is not None, "the number of tokens that bpe is to learn")
        return train_bpe(read_texts(files), vocab or 0)


class Encoded(NamedTuple):
    """Some tokens of a document."""

    ids: list[int]
    begins: bool  # whether these are its first
    answers: list[int] | None  # of a conversation: 1 for a token that the assistant says, else 0


def encode_file(path: Path, tokenizer: Tokenizer) -> Iterator[Encoded]:
    """The documents of a file. Around a text go BOS, where the tokenizer puts it there, and EOS."""
    if path.suffix != ".jsonl":
        ends = {token for token in (tokenizer.bos, tokenizer.eos, *tokenizer.stops) if token is not None}
        parts = read_documents(path, [name for name, token in tokenizer.specials.items() if token in ends])
        with blamed_on(path):
            yield from encode_texts(parts, tokenizer)
        return
    for where, record in read_records(path):
        with blamed_on(where):
            if isinstance(record, str):
                yield from encode_texts([(record, True)], tokenizer)
            else:
                yield encode_conversation(record, tokenizer)


def encode_texts(parts: Iterable[tuple[str, bool]], tokenizer: Tokenizer) -> Iterator[Encoded]:
    """Documents in parts; with each part comes whether its document ends there. Empty documents are left out."""
    begins, eos = True, [] if tokenizer.eos is None else [tokenizer.eos]
    for text, ends in parts:
        if text or not begins:
            ids = tokenizer.begin(text) if begins else encode_more(tokenizer, text)
            yield Encoded(ids + eos if ends else ids, begins, None)
        begins = ends


def encode_more(tokenizer: Tokenizer, text: str) -> list[int]:
    """A later part of a document, without the space that some tokenizers put before every text."""
    if not tokenizer.prefix or not text:
        return tokenizer.encode(text, False) if text else []
    newline, ids = tokenizer.encode("\n", False), tokenizer.encode("\n" + text, False)
    return ids[len(newline) :] if ids[: len(newline)] == newline else tokenizer.encode(text, False)


def encode_conversation(messages: list[dict[str, Any]], tokenizer: Tokenizer) -> Encoded:
    """A conversation, and which tokens in it are the assistant's: each answer, and the token that ends it."""
    ids = chat_prompt(tokenizer, messages, add_generation_prompt=False)
    answers = [0] * len(ids)
    said = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    check("messages", f"{len(messages)}, none of an assistant", bool(said), "an answer to learn from")
    for i in said:
        prompt = chat_prompt(tokenizer, messages[:i])
        whole = chat_prompt(tokenizer, messages[: i + 1], add_generation_prompt=False)
        ends = (at for at in range(len(prompt), len(whole)) if whole[at] in tokenizer.stops)
        end = next(ends, len(whole) - 1) + 1
        same = whole[: len(prompt)] == prompt and ids[:end] == whole[:end]
        check(
            "chat_template", f"other tokens before answer {i + 1}", same, "those that ask for it, and then the answer"
        )
        answers[len(prompt) : end] = [1] * (end - len(prompt))
    return Encoded(ids, True, answers)


# ---- Tokens to splits ------------------------------------------------------------------------------------------------


def open_corpus(
    files: Sequence[Path], where: object, tokenizer: Tokenizer | None, vocab: int | None, seq: int, fraction: float,
    pack: bool,
) -> Corpus:  # fmt: skip
    """Open token files, check every id, and split them."""
    folder = files[0].parent
    said = describe(folder) if [file.name for file in files] == [IDS] else {}
    if vocab is None:
        vocab = len(tokenizer.pieces) if tokenizer else said.get("vocab")
    if vocab is None:
        raise LlamaError(where, "vocab", "nothing", "the number of tokens, or the tokenizer of the token files")
    tokens = Tokens([open_part(file, said.get("dtype") or id_dtype(vocab)) for file in files], vocab)
    digest = tokens.digest()
    check("sha256", digest, said.get("sha256", digest) == digest, said.get("sha256"), files[0])
    prints = {"data": digest} | ({} if tokenizer is None else {"tokenizer": fingerprint(tokenizer)})
    if pack or said.get("conversations"):
        check("pack", "token files without documents", bool(said), "texts, or a folder that a run has written", where)
        train, validation = split_documents(tokens, folder, said, where, seq, fraction, pack)
    else:
        train, validation = split_tokens(tokens, where, seq, fraction)
    return Corpus(train, validation, tokenizer, vocab, prints)


def describe(folder: Path) -> dict[str, Any]:
    """What the data.json in a folder says of the tokens beside it; nothing where there is none."""
    data = small_file(folder / DESCRIPTION)
    if data is None:
        return {}
    said = read_json(data, folder / DESCRIPTION)
    check(
        "dtype", said.get("dtype"), said.get("dtype") in ("uint16", "uint32"), "uint16 or uint32", folder / DESCRIPTION
    )
    for name in ("vocab", "tokens", "documents", "conversations"):
        right = is_whole(said.get(name)) and 0 <= said[name] < 2**48
        check(name, said.get(name), right, "a whole number", folder / DESCRIPTION)
    return said


def split_tokens(tokens: Tokens, where: object, seq: int, fraction: float) -> tuple[Split, Split | None]:
    """The first tokens to train on, the last for validation, as nanoGPT splits TinyShakespeare."""
    cut = int(tokens.count * (1 - fraction))
    for count, what in ((cut, "training"), (tokens.count - cut, "validation")):
        need = count > seq or (what == "validation" and not fraction)
        check("tokens", f"{count} for {what}", need, f"at least {seq + 1}, a row of {seq} and one more", where)
    return Windows(tokens, 0, cut, seq), Windows(tokens, cut, tokens.count, seq) if fraction else None


def split_documents(
    tokens: Tokens, folder: Path, said: Mapping[str, Any], where: object, seq: int, fraction: float, pack: bool
) -> tuple[Split, Split | None]:  # fmt: skip
    """The first documents to train on, the last for validation."""
    starts = np.append(np.fromfile(folder / STARTS, "<u8").astype(np.int64), tokens.count)
    answers = Tokens([open_part(folder / ANSWERS, "u1")], 2) if said["conversations"] else None
    documents = len(starts) - 1
    cut = documents - (max(1, documents - int(documents * (1 - fraction))) if fraction else 0)
    check("documents", documents, cut > 0, "at least 2, one for validation", where)
    parts = [(starts[: cut + 1], "training")] + ([(starts[cut:], "validation")] if fraction else [])
    splits = list[Split]()
    for part, what in parts:
        begin, sizes = cut_documents(part, seq, answers)
        check("tokens", f"no targets for {what}", len(sizes) > 0, f"answers within the first {seq} tokens", where)
        splits.append(Documents(tokens, answers, begin, sizes, seq, pack))
    return splits[0], splits[1] if fraction else None


def cut_documents(
    starts: Int[np.ndarray, " ends"], seq: int, answers: Tokens | None
) -> tuple[Int[np.ndarray, " docs"], Int[np.ndarray, " docs"]]:  # fmt: skip
    """Where the documents begin, in pieces of at most seq targets, and how many targets each has.

    Of a conversation, which a question begins and no answer, only the first piece is used, and only if it has targets.
    """
    first, targets = starts[:-1], np.diff(starts) - 1
    pieces = -(-targets // seq)
    if answers is not None:
        places = np.stack([first, np.minimum(targets, seq) + 1], axis=1).tolist()
        masks = [answers.read(start, size) for start, size in places]
        asked = np.array([mask[0] == 0 for mask in masks])
        useful = np.array([mask[1:].any() for mask in masks])
        pieces = np.where(asked, useful, pieces)
        unused = int((asked & ~useful).sum())
        if unused:
            print(f"note: {unused} conversations have no answer within their first {seq} tokens", file=sys.stderr)
    piece = np.arange(int(pieces.sum())) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    return np.repeat(first, pieces) + piece * seq, np.minimum(np.repeat(targets, pieces) - piece * seq, seq)


# ---- Fingerprints ----------------------------------------------------------------------------------------------------


def fingerprint(tokenizer: Tokenizer) -> str:
    """The SHA-256 of what a tokenizer consists of, but for how it finds its pieces: the data's own shows that."""
    digest = hashlib.sha256()
    ends = (tokenizer.bos, tokenizer.eos, sorted(tokenizer.stops), tokenizer.adds_bos, tokenizer.prefix)
    for part in (*tokenizer.pieces, sorted(tokenizer.specials.items()), ends, tokenizer.template):
        data = part if isinstance(part, bytes) else repr(part).encode()
        digest.update(len(data).to_bytes(8) + data)
    return digest.hexdigest()


def digest_of(files: Sequence[Path]) -> str:
    """The SHA-256 of what files hold, one after the other."""
    digest = hashlib.sha256()
    for path in files:
        with open_file(path) as file:
            while data := file.read(2**20):
                digest.update(data)
    return digest.hexdigest()
