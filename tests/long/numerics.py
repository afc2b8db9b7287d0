"""Errors of float32 and bfloat16 against float64, here and in transformers; and how far the compiler can be trusted.

    ./dev numerics            print the tables
    ./dev numerics --write    put them into docs/numerics.md

test_docs.py fails if the first table there is out of date. Those of watch.py take minutes.
"""

import argparse
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
import watch
from builders import layers_of, random_params
from jax import Array, vmap
from jax import numpy as jnp
from jaxtyping import Float, Int
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

import lovely_llama as ll
from lovely_llama_tools.formats.hugging_face import to_hf

PAGE = Path(__file__).resolve().parents[2] / "docs" / "numerics.md"
MARKS = "<!-- numerics -->\n", "<!-- /numerics -->"
FUNCTIONS = ("rms_norm", "rope", "softmax", "attend", "silu", "swiglu", "attention", "block")
DEPTHS = {f"{n} layer{'s' if n > 1 else ''}": n for n in (1, 2, 4, 8, 12, 16, 32)}
SEQ = 300  # more than one block of keys
# Sizes differ pairwise, and the heads together are not as wide as dim.
CONFIG = ll.Config(
    vocab=151, dim=90, layers=max(DEPTHS.values()), kv_heads=2, q_per_kv=3, head_dim=20, hidden_dim=236, ctx=SEQ,
    eps=1e-5, theta=5e5, rope_scaling=None, tied=False,
)  # fmt: skip


class Given(NamedTuple):
    """All inputs. A function gets one row per position, as inside a model."""

    params: ll.Params
    tokens: Int[Array, " seq"]
    x: Float[Array, "seq dim"]
    scores: Float[Array, "seq seq"]
    q: Float[Array, "seq head_dim"]
    keys: Float[Array, "seq head_dim"]
    values: Float[Array, "seq head_dim"]


def draw(dtype: str) -> Given:
    """Random numbers, rounded to a dtype here and never again, so that later differences come from arithmetic alone."""
    rng = np.random.default_rng(0)
    tokens = jnp.array(rng.integers(CONFIG.vocab, size=SEQ, dtype=np.int32))
    widths = CONFIG.dim, SEQ, *[CONFIG.head_dim] * 3
    vectors = [jnp.array(rng.standard_normal((SEQ, width)), dtype) for width in widths]
    return Given(random_params(CONFIG, dtype=dtype), tokens, *vectors)


