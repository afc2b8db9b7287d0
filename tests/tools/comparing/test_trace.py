"""`trace`: every intermediate of a run, held against transformers' hooks, in value and gradient."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from asserts import assert_close
from builders import SMALL, layers_of, random_params, tiny_arrays, tiny_fields, write_gguf
from jax import numpy as jnp
from jax import vmap
from safetensors.numpy import load_file
from test_3_transformers import DRAWN, our_config, ours, random_oracle

import lovely_llama as ll
from lovely_llama import LlamaError
from lovely_llama_tools import save, trace
from lovely_llama_tools.commands import main
from lovely_llama_tools.comparing.naming import NAMINGS, renamed
from lovely_llama_tools.comparing.trace import names_of
from lovely_llama_tools.formats.model import Model

HOOKED = [next(name for name in DRAWN if kind in name) for kind in ("llama3-gqa", "yarn-gqa", "linear-mha")]


def hooked(oracle: Any, tokens: Any, backward: bool) -> dict[str, Any]:
    """What transformers' modules are given and give, by their paths; with `backward`, the gradients instead."""
    found, kept = dict[str, Any](), dict[str, torch.Tensor]()

    def keep(name: str, tensor: Any) -> None:
        kept[name] = tensor[0] if isinstance(tensor, tuple) else tensor
        kept[name].retain_grad()

    def hook(name: str) -> Callable[..., None]:
        def keep_both(_: Any, given: Any, out: Any) -> None:
            if name != "model.embed_tokens":  # which is given ids
                keep(f"{name}.input", given)
            keep(name, out)

        return keep_both

    handles = [
        module.register_forward_hook(hook(name))
        for name, module in oracle.named_modules()
        if name.endswith(("_proj", "norm", "lm_head", "embed_tokens")) or name.rpartition(".")[2].isdigit()
    ]
    ids = torch.tensor(tokens).long()[None]
    out = oracle(ids, labels=ids, output_attentions=True)
    for layer, weights in enumerate(out.attentions):
        keep(f"attentions.{layer}", weights)
    if backward:
        out.loss.backward()
    for name, tensor in kept.items():
        found[name] = (cast(Any, tensor.grad) if backward else tensor)[0].detach().numpy()
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", HOOKED)
def test_every_intermediate_is_that_of_transformers(name: str) -> None:
    """Under their names and in their arrangement; and the gradient with respect to each."""
    oracle: Any = random_oracle(DRAWN[name].hf, seed=3)
    oracle.set_attn_implementation("eager")
    config = our_config(DRAWN[name].hf)
    params = ours(dict(oracle.named_parameters()), config)
    tokens = np.random.default_rng(0).integers(config.vocab, size=70)
    model = Model(replace(config, ctx=max(config.ctx, 70)), params, None)
    for gradients, bound in ((False, 1e-5), (True, 1e-4)):
        found = renamed(trace(model, tokens, gradients=gradients), NAMINGS["hf"], config)
        want = hooked(oracle, tokens, gradients)
        assert len(found) == 3 + config.layers * 13  # all but the scores, and q and k once they are rotated
        assert_close(found, {key: want[key] for key in found}, bound, name)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_logits_are_the_library_s_bit_for_bit(dtype: Any) -> None:
    params, tokens = random_params(SMALL, 1, dtype), np.arange(20) % SMALL.vocab
    want = ll.logits(params, tokens, SMALL)
    assert (trace(Model(SMALL, params, None), tokens)["logits"] == np.asarray(want)).all()


def test_what_is_noted_fits_together() -> None:
    """What transformers does not tell: rotated queries and keys, and masked scores, in the library's own functions."""
    params, tokens = random_params(SMALL), np.arange(23)
    found = trace(Model(SMALL, params, None), tokens)
    assert list(found) == names_of(SMALL)
    where = ll.positions(0, len(tokens), SMALL)
    for layer, w in enumerate(layers_of(params)):
        at = {name.rpartition(".")[2]: array for name, array in found.items() if name.startswith(f"layers.{layer}.")}
        for q in ("q", "k"):
            rows, turned = (at[name].reshape(-1, 23, SMALL.head_dim)[0] for name in (q, f"{q}_rotated"))
            assert_close(turned, vmap(ll.rope)(jnp.asarray(rows), where.angles), 1e-6, q)
        scores = np.einsum("gqsd,gtd->gqst", at["q_rotated"], at["k_rotated"]) / SMALL.head_dim**0.5
        later = np.triu(np.ones((23, 23), bool), 1)
        assert (at["scores"][..., later] == -np.inf).all()
        assert_close(np.where(later, 0, at["scores"]), np.where(later, 0, scores), 1e-5, "scores")
        heads = np.einsum("gqst,gtd->gqsd", at["weights"], at["v"])
        assert_close(at["attn"], np.einsum("gqsd,ogqd->so", heads, w.attn.o), 1e-5, "attn")


