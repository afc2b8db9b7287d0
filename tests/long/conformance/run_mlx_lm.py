"""mlx-lm: its own loader reads the checkpoint's folder."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from serving import serve

INSTALL = ("pip install mlx[cpu]==0.32.4 mlx-lm==0.32.2",)


def load(folder: Path, dtype: str) -> Any:
    model = load_model(folder)[0]
    model.set_dtype(getattr(mx, dtype))
    return model


def logits(model: Any, ids: list[int]) -> Any:
    return rows_of(model(mx.array([ids])))


def decode(model: Any, ids: list[int]) -> Any:
    cache = make_prompt_cache(model)
    return np.concatenate([rows_of(model(mx.array([[token]]), cache=cache)) for token in ids])


def rows_of(out: Any) -> Any:
    return np.array(out[0].astype(mx.float32))


def gradient(model: Any, ids: list[int]) -> Any:
    def loss(model: Any) -> Any:
        return nn.losses.cross_entropy(model(mx.array([ids]))[0, :-1], mx.array(ids[1:]), reduction="mean")

    return np.array(nn.value_and_grad(model, loss)(model)[1]["model"]["embed_tokens"]["weight"])


if __name__ == "__main__":
    serve("mlx-lm", load, logits, decode, gradient)
