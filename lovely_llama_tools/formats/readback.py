"""What has been written, compared with the model it was written from: config, parameters and tokenizer."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import chain
from typing import Any, cast

import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float

from lovely_llama import Config, LlamaError, Sampling, check, is_number

from ..extras import progress
from ..tokens import SETTINGS, Tokenizer
from .layout import OURS, all_tensors, from_named, to_named
from .model import THREADS, Checkpoint, Model, narrowed

# What can be left out of a model where a format has no place for it. `ids`: that a tokenizer gives the same ones.
DROPS = ("tokenizer", "ids", "stops", "template", "sampling", *SETTINGS, "pad_token_id")
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Texts whose ids tell tokenizers apart: spaces and lines, digits, case, scripts, emoji, code, what Unicode may change.
TEXTS = (
    "The quick brown fox, 12345.67 of them.", " one", "  two", "three ", "   ", "a\nb", "\n\n\n", "\tx = f(y)\n  z",
    "DON'T don't I'll we've", "naïve café, Zürich, Ελλάδα, Москва", "日本語の文章。", "नमस्ते", "שלום", "🙂👍🏽",
    "e\u0301 ﬁ ² Ａ", "a\u00a0b\u200bc\ufeffd", "https://example.org/a?b=c&d=%20", "x=1;y+=2 //{}[]<>", "1" * 20,
    "<s> </s> <|im_end|>",
)  # fmt: skip
SAMPLES = 100  # pieces that are put into texts besides


def check_saved(model: Model, found: Checkpoint, left_out: Mapping[str, Any], drop: Collection[str]) -> None:
    """Refuse a checkpoint that is not read as the model, but for what is left out of it or may be dropped."""
    for name, want in flat(model.config).items():
        got = flat(found.config)[name]
        check(name, got, alike(got, want), want)
    check_params(model, found)
    if model.tokenizer:
        if found.tokenizer is None:
            raise LlamaError("tokenizer", "tokenizer", "none", "the model's")
        check_tokenizer(model.tokenizer, found.tokenizer, left_out, drop)


def flat(config: Config) -> dict[str, Any]:
    """The fields of a config, those of its scaling by themselves."""
    scaling = config.rope_scaling._asdict() if config.rope_scaling else {"kind": None}
    fields = {f"rope_scaling.{name}": value for name, value in scaling.items()}
    return asdict(config) | {"rope_scaling": config.rope_scaling and config.rope_scaling.kind} | fields


def alike(a: object, b: object) -> bool:
    """Equality, of numbers to the precision of float32."""
    return math.isclose(cast(float, a), cast(float, b), rel_tol=1e-6) if is_number(a) and is_number(b) else a == b


# ---- Parameters ------------------------------------------------------------------------------------------------------


def check_params(model: Model, found: Checkpoint) -> None:
    """Every tensor is as it was, rounded to the type in which it is stored."""
    ours, config = to_named(OURS, model.params, model.config), model.config
    names = dict(zip(all_tensors(found.layout, config), all_tensors(OURS, config), strict=True))
    nothing = jnp.zeros(())  # in place of a parameter that has been compared
    with progress("reading it back", len(names)) as advance, ThreadPoolExecutor(THREADS) as threads:

        def compare(name: str, array: Float[np.ndarray, "..."]) -> Array:
            shape, kind = found.tensors[name]
            got, want = array, narrowed(ours(names[name]), FLOATS.get(kind, "float32"), name)
            good = np.array_equal(got, want) if kind in FLOATS else are_near(got.reshape(shape), want.reshape(shape))
            check(name, "other numbers", good, f"the model's, rounded to {kind}")
            advance(1)
            return nothing

        from_named(found.layout, found.get, config, compare, threads.map)


def are_near(got: Float[np.ndarray, "..."], want: Float[np.ndarray, "..."]) -> bool:
    """Whether numbers are within half a step of 8 bits, whose scale may be a float16: of the largest in the row."""
    step = np.abs(want).max(axis=-1, keepdims=True) / 127
    return bool((np.abs(got - want) <= 0.57 * step + 127 * 2.0**-25).all())


# ---- Tokenizers ------------------------------------------------------------------------------------------------------


def check_tokenizer(
    want: Tokenizer, got: Tokenizer, left_out: Mapping[str, Any] | None = None, drop: Collection[str] = ()
) -> None:  # fmt: skip
    """Refuse a tokenizer that differs from another, but in what may be dropped, or is left out and absent."""
    left_out, after = left_out or {}, described(got)
    for name, value in described(want).items():
        other, field = after.get(name), "ids" if name == "specials" else name
        if name == "stops":
            value = value - {*left_out.get("stops", ())}
        absent = not other or (name == "sampling" and other == described_sampling(None))
        padded = name in ("pad_token", "pad_token_id") and want.pad is not None and got.pad == want.pad
        good = are_alike(other, value) or padded or field in drop or (name in left_out and absent)
        check(name, brief(other), good, f"{brief(value)}, or --drop {field if field in DROPS else 'tokenizer'}")
    for text in () if "ids" in drop else texts(want):
        for special in (False, True):
            a, b = (ids(tokenizer.encode, text, special) for tokenizer in (got, want))
            check("ids", f"{brief(a)} for {text!r:.40}", a == b, f"{brief(b)}, or --drop ids")


def described(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a tokenizer says of itself, by the names of `DROPS` where it has one."""
    template = ({"default": tokenizer.template} if tokenizer.template else {}) | {**tokenizer.templates}
    return {
        "bos_token": tokenizer.bos,
        "eos_token": tokenizer.eos,
        "add_bos_token": tokenizer.adds_bos,
        "specials": {**tokenizer.specials},
        "stops": tokenizer.stops,
        "template": template,
        "sampling": described_sampling(tokenizer.sampling),
        **tokenizer.settings,
    }


def described_sampling(sampling: Sampling | None) -> dict[str, Any]:
    """What a choice depends on; of a greedy one, only the penalty counts."""
    values = (sampling or Sampling())._asdict()
    greedy = values["temperature"] == 0
    return {name: values[name] for name in ("temperature", "repetition_penalty")} if greedy else values


def are_alike(a: Any, b: Any) -> bool:
    """`alike`, of dictionaries item by item."""
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return alike(cast(object, a), b)
    left, right = cast(dict[Any, Any], a), cast(dict[Any, Any], b)
    return left.keys() == right.keys() and all(alike(left[key], right[key]) for key in left)


def brief(value: Any) -> str:
    """The beginning of a value."""
    return f"{sorted(cast(Any, value)) if isinstance(value, frozenset) else value!s:.80}"


def ids(encode: Callable[[str, bool], list[int]], text: str, special: bool) -> list[int] | None:
    """The ids of a text, or None where a tokenizer refuses it."""
    try:
        return encode(text, special)
    except LlamaError:
        return None


def texts(tokenizer: Tokenizer) -> Iterator[str]:
    """`TEXTS`, and texts with special tokens and with pieces from all over the vocabulary."""
    pieces = tokenizer.pieces[:: max(1, len(tokenizer.pieces) // SAMPLES)]
    said = (piece.decode("utf-8", "ignore") for piece in pieces)
    return chain(TEXTS, (f"a{name} b {name}c" for name in [*tokenizer.specials][:20]), (f"x{text} y" for text in said))