def test_some_names_alone() -> None:
    """Only what is asked for is kept; names that no model has, or that this one has not, are refused."""
    model, tokens = Model(SMALL, random_params(SMALL), None), np.arange(9)
    whole = trace(model, tokens)
    some = trace(model, tokens, ["norm", "layers.1.q"])
    assert list(some) == ["layers.1.q", "norm"] and all((some[name] == whole[name]).all() for name in some)
    for names in (["q"], ["layers.2.q"], ["layers.0.Q"]):
        with pytest.raises(LlamaError, match=r"names: got .*, expected embed, norm, logits, layers\.N\.attn_norm"):
            trace(model, tokens, names)
    for tokens, says in (([29], "ids from 0 to 28"), ([], "1 to 131"), ([0] * 132, "1 to 131")):
        with pytest.raises(LlamaError, match=f"tokens: got .*, expected {says}"):
            trace(model, tokens)
    with pytest.raises(LlamaError, match="tokens: got 1 token, expected 2 at least"):
        trace(model, [1], gradients=True)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that others read, of a folder that others read; under our names and theirs."""
    model = Model(SMALL, random_params(SMALL), None)
    save(model, tmp_path / "model")
    out, run = tmp_path / "t.safetensors", ["trace", str(tmp_path / "model"), "--tokens", "3 1,4 1 5", "--out"]
    assert main([*run, str(out)]) == 0
    assert capsys.readouterr() == (f"{out}\n", "")
    found = load_file(out)
    assert found.pop("tokens").tolist() == [3, 1, 4, 1, 5]
    want = trace(model, [3, 1, 4, 1, 5])
    assert found.keys() == want.keys() and all((found[name] == want[name]).all() for name in want)
    assert main([*run, str(out), "--force", "--gradients", "--only", "layers.0.k", "logits"]) == 0
    found = load_file(out)
    assert found.keys() == {"tokens", "layers.0.k", "logits"}
    assert abs(found["logits"].sum(axis=1)).max() < 1e-6  # of softmax minus one-hot
    assert main([*run, str(out), "--force", "--names", "hf"]) == 0
    assert_close(load_file(out)["lm_head"], want["logits"], 0)
    for name, shape in (("transformer-lens", (5, 12, 10)), ("llama.cpp", (5, 12, 10))):
        assert main([*run, str(out), "--force", "--names", name]) == 0
        assert load_file(out)[NAMINGS[name].names["q_rotated"].format(0)].shape == shape
    out.unlink()
    capsys.readouterr()
    text = ["trace", str(write_gguf(tmp_path / "tiny.gguf", tiny_fields(), tiny_arrays())), "--text", "the end"]
    assert main([*text, "--out", str(out)]) == 0 and len(load_file(out)["tokens"]) > 2
    capsys.readouterr()
    for arguments, says in (
        ([*run, str(out)], f"{out}: path: got a path that exists, expected a new one, or --force"),
        ([*run, str(tmp_path / "no" / "t")], f"{tmp_path / 'no' / 't'}: path: got a folder that does not exist"),
        ([*run[:2], "--out", str(out), "--force"], "arguments: tokens: got none, expected --tokens or --text"),
        ([*run[:2], "--text", "a", "--out", str(out), "--force"], f"{tmp_path / 'model'}: tokenizer: got none"),
        ([*run[:3], "1 x", "--out", str(out), "--force"], "arguments: tokens: got '1 x', expected token ids"),
        ([*run[:3], "1 29", "--out", str(out), "--force"], "arguments: tokens: got [29], expected ids from 0 to 28"),
        ([*run, str(out), "--force", "--only", "layers.0.scores", "--names", "hf"], "arguments: names: got "),
    ):
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {says}") and said.count("\n") == 1
