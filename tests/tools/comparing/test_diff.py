"""`diff` on programs that are not ours: bugs in transformers' Llama are named from its logits alone."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import SMALL, random_params
from safetensors.numpy import save_file
from test_bugs import THEIRS, oracle_with
from torch.nn import functional
from transformers.models.llama import modeling_llama

import lovely_llama as ll
from lovely_llama import LlamaError
from lovely_llama_tools import diff, save
from lovely_llama_tools.commands import main
from lovely_llama_tools.comparing.bugs import BUGS
from lovely_llama_tools.comparing.diff import default_prompt
from lovely_llama_tools.formats.model import Model

MODEL = Model(SMALL, random_params(SMALL), None)
IDS = default_prompt(SMALL)


def run(model: Any, mask: Callable[[Any], Any] = lambda ids: None) -> Callable[[Any], Any]:
    """transformers' model as a function from ids to logits."""

    @torch.no_grad()
    def logits(ids: Any) -> Any:
        tokens = torch.tensor(np.array(ids)).long()[None]
        return model(tokens, attention_mask=mask(tokens)).logits[0]

    return logits


@pytest.mark.parametrize("name", THEIRS)
def test_a_bug_is_named_from_logits_alone(name: str) -> None:
    model, mask = oracle_with(name)
    verdict = diff(MODEL, run(model, mask))
    alike = ["weights of the next layer in a circle"] if name == "layers reversed" else []  # of two layers
    assert sorted(verdict.bugs) == sorted([name, *alike]), verdict
    assert verdict.verdict == ("several" if alike else "bug")
    assert verdict.error < 1e-5 and verdict.rounding < 1e-5 and verdict.first is not None
    assert f"Found: {name}\n  the program {BUGS[name].does}\n  cure: {BUGS[name].cure}" in str(verdict)


