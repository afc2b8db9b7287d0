"""google-tunix: create_model_from_safe_tensors; ModelConfig by hand, as it reads no config.json."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp
from serving import serve
from tunix.models.llama3 import params
from tunix.models.llama3.model import ModelConfig

INSTALL = ("pip install google-tunix==0.1.7",)


def load(folder: Path, dtype: str) -> Any:
    """Llama 3.1's scaling has no field either, but there are ready configs of Llama 3.1 and 3.2."""
    stated = json.loads((folder / "config.json").read_text())
    rope = stated.get("rope_parameters") or {"rope_theta": stated["rope_theta"], **(stated["rope_scaling"] or {})}
    if (kind := rope.get("rope_type", "default")) not in {"default", "llama3"}:
        raise ValueError(f"no {kind} scaling")
    config = ModelConfig(
        num_layers=stated["num_hidden_layers"], vocab_size=stated["vocab_size"], embed_dim=stated["hidden_size"],
        hidden_dim=stated["intermediate_size"], num_heads=stated["num_attention_heads"], head_dim=stated["head_dim"],
        num_kv_heads=stated["num_key_value_heads"], rope_theta=rope["rope_theta"], norm_eps=stated["rms_norm_eps"],
        weight_tying=stated["tie_word_embeddings"],
    )  # fmt: skip
    return params.create_model_from_safe_tensors(str(folder), config, dtype=getattr(jnp, dtype))


def logits(model: Any, ids: list[int]) -> Any:
    places = jnp.arange(len(ids))
    return model(jnp.array([ids]), places[None], None, (places <= places[:, None])[None])[0]


def decode(model: Any, ids: list[int]) -> Any:
    config, places, rows = model.config, jnp.arange(len(ids)), list[Any]()
    empty = jnp.zeros((1, len(ids), config.num_kv_heads, config.head_dim), model.embedder.input_embedding.dtype)
    layer = {"k": empty, "v": empty, "end_index": jnp.zeros(1, jnp.int32)}
    cache = {f"layer_{index}": layer for index in range(config.num_layers)}
    for place, token in enumerate(ids):
        out, cache = model(jnp.array([[token]]), jnp.array([[place]]), cache, (places <= place)[None, None])
        rows.append(out[0, 0])
    return np.array(rows, np.float32)


def gradient(model: Any, ids: list[int]) -> Any:
    def loss(model: Any) -> Any:
        chances = jax.nn.log_softmax(logits(model, ids)[0, :-1])
        return -chances[jnp.arange(len(ids) - 1), jnp.array(ids[1:])].mean()

    return nnx.grad(loss)(model)["embedder"]["input_embedding"][...]


if __name__ == "__main__":
    serve("google-tunix", load, logits, decode, gradient)
