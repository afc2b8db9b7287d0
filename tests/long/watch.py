"""The compiler, watched: logits, loss and gradients of three models against numpy and torch, over widths and rows.

Each is computed as the tools compile programs, and as `jax.jit` does by itself. Part of `./dev numerics`.
"""

import operator
import textwrap
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from builders import layers_of, random_params
from jax import numpy as jnp
from jax import vmap
from machine import processor
from transformers import LlamaConfig, LlamaForCausalLM

import lovely_llama as ll
from lovely_llama_tools.devices.programs import Program
from lovely_llama_tools.formats.hugging_face import from_hf, to_hf
from lovely_llama_tools.formats.hugging_face_config import config_to_hf

MARKS = "<!-- watch -->\n", "<!-- /watch -->"
FUSION_MARKS = "<!-- fusions -->\n", "<!-- /fusions -->"
WIDTHS = (3, 48, 64, 576)
ROWS = (1, 8, 304, 4096, 40000)  # tokens, in sequences of at most eight
TRAINED = 4096 * 64  # rows × width up to which gradients are compared: torch's, in float64, take long
VOCAB = 61
COMPILED: dict[str, Callable[..., Any]] = {"tools": Program, "jax": jax.jit}


def models(width: int) -> Iterator[ll.Config]:
    """Multi-head and tied, grouped, and deep."""
    head_dim, hidden_dim = 2 * max(1, width // 16), 8 * width // 3 + 1
    heads = 3 if width % 3 == 0 else 4  # by which transformers wants the width to be divisible
    for layers, kv_heads, q_per_kv, tied in ((2, heads, 1, True), (2, 1, heads, False), (8, 1, heads, False)):
        yield ll.Config(VOCAB, width, layers, kv_heads, q_per_kv, head_dim, hidden_dim, 8, 1e-5, 1e4, None, tied)


class Given(NamedTuple):
    config: ll.Config
    params: ll.Params
    tokens: Any
    targets: Any


def draw(config: ll.Config, rows: int) -> Given:
    """Random parameters; tokens and targets, some of them ignored."""
    shape = max(1, rows // 8), min(rows, 8)
    tokens, targets = np.random.default_rng(rows).integers(VOCAB, size=(2, *shape), dtype=np.int32)
    targets[targets < 9] = -1
    targets[0, 0] = 0
    return Given(config, random_params(config), tokens, targets)


# ---- The fusions that were wrong -------------------------------------------------------------------------------------

FUSED = "xla_cpu_experimental_ynn_fusion_type"
KINDS = [None, "", *(f"LIBRARY_FUSION_TYPE_{kind}" for kind in ("INDIVIDUAL_DOT", "DOT", "REDUCE", "ELTWISE"))]


def fusions() -> str:
    """How many rows of the public example are wrong under each option, and how long products with few rows take."""
    rng = np.random.default_rng(0)
    matrix, rows = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 3), (40000, 3)))
    want = np.square(rows.astype(np.float64) @ matrix.T.astype(np.float64)).sum(axis=1)
    matrices = [rng.standard_normal((2048, 768)).astype(np.float32) for _ in range(24)]
    few = rng.standard_normal((8, 768)).astype(np.float32)
    lines = [f"| {FUSED} | rows wrong | 24 products of 2048 × 768 with 8 rows, ms |", "|---|---|---|"]
    for kind in KINDS:
        options = {} if kind is None else {FUSED: kind}
        squares = jax.jit(vmap(lambda row: jnp.sum((matrix @ row) ** 2)), compiler_options=options)
        products = jax.jit(lambda ws, x: [vmap(partial(operator.matmul, w))(x) for w in ws], compiler_options=options)
        wrong = int((np.abs(np.asarray(squares(rows)) - want) > 1e-4 * want).sum())
        given = jax.device_put((matrices, few))
        times = list[float]()
        for _ in range(20):
            begun = time.perf_counter()
            jax.block_until_ready(products(*given))
            times.append(1000 * (time.perf_counter() - begun))
        name = {None: "the default", "": "none"}.get(kind, kind)
        lines.append(f"| {name} | {wrong:,} | {np.median(times[2:]):.0f} |")
    return "\n".join([*lines, "", f"jaxlib {version('jaxlib')} on {processor()}; medians.", ""])


# ---- Without XLA -----------------------------------------------------------------------------------------------------


