"""The probe: tiny Llamas on which every known bug shows, with all that a correct program computes from them.

Three models, since no single one shows everything. Their sizes are pairwise different, but where matrices must be
square; gains are far from 1, inputs so small that eps matters, parameters the same numbers on every machine.
"""

import hashlib
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Int, Shaped

from lovely_llama import (
    Config,
    LlamaError,
    Params,
    RopeScaling,
    Sampling,
    __version__,
    adamw,
    check,
    clip,
    cross_entropy,
    empty_cache,
    llama,
    logits,
    moments,
    shapes,
    softmax,
)

from ..devices.programs import Program
from ..formats.files import publish, save
from ..formats.hugging_face import to_hf
from ..formats.hugging_face_config import config_to_hf
from ..formats.model import Model
from ..formats.safetensors import write_arrays
from ..strict_json import to_json
from ..tokens import Tokenizer
from ..tokens.training import train_sentencepiece
from . import answers
from .answers import ANSWERS
from .trace import trace

VOCAB, LENGTH = 288, 272
TRACED, PREFILL = 16, 4  # of a prompt's tokens, those that are traced and learned from, and that are read at once
QUICK = {"xla_backend_optimization_level": 0}  # what runs once is compiled sooner without optimisation
STEP = {"rate": 1e-3, "decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "clip": 1.0}
SAMPLINGS = {
    "temperature": Sampling(None, 0.7, None, None, None),
    "top_k": Sampling(None, 1.0, 5, None, None),
    "top_p": Sampling(None, 1.0, None, 0.6, None),
    "min_p": Sampling(None, 1.0, None, None, 0.2),
    "repetition_penalty": Sampling(1.3, 1.0, None, None, None),
    "all": Sampling(1.1, 0.8, 40, 0.9, 0.02),
}
CORPUS = "the cat sat on the mat, and that is that. a hat, a mat. the end. "
TEXTS = ("", "the cat", " the  end", "that hat.\n\na mat", "Zürich 東京 🙂", "2 < 3", "\t1234")
TOLERANCES = {"gradients": 1e-4, "trace_gradients": 1e-4, "step": 1e-4}  # relative, ‖a − b‖ ≤ tolerance ‖b‖; else:
TOLERANCE = 1e-5
ABOUT = """Made by `lovely-llama golden`. Each model stands as a folder of Hugging Face's and as GGUF, one as llama2.c's
.bin. logits: of the whole prompt. trace: every intermediate of its first tokens, and trace_gradients the gradients with
respect to them of the mean cross-entropy of each token given those before it. gradients: with respect to the
parameters; step: the parameters after one step of AdamW from zero moments, the gradient clipped first. decoding: the
logits when the first tokens are read at once and the others one at a time, and the cache after that. answers: what
every known bug gives, at some positions, for `lovely-llama diff`. Names and order of
rotary rows in gradients and step are Hugging Face's, else ours: heads, tokens, features; neighbouring rotary rows."""


class Probe(NamedTuple):
    """A model of the probe: its config, and the seed of its parameters and its prompt."""

    config: Config
    seed: int


PROBES = {
    # Eleven layers, grouped queries, head_dim ≠ dim/heads, llama3's three bands, an unembedding of its own.
    "grouped": Probe(
        Config(VOCAB, 30, 11, 2, 3, 12, 44, 512, 3e-4, 7e3, RopeScaling("llama3", 4.0, 64, 1.0, 4.0), False), 1,
    ),
    # Square q and o, rows that 32 divides, llama2.c's theta and eps, tied.
    "square": Probe(Config(VOCAB, 32, 3, 4, 1, 8, 64, 320, 1e-5, 1e4, None, True), 2),
    # YaRN, and a theta that no table has.
    "yarn": Probe(
        Config(VOCAB, 36, 2, 3, 2, 10, 52, 384, 2e-5, 9e2, RopeScaling("yarn", 6.0, 64, 1.0, 32.0, 1.2), False), 3,
    ),
}  # fmt: skip


def parameters(probe: Probe) -> Params:
    """A probe's parameters: gains 1 ± ½, embeddings of 0.05, matrices that keep norms but for half in o and down.

    numpy guarantees the stream of `RandomState` for good."""
    rng = np.random.RandomState(probe.seed)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Any:
        drawn, name = rng.standard_normal(leaf.shape), path[-1].name
        if "norm" in name:
            return jnp.asarray(1 + drawn / 2, jnp.float32)
        fan_in = math.prod(leaf.shape[1:]) if name == "o" else leaf.shape[-1]
        scale = 0.05 if name == "embed" else (0.5 if name in ("o", "down") else 1) / math.sqrt(fan_in)
        return jnp.asarray(drawn * scale, jnp.float32)

    return jax.tree.map_with_path(draw, shapes(probe.config))


def prompt(probe: Probe) -> Int[np.ndarray, " seq"]:
    """A probe's prompt, longer than bfloat16 counts, with 0 among its ids."""
    ids = np.random.RandomState(probe.seed + 100).randint(1, VOCAB, LENGTH)
    ids[[5, 11, 40]] = 0
    return ids.astype(np.int32)


# ---- Writing ---------------------------------------------------------------------------------------------------------


def golden(out: str | Path) -> None:
    """Write the probe into a new folder: its models, what they compute, and manifest.json, which describes it all."""
    out = Path(out)
    part = out.with_name(f".{out.name}.part{os.getpid()}")
    try:
        check("path", "a NUL character", "\0" not in str(out), "a name without", out)
        check("path", "a path that exists", not os.path.lexists(out), "a new one", out)
        part.mkdir(parents=True)
        try:
            write(part)
            publish(part, out)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise LlamaError(out, "path", error.strerror, "a place that can be written to") from error


def write(folder: Path) -> None:
    """Write the probe into an empty folder."""
    tokenizer = train_sentencepiece([CORPUS * 3], VOCAB)
    probes = {name: write_probe(folder / name, probe, tokenizer) for name, probe in PROBES.items()}
    write_arrays(folder / "samplers.safetensors", distributions(PROBES["square"]))
    manifest = {
        "about": " ".join(ABOUT.split()),
        "version": __version__,
        "tolerance": TOLERANCE,
        "models": probes,
        "step": STEP,
        "samplings": {name: sampling._asdict() for name, sampling in SAMPLINGS.items()},
        "tokenizer": [{"text": text, "ids": tokenizer.begin(text)} for text in TEXTS],
        "files": {str(path.relative_to(folder)): described(path) for path in sorted(folder.rglob("*.*"))},
    }
    (folder / "manifest.json").write_text(to_json(manifest, indent=1, ensure_ascii=False) + "\n")


def described(path: Path) -> dict[str, Any]:
    """A file's size and hash."""
    data = path.read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def write_probe(folder: Path, probe: Probe, tokenizer: Tokenizer) -> dict[str, Any]:
    """Write a model and what it computes, and return what the manifest says of it."""
    model = Model(probe.config, parameters(probe), tokenizer)
    forms = ["model", "model.gguf"] + ["llama2c/model.bin"] * (probe.config.rope_scaling is None)
    for form in forms:
        save(model, folder / form)
    ids, found = prompt(probe), dict[str, Any]()
    write_arrays(folder / ANSWERS, answers.computed(model, ids))
    for name, arrays in computed(model, ids).items():
        write_arrays(folder / f"{name}.safetensors", arrays)
        tensors = {key: [*array.shape] for key, array in arrays.items()}
        found[name] = {"tolerance": TOLERANCES.get(name, TOLERANCE), "tensors": tensors}
    return {"config": config_to_hf(probe.config), "tokens": ids.tolist(), "forms": forms, "computed": found}


def computed(model: Model, ids: Int[np.ndarray, " seq"]) -> dict[str, Mapping[str, Shaped[np.ndarray, "..."]]]:
    """All that a model's program can be compared by, file by file."""
    config, params, first = model.config, model.params, ids[:TRACED]
    value, norm, gradients, stepped = Program(learn, QUICK, static_argnames="config")(
        params, jnp.asarray(first), config
    )
    run = Program(llama, QUICK, static_argnames="config")
    cache, rows = empty_cache(config, TRACED, jnp.float32), list[Any]()
    for start, end in [(0, PREFILL), *((i, i + 1) for i in range(PREFILL, TRACED))]:
        row, cache = run(params, jnp.asarray(first[start:end]), cache, start, config)
        rows.append(np.asarray(row))
    keys, values = (np.stack([np.asarray(layer[i]) for layer in cache]) for i in range(2))
    numbers = {"loss": np.asarray(value)[None], "norm": np.asarray(norm)[None]}
    return {
        "logits": {"tokens": ids, "logits": np.asarray(logits(params, ids, config))},
        "trace": {"tokens": first, **trace(model, first)},
        "trace_gradients": trace(model, first, gradients=True),
        "gradients": {**numbers, **to_hf(gradients, config)},
        "step": to_hf(stepped, config),
        "decoding": {"logits": np.concatenate(rows), "keys": keys, "values": values},
    }


def learn(params: Params, tokens: Int[Array, " seq"], config: Config) -> tuple[Any, ...]:
    """The loss of predicting each token from those before it, its gradient and the norm of that, and a step."""

    def loss(params: Params) -> Any:
        return cross_entropy(logits(params, tokens, config)[:-1], tokens[1:])

    value, gradients = jax.value_and_grad(loss)(params)
    clipped, norm = clip(gradients, STEP["clip"])
    betas = STEP["beta1"], STEP["beta2"]
    stepped, _ = adamw(params, clipped, moments(params), STEP["rate"], STEP["decay"], betas, STEP["eps"])
    return value, norm, gradients, stepped


def distributions(probe: Probe) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The exact probabilities from which each way of sampling draws the token after a prompt."""
    ids = prompt(probe)[:TRACED]
    scores = logits(parameters(probe), ids, probe.config)[-1] * 8  # sharper than those of random weights
    seen = np.isin(np.arange(VOCAB), ids)
    found = {name: np.asarray(softmax(sampling(scores, jnp.asarray(seen)))) for name, sampling in SAMPLINGS.items()}
    return {"logits": np.asarray(scores), "seen": seen.astype(np.int32), **found}
