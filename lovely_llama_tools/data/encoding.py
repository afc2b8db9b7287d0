"""Tokenizing texts and conversations, marking where documents start and which tokens are answers to learn."""

import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from lovely_llama import LlamaError

from ..extras import counted
from ..formats.model import blamed_on
from ..tokens import Tokenizer
from ..tokens.base import ENDS
from ..tokens.parts import continue_text, divided, encode_known
from .conversations import Encoder, Learned
from .corpora import read_documents
from .records import Conversation, is_records, read_records

ROWS = 32  # conversations that are rendered at a time
TURNS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>")  # of `ENDS`, those that end a turn rather than a text


class Encoded(NamedTuple):
    """Consecutive tokens of a document."""

    ids: list[int]
    begins: bool  # whether the document starts with them
    answers: list[int] | None  # in a conversation: 1 for tokens of the assistant, else 0


class Notes:
    """What is worth telling of the texts that have been read."""

    def __init__(self) -> None:
        self.skipped = list[LlamaError]()  # rows from which nothing can be learned
        self.endless = 0  # conversations with an answer that no token ends
        self.letters = ""  # the name of a special token that was read as letters

    def lines(self) -> Iterator[str]:
        """A line for each."""
        if self.skipped:
            yield f"{counted(len(self.skipped), 'row')} left out: {'; '.join(map(str, self.skipped[:3]))}"
        if self.endless:
            where = counted(self.endless, "conversation")
            yield f"no token to stop at follows an answer in {where}: there the model does not learn to stop"
        if self.letters:
            yield f"{self.letters} in texts is read as letters; with --special-tokens, as the token of that name"


def encode_file(path: Path, tokenizer: Tokenizer, notes: Notes, special: bool = False) -> Iterator[Encoded]:
    """Tokenize the documents of a file: one per row of JSON; in a text, separated by <|endoftext|>.

    Other end-of-text tokens of the tokenizer separate documents too. Without BOS and EOS a boundary could not be
    marked, and the text is one document. With `special` the names of special tokens in texts are those tokens, and the
    end of a turn separates nothing.
    """
    if not is_records(path):
        marked = tokenizer.bos is not None or tokenizer.eos is not None
        ends = [name for name in ENDS if not (special and name in TURNS)]
        separators = [name for name in ends if name == ENDS[0] or name in tokenizer.specials]
        with blamed_on(path):
            documents = read_documents(path, separators if marked else [], tokenizer)
            yield from encode_texts(documents, tokenizer, notes, special)
        return
    waiting, encoder = list[tuple[str, Conversation]](), None
    for where, record in chain(read_records(path), [("", "")]):
        if isinstance(record, Conversation):
            with blamed_on(where):
                encoder = encoder or Encoder(tokenizer)
            waiting.append((where, record))
        if encoder and waiting and (isinstance(record, str) or len(waiting) == ROWS):
            yield from encode_rows(waiting, encoder, notes)
            waiting = []
        if isinstance(record, str) and where:
            with blamed_on(where):
                yield from encode_texts([(record, True)], tokenizer, notes, special)


def encode_rows(rows: list[tuple[str, Conversation]], encoder: Encoder, notes: Notes) -> Iterator[Encoded]:
    """The conversations of some rows, but for those from which nothing can be learned."""
    with blamed_on(rows[0][0]):
        encoded = encoder.encode([record for _, record in rows])
    for (where, _), found in zip(rows, encoded, strict=True):
        if not isinstance(found, Learned):
            notes.skipped.append(LlamaError(where, found.field, found.got, found.expected))
            continue
        notes.endless += not found.ended
        yield Encoded(found.ids, True, found.answers)


def encode_texts(
    parts: Iterable[tuple[str, bool]], tokenizer: Tokenizer, notes: Notes, special: bool
) -> Iterator[Encoded]:
    """Tokenize documents given in parts, each with whether its document ends there. Empty documents are skipped.

    BOS precedes a document if the tokenizer adds it to texts; EOS, if it has one, follows.
    """
    bos = [] if tokenizer.bos is None or not tokenizer.adds_bos else [tokenizer.bos]
    begins, eos, last = True, [] if tokenizer.eos is None else [tokenizer.eos], list[int]()
    names = re.compile("|".join(map(re.escape, tokenizer.specials)) or "(?!)")
    for text, ends in parts:
        if text or not begins:
            if not special and not notes.letters and (found := names.search(text)):
                notes.letters = found[0]
            for part in divided(tokenizer, text):
                ids = encode(tokenizer, part, begins, special)
                lead = bos if begins and ids[:1] != bos else []
                yield Encoded([*lead, *ids], begins, None)
                begins, last = False, ids or last
            yield Encoded(eos if ends and last[-1:] != eos else [], False, None)
        begins = ends


def encode(tokenizer: Tokenizer, text: str, begins: bool, special: bool) -> list[int]:
    """Tokenize a part of a text, in which names of special tokens are letters unless `special`."""
    if not special:
        return encode_known(tokenizer, text, begins)
    return tokenizer.encode(text, True) if begins else continue_text(tokenizer, text, True)