def plain_logits(given: Given) -> Any:
    """Llama in numpy, in float64."""
    config, tokens = given.config, given.tokens
    params: Any = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), given.params)

    def norm(x: Any, gain: Any) -> Any:
        return gain * x / np.sqrt(config.eps + np.mean(x**2, axis=-1, keepdims=True))

    def times(x: Any, w: Any) -> Any:
        return np.tensordot(x, w, axes=(-1, -1))

    positions = np.arange(tokens.shape[1])
    turns = np.exp(1j * positions[:, None] * config.theta ** (-2 * np.arange(config.head_dim // 2) / config.head_dim))

    def rotated(x: Any) -> Any:
        """Neighbouring pairs as complex numbers; x has the axes batch, seq, …, head_dim."""
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turns.reshape(len(turns), *[1] * (x.ndim - 3), -1)
        return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)

    x = params.embed[tokens]
    for w in layers_of(params):
        h = norm(x, w.attn_norm)
        q, k, v = rotated(times(h, w.attn.q)), rotated(times(h, w.attn.k)), times(h, w.attn.v)
        out = np.zeros_like(q)
        for last in positions:
            keys, values = k[:, : last + 1], v[:, : last + 1]
            scores = np.exp(np.einsum("bkqh,bskh->bkqs", q[:, last], keys) / np.sqrt(config.head_dim))
            out[:, last] = np.einsum("bkqs,bskh->bkqh", scores / scores.sum(axis=-1, keepdims=True), values)
        x = x + np.tensordot(out, w.attn.o, axes=((2, 3, 4), (1, 2, 3)))
        h = norm(x, w.ffn_norm)
        gate = times(h, w.ffn.gate)
        x = x + times(gate / (1 + np.exp(-gate)) * times(h, w.ffn.up), w.ffn.down)
    return times(norm(x, params.norm), params.embed if config.tied else params.unembed)


def plain_loss(logits: Any, targets: Any) -> float:
    """The mean cross-entropy of the targets that are not ignored, in numpy."""
    nats = (
        np.log(np.exp(logits).sum(axis=-1)) - np.take_along_axis(logits, np.maximum(targets, 0)[..., None], -1)[..., 0]
    )
    return float(nats[targets >= 0].mean())


def torch_gradient(given: Given) -> ll.Params:
    """The gradient by transformers and torch, in float64."""
    model: Any = LlamaForCausalLM(LlamaConfig(**config_to_hf(given.config))).double()
    weights = {name: torch.tensor(np.asarray(w)).double() for name, w in to_hf(given.params, given.config).items()}
    model.load_state_dict(weights, strict=False)  # which has a tied matrix once
    scores = model(torch.tensor(given.tokens, dtype=torch.long)).logits.reshape(-1, VOCAB)
    wanted = torch.tensor(given.targets, dtype=torch.long).reshape(-1)
    torch.nn.functional.cross_entropy(scores, wanted, ignore_index=-1).backward()
    return from_hf({name: w.grad.numpy().astype(np.float32) for name, w in model.named_parameters()}, given.config)


# ---- The table -------------------------------------------------------------------------------------------------------


def error(got: Any, want: Any) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def flat(tree: Any) -> Any:
    """All leaves as one vector: some gradients are zero, such as a query's in sequences of one token."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def errors(given: Given) -> dict[str, float]:
    """Relative errors of logits, loss and gradient, by who compiles."""
    config, found = given.config, dict[str, float]()
    want = plain_logits(given)
    trained = given.tokens.size * config.dim <= TRAINED
    gradient = torch_gradient(given) if trained else None

    def logits(params: ll.Params, tokens: Any) -> Any:
        return vmap(lambda ids: ll.logits(params, ids, config))(tokens)

    loss = partial(ll.loss, config=config)
    for name, compiled in COMPILED.items():
        found[f"logits, {name}"] = error(compiled(logits)(given.params, given.tokens), want)
        value = compiled(loss)(given.params, given.tokens, given.targets)
        found[f"loss, {name}"] = error(value, plain_loss(want, given.targets))
        if gradient:
            ours = compiled(jax.grad(loss))(given.params, given.tokens, given.targets)
            found[f"gradient, {name}"] = error(flat(ours), flat(gradient))
    return found


def table() -> str:
    """The worst of three models for each width and number of rows, in Markdown."""
    columns = [f"{what}, {name}" for what in ("logits", "loss", "gradient") for name in COMPILED]
    lines = ["| width | rows | " + " | ".join(columns) + " |", "|---" * (2 + len(columns)) + "|"]
    for width in WIDTHS:
        for rows in ROWS:
            found = [errors(draw(config, rows)) for config in models(width)]
            worst = [max(one[column] for one in found) if column in found[0] else None for column in columns]
            cells = ["–" if one is None else f"{one:.1e}" for one in worst]
            lines.append(f"| {width} | {rows:,} | " + " | ".join(cells) + " |")
    below = f"""jaxlib {version("jaxlib")}. The worst of three models of that width, in float32 on a CPU: logits and
    loss against a Llama in numpy in float64, gradients against torch's in float64. "tools" are programs as
    `lovely_llama_tools` compiles them, "jax" the same under `jax.jit`. At width 3 the mean square of a token can be
    close to 0, where a norm amplifies rounding."""
    return "\n".join([*lines, "", textwrap.fill(" ".join(below.split()), 120), ""])
