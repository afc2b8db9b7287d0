"""A written checkpoint, opened by the program that owns its format: transformers, or the package gguf."""

import importlib
import importlib.util
import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from lovely_llama import logits

from ..extras import extra
from ..tokens.base import contained
from .layout import GGUF, to_named
from .model import Model, widened

SEQ = 64  # tokens of which logits are compared


def verified(model: Model, path: Path, to: str) -> str:
    """What that program finds, in a line."""
    if to == "gguf":
        return f"gguf: error of the parameters {gguf_error(model, path):.1e}"
    if to != "hf":
        return f"{to}: read back here alone; no package reads it"
    if not all(importlib.util.find_spec(name) for name in ("transformers", "torch")):
        return "transformers: not installed"
    return f"transformers: error of the logits {transformers_error(model, path):.1e}"


def gguf_error(model: Model, path: Path) -> float:
    """The norm of the difference of all parameters, relative to theirs, as the package gguf reads them."""
    lib, get, error, size = extra("gguf", "chat"), to_named(GGUF, model.params, model.config), 0.0, 0.0
    with contained(path, "verify", "a file that it fails to read", "one that the package gguf reads"):
        tensors = {tensor.name: tensor for tensor in lib.GGUFReader(path).tensors}
        tensors.pop("rope_freqs.weight", None)
        for name, tensor in tensors.items():
            want = widened(get(name)).astype(np.float64)
            error += float(((lib.quants.dequantize(tensor.data, tensor.tensor_type) - want) ** 2).sum())
            size += float((want**2).sum())
    return (error / size) ** 0.5


def transformers_error(model: Model, path: Path) -> float:
    """The norm of the difference of the logits of a random text, relative to theirs, as transformers computes them."""
    seq = min(SEQ, model.config.ctx)
    tokens = np.random.default_rng(0).integers(model.config.vocab, size=seq, dtype=np.int32)
    what = "a folder that it fails to read", "one that transformers reads"
    with contained(path, "verify", *what), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        torch: Any = importlib.import_module("torch")
        reader: Any = importlib.import_module("transformers").AutoModelForCausalLM
        with torch.no_grad():
            theirs = reader.from_pretrained(path, dtype=torch.float32)(torch.tensor(tokens[None]).long()).logits[0]
    params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), model.params)
    ours = np.asarray(jax.jit(logits, static_argnames="config")(params, tokens, config=model.config), np.float64)
    return float(np.linalg.norm(theirs.numpy() - ours) / np.linalg.norm(ours))
