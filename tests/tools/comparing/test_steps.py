"""Faults in transformers' Llama, named step by step from what ten lines of hooks record: docs/diff.md's."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import SMALL, random_params
from foreign import BY_FUNCTIONS, UNLISTED, oracle_with
from torch import nn

from lovely_llama import LlamaError
from lovely_llama_tools import diff, trace
from lovely_llama_tools.comparing.diff import default_prompt
from lovely_llama_tools.comparing.naming import NAMINGS, recognised, renamed
from lovely_llama_tools.formats.model import Model

MODEL = Model(SMALL, random_params(SMALL), None)
IDS = default_prompt(SMALL)
PAGE = (Path(__file__).parents[3] / "docs" / "diff.md").read_text()
LOADING, HOOKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[:2]


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """What the page's hooks record of a model."""
    monkeypatch.chdir(tmp_path)

    def run(net: Any, dtype: Any = torch.float32) -> dict[str, Any]:
        with torch.no_grad():
            exec(HOOKS, {"net": net.to(dtype), "ids": IDS.tolist(), "np": np, "torch": torch})
        return dict(np.load("theirs.npz"))

    return run


def judged(found: dict[str, Any]) -> Any:
    return diff(MODEL, found["lm_head"], found["tokens"], activations=found)


def steps_of(verdict: Any) -> list[tuple[str, list[int], list[str]]]:
    return [(step["step"], step["layers"], step["bugs"]) for step in verdict.steps]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_correct_program_has_no_wrong_step(record: Any, dtype: Any) -> None:
    verdict = judged(record(oracle_with(None, MODEL.params, SMALL)[0], dtype))
    assert verdict.verdict == "same" and not verdict.steps and verdict.compared > 20, verdict
    assert verdict.dtype == str(dtype).removeprefix("torch.")
    assert "model.rotary_emb" in verdict.unknown and "model.layers.0.mlp" not in verdict.unknown


def test_the_step_is_named_and_the_bug(record: Any) -> None:
    for name, want in {
        "gelu": [("ffn", [0, 1])],
        "norms exchanged": [("attn_norm", [0, 1]), ("ffn_norm", [0, 1])],
        "Meta's rows rotated as halves": [("q", [0, 1]), ("k", [0, 1])],
        "theta 1e4": [("attn", [0, 1])],
    }.items():
        verdict = judged(record(oracle_with(name, MODEL.params, SMALL)[0]))
        assert verdict.bugs == [name] and verdict.verdict == "bug", verdict
        assert steps_of(verdict) == [(step, layers, [name]) for step, layers in want]
        assert verdict.error < 1e-5 < verdict.steps[0]["error"]


