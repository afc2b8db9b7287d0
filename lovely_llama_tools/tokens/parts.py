"""Long texts tokenized in parts, to the same tokens as in one go, so that memory does not grow with the text."""

import re
from collections.abc import Iterator

from lovely_llama import LlamaError, check

from .base import Tokenizer
from .characters import Characters

BLOCK = 2**18  # characters tokenized at a time
LONGEST = 2**22  # characters among which there may be no place to divide
AROUND = 99  # characters on either side of a place that are tokenized to see that no token is lost there

LINE, WORD, ANYWHERE = (re.compile(rf"(?s).*{last}") for last in (r"\S\n(?=\S)", r"[^\W_](?=\s)", "."))


def places(tokenizer: Tokenizer) -> list[re.Pattern[str]]:
    """Patterns whose last match in a text ends where the text may be divided.

    A tokenizer's regular expression, or its vocabulary, has a boundary between two lines that end and start with a
    visible character, and after a word before white space. The latter, unless a token extends over it.
    """
    if isinstance(tokenizer.encode, Characters):
        return [ANYWHERE]
    special = {*tokenizer.specials.values()}
    pieces = [piece for i, piece in enumerate(tokenizer.pieces) if i not in special]
    names = [name.encode() for name in tokenizer.specials]
    return [LINE] if any(re.search(rb"[0-9A-Za-z\x80-\xff]\s", piece) for piece in pieces + names) else [LINE, WORD]


def divide(tokenizer: Tokenizer, text: str, at: list[re.Pattern[str]]) -> int:
    """The length of the longest prefix that can be tokenized on its own; 0 if there is none."""
    check("text", f"{len(text)} characters in one word", len(text) <= LONGEST, f"at most {LONGEST} without a space")
    for end in (found.end() for found in (place.match(text) for place in at) if found):
        before, after = text[max(0, end - AROUND) : end], text[end : end + AROUND]
        apart = tokenizer.encode(before, False) + continue_text(tokenizer, after)
        if apart == tokenizer.encode(before + after, False):
            return end
    return 0


def divided(tokenizer: Tokenizer, text: str) -> Iterator[str]:
    """Split a text into parts; a short one is a single part."""
    begin, size, at = 0, BLOCK, places(tokenizer) if len(text) > BLOCK else []
    while begin + size < len(text):
        end = divide(tokenizer, text[begin : begin + size], at)
        if end:
            yield text[begin : begin + end]
        begin, size = begin + end, BLOCK if end else 2 * size
    yield text[begin:]


def continue_text(tokenizer: Tokenizer, text: str, special: bool = False) -> list[int]:
    """Tokenize the continuation of a text.

    Some tokenizers insert a space at the start of every text. A continuation is therefore encoded after a newline,
    where none is inserted, and the newline is dropped again.
    """
    if not tokenizer.prefix or not text:
        return tokenizer.encode(text, special) if text else []
    newline, ids = tokenizer.encode("\n", False), tokenizer.encode("\n" + text, special)
    return ids[len(newline) :] if ids[: len(newline)] == newline else tokenizer.encode(text, special)


def encode_parts(tokenizer: Tokenizer, text: str, special: bool = False) -> Iterator[list[int]]:
    """The tokens of a text, in parts."""
    for i, part in enumerate(divided(tokenizer, text)):
        yield continue_text(tokenizer, part, special) if i else tokenizer.encode(part, special)


def encode_known(tokenizer: Tokenizer, text: str, begins: bool = True) -> list[int]:
    """Tokenize a text as letters, or its continuation if `begins` is false. Unknown characters are refused."""
    ids, special = tokenizer.encode(text) if text and begins else continue_text(tokenizer, text), specials(tokenizer)
    if not special.isdisjoint(ids):  # none is named here, so it is the unknown token
        unknown = [c for c in sorted({*text}) if not special.isdisjoint(tokenizer.encode(c))]
        raise LlamaError("text", "text", f"characters {unknown[:9]}", "characters that the tokenizer has tokens for")
    return ids


def specials(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids of special tokens."""
    return frozenset(tokenizer.specials.values())
