"""Hugging Face: arrays named and arranged as in transformers' LlamaForCausalLM."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from lovely_llama import Config, Params

from ..layout import HUGGING_FACE, from_arrays, to_arrays


def from_hf(arrays: Mapping[str, Any], config: Config) -> Params:
    """Parameters from arrays named as in transformers' LlamaForCausalLM: copies, rotary pairs made neighbours.

    The arrays may be numpy's, jax's or torch's: `from_hf(model.state_dict(), config)`.
    """
    return from_arrays(HUGGING_FACE, arrays, config)


def to_hf(params: Params, config: Config) -> dict[str, Float[np.ndarray, "..."]]:
    """Arrays named as in transformers' LlamaForCausalLM, rotary pairs split into halves."""
    return to_arrays(HUGGING_FACE, params, config)
