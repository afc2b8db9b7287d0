"""Tokenizing texts and conversations, marking where documents start and which tokens are answers to learn."""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from lovely_llama import LlamaError, check

from ..formats.model import blamed_on
from ..inference.chat import chat_prompt
from ..tokens import Tokenizer
from ..tokens.base import ENDS
from ..tokens.parts import continue_text, divided
from .corpora import is_records, read_documents, read_records

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")


class Encoded(NamedTuple):
    """Consecutive tokens of a document."""

    ids: list[int]
    begins: bool  # whether the document starts with them
    answers: list[int] | None  # in a conversation: 1 for tokens of the assistant, else 0


def encode_file(path: Path, tokenizer: Tokenizer) -> Iterator[Encoded]:
    """Tokenize the documents of a file: one per line of JSON lines; in a text, separated by <|endoftext|>.

    Other end-of-text tokens of the tokenizer separate documents too. Without BOS and EOS a boundary could not be
    marked, and the text is one document.
    """
    if not is_records(path):
        marked = tokenizer.bos is not None or tokenizer.eos is not None
        separators = [name for name in ENDS if name == ENDS[0] or name in tokenizer.specials]
        with blamed_on(path):
            yield from encode_texts(read_documents(path, separators if marked else [], tokenizer), tokenizer)
        return
    for where, record in read_records(path):
        with blamed_on(where):
            if isinstance(record, str):
                yield from encode_texts([(record, True)], tokenizer)
            else:
                yield encode_conversation(record, tokenizer)


def encode_texts(parts: Iterable[tuple[str, bool]], tokenizer: Tokenizer) -> Iterator[Encoded]:
    """Tokenize documents given in parts, each with whether its document ends there. Empty documents are skipped.

    BOS precedes a document if the tokenizer adds it to texts; EOS, if it has one, follows.
    """
    bos = [] if tokenizer.bos is None or not tokenizer.adds_bos else [tokenizer.bos]
    begins, eos = True, [] if tokenizer.eos is None else [tokenizer.eos]
    for text, ends in parts:
        if text or not begins:
            for part in divided(tokenizer, text):
                yield Encoded([*(bos if begins else []), *encode(tokenizer, part, begins)], begins, None)
                begins = False
            yield Encoded(eos if ends else [], False, None)
        begins = ends


def encode(tokenizer: Tokenizer, text: str, begins: bool = True) -> list[int]:
    """Tokenize a text, or its continuation if `begins` is false."""
    ids = tokenizer.encode(text, False) if text and begins else continue_text(tokenizer, text)
    if not {*ids}.isdisjoint(
        tokenizer.specials.values()
    ):  # special tokens are never encoded here, so it is the unknown token
        unknown = [
            c for c in sorted({*text}) if not {*tokenizer.encode(c, False)}.isdisjoint(tokenizer.specials.values())
        ]
        raise LlamaError("text", "text", f"characters {unknown[:9]}", "characters that the tokenizer has tokens for")
    return ids


def encode_conversation(messages: list[dict[str, Any]], tokenizer: Tokenizer) -> Encoded:
    """Tokenize a conversation and mark the assistant's tokens: each answer, and the token that ends it.

    The tokens before an answer must be exactly the prompt that will ask for it in a chat.
    """
    ids = chat_prompt(tokenizer, messages, add_generation_prompt=False)
    answers = [0] * len(ids)
    said = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    roles = ", ".join(dict.fromkeys(repr(message["role"]) for message in messages))
    got, known = f"{len(messages)} of the roles {roles}, none of an assistant", ", ".join(ROLES)
    check("messages", got, bool(said), f"an answer to learn from; roles are {known}")
    for message in messages:
        encode(tokenizer, message["content"])
    for i in said:
        prompt = chat_prompt(tokenizer, messages[:i])
        whole = chat_prompt(tokenizer, messages[: i + 1], add_generation_prompt=False)
        stops = (at for at in range(len(prompt), len(whole)) if whole[at] in tokenizer.stops)
        end = next(stops, len(whole) - 1) + 1
        row = messages[max(0, i - 1) : i + 2]
        twice = any(one["role"] == other["role"] == "assistant" for one, other in pairwise(row))
        got = f"a prompt for message {i + 1} that the conversation does not begin with"
        same = whole[: len(prompt)] == prompt and ids[:end] == whole[:end]
        check("messages", "two assistant messages in a row", same or not twice, "one message of both")
        check("chat_template", got, same, "the tokens that ask for an answer, and then the answer")
        answers[len(prompt) : end] = [1] * (end - len(prompt))
    return Encoded(ids, True, answers)
