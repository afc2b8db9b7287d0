"""Rotary scaling in a GGUF: as keys for linear and yarn, as a tensor of factors for llama3."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Float

from lovely_llama import Config, LlamaError, RopeScaling, check, rope_frequencies

from .gguf_header import shortest
from .layout import rope_scaling

FREQUENCIES = "rope_freqs.weight"  # by what llama.cpp divides the frequencies of rotary pairs
# Keys that other programs ignore: exactly which scaling of llama3 the factors came from.
OWN = {"factor": float, "original_ctx": int, "low": float, "high": float}
OWN_PREFIX = "lovely_llama.rope.scaling."
EXACT = 1e-6  # factors are equal, but for rounding to float32

Factors = Float[np.ndarray, " pairs"]


def read_scaling(stated: dict[str, Any], file: object) -> RopeScaling | None:
    """The scaling of the keys `llama.rope.scaling.…`, which come without this prefix.

    llama.cpp takes a factor without a type for a linear one, and its attn_factor multiplies yarn's usual one. For this
    architecture it reads none of the keys yarn_….
    """
    names = {"type": "rope_type", "factor": "factor", "original_context_length": "original_max_position_embeddings"}
    fields = {ours: stated[name] for name, ours in names.items() if name in stated}
    if fields.get("rope_type") == "none" or not stated:
        return None
    fields.setdefault("rope_type", "linear" if "factor" in stated else "default")
    scaling = rope_scaling(fields, file)
    times = stated.get("attn_factor", 1.0)
    yarn = scaling is not None and scaling.kind == "yarn"
    check("llama.rope.scaling.attn_factor", times, yarn or times == 1, "1, but for yarn", file)
    if scaling is None or not yarn or times == 1:
        return scaling
    # float32 holds seven digits of the product.
    return scaling._replace(attention_factor=float(f"{times * scaling.attention_factor:.7g}"))


def factors_of(config: Config) -> Factors:
    """By what the scaling of a config divides each frequency."""
    unscaled = rope_frequencies(replace(config, rope_scaling=None))
    return np.asarray(unscaled / rope_frequencies(config), np.float32)


def candidates(factors: Factors, config: Config, stated: dict[str, Any]) -> Iterator[RopeScaling | None]:
    """Scalings that these factors may come from, the likeliest first.

    A factor is 1 / (κ + (1 − κ) / s) with κ = (c f / 2π − low) / (high − low) between 0 and 1, where f is the frequency
    and c the original context: see `rope_frequencies`. κ is linear in f, so two pairs that are slowed in part give low
    and high up to a number by which c, low and high can be multiplied: it is chosen to make low 1, or c 8192.
    """
    if len(stated) == len(OWN):
        yield RopeScaling("llama3", *(stated[name] for name in OWN))
    f = np.asarray(rope_frequencies(replace(config, rope_scaling=None)), np.float64) / (2 * math.pi)
    kept, slowed = factors < 1 + EXACT, factors > factors.max() * (1 - EXACT)
    s = shortest(float(np.median(factors[slowed])))
    yield None if s == 1 else RopeScaling("linear", s)
    if s <= 1:
        return
    yield RopeScaling("llama3", s, 8192, 1.0, 4.0)  # all of Meta's
    between = ~(kept | slowed)
    kappa = (1 / factors[between].astype(np.float64) - 1 / s) / (1 - 1 / s)
    if len(kappa) > 1:
        slope, zero = (float(number) for number in np.polyfit(f[between], kappa, 1))
        if zero < 0 < slope:
            ctx, high = -slope / zero, 1 - 1 / zero  # where low is 1
            yield from (RopeScaling("llama3", s, round(ctx), 1.0, round(high, digits)) for digits in (0, 2))
            yield RopeScaling("llama3", s, 8192, 8192 / ctx, 8192 / ctx * high)
    elif len(kappa):
        yield RopeScaling("llama3", s, round((3 * float(kappa[0]) + 1) / float(f[between][0])), 1.0, 4.0)
    elif kept.any():
        middle = math.sqrt(float(f[kept].min() * f[slowed].max()))
        yield RopeScaling("llama3", s, round(2 / middle), 1.0, 4.0)


def gives(scaling: RopeScaling | None, factors: Factors, config: Config) -> bool:
    """Whether a scaling is valid and has these factors. llama.cpp's converter computes them in float32."""
    try:
        return np.allclose(factors, factors_of(replace(config, rope_scaling=scaling)), rtol=1e-5, atol=0)
    except LlamaError:
        return False


def scaling_of(factors: Factors, config: Config, stated: dict[str, Any], path: Path) -> RopeScaling | None:
    """The scaling that gives these factors, as the converter of llama.cpp writes them for llama3; else refused."""
    check(FREQUENCIES, "other factors", bool((factors >= 1).all()), "factors of at least 1", path)
    keys = config.rope_scaling is None or bool((factors == 1).all())
    check(FREQUENCIES, "factors beside llama.rope.scaling", keys, "only one of them", path)
    if config.rope_scaling:
        return config.rope_scaling
    found = [scaling for scaling in candidates(factors, config, stated) if gives(scaling, factors, config)]
    check(FREQUENCIES, "other factors", bool(found), "those of a scaling of llama3", path)
    return found[0]


def write_scaling(scaling: RopeScaling | None) -> dict[str, Any]:
    """The keys for a scaling, with their prefixes; a scaling that llama.cpp would not read is refused."""
    if scaling is None:
        return {}
    if scaling.kind == "llama3":
        return {OWN_PREFIX + name: kind(getattr(scaling, name)) for name, kind in OWN.items()}
    keys: dict[str, Any] = {"type": scaling.kind, "factor": float(scaling.factor)}
    if scaling.kind == "yarn":
        turns = (scaling.low, scaling.high)
        check("rope_scaling", f"low and high {turns}", turns == (1, 32), "1 and 32, as llama.cpp fixes them", "config")
        keys["original_context_length"] = int(scaling.original_ctx)
        usual = cast(RopeScaling, read_scaling(keys, "config")).attention_factor
        if scaling.attention_factor != usual:
            keys["attn_factor"] = shortest(scaling.attention_factor / usual)
        again = cast(RopeScaling, read_scaling(keys, "config")).attention_factor
        factor = scaling.attention_factor
        check("rope_scaling.attention_factor", factor, again == factor, "a number of at most 7 digits", "config")
    return {f"llama.rope.scaling.{name}": value for name, value in keys.items()}
