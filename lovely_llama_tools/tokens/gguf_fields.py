"""The keys `tokenizer.…` of a GGUF: read, and written."""

from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lovely_llama import LlamaError, check

from ..extras import counted
from .base import Tokenizer, usual_stops, with_ends
from .converting import vocabulary_of
from .pieces import BYTE, BYTES, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, Piece, built_tokenizer, setting
from .pipelines import (
    PRE,
    PRE_NAMES,
    WHOLE,
    Pipeline,
    byte_letters,
    byte_level,
    is_byte_level,
    parts_of,
    pipeline_tokenizer,
    token_names,
)
from .templates import check_template

# The keys of special tokens, by their names in tokenizer_config.json. The third is spelt as gguf-py has it.
PLACES = {
    "pad_token": "padding_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",
    "mask_token": "mask_token_id",
}


def gguf_tokenizer(fields: Mapping[str, Any], vocab: int, path: Path) -> Tokenizer:
    """The tokenizer that these keys describe. github.com/ggml-org/ggml, docs/gguf.md."""

    def field(name: str, *default: Any) -> Any:
        check(f"tokenizer.ggml.{name}", "nothing", f"tokenizer.ggml.{name}" in fields or bool(default), "a value", path)
        return fields.get(f"tokenizer.ggml.{name}", *default)

    def must(name: str, got: object, ok: bool, expected: object) -> None:
        check(f"tokenizer.ggml.{name}", got, ok, expected, path)

    def array(name: str, kind: type, n: int | None) -> list[Any]:
        values = field(name)
        expected = f"{n or 'any number'} of type {kind.__name__}"
        must(name, f"a value of type {type(values).__name__}", type(values) in (list, memoryview), expected)
        must(name, counted(len(values), "value"), n in (None, len(values)), expected)
        values = values.tolist() if isinstance(values, memoryview) else values
        must(name, counted(len(values), "value"), all(type(value) is kind for value in values), expected)
        return values

    def token(name: str) -> Any:
        """The id of a special token. −1 stands for none, in whole numbers without a sign too."""
        i = field(name, None)
        return None if i in (-1, 2**32 - 1) else i

    model = field("model")
    must("model", f"{model!s:.99}", model in ("gpt2", "llama"), "gpt2 or llama")
    stated = {name for name in ("token_type", "scores") if f"tokenizer.ggml.{name}" in fields}
    names = [name or f"[EMPTY_{i}]" for i, name in enumerate(array("tokens", str, vocab))]
    kinds = array("token_type", int, vocab) if "token_type" in stated else [NORMAL] * len(names)
    must("token_type", {*kinds}, {*kinds} <= {*range(NORMAL, BYTE + 1)}, "1 to 6")
    name, times = Counter(names).most_common(1)[0]
    must("tokens", f"{times} times {name!r}", times == 1, "each once")
    bos, eos, adds_bos = token("bos_token_id"), token("eos_token_id"), field("add_bos_token", None)
    must("add_bos_token", adds_bos, type(adds_bos) in (bool, type(None)), "true or false")
    ends = {key: token(key) for key in ("eot_token_id", "eom_token_id")}  # of a turn, and of a message
    for key, i in {"bos_token_id": bos, "eos_token_id": eos, **ends}.items():
        must(key, i, i is None or (type(i) is int and 0 <= i < vocab), f"an id from 0 to {vocab - 1}")
    if "token_type" not in stated:
        kinds = [BYTE if model == "llama" and name in BYTES else kind for name, kind in zip(names, kinds, strict=True)]
        kinds = [CONTROL if i in (bos, eos, *ends.values()) else kind for i, kind in enumerate(kinds)]
    if model == "gpt2":
        pre = field("pre", "default")
        must("pre", f"{pre!s:.99}", type(pre) is str and pre in PRE_NAMES, f"one of {', '.join(PRE_NAMES)}")
        pre = PRE_NAMES[pre]
        tokenizer = gpt2_vocabulary(names, kinds, array("merges", str, None), pre, must, path)
    else:
        pre = ""
        kinds = with_unknown(kinds, token("unknown_token_id"))
        scores = array("scores", float, vocab) if "scores" in stated else [0.0] * len(names)
        prefix = field("add_space_prefix", True)
        must("add_space_prefix", prefix, type(prefix) is bool, "true or false")
        entries = zip(names, scores, kinds, strict=True)
        tokenizer = built_tokenizer([Piece(*entry) for entry in entries], bos, eos, prefix, path)
    adds_bos = adds_bos if adds_bos is not None else bos is not None and (model == "llama" or pre in WHOLE)
    must("bos_token_id", "none", bos is not None or not adds_bos, "an id, as add_bos_token is true")
    templates = read_templates(fields, path)
    template = templates.pop("default", None)
    tokenizer = with_ends(tokenizer, bos, eos, adds_bos, path)
    stops = tokenizer.stops | {i for i in ends.values() if i is not None}
    pieces = [b"" if kind == UNUSED else piece for kind, piece in zip(kinds, tokenizer.pieces, strict=True)]
    ids = {name: field(key, None) for name, key in PLACES.items()}
    settings = {**tokenizer.settings, **named_settings(ids, names, tokenizer.specials)}
    if field("add_eos_token", None) is True:
        settings["add_eos_token"] = True
    return tokenizer._replace(template=template, templates=templates, stops=stops, pieces=pieces, settings=settings)


