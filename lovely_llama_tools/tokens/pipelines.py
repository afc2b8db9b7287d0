"""Hugging Face's tokenizer.json, run by the package tokenizers; byte-level vocabularies are written as one first."""

import json
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

from lovely_llama import LlamaError, check

from ..extras import extra
from ..strict_json import read_json, to_json
from .base import Tokenizer, apart, check_text, contained, prefix_of
from .pieces import BYTES

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def splits(*patterns: str) -> dict[str, Any]:
    """Each pattern in turn: its matches, and what is between them, become parts that no token crosses."""
    steps: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in patterns
    ]
    return {"type": "Sequence", "pretokenizers": [*steps, letters_for_bytes(False)]}


def letters_for_bytes(regex: bool) -> dict[str, Any]:
    """GPT-2's letters for bytes, and its pattern where `regex`."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": regex}


# What llama.cpp calls these splits, src/llama-vocab.cpp.
PRE: dict[str, dict[str, Any]] = {
    "gpt-2": letters_for_bytes(True),
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, letters_for_bytes(True)],
    },
    "llama-bpe": splits(LLAMA3),
    "smaug-bpe": splits(LLAMA3),
    "default": splits(r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
# Under which other names it has the same.
OTHER_NAMES = {
    "gpt-2": "a.x-4.0 exaone4 gigachat granite-docling jais jina-de jina-es jina-v2-de jina-v2-es mellum mpt olmo "
    "phi-2 trillion",
    "smollm": "codeshell command-r exaone minerva-7b refact starcoder",
    "llama-bpe": "falcon-h1 falcon3 lfm2 llama-v3 llama3 midm-2.0 pixtral",
    "smaug-bpe": "dbrx",
}
PRE_NAMES = {name: name for name in PRE} | {name: pre for pre, names in OTHER_NAMES.items() for name in names.split()}
WHOLE = {"llama-bpe"}  # where a part that is a token is that token, however merges would go


def byte_letters() -> dict[str, int]:
    """GPT-2's letter for each byte: the character itself where it is visible, else the next unused from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


def added_token(name: str, i: int, special: bool) -> dict[str, Any]:
    """An entry of `added_tokens`: a text that is always one token; if special, only where special tokens are meant."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": name, **flags, "special": special}


def byte_level(
    names: Sequence[str], merges: Sequence[str], pre: str, specials: Mapping[str, int],
    words: Mapping[str, int] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A tokenizer.json: byte pair encoding, Sennrich et al. 2016, arXiv:1508.07909, over UTF-8 bytes, Radford 2019.

    A merge is two names with a space between them. Specials are found in a text where they are meant, words always.
    """
    kinds = ((specials, True), (words or {}, False))
    added = [added_token(name, i, special) for found, special in kinds for name, i in found.items()]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "normalizer": None,
        "pre_tokenizer": PRE[pre],
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre in WHOLE,
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": merges,
        },
    }


def as_object(value: Any) -> dict[str, Any]:
    """The value if it is an object in JSON, else an empty one."""
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    """The value if it is an array in JSON, else an empty one."""
    return cast(list[Any], value) if isinstance(value, list) else []


