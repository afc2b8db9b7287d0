"""easydel: AutoEasyDeLModelForCausalLM.from_pretrained with from_torch; attention and cache in the model's dtype."""

from pathlib import Path
from typing import Any

import easydel
import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp
from serving import serve

INSTALL = ("pip install easydel==0.3.0",)


def load(folder: Path, dtype: str) -> Any:
    """Attention is in bfloat16 unless it is set, as its documentation says."""
    kind = getattr(jnp, dtype)
    return easydel.AutoEasyDeLModelForCausalLM.from_pretrained(
        str(folder), from_torch=True, dtype=kind, param_dtype=kind, config_kwargs={"attn_dtype": kind, "kvdtype": kind}
    )


def logits(model: Any, ids: list[int]) -> Any:
    with model.mesh:
        return model(input_ids=jnp.array([ids])).logits


def decode(model: Any, ids: list[int]) -> Any:
    every, rows = jnp.array([ids]), list[Any]()
    step = nnx.jit(lambda model, token, state: model(input_ids=token, **state))
    with model.mesh:
        state = model.prepare_inputs_for_generation(every[:, :1], len(ids), 0, attention_mask=jnp.ones((1, 1), bool))
        for place in range(len(ids)):
            out = step(model, every[:, place : place + 1], state)
            state = model.update_inputs_for_generation(out, state)
            rows.append(out.logits[0, 0])
    return np.array(rows, np.float32)


def gradient(model: Any, ids: list[int]) -> Any:
    def loss(model: Any) -> Any:
        chances = jax.nn.log_softmax(logits(model, ids)[0, :-1])
        return -chances[jnp.arange(len(ids) - 1), jnp.array(ids[1:])].mean()

    return nnx.grad(loss)(model)["model"]["embed_tokens"]["embedding"][...]


if __name__ == "__main__":
    serve("easydel", load, logits, decode, gradient)