def replaced(name: str, change: Callable[[Any], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Another function in transformers' modeling_llama, made from the right one."""
    return lambda patch: patch.setattr(modeling_llama, name, change(getattr(modeling_llama, name)))


def method(owner: str, name: str, change: Callable[[Any], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Another method of one of its classes."""
    where = getattr(modeling_llama, owner)
    return lambda patch: patch.setattr(where, name, change(getattr(where, name)))


def rotary(change: Callable[[Any, Any], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Other cosines and sines."""
    return method("LlamaRotaryEmbedding", "forward", lambda right: lambda self, *a, **o: change(*right(self, *a, **o)))


def norm(change: Callable[[Any, Any, float], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Another norm of x, by gain and eps."""
    new = lambda self, x: change(x, self.weight, self.variance_epsilon)  # noqa: E731
    return method("LlamaRMSNorm", "forward", lambda right: new)


def feed_forward(change: Callable[[Any, Any], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Another function of the module and its input."""
    return method("LlamaMLP", "forward", lambda right: change)


def attended(change: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Other weights from scores, before the mask is added, and the mask."""

    def forward(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **_: Any) -> Any:
        key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
        weights = change(query @ key.transpose(2, 3) * scaling, mask, module)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    return replaced("eager_attention_forward", lambda right: forward)


FUNCTIONS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "rotated backwards": rotary(lambda cos, sin: (cos, -sin)),
    "rotation left out": rotary(lambda cos, sin: (cos * 0 + 1, sin * 0)),
    "rotation without its sines": rotary(lambda cos, sin: (cos, sin * 0)),
    "cosines and sines in bfloat16": rotary(lambda cos, sin: (cos.bfloat16().float(), sin.bfloat16().float())),
    "keys not rotated": replaced("apply_rotary_pos_emb", lambda right: lambda q, k, *a, **o: (right(q, k, *a)[0], k)),
    "queries not rotated": replaced(
        "apply_rotary_pos_emb", lambda right: lambda q, k, *a, **o: (q, right(q, k, *a)[1])),
    "scores not scaled": attended(lambda s, mask, m: torch.softmax(s * math.sqrt(m.head_dim) + mask, -1)),
    "scores scaled by dim": attended(
        lambda s, mask, m: torch.softmax(s * math.sqrt(m.head_dim / SMALL.dim) + mask, -1)),
    "mask after softmax": attended(lambda s, mask, m: torch.softmax(s, -1) * (mask == 0)),
    "softmax over queries": attended(lambda s, mask, m: torch.softmax(s + mask, -2)),
    "each token sees itself alone": attended(lambda s, mask, m: torch.eye(s.shape[-1]).expand(s.shape)),
    "an attention sink": attended(lambda s, mask, m: torch.softmax(functional.pad(s + mask, (0, 1)), -1)[..., :-1]),
    "LayerNorm": norm(lambda x, g, eps: functional.layer_norm(x, x.shape[-1:], g, None, eps)),
    "gain before the norm": norm(lambda x, g, eps: functional.rms_norm(g * x, x.shape[-1:], None, eps)),
    "eps outside the root": norm(lambda x, g, eps: g * x / (x.pow(2).mean(-1, True).sqrt() + eps)),
    "sum for mean": norm(lambda x, g, eps: g * x * torch.rsqrt(x.pow(2).sum(-1, True) + eps)),
    "no gate": feed_forward(lambda m, x: m.down_proj(m.up_proj(x))),
    "gate and up added": feed_forward(lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)) + m.up_proj(x))),
    "silu of the product": feed_forward(lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x) * m.up_proj(x)))),
}  # fmt: skip
UNKNOWN: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a bias": feed_forward(lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)) * m.up_proj(x)) + 0.1),
    "tanh for silu": feed_forward(lambda m, x: m.down_proj(torch.tanh(m.gate_proj(x)) * m.up_proj(x))),
    "the square of up": feed_forward(lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)) * m.up_proj(x) ** 2)),
    "a norm by the largest": norm(lambda x, g, eps: g * x / x.abs().amax(-1, True)),
    "cube roots": norm(lambda x, g, eps: g * x / (x.abs().pow(3).mean(-1, True) + eps) ** (1 / 3)),
    "distances": attended(lambda s, mask, m: torch.softmax(s + mask - torch.arange(s.shape[-1]).flip(0) * 0.1, -1)),
    "weights of 1.5": attended(lambda s, mask, m: torch.softmax(s + mask, -1) ** 1.5),
    "dropped scores": attended(lambda s, mask, m: torch.softmax(torch.where(s > 1, 0.0, s) + mask, -1)),
    "sines halved": rotary(lambda cos, sin: (cos, sin / 2)),
    "values of a bias": attended(lambda s, mask, m: torch.softmax(s + mask, -1) + 0.01),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_bug_in_a_function_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FUNCTIONS[name](monkeypatch)
    model, _ = oracle_with(None)
    verdict = diff(MODEL, run(model))
    assert verdict.bugs[:1] == [name] and verdict.verdict == "bug", verdict


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_fault_that_nobody_has_listed_gets_no_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    UNKNOWN[name](monkeypatch)
    model, _ = oracle_with(None)
    verdict = diff(MODEL, run(model))
    assert verdict.verdict == "none" and not verdict.bugs, verdict


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_correct_program_is_called_so(dtype: Any) -> None:
    model, _ = oracle_with(None)
    verdict = diff(MODEL, run(model.to(dtype)))
    assert verdict.verdict == "same" and verdict.first is None and not verdict.bugs, verdict
    assert verdict.dtype == str(dtype).removeprefix("torch.")
    assert "The same: theirs are" in str(verdict)


@pytest.mark.parametrize("name", ["gelu", "theta 1e4", "k and v exchanged", "1 + gain", "no mask", "layers reversed"])
def test_a_bug_in_half_precision(name: str) -> None:
    """Nothing else is named for it."""
    model, mask = oracle_with(name)
    verdict = diff(MODEL, run(model.to(torch.bfloat16), mask))
    assert verdict.verdict in ("bug", "several") and name in verdict.bugs, verdict


def test_a_number_that_is_not_the_right_one_is_found() -> None:
    for name, change in (("theta", {"rope_theta": 3e3}), ("eps", {"rms_norm_eps": 4e-3})):
        model, _ = oracle_with(None, change)
        verdict = diff(MODEL, run(model))
        (want,) = change.values()
        assert verdict.verdict == "bug" and not verdict.bugs, verdict
        assert verdict.dial and verdict.dial["name"] == name and verdict.dial["ours"] == getattr(SMALL, name)
        assert abs(verdict.dial["theirs"] / want - 1) < 0.01
    assert "Found: eps 0.004 instead of 0.0003\n" in str(verdict)


def test_the_width_of_a_window_is_found() -> None:
    def mask(ids: Any) -> Any:
        distance = torch.arange(ids.shape[1])[:, None] - torch.arange(ids.shape[1])
        return torch.where((distance >= 0) & (distance < 11), 0.0, -torch.inf)[None, None]

    verdict = diff(MODEL, run(oracle_with(None)[0], mask))
    assert verdict.first == 11 and not verdict.bugs, verdict
    assert verdict.dial == {"name": "sliding window", "theirs": 11, "ours": SMALL.ctx}


def test_rows_that_are_not_numbers_are_left_out() -> None:
    rows = np.array(ll.logits(MODEL.params, IDS, SMALL))
    rows[3] = np.nan
    assert diff(MODEL, rows).verdict == "same"
    last = diff(MODEL, rows[-2:])  # the last of what was recorded is compared with the last of ours
    assert last.verdict == "same" and len(last.positions) == 2 and max(last.positions) < 1e-5
    for wrong, says in (
        (rows[:, 1:], r"logits: got shape \(40, 28\)"), (rows * np.nan, "logits: got NaN"),
        (rows[0], "logits: got shape"),
    ):  # fmt: skip
        with pytest.raises(LlamaError, match=says):
            diff(MODEL, wrong)
    with pytest.raises(LlamaError, match="tokens: got"):
        diff(MODEL, rows, [29])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In every form of file, as text and as JSON; the exit status says whether they differ."""
    save(MODEL, tmp_path / "model")
    rows, model = np.asarray(ll.logits(MODEL.params, IDS, SMALL)), oracle_with("gelu")[0]
    wrong = run(model)(IDS).numpy()
    np.savez(tmp_path / "right", tokens=IDS, logits=rows[None])
    save_file({"tokens": IDS.astype(np.int64), "logits": wrong}, tmp_path / "wrong")
    lines = [json.dumps({"tokens": int(i), "logits": row.tolist()}) for i, row in zip(IDS, wrong, strict=True)]
    (tmp_path / "lines").write_text("\n".join(lines))
    (tmp_path / "line").write_text(json.dumps({"tokens": IDS.tolist(), "logits": wrong.tolist()}))
    command = ["diff", str(tmp_path / "model")]
    assert main([*command, str(tmp_path / "right.npz")]) == 0
    assert "The same" in capsys.readouterr().out
    for name in ("wrong", "lines", "line"):
        assert main([*command, str(tmp_path / name), "--json"]) == 1
        told = json.loads(capsys.readouterr().out)
        assert told["verdict"] == "bug" and told["bugs"] == ["gelu"] and told["next"]["name"] == "gelu by tanh"
        assert told["first"] == 0 and told["dial"] is None and told["error"] < told["next"]["error"] < 0.1
    (tmp_path / "none").write_text('{"logits": [[1]]}')
    (tmp_path / "text").write_text("logits")
    (tmp_path / "pickle.npz").write_bytes(b"PK\3\4 and no more")
    np.savez(tmp_path / "other", tokens=IDS, logits=rows[:, :5])
    for name, says in (
        ("none", "tokens: got none in line 1"), ("text", "line 1: got no JSON"),
        ("pickle.npz", "contents: got a zip file"),
        ("missing", "path: got no such file"),
    ):  # fmt: skip
        assert main([*command, str(tmp_path / name)]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {tmp_path / name}: {says}") and said.count("\n") == 1
    assert main([*command, str(tmp_path / "other.npz")]) == 2
    assert "logits: got shape (40, 5), expected (40, 29)" in capsys.readouterr().err