def parts_of(part: Any, *lists: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a normaliser, pre-tokenizer, decoder or post-processor."""
    found = as_object(part)
    if found.get("type") not in ("Sequence", None):
        yield found
    for steps in (found.get(name) for name in lists):
        for step in as_list(steps):
            yield from parts_of(step, *lists)


def normalizers(description: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [*parts_of(description.get("normalizer"), "normalizers")]


def pre_tokenizers(description: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [*parts_of(description.get("pre_tokenizer"), "pretokenizers")]


def decoders(description: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [*parts_of(description.get("decoder"), "decoders")]


def is_byte_level(description: Mapping[str, Any]) -> bool:
    """Whether tokens are written in GPT-2's letters for bytes."""
    return any(step.get("type") == "ByteLevel" for step in decoders(description))


def regexes(description: Mapping[str, Any]) -> set[str]:
    """The regular expressions by which texts are changed or split."""
    patterns = (as_object(step.get("pattern")) for step in normalizers(description) + pre_tokenizers(description))
    return {str(pattern["Regex"]) for pattern in patterns if "Regex" in pattern}


GAP = 2**16  # ids that may be missing before added tokens
TRIED = {regex for split in PRE.values() for regex in regexes({"pre_tokenizer": split})}  # others may give up on a text


class Pipeline:
    """Encodes with the package tokenizers; pickles as its tokenizer.json."""

    def __init__(self, source: str, description: Mapping[str, Any] | None = None) -> None:
        self.source, self.lock = source, threading.Lock()  # the lock is over the library's settings
        self.library = apart(lambda: extra("tokenizers", "chat").Tokenizer.from_str(source))
        self.library.no_truncation()
        self.library.no_padding()
        description = description or self.description()
        self.known, self.byte_level = known_letters(description)
        self.tried = regexes(description) <= TRIED
        added = map(as_object, as_list(description.get("added_tokens")))
        self.words = {str(token["content"]): int(token["id"]) for token in added if token.get("special") is False}

    def __call__(self, text: str, special: bool = False) -> list[int]:
        check_text("text", text)
        if self.known is not None:  # the package drops what is not
            normalizer = self.library.normalizer
            spelt = text.encode() if self.byte_level else normalizer.normalize_str(text) if normalizer else text
            unknown = sorted({*spelt} - self.known)
            what = "bytes" if self.byte_level else "characters"
            check("text", f"{what} {unknown}", not unknown, f"{what} that are in the vocabulary")
        what = contained("arguments", "text", "one that the tokenizer fails to split", "another text, or tokenizer")
        with what, self.lock:
            self.library.encode_special_tokens = not special
            encode = partial(self.library.encode, text, add_special_tokens=False)
            return (encode() if self.tried else apart(encode)).ids

    def description(self) -> dict[str, Any]:
        """Its tokenizer.json."""
        return json.loads(self.source)

    def __reduce__(self) -> tuple[Any, ...]:
        return Pipeline, (self.source,)


def known_letters(description: Mapping[str, Any]) -> tuple[set[Any] | None, bool]:
    """The bytes or characters that have tokens, or None where no text can have others; and whether these are bytes."""
    model, byte_of, letters = description["model"], byte_letters(), is_byte_level(description)
    names = model["vocab"] if isinstance(model["vocab"], dict) else [name for name, _ in model["vocab"]]
    spelt = model.get("byte_fallback") and {*names} >= BYTES.keys()
    if spelt or model.get("unk_token") is not None or model.get("unk_id") is not None:
        return None, letters
    if not letters:
        return {name for name in names if len(name) == 1}, letters
    known = {byte_of[name] for name in names if name in byte_of}
    return None if len(known) == 256 else known, letters


# ---- What a tokenizer.json must be -----------------------------------------------------------------------------------

PLAIN = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace", "Sequence"}  # decoders of what is not byte-level


def json_tokenizer(data: bytes, file: object) -> Tokenizer:
    """A tokenizer from a tokenizer.json."""
    return pipeline_tokenizer(read_json(data, file), file, data.decode())


def pipeline_tokenizer(description: Mapping[str, Any], file: object, source: str | None = None) -> Tokenizer:
    """A tokenizer from a tokenizer.json that has been parsed."""
    names, specials = token_names(description, file)
    with contained(file, "contents", "other data, or a regex that is none", "a tokenizer.json"):
        encode = Pipeline(source or to_json(description, ensure_ascii=False), description)
        ids = [encode.library.token_to_id(name) for name in names]
        settled: list[int] = apart(lambda: encode.library.encode("")).ids  # what comes before and after every text
    wrong = [names[i] for i, token in enumerate(ids) if token != i]
    check("added_tokens", f"{wrong[:1]} under another id", not wrong, "the id that the vocabulary has", file)
    pieces = spelt_pieces(description, names, specials, file)
    tokenizer = Tokenizer(encode, pieces, specials, frozenset(), None, False, prefix_of(encode, pieces), None)
    bos = settled[0] if settled and names[settled[0]] in specials else None
    return tokenizer._replace(bos=bos, adds_bos=bos is not None)


def without_gap(description: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer.json with tokens that no text has in a gap of ids before added ones, which the package does not keep.

    What else may be wrong with it is for `token_names` to say."""
    vocab, added = as_object(description.get("model")).get("vocab"), as_list(description.get("added_tokens"))
    ids = {*(as_object(vocab).values() or range(len(as_list(vocab)))), *(as_object(token).get("id") for token in added)}
    whole = all(type(i) is int for i in ids)
    last = max((i for i in ids if type(i) is int), default=-1)
    missing = [i for i in range(last) if i not in ids] if whole and last < len(ids) + GAP else []
    inner = max((i for i in as_object(vocab).values() if type(i) is int), default=-1)
    if not missing or min(missing) < inner:
        return dict(description)
    every = [*added, *(added_token(f"[PAD{i}]", i, True) for i in missing)]
    return {**description, "added_tokens": sorted(every, key=lambda token: token["id"])}


def token_names(description: Mapping[str, Any], file: object) -> tuple[list[str], dict[str, int]]:
    """The name of each id, and the ids of special tokens. Each id from 0 on must have one name."""
    model = description.get("model")
    check("model", f"a value of type {type(model).__name__}", isinstance(model, dict), "an object", file)
    settings, added = as_object(model), as_list(description.get("added_tokens"))
    kind, vocab = settings.get("type", "BPE"), settings.get("vocab")
    check("model.type", repr(kind), kind in ("BPE", "Unigram"), "BPE or Unigram", file)
    check("model.dropout", settings.get("dropout"), not settings.get("dropout"), "none: ids are not random", file)
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        check(f"model.{name}", repr(settings.get(name)), not settings.get(name), "none", file)
    try:
        entries: list[tuple[Any, Any]] = [*as_object(vocab).items()]
        entries += [(name, i) for i, (name, _) in enumerate(as_list(vocab))]
        extras: list[tuple[Any, Any, Any]] = [(token["content"], token["id"], token["special"]) for token in added]
        both = {*entries, *((name, i) for name, i, _ in extras)}
    except (KeyError, TypeError, ValueError) as error:
        raise LlamaError(file, "added_tokens", "other entries", "a content, an id and whether it is special") from error
    right = all(isinstance(name, str) and type(i) is int and 0 <= i < 2**31 for name, i in both)
    check("model.vocab", "other entries", right and bool(both), "names with ids from 0 on", file)
    for what, count in (("names", Counter(name for name, _ in both)), ("ids", Counter(i for _, i in both))):
        value, times = count.most_common(1)[0]
        check("model.vocab", f"{value!r} {times} times among the {what}", times == 1, "each once", file)
    last = max(i for _, i in both)
    check("model.vocab", f"the id {last} among {len(both)}", last < len(both), "ids without a gap", file)
    names = [name for name, _ in sorted(both, key=lambda entry: entry[1])]
    return names, {name: i for name, i, special in extras if special}


def spelt_pieces(
    description: Mapping[str, Any], names: Sequence[str], specials: Mapping[str, int], file: object
) -> list[bytes]:  # fmt: skip
    """What each token adds to a text, as the decoder of the tokenizer.json says."""
    steps = [step.get("type") for step in decoders(description)]
    words = {token["content"] for token in as_list(description.get("added_tokens"))}
    if "ByteLevel" in steps:
        byte_of = byte_letters()
        table = str.maketrans({letter: chr(byte) for letter, byte in byte_of.items()})
        return [
            b"" if name in specials
            else name.translate(table).encode("latin-1") if name not in words and {*name} <= byte_of.keys()
            else name.encode()
            for name in names
        ]  # fmt: skip
    foreign, fallback = [step for step in steps if step not in PLAIN], "ByteFallback" in steps
    check("decoder", foreign or "none", bool(steps) and not foreign, f"ByteLevel, or of {sorted(PLAIN)}", file)
    return [
        b"" if name in specials
        else bytes([BYTES[name]]) if fallback and name in BYTES
        else name.encode() if name in words
        else name.replace("▁", " ").encode()
        for name in names
    ]  # fmt: skip
