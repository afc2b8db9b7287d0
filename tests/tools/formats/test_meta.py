"""Meta's folders: files that torch writes, in one part or several, against transformers' logits."""

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asserts import assert_close, jit
from jax import numpy as jnp
from meta_files import META, meta_weights, write_meta
from transformers import LlamaConfig, LlamaForCausalLM

from lovely_llama import CONFIGS, Config, RopeScaling, count, logits
from lovely_llama_tools.formats.files import checkpoint, load
from lovely_llama_tools.formats.llama2c import to_llama2c
from lovely_llama_tools.formats.meta import make_config, read_params

FORWARD = jit(logits, static_argnums=2)
TOKENS = np.random.default_rng(0).integers(META.vocab, size=70)


def reference(config: Config, weights: Mapping[str, torch.Tensor]) -> np.ndarray:
    """transformers' logits. Its own conversion of Meta's files, convert_llama_weights_to_hf.py, moves q's and k's rows.

    A head's rows are pairs of neighbours there and are halves here.
    """
    heads, scaling = config.kv_heads * config.q_per_kv, config.rope_scaling
    rope: dict[str, Any] = {"rope_theta": config.theta, "rope_type": "default"}
    if scaling:
        rope |= {
            "rope_type": "llama3", "factor": scaling.factor, "low_freq_factor": scaling.low,
            "high_freq_factor": scaling.high, "original_max_position_embeddings": scaling.original_ctx,
        }  # fmt: skip
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab, hidden_size=config.dim, num_hidden_layers=config.layers, num_attention_heads=heads,
            num_key_value_heads=config.kv_heads, intermediate_size=config.hidden_dim, rms_norm_eps=config.eps,
            max_position_embeddings=config.ctx, rope_parameters=rope, tie_word_embeddings=False,
        )
    )  # fmt: skip

    def halves(w: torch.Tensor, heads: int) -> torch.Tensor:
        return w.view(heads, w.shape[0] // heads // 2, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)

    state = {"model.embed_tokens.weight": "tok_embeddings", "model.norm.weight": "norm", "lm_head.weight": "output"}
    names = {
        "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3",
    }  # fmt: skip
    for i in range(config.layers):
        state |= {f"model.layers.{i}.{theirs}.weight": f"layers.{i}.{name}" for theirs, name in names.items()}
    loaded = {theirs: weights[f"{name}.weight"].float() for theirs, name in state.items()}
    for name in loaded:
        if "q_proj" in name or "k_proj" in name:
            loaded[name] = halves(loaded[name], heads if "q_proj" in name else config.kv_heads)
    model.load_state_dict(loaded)
    with torch.no_grad():
        return model(torch.tensor(TOKENS[None])).logits[0].numpy()


@pytest.mark.parametrize("style", ["llama 2", "llama 3"])
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_are_those_of_transformers(tmp_path: Path, style: str, parts: int, dtype: torch.dtype) -> None:
    """8 heads over 4 kv_heads, positions up to 69, and in Llama 3's style its scaling."""
    config, given = META, dict[str, Any]()
    if style == "llama 3":
        config = replace(META, theta=5e5, rope_scaling=RopeScaling("llama3", 8.0, 8192, 1.0, 4.0))
        given = {"rope_theta": 500000.0, "use_scaled_rope": True, "vocab_size": META.vocab}
    weights = {name: w.to(dtype) for name, w in meta_weights(config).items()}
    write_meta(tmp_path, weights, parts, style, **given)
    model = load(tmp_path)
    assert model.config == replace(config, ctx=131072 if style == "llama 3" else 4096)
    assert_close(to_llama2c(model.params, model.config), {name: w.float().numpy() for name, w in weights.items()}, 0)
    got = FORWARD(model.params, jnp.array(TOKENS, jnp.int32), replace(config, ctx=128))
    assert_close(got, reference(config, weights), 1e-5, "logits")


def test_6_heads_over_2(tmp_path: Path) -> None:
    config = replace(META, dim=36, kv_heads=2, q_per_kv=3, head_dim=6, hidden_dim=96)
    weights = meta_weights(config)
    write_meta(tmp_path, weights, 2, "llama 2", dim=36, n_heads=6, n_kv_heads=2, multiple_of=32)
    model = load(tmp_path)
    assert model.config == replace(config, ctx=4096)
    got = FORWARD(model.params, jnp.array(TOKENS, jnp.int32), replace(config, ctx=128))
    assert_close(got, reference(config, weights), 1e-5, "logits")


PUBLISHED: dict[str, dict[str, Any]] = {
    "llama-1-7b": dict(dim=4096, multiple_of=256, n_heads=32, n_layers=32, norm_eps=1e-6, vocab_size=-1),
    "llama-1-65b": dict(dim=8192, multiple_of=256, n_heads=64, n_layers=80, norm_eps=1e-5, vocab_size=-1),
    "llama-2-13b": dict(dim=5120, multiple_of=256, n_heads=40, n_layers=40, norm_eps=1e-5, vocab_size=-1),
    "llama-2-70b": dict(
        dim=8192, multiple_of=4096, ffn_dim_multiplier=1.3, n_heads=64, n_kv_heads=8, n_layers=80, norm_eps=1e-5,
        vocab_size=-1,
    ),
    "code-llama-7b": dict(
        dim=4096, n_layers=32, n_heads=32, multiple_of=256, ffn_dim_multiplier=1.0, norm_eps=1e-5, rope_theta=1e6
    ),
    "llama-3-8b": dict(
        dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, vocab_size=128256, multiple_of=1024, ffn_dim_multiplier=1.3,
        norm_eps=1e-5, rope_theta=5e5,
    ),
    "llama-3.1-405b": dict(
        dim=16384, n_layers=126, n_heads=128, n_kv_heads=8, vocab_size=128256, multiple_of=4096, ffn_dim_multiplier=1.2,
        norm_eps=1e-5, rope_theta=5e5, use_scaled_rope=True,
    ),
    "llama-3.2-1b": dict(
        dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, vocab_size=128256, multiple_of=256, ffn_dim_multiplier=1.5,
        norm_eps=1e-5, rope_theta=5e5, use_scaled_rope=True,
    ),
    "llama-3.2-3b": dict(
        dim=3072, n_layers=28, n_heads=24, n_kv_heads=8, vocab_size=128256, multiple_of=256, ffn_dim_multiplier=1.0,
        norm_eps=1e-5, rope_theta=5e5, use_scaled_rope=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_params(name: str) -> None:
    """All that params.json does not say is supplied: hidden_dim, the context, and Llama 3.2's scaling."""
    config, file = CONFIGS[name], Path("params.json")
    assert make_config(read_params(PUBLISHED[name], file), config.vocab, config.tied, file) == config


def test_what_became_of_each_field(tmp_path: Path) -> None:
    write_meta(tmp_path, meta_weights(META), 1, "llama 2", max_batch_size=4, use_scaled_rope=True)
    with checkpoint(tmp_path) as found:
        assert found.format == "Meta"
        assert found.fields == {
            "dim": (32, "honoured"), "n_layers": (2, "honoured"), "n_heads": (8, "honoured"),
            "n_kv_heads": (4, "honoured"), "vocab_size": (40, "honoured"), "multiple_of": (16, "honoured"),
            "ffn_dim_multiplier": (None, "defaulted"), "norm_eps": (1e-5, "honoured"), "rope_theta": (1e4, "defaulted"),
            "use_scaled_rope": (True, "honoured"), "rope_scaling_factor": (8.0, "defaulted"),
            "max_seq_len": (131072, "defaulted"), "max_batch_size": (4, "ignored"),
        }  # fmt: skip
        assert found.tensors["layers.1.feed_forward.w2.weight"] == ((32, 96), "F32")
        assert "rope.freqs" not in found.tensors


def test_max_seq_len_is_the_context(tmp_path: Path) -> None:
    write_meta(tmp_path, meta_weights(META), 2, "llama 2", max_seq_len=77)
    assert load(tmp_path).config == replace(META, ctx=77)


@pytest.mark.parametrize("parts", [1, 2])
def test_an_unembedding_that_is_the_embedding_again_is_tied(tmp_path: Path, parts: int) -> None:
    """As in Llama 3.2, where both are in the file; or where it is missing."""
    weights = meta_weights(META)
    tied = weights | {"output.weight": weights["tok_embeddings.weight"]}
    write_meta(tmp_path / "both", tied, parts, "llama 3", vocab_size=40)
    del tied["output.weight"]
    write_meta(tmp_path / "one", tied, parts, "llama 3", vocab_size=40)
    both, one = load(tmp_path / "both"), load(tmp_path / "one")
    assert both.config == one.config == replace(META, ctx=4096, tied=True)
    assert_close(both.params, one.params, 0)
    almost = weights | {"output.weight": weights["tok_embeddings.weight"].clone()}
    almost["output.weight"][-1, -1] += 1
    write_meta(tmp_path / "almost", almost, parts, "llama 3", vocab_size=40)
    assert not load(tmp_path / "almost").config.tied


def test_loading_is_light(tmp_path: Path) -> None:
    """Two parts, 210 MB together: in a process of its own, memory peaks at 1.2 times that and 150 MB at most."""
    config = replace(META, vocab=4000, dim=1024, layers=4, q_per_kv=4, kv_heads=4, head_dim=64, hidden_dim=2816)
    write_meta(
        tmp_path, meta_weights(config), 2, "llama 2", dim=1024, n_layers=4, n_heads=16, n_kv_heads=4, multiple_of=256
    )
    code = (
        "import re, sys, torch, lovely_llama_tools.formats.meta, jax; jax.numpy.zeros(3)\n"
        "from lovely_llama_tools.formats.files import load\n"
        "peak = lambda: int(re.findall(r'VmHWM:[^0-9]*([0-9]+)', open('/proc/self/status').read())[0]) * 1024\n"
        "before = peak(); model = load(sys.argv[1]); print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], check=True, capture_output=True, text=True)
    size = 4 * count(config)
    assert int(done.stdout) <= 1.2 * size + 150e6, f"{int(done.stdout) / size:.2f} times the parameters"