def with_unknown(kinds: list[int], stated: Any) -> list[int]:
    """The kinds of a SentencePiece vocabulary with one piece for what is unknown: the one that a key states, that is
    marked alone, or the first, as in llama.cpp, whose converter marks Llama's `<unk>` as a control token."""
    marked = [i for i, kind in enumerate(kinds) if kind == UNKNOWN]
    known = type(stated) is int and 0 <= stated < len(kinds)
    unknown = stated if known else marked[0] if len(marked) == 1 else 0
    return [UNKNOWN if i == unknown else UNUSED if kind == UNKNOWN else kind for i, kind in enumerate(kinds)]


def named_settings(ids: Mapping[str, Any], names: list[str], specials: Mapping[str, int]) -> dict[str, Any]:
    """Special tokens as tokenizer_config.json states them. An id beyond the vocabulary states none."""
    known = {name: i for name, i in ids.items() if type(i) is int and 0 <= i < len(names)}
    settings: dict[str, Any] = {name: names[i] for name, i in known.items() if names[i] in specials}
    if "pad_token" in known.keys() - settings.keys():
        settings["pad_token_id"] = known["pad_token"]
    return settings


def gpt2_vocabulary(
    names: list[str], kinds: list[int], merges: list[str], pre: str, must: "partial[None] | Any", path: Path
) -> Tokenizer:  # fmt: skip
    """A byte-level vocabulary, split as its key `pre` says. Tokens that are not normal are special."""
    pairs, ids, byte_of = [tuple(merge.split(" ")) for merge in merges], {*names}, byte_letters()
    wrong = [pair for pair in pairs if len(pair) != 2 or not {*pair, "".join(pair)} <= ids]
    must("merges", wrong[:1], not wrong, "pairs of tokens that make a token")
    foreign = [n for n, kind in zip(names, kinds, strict=True) if kind == NORMAL and not {*n} <= byte_of.keys()]
    must("tokens", foreign[:1], not foreign, "letters that stand for bytes")
    specials = {name: i for i, (name, kind) in enumerate(zip(names, kinds, strict=True)) if kind in (UNKNOWN, CONTROL)}
    words = {name: i for i, (name, kind) in enumerate(zip(names, kinds, strict=True)) if kind == USER_DEFINED}
    return pipeline_tokenizer(byte_level(names, merges, pre, specials, words), path)


def read_templates(fields: Mapping[str, Any], path: Path) -> dict[str, str]:
    """The chat templates by name; the one without a name is "default"."""
    start = "tokenizer.chat_template."
    named = {name.removeprefix(start): name for name in fields if name.startswith(start)}
    keys = {"default": "tokenizer.chat_template"} if "tokenizer.chat_template" in fields else {}
    for key in (keys | named).values():
        check(key, type(fields[key]).__name__, type(fields[key]) is str, "a text", path)
        check_template(fields[key], key, path)
    return {name: fields[key] for name, key in (keys | named).items()}


# ---- Writing ---------------------------------------------------------------------------------------------------------