def widen(given: Given) -> Given:
    """The same numbers in float64."""
    return jax.tree.map(lambda a: a.astype(jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a, given)


# ---- Here ------------------------------------------------------------------------------------------------------------


def ours(given: Given) -> dict[str, Array]:
    """Every row of the table, in the dtype of the inputs. Models of all depths consist of the same first layers."""
    after, layers = [given.params.embed[given.tokens]], layers_of(given.params)
    for w in layers:
        after.append(block(w, after[-1]))
    models = {row: readout(given.params, after[depth]) for row, depth in DEPTHS.items()}
    return {**functions(given), "block": block(layers[0], given.x), **models}


@jax.jit
def functions(given: Given) -> dict[str, Array]:
    x, q = given.x, given.q
    w: Any = given.params.blocks[0]
    where, cache = places(x.dtype)
    return {
        "rms_norm": vmap(lambda x: ll.rms_norm(x, w.attn_norm, CONFIG.eps))(x),
        "rope": vmap(ll.rope)(q, where.angles),
        "softmax": vmap(ll.softmax)(given.scores),
        "attend": vmap(lambda q, last: ll.attend(q, given.keys, given.values, last))(q, jnp.arange(SEQ)),
        "silu": vmap(ll.silu)(x),
        "swiglu": vmap(lambda x: ll.swiglu(x, *w.ffn))(x),
        "attention": ll.attention(w.attn, x, cache, where)[0],
    }


@jax.jit  # separate, so that it is compiled once for all layers
def block(w: ll.Block, x: Array) -> Array:
    where, cache = places(x.dtype)
    return ll.block(w, x, cache, where, CONFIG.eps)[0]


@jax.jit
def readout(params: ll.Params, x: Array) -> Array:
    return vmap(lambda x: ll.readout(params, x, CONFIG.eps))(x)


def places(dtype: Any) -> tuple[ll.Positions, ll.Cache]:
    """The positions, and an empty cache."""
    return ll.positions(0, SEQ, CONFIG), ll.empty_cache(CONFIG, SEQ, dtype)[0]


# ---- In transformers -------------------------------------------------------------------------------------------------


@torch.no_grad()
def theirs(given: Given, dtype: torch.dtype) -> dict[str, Any]:
    """The same rows except `softmax`, for which transformers has no function."""

    def across(array: Any) -> torch.Tensor:
        return torch.tensor(np.asarray(array, np.float64), dtype=dtype)

    hf = LlamaConfig(
        vocab_size=CONFIG.vocab, hidden_size=CONFIG.dim, num_hidden_layers=CONFIG.layers, head_dim=CONFIG.head_dim,
        num_attention_heads=CONFIG.kv_heads * CONFIG.q_per_kv, num_key_value_heads=CONFIG.kv_heads,
        intermediate_size=CONFIG.hidden_dim, max_position_embeddings=CONFIG.ctx, rms_norm_eps=CONFIG.eps,
        rope_parameters={"rope_type": "default", "rope_theta": CONFIG.theta}, tie_word_embeddings=CONFIG.tied,
    )  # fmt: skip
    # Created in this dtype, not cast to it: a cast would round the rotary frequencies too.
    model: Any = AutoModelForCausalLM.from_config(hf, dtype=dtype, attn_implementation="eager").eval()
    model.load_state_dict({name: across(array) for name, array in to_hf(given.params, CONFIG).items()})

    def logits(depth: int) -> torch.Tensor:
        model.config.num_hidden_layers = depth  # how many layers it runs
        return model(torch.tensor(np.asarray(given.tokens))[None]).logits

    x, _, q, keys, values = (across(a)[None] for a in given[2:])
    layer, turns = model.model.layers[0], model.model.rotary_emb(x, torch.arange(SEQ)[None])
    mask = torch.full((SEQ, SEQ), -torch.inf, dtype=dtype).triu(1)
    halves = torch.cat([q[..., 0::2], q[..., 1::2]], dim=-1)[None]
    turned, _ = apply_rotary_pos_emb(halves, halves, *turns)
    scaling = layer.self_attn.scaling
    averages, _ = eager_attention_forward(layer.self_attn, q[None], keys[None], values[None], mask, scaling)
    rows = {
        "rms_norm": layer.input_layernorm(x),
        "rope": torch.stack(turned[0].chunk(2, dim=-1), dim=-1).flatten(-2),
        "attend": averages[:, :, 0],
        "silu": layer.mlp.act_fn(x),
        "swiglu": layer.mlp(x),
        "attention": layer.self_attn(x, turns, mask)[0],
        "block": layer(x, mask, position_embeddings=turns),
    } | {row: logits(depth) for row, depth in DEPTHS.items()}
    return {name: result[0].double().numpy() for name, result in rows.items()}


# ---- The table -------------------------------------------------------------------------------------------------------

BELOW = f"""
A figure is ‖a − b‖ / ‖b‖, where a is a function's result for {SEQ} rows, or a model's logits for {SEQ} tokens, and b is
the result of `lovely_llama.py` in float64 for the same numbers. Weights and inputs are rounded to float32 or bfloat16
beforehand, so a figure measures the arithmetic alone. dim is {CONFIG.dim}, hidden_dim {CONFIG.hidden_dim}, and
{CONFIG.kv_heads} × {CONFIG.q_per_kv} heads have a head_dim of {CONFIG.head_dim}; matrices are random and preserve a
vector's norm, gains are 1 ± ½. Everything ran on a CPU, ours under `jit`, transformers with eager attention; it has no
softmax of its own.
"""


def errors() -> dict[str, dict[str, float]]:
    """‖a − b‖ / ‖b‖ for each column and row, where b is the float64 result for the same inputs."""
    columns = dict[str, dict[str, float]]()
    for name in ("float32", "bfloat16"):
        given = draw(name)
        with jax.enable_x64(True):
            exact = {row: np.asarray(b) for row, b in ours(widen(given)).items()}
        for column, rows in ((name, ours(given)), (f"transformers, {name}", theirs(given, getattr(torch, name)))):
            columns[column] = {row: error(a, exact[row]) for row, a in rows.items()}
    return columns


def error(got: Any, want: Any) -> float:
    assert got.shape == want.shape
    return float(np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want))


def table(columns: dict[str, dict[str, float]]) -> str:
    """The errors in Markdown, and how they were measured."""
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for row in (*FUNCTIONS, *DEPTHS):
        cells = [f"{column[row]:.1e}" if row in column else "–" for column in columns.values()]
        lines.append(" | ".join([f"| `{row}`" if row in FUNCTIONS else f"| {row}", *cells]) + " |")
    return "\n".join([*lines, "", textwrap.fill(" ".join(BELOW.split()), 120), ""])


def split(page: str, marks: tuple[str, str] = MARKS) -> tuple[str, str, str]:
    """The text before a table, the table, and the text after it."""
    before, rest = page.split(marks[0])
    written, after = rest.split(marks[1])
    return before + marks[0], written, marks[1] + after


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="./dev numerics", description="How far float32 and bfloat16 are from float64."
    )
    parser.add_argument("--write", action="store_true", help="put the tables into docs/numerics.md")
    write = parser.parse_args().write
    tables = (MARKS, lambda: table(errors())), (watch.FUSION_MARKS, watch.fusions), (watch.MARKS, watch.table)
    for marks, make in tables:
        text = make()
        print(text, flush=True)
        if write:
            before, _, after = split(PAGE.read_text(), marks)
            PAGE.write_text(before + text + after)


if __name__ == "__main__":
    main()
