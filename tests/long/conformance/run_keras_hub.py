"""keras-hub: its own converter reads the checkpoint's folder, on JAX."""

import os
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"

import jax
import keras
import numpy as np
from jax import numpy as jnp
from keras_hub.models import Llama3Backbone, Llama3CausalLM
from serving import serve

INSTALL = (
    "pip install --no-deps keras-hub==0.32.0 keras==3.15.1 namex==0.1.0 optree==0.20.0 h5py==3.16.0",
    "pip install --no-deps absl-py ml-dtypes rich",
)


def load(folder: Path, dtype: str) -> Any:
    return Llama3CausalLM(Llama3Backbone.from_preset(str(folder), dtype=dtype), preprocessor=None)


def logits(model: Any, ids: list[int]) -> Any:
    tokens = np.array([ids])
    return model({"token_ids": tokens, "padding_mask": np.ones_like(tokens)})


def decode(model: Any, ids: list[int]) -> Any:
    cache = jnp.zeros_like(model._build_cache(np.zeros((1, len(ids)), int))[1])
    rows = list[Any]()
    for position, token in enumerate(ids):
        row, _, cache = model.call_with_cache(np.array([[token]]), cache, position)
        rows.append(row[0])
    return jnp.concatenate(rows)


def gradient(model: Any, ids: list[int]) -> Any:
    embedding = model.backbone.token_embedding.embeddings

    def loss(value: Any) -> Any:
        with keras.StatelessScope(state_mapping=[(embedding, value)]):
            told = jax.nn.log_softmax(logits(model, ids)[0, :-1])
        return -told[np.arange(len(ids) - 1), np.array(ids[1:])].mean()

    return jax.grad(loss)(embedding.value)


if __name__ == "__main__":
    serve("keras-hub", load, logits, decode, gradient)