def tokenizer_fields(tokenizer: Tokenizer, vocab: int, file: object = "tokenizer") -> dict[str, Any]:
    """The keys of a GGUF that describe a tokenizer, for a model of this vocabulary: the rest of it is unused tokens.

    A tokenizer.json that is not byte-level becomes a SentencePiece vocabulary; see `vocabulary_of`.
    """
    encode, fields = tokenizer.encode, dict[str, Any]()
    if isinstance(encode, Pipeline) and is_byte_level(description := encode.description()):
        fields |= byte_level_fields(description, file)
    else:
        vocabulary = vocabulary_of(encode, file)
        fields |= {
            "model": "llama",
            "pre": "default",
            "tokens": [spelt(piece) for piece in vocabulary.pieces],
            "scores": [piece.score for piece in vocabulary.pieces],
            "token_type": [piece.kind for piece in vocabulary.pieces],
            "add_space_prefix": bool(setting(vocabulary, 3, 3, True)),
            "unknown_token_id": next(i for i, piece in enumerate(vocabulary.pieces) if piece.kind == UNKNOWN),
        }
        charsmap, squeezes = setting(vocabulary, 3, 2, b""), bool(setting(vocabulary, 3, 4, True))
        check("tokenizer", "a normaliser", not charsmap and not squeezes, "texts taken as they are, in a GGUF", file)
    unused = vocab - len(fields["tokens"])
    check("tokenizer", counted(len(fields["tokens"]), "token"), unused >= 0, f"at most {vocab}", file)
    fields["tokens"] += [f"[PAD{vocab - unused + i}]" for i in range(unused)]
    fields["token_type"] += [UNUSED] * unused
    if "scores" in fields:
        fields["scores"] += [-1e4] * unused
    ends = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "add_bos_token": tokenizer.adds_bos}
    fields |= {name: value for name, value in ends.items() if value is not None} | settings_fields(tokenizer)[0]
    found = {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
    if tokenizer.template is not None:
        found["tokenizer.chat_template"] = tokenizer.template
    if tokenizer.templates:
        found["tokenizer.chat_templates"] = [*tokenizer.templates]
    return found | {f"tokenizer.chat_template.{name}": text for name, text in tokenizer.templates.items()}


def spelt(piece: Piece) -> str:
    """A piece as llama.cpp compares it: user-defined ones with texts in which no ▁ stands for a space yet."""
    return piece.text.replace("▁", " ") if piece.kind == USER_DEFINED else piece.text


def settings_fields(tokenizer: Tokenizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keys for what a tokenizer states besides its vocabulary, and what of that has no key.

    llama.cpp knows two tokens that end an answer besides EOS and those whose names tell.
    """
    rest, fields = dict(tokenizer.settings), dict[str, Any]()
    for name, key in PLACES.items():
        if rest.get(name) in tokenizer.specials:
            fields[key] = tokenizer.specials[rest.pop(name)]
    for name, key in {"pad_token_id": PLACES["pad_token"], "add_eos_token": "add_eos_token"}.items():
        if name in rest and key not in fields:
            fields[key] = rest.pop(name)
    stops = sorted(tokenizer.stops - usual_stops(tokenizer))
    fields |= dict(zip(("eot_token_id", "eom_token_id"), stops, strict=False))
    return fields, rest | ({"stops": stops[2:]} if stops[2:] else {})


def without_key(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a tokenizer states and a GGUF has no key for."""
    return settings_fields(tokenizer)[1]


def canonical(pre: Any) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer, without what changes no ids."""
    return [{k: v for k, v in step.items() if k != "trim_offsets"} for step in parts_of(pre, "pretokenizers")]


def byte_level_fields(description: Mapping[str, Any], file: object) -> dict[str, Any]:
    """The keys for a byte-level tokenizer.json whose split is one that llama.cpp knows by name."""
    model, steps = description["model"], canonical(description["pre_tokenizer"])
    whole = bool(model.get("ignore_merges"))
    alike = [name for name, split in PRE.items() if canonical(split) == steps]
    pre = next((name for name in alike if (name in WHOLE) == whole), next(iter(alike), None))
    if pre is None:
        raise LlamaError(file, "pre_tokenizer", "another split of texts", f"that of {', '.join(PRE)}, in a GGUF")
    check("normalizer", "one", description.get("normalizer") is None, "none, in a GGUF", file)
    check("model.ignore_merges", whole, whole == (pre in WHOLE), f"{pre in WHOLE}, with the split of {pre}", file)
    names, _ = token_names(description, file)
    kinds = {token["content"]: CONTROL if token["special"] else USER_DEFINED for token in description["added_tokens"]}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": names,
        "token_type": [kinds.get(name, NORMAL) for name in names],
        "merges": merges,
    }
