"""Part 3: the whole model against transformers' LlamaForCausalLM, live, over random configs.

Bounds are relative errors per leaf. Compared with float64, transformers is off by 5e-7 in values, 1e-6 in gradients.
"""

import math
import random
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import torch
from asserts import assert_close, jit
from jax import numpy as jnp
from jax import vmap
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import lovely_llama as ll
from lovely_llama_tools.formats.hugging_face import from_hf
from lovely_llama_tools.formats.layout import rope_scaling

torch.set_num_threads(1)  # otherwise torch's threads and jax's contend for the cores
VALUES, GRADIENTS, LOSS = 1e-5, 5e-5, 1e-6

# ---- Random configs --------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A config in Hugging Face's form, a batch size and a sequence length."""

    hf: dict[str, Any]
    batch: int
    seq: int

    @property
    def sizes(self) -> list[int]:
        """Sizes that must differ pairwise, so that swapped axes cannot fit. Head axes of length 1 are exempt."""
        c = our_config(self.hf)
        axes = [self.batch, self.seq, c.vocab, c.dim, c.layers, c.head_dim, c.hidden_dim, c.kv_heads * c.q_per_kv]
        return axes + [n for n in (c.kv_heads, c.q_per_kv) if 1 < n < c.kv_heads * c.q_per_kv]


def our_config(hf: Mapping[str, Any]) -> ll.Config:
    """The `Config` that a config.json of Hugging Face describes."""
    heads, rope = hf["num_attention_heads"], hf["rope_parameters"]
    return ll.Config(
        hf["vocab_size"], hf["hidden_size"], hf["num_hidden_layers"], hf["num_key_value_heads"],
        heads // hf["num_key_value_heads"], hf["head_dim"], hf["intermediate_size"], hf["max_position_embeddings"],
        hf["rms_norm_eps"], rope["rope_theta"], rope_scaling(rope, "config.json"), hf["tie_word_embeddings"],
    )  # fmt: skip


def draw_rope(rng: random.Random, kind: str) -> dict[str, Any]:
    """Rotary parameters with an original context so short that a few hundred positions far exceed it."""
    rope = {"rope_type": kind, "rope_theta": round(10 ** rng.uniform(4, 6), 1)}
    if kind == "default":
        return rope
    rope |= {"factor": rng.choice((2.0, 4.0, 8.0, 10.5))}
    if kind == "linear":
        return rope
    rope |= {"original_max_position_embeddings": 2 * rng.randint(16, 64)}
    if kind == "llama3":
        return rope | {"low_freq_factor": rng.choice((1.0, 1.5)), "high_freq_factor": rng.choice((4.0, 5.0))}
    own = {"beta_fast": rng.choice((4.0, 8.0)), "beta_slow": rng.choice((0.5, 2.0)), "attention_factor": 1.25}
    return rope | {name: value for name, value in own.items() if rng.random() < 0.5}


def extended(rope: Mapping[str, Any]) -> int:
    """The context length that rotary parameters extend to; transformers warns about any other."""
    return int(rope.get("factor", 1) * rope.get("original_max_position_embeddings", 512))


def draw(rng: random.Random, kind: str, heads: str, tied: bool) -> Case:
    """A random case, redrawn until all its sizes differ and all bands of its scaling are used."""
    while True:
        kv_heads = 1 if heads == "mqa" else rng.randint(2, 4)
        n_heads = kv_heads * (1 if heads == "mha" else rng.randint(2, 4))
        rope = draw_rope(rng, kind)
        hf: dict[str, Any] = {
            "vocab_size": rng.randint(40, 90), "hidden_size": n_heads * rng.randint(5, 9),
            "num_hidden_layers": rng.choice((2, 2, 3)), "num_attention_heads": n_heads, "num_key_value_heads": kv_heads,
            "head_dim": 2 * rng.randint(5, 12), "intermediate_size": rng.randint(30, 70),
            "max_position_embeddings": extended(rope), "rms_norm_eps": 10 ** rng.uniform(-6, -4),
            "rope_parameters": rope, "tie_word_embeddings": tied,
        }  # fmt: skip
        case = Case(hf, rng.randint(1, 4), rng.choice((rng.randint(65, 256), rng.randint(257, 300))))
        usual = hf["head_dim"] * n_heads == hf["hidden_size"]
        if not usual and len(set(case.sizes)) == len(case.sizes) and bands(hf) == BANDS[kind]:
            return case


BANDS = {"default": {"kept"}, "linear": {"slowed"}, "llama3": (all3 := {"kept", "between", "slowed"}), "yarn": all3}