def test_the_page_from_loading_to_the_verdict(probe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its program records two faults at once, and the command prints what the page shows, but for the last digits."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "probe").symlink_to(probe)
    names: dict[str, Any] = {}
    exec(LOADING, names)
    BY_FUNCTIONS["keys not rotated"](monkeypatch)
    names["net"].model.layers[3].mlp.act_fn = nn.GELU()
    with torch.no_grad():
        exec(HOOKS, names)
    (command,) = re.findall(r"```sh\nlovely-llama (diff .*)\n```", PAGE)
    done = subprocess.run(
        [sys.executable, "-m", "lovely_llama_tools", *command.split()], capture_output=True, text=True
    )
    (shown,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    assert done.returncode == 1 and digits(done.stdout) == digits(shown), done.stderr


def digits(text: str) -> str:
    """A text without its digits."""
    return re.sub(r"\d\.\de[-+]\d\d", "#", text)


def test_two_faults_at_once_in_bfloat16(record: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    BY_FUNCTIONS["queries not rotated"](monkeypatch)
    verdict = judged(record(oracle_with("relu", MODEL.params, SMALL)[0], torch.bfloat16))
    assert steps_of(verdict) == [("attn", [0, 1], ["queries not rotated"]), ("ffn", [0, 1], ["relu"])]
    assert verdict.verdict == "several" and sorted(verdict.bugs) == ["queries not rotated", "relu"]
    assert verdict.together and "They are there at once" in str(verdict)


def test_what_looks_alike_in_a_step_is_not_there_at_once(record: Any) -> None:
    """An eps below what float32 adds to these squares is none."""
    verdict = judged(record(oracle_with(None, MODEL.params, SMALL, {"rms_norm_eps": 1e-12})[0]))
    assert {"eps 1e-12", "eps left out"} <= {*verdict.bugs} and verdict.verdict == "several", verdict
    assert not verdict.together and "cannot tell them apart" in str(verdict)


def test_a_fault_in_one_layer_is_named(record: Any) -> None:
    net, _ = oracle_with(None, MODEL.params, SMALL)
    net.model.layers[1].mlp.act_fn = nn.GELU()
    net.model.layers[0].self_attn.k_proj.weight.data *= 1.25
    verdict = judged(record(net))
    assert steps_of(verdict) == [("k", [0], []), ("ffn", [1], ["gelu"])], verdict
    assert verdict.steps[0]["says"] == "is multiplied by 1.25" and verdict.bugs == ["gelu"]
    assert "k of layer 0" in str(verdict) and "ffn of layer 1" in str(verdict)


def test_other_weights_are_named(record: Any) -> None:
    """Another layer's, another matrix of the same layer, and zeros."""
    net, _ = oracle_with(None, MODEL.params, SMALL)
    first, second = net.model.layers
    first.mlp.up_proj.weight = second.mlp.up_proj.weight
    second.self_attn.v_proj.weight = second.self_attn.k_proj.weight
    second.self_attn.o_proj.weight.data.zero_()
    verdict = judged(record(net))
    says = {(step["step"], *step["layers"]): step["says"] for step in verdict.steps}
    assert says == {
        ("up", 0): "has the weights of layer 1", ("attn", 1): "is zero",
        ("v", 1): "has the weights of attn.k, in Hugging Face's order",
    }, verdict  # fmt: skip
    assert verdict.verdict == "several" and not verdict.bugs


def test_an_unlisted_fault_is_placed_and_gets_no_name(record: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    UNLISTED["sines halved"](monkeypatch)
    verdict = judged(record(oracle_with(None, MODEL.params, SMALL)[0]))
    assert verdict.verdict == "none" and not verdict.bugs, verdict
    assert steps_of(verdict) == [("attn", [0, 1], [])] and "attn of layers 0-1: " in str(verdict)
    assert "not explained" in str(verdict) and "Record next: what stands before these steps." in str(verdict)


def test_activations_alone_and_few_of_them(record: Any) -> None:
    """A step is as long as from one array to the next. What does not fit is listed."""
    found = record(oracle_with("relu", MODEL.params, SMALL)[0])
    few = {name: x for name, x in found.items() if re.fullmatch(r"model\.(embed_tokens|layers\.\d)", name)}
    few |= {"model.layers.0.mlp.up_proj": found["model.layers.0.mlp.up_proj"][:, :-1], "else": np.ones(3)}
    verdict = diff(MODEL, None, IDS, activations=few)
    assert steps_of(verdict) == [("out", [0, 1], ["relu"])] and verdict.first == 0, verdict
    assert verdict.unknown == ["else", "model.layers.0.mlp.up_proj of shape (1, 39, 19)"]
    with pytest.raises(LlamaError, match="logits: got none, expected logits, or activations"):
        diff(MODEL, None, IDS, activations={"else": np.ones(3)})


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_is_understood(naming: str) -> None:
    found = trace(MODEL, IDS)
    theirs = renamed(found, NAMINGS[naming], SMALL)
    ours, unknown = recognised({f"module.{name}": x[None] for name, x in theirs.items()}, SMALL, len(IDS))
    assert len(ours) == len(theirs) and not unknown
    for name, x in ours.items():
        np.testing.assert_allclose(x, found[name], 1e-6)
