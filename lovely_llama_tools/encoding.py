"""Texts and conversations to tokens: where documents begin, and which tokens are answers to learn."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lovely_llama import LlamaError, check

from .chat import chat_prompt
from .corpora import is_records, read_documents, read_records
from .formats import blamed_on
from .tokens import Tokenizer
from .tokens.base import ENDS


class Encoded(NamedTuple):
    """Some tokens of a document."""

    ids: list[int]
    begins: bool  # whether these are its first
    answers: list[int] | None  # of a conversation: 1 for each token that the assistant says, else 0


def encode_file(path: Path, tokenizer: Tokenizer) -> Iterator[Encoded]:
    """The documents of a file: of JSON lines, a line each; of a text, the parts that <|endoftext|> separates.

    So do the tokenizer's own names of what ends a text. Where it has neither BOS nor EOS, nothing can mark a border,
    and the text is one document.
    """
    if not is_records(path):
        marked = tokenizer.bos is not None or tokenizer.eos is not None
        separators = [name for name in ENDS if name == ENDS[0] or name in tokenizer.specials]
        with blamed_on(path):
            yield from encode_texts(read_documents(path, separators if marked else []), tokenizer)
        return
    for where, record in read_records(path):
        with blamed_on(where):
            if isinstance(record, str):
                yield from encode_texts([(record, True)], tokenizer)
            else:
                yield encode_conversation(record, tokenizer)


def encode_texts(parts: Iterable[tuple[str, bool]], tokenizer: Tokenizer) -> Iterator[Encoded]:
    """Documents in parts; with each part comes whether its document ends there. Empty documents are left out.

    BOS stands before a document where the tokenizer puts it before texts, and EOS after it where there is one.
    """
    bos = [] if tokenizer.bos is None or not tokenizer.adds_bos else [tokenizer.bos]
    begins, eos = True, [] if tokenizer.eos is None else [tokenizer.eos]
    for text, ends in parts:
        if text or not begins:
            ids = encode(tokenizer, text, begins)
            yield Encoded([*(bos if begins else []), *ids, *(eos if ends else [])], begins, None)
        begins = ends


def encode(tokenizer: Tokenizer, text: str, begins: bool = True) -> list[int]:
    """The tokens of a text, or of what follows the beginning of one.

    Some tokenizers put a space before every text: after a newline none is put, so that what follows is encoded with
    one before it, which is dropped again.
    """
    if begins or not tokenizer.prefix or not text:
        ids = tokenizer.encode(text, False) if text else []
    else:
        newline, ids = tokenizer.encode("\n", False), tokenizer.encode("\n" + text, False)
        ids = ids[len(newline) :] if ids[: len(newline)] == newline else tokenizer.encode(text, False)
    if not {*ids}.isdisjoint(tokenizer.specials.values()):  # no names are encoded as such: it stands for the unknown
        unknown = [
            c for c in sorted({*text}) if not {*tokenizer.encode(c, False)}.isdisjoint(tokenizer.specials.values())
        ]
        raise LlamaError("text", "text", f"characters {unknown[:9]}", "characters that the tokenizer has tokens for")
    return ids


def encode_conversation(messages: list[dict[str, Any]], tokenizer: Tokenizer) -> Encoded:
    """A conversation, and which tokens in it are the assistant's: each answer, and the token that ends it.

    What comes before an answer must be the tokens that ask for it, since with these it will be asked for.
    """
    ids = chat_prompt(tokenizer, messages, add_generation_prompt=False)
    answers = [0] * len(ids)
    said = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    check("messages", f"{len(messages)}, none of an assistant", bool(said), "an answer to learn from")
    for message in messages:
        encode(tokenizer, message["content"])
    for i in said:
        prompt = chat_prompt(tokenizer, messages[:i])
        whole = chat_prompt(tokenizer, messages[: i + 1], add_generation_prompt=False)
        stops = (at for at in range(len(prompt), len(whole)) if whole[at] in tokenizer.stops)
        end = next(stops, len(whole) - 1) + 1
        got = f"a prompt for message {i + 1} that the conversation does not begin with"
        same = whole[: len(prompt)] == prompt and ids[:end] == whole[:end]
        check("chat_template", got, same, "the tokens that ask for an answer, and then the answer")
        answers[len(prompt) : end] = [1] * (end - len(prompt))
    return Encoded(ids, True, answers)