def bands(hf: dict[str, Any]) -> set[str]:
    """What scaling does to the frequencies of the pairs, according to transformers' own tables."""
    plain = {"rope_type": "default", "rope_theta": hf["rope_parameters"]["rope_theta"]}
    ratio = (rotary(hf).inv_freq / rotary(hf | {"rope_parameters": plain}).inv_freq).numpy()
    slowed, kept = (np.isclose(ratio, r, rtol=1e-6) for r in (1 / hf["rope_parameters"].get("factor", 1), 1))
    return {*np.where(kept, "kept", np.where(slowed, "slowed", "between")).tolist()}


def rotary(hf: Mapping[str, Any]) -> LlamaRotaryEmbedding:
    return LlamaRotaryEmbedding(LlamaConfig(**hf))


KINDS, HEADS = ("default", "linear", "llama3", "yarn"), ("mha", "gqa", "gqa", "mqa")
RNG = random.Random(26)
DRAWN = {
    f"{i}-{kind}-{heads}-{'tied' if tied else 'untied'}": draw(RNG, kind, heads, tied)
    for i, (kind, heads, tied) in enumerate(product(KINDS, HEADS, (False, True)))
}


def random_oracle(hf: Mapping[str, Any], seed: int) -> LlamaForCausalLM:
    """transformers' model with all parameters random, gains included, and a residual stream so small that eps shows."""
    model, rng = LlamaForCausalLM(LlamaConfig(**hf)).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            small = 0.05 if any(part in name for part in ("embed_tokens", "o_proj", "down_proj")) else 1
            mean, σ = (1, 0.3) if "norm" in name else (0, small if "embed" in name else small / math.sqrt(p.shape[1]))
            p.normal_(mean, σ, generator=rng)
    return model


def ours(tensors: Mapping[str, torch.Tensor], config: ll.Config) -> ll.Params:
    """transformers' parameters, or their gradients, in our layout."""
    return from_hf({name: tensor.detach().numpy() for name, tensor in tensors.items()}, config)


# ---- Values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DRAWN)
def test_random_config(name: str) -> None:
    """Logits, hidden states after every layer, the loss and all gradients match both of transformers' attentions."""
    case = DRAWN[name]
    model = random_oracle(case.hf, seed=len(name))
    config = replace(our_config(model.config.to_dict()), ctx=case.seq)  # some are longer than the model is meant for
    params = ours(dict(model.named_parameters()), config)
    rng = np.random.default_rng(case.seq)
    tokens, labels = rng.integers(config.vocab, size=(2, case.batch, case.seq))
    labels[rng.random(labels.shape) < 0.2] = -100
    # transformers compares the logits after token t with label t + 1.
    targets = np.roll(np.where(labels < 0, -1, labels), -1, axis=1)
    targets[:, -1] = -1

    @jit
    def everything(params: ll.Params, tokens: jax.Array, targets: jax.Array) -> Any:
        def after(n: int, row: jax.Array) -> jax.Array:
            x, where = ll.embed(params, row), ll.positions(0, case.seq, config)
            for w, cache in zip(params.blocks[:n], ll.empty_cache(config, case.seq, jnp.float32), strict=False):
                x, _ = ll.block(w, x, cache, where, config.eps)
            return x

        def row(row: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
            *hidden, last = [after(n, row) for n in range(config.layers + 1)]
            normed = vmap(partial(ll.rms_norm, gain=params.norm, eps=config.eps))(last)
            return vmap(lambda x: ll.readout(params, x, config.eps))(last), [*hidden, normed]

        return vmap(row)(tokens), jax.value_and_grad(ll.loss)(params, tokens, targets, config)

    (logits, hidden), (loss, gradients) = everything(params, tokens.astype(np.int32), targets.astype(np.int32))
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        model.zero_grad()
        out = model(torch.tensor(tokens), labels=torch.tensor(labels), output_hidden_states=True, use_cache=False)
        out.loss.backward()
        wanted = ours({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, config)
        assert_close(hidden, [state.detach().numpy() for state in out.hidden_states], VALUES, f"{attention}: hidden")
        assert_close(logits, out.logits.detach().numpy(), VALUES, f"{attention}: logits")
        assert_close(loss, out.loss.detach().numpy(), LOSS, f"{attention}: loss")
        assert_close(gradients, wanted, GRADIENTS, f"{attention}: gradient")


def test_random_configs_cover_everything() -> None:
    """Enough configs, pairwise different sizes, long sequences, and every band of every scaling."""
    assert len(DRAWN) >= 32
    for case in DRAWN.values():
        assert len(set(case.sizes)) == len(case.sizes) and 64 < case.seq <= 300
        rope = case.hf["rope_parameters"]
        assert bands(case.hf) == BANDS[rope["rope_type"]]
    assert {len(bands(case.hf)) for case in DRAWN.values()} == {1, 3}
