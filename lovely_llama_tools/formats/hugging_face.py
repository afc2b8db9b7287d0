"""Hugging Face: arrays named and arranged as in transformers' LlamaForCausalLM."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jax import numpy as jnp
from jaxtyping import Float

from lovely_llama import Config, Params

from ..layout import HUGGING_FACE, from_named, to_named


def from_hf(arrays: Mapping[str, Any], config: Config) -> Params:
    """Parameters from arrays named as in transformers' LlamaForCausalLM: copies, rotary pairs made neighbours."""
    return from_named(HUGGING_FACE, lambda name: jnp.array(arrays[name]), config)


def to_hf(params: Params, config: Config) -> dict[str, Float[np.ndarray, "..."]]:
    """Arrays named as in transformers' LlamaForCausalLM, rotary pairs split into halves."""
    return to_named(HUGGING_FACE, params)
