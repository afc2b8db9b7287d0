"""Between SentencePiece models and tokenizer.json: the same ids from either."""

import base64
from collections.abc import Callable, Mapping
from typing import Any

from lovely_llama import LlamaError, check

from .base import Tokenizer
from .pieces import (
    BYTE,
    BYTES,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Piece,
    SentencePiece,
    Vocabulary,
    new_settings,
    read_proto,
    setting,
    write_bin,
)
from .pipelines import Pipeline, added_token, is_byte_level, normalizers, pre_tokenizers, token_names


def describe_proto(vocabulary: Vocabulary, file: object) -> dict[str, Any]:
    """The tokenizer.json of a SentencePiece model for BPE: every two pieces that make a third are a merge, best first.

    As transformers converts Llama's: a text between special tokens has a prefix of its own.
    """
    kind = setting(vocabulary, 2, 3, 1)
    check("model_type", kind, kind == 2, "2, for BPE, to be written as a tokenizer.json", file)
    pieces = vocabulary.pieces
    scores = {piece.text: piece.score for piece in pieces if piece.kind == NORMAL}
    merges = [
        (-score, -i, text[:i], text[i:])
        for text, score in scores.items()
        for i in range(1, len(text))
        if text[:i] in scores and text[i:] in scores
    ]
    steps: list[dict[str, Any]] = []
    if charsmap := setting(vocabulary, 3, 2, b""):
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()})
    if setting(vocabulary, 3, 4, True):
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    prefix = bool(setting(vocabulary, 3, 3, True))
    steps += [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    ends: list[dict[str, Any]] = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    unknown = next(piece.text for piece in pieces if piece.kind == UNKNOWN)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            added_token(piece.text, i, piece.kind != USER_DEFINED)
            for i, piece in enumerate(pieces)
            if piece.kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ],
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *ends,
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(piece.kind == BYTE for piece in pieces),
            "ignore_merges": False,
            "vocab": {piece.text: i for i, piece in enumerate(pieces)},
            "merges": [[left, right] for _, _, left, right in sorted(merges)],
        },
    }


def vocabulary_of(encode: Callable[[str, bool], list[int]], file: object) -> Vocabulary:
    """The SentencePiece model that gives the ids of a tokenizer, or of its tokenizer.json.

    A tokenizer.json with the step Metaspace puts no space before a text that begins with one; SentencePiece always.
    """
    if isinstance(encode, SentencePiece):
        return read_proto(encode.proto, file)
    if not isinstance(encode, Pipeline):
        raise LlamaError(file, "tokenizer", f"a {type(encode).__name__}", "a vocabulary that this format can hold")
    description = encode.description()
    model, names = description["model"], token_names(description, file)[0]
    unknown = model.get("unk_token") or "<unk>"  # transformers 5 writes null where every byte has a token
    pieced = model.get("type", "BPE") == "BPE" and not is_byte_level(description) and unknown in names
    check("tokenizer", "another kind of vocabulary", pieced, "one of SentencePiece's BPE", file)
    prefix = takes_prefix(description, file)
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    best = dict[str, int]()
    for pair in pairs:
        best.setdefault("".join(pair), len(best))
    kinds = dict.fromkeys(BYTES, BYTE) if model.get("byte_fallback") else {}
    kinds |= {token["content"]: CONTROL if token["special"] else USER_DEFINED for token in description["added_tokens"]}
    kinds[unknown] = UNKNOWN
    # No piece that merges do not make is ever compared with another.
    pieces = [Piece(name, -float(best.get(name, len(best))), kinds.get(name, NORMAL)) for name in names]
    return Vocabulary(pieces, new_settings(pieces, None, None, prefix))


def takes_prefix(description: Mapping[str, Any], file: object) -> bool:
    """Whether a space is put before a text. Any other change to a text is refused."""
    prefix = False
    for step in normalizers(description):
        known = step == {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        prefix |= step == {"type": "Prepend", "prepend": "▁"}
        ok = known or step == {"type": "Prepend", "prepend": "▁"}
        check("normalizer", step.get("type"), ok, "texts taken as they are, with ▁ for a space", file)
    for step in pre_tokenizers(description):
        ok = step.get("type") == "Metaspace" and not step.get("split") and step.get("replacement") == "▁"
        check("pre_tokenizer", step.get("type"), ok, "texts that are not split", file)
        prefix |= step.get("prepend_scheme") in ("always", "first")
    return prefix


def tokenizer_bin(tokenizer: Tokenizer, file: object = "tokenizer") -> bytes:
    """llama2.c's tokenizer.bin for a SentencePiece vocabulary."""
    return write_bin(vocabulary_of(tokenizer.encode, file), file)
