"""Plain characters: each character of a corpus is a token."""

from collections.abc import Sequence
from typing import Any

from lovely_llama import check

from ..strict_json import read_json, to_json
from .base import Tokenizer, check_text


class Characters:
    """Encodes character by character; ids are positions among the characters it knows."""

    def __init__(self, characters: str) -> None:
        self.characters, self.ids = characters, {character: i for i, character in enumerate(characters)}

    def __call__(self, text: str, special: bool = False) -> list[int]:
        check_text("text", text)
        unknown = sorted({*text} - self.ids.keys())
        check("text", f"characters {unknown}", not unknown, "characters that are in the vocabulary")
        return [self.ids[character] for character in text]

    def __reduce__(self) -> tuple[Any, ...]:
        return Characters, (self.characters,)


def characters_tokenizer(characters: str, file: object = "characters") -> Tokenizer:
    """A tokenizer that knows these characters, each once, and no special tokens."""
    check_text("characters", characters)
    check("characters", len(characters), bool(characters), "at least one", file)
    twice = [c for i, c in enumerate(characters[:4096]) if c in characters[:i]]
    check("characters", f"{twice[:1]} twice", len({*characters}) == len(characters), "each once", file)
    pieces: Sequence[bytes] = [character.encode() for character in characters]
    return Tokenizer(Characters(characters), pieces, {}, frozenset(), None, False, b"", None)


def read_characters(data: bytes, file: object) -> Tokenizer:
    """A tokenizer from a characters.json, `{"characters": "…"}`."""
    characters = read_json(data, file).get("characters")
    check("characters", f"a value of type {type(characters).__name__}", isinstance(characters, str), "a text", file)
    return characters_tokenizer(str(characters), file)


def write_characters(encode: Characters) -> dict[str, bytes]:
    """characters.json, and a tokenizer.json with the same ids for other programs."""
    plain: dict[str, Any] = {"characters": encode.characters}
    description = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list[dict[str, Any]](),
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "vocab": encode.ids, "merges": list[str]()},
    }
    files = {"characters.json": plain, "tokenizer.json": description}
    return {name: to_json(content, ensure_ascii=False).encode() for name, content in files.items()}
