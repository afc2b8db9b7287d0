"""`diff` on programs that are not ours: bugs in transformers' Llama are named from its logits alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import SMALL, random_params
from foreign import AROUND, TORCH, TRANSFORMERS, UNLISTED, in_torch, in_transformers, oracle_with, run
from safetensors.numpy import load_file, save_file

import lovely_llama as ll
from lovely_llama import LlamaError
from lovely_llama_tools import diff, load, save
from lovely_llama_tools.commands import main
from lovely_llama_tools.comparing.bugs import BUGS
from lovely_llama_tools.comparing.diff import default_prompt
from lovely_llama_tools.formats.model import Model

MODEL = Model(SMALL, random_params(SMALL), None)
IDS = default_prompt(SMALL)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_bug_in_transformers_is_named_from_logits_alone(name: str, probe: Path) -> None:
    """On a model of the probe, whose answers are known, and on its prompt."""
    folder = probe / "grouped"
    with in_transformers(load(folder / "model"), name) as run:
        verdict = diff(folder, run)
    assert verdict.bugs == [name] and verdict.verdict == "bug", verdict
    assert verdict.error < 1e-4 and verdict.rounding < 1e-5 and verdict.first is not None
    bug, said = BUGS[name], str(verdict)
    assert f"Found: {name}\n  the program {bug.does}\n" in said and f"\n  cure: {bug.cure}\n" in said
    assert all(f"  as if {function} had {new} for " in said for function, _, new in bug.words if "\n" not in new)


@pytest.mark.parametrize("name", [name for name in TORCH if name not in ("o transposed", "q transposed, Meta's rows")])
def test_a_bug_in_torch_is_named(name: str, probe: Path) -> None:
    verdict = diff(probe / "grouped", in_torch(load(probe / "grouped" / "model"), name))
    assert verdict.bugs == [name] and verdict.verdict == "bug", verdict


@pytest.mark.parametrize("name", ["o transposed", "q transposed, Meta's rows", "gelu", "eps 1e-3", "layers reversed"])
def test_a_bug_in_a_square_model_is_named(name: str, probe: Path) -> None:
    model = load(probe / "square" / "model")
    if name in TORCH:
        verdict = diff(probe / "square", in_torch(model, name))
    else:
        with in_transformers(model, name) as run:
            verdict = diff(probe / "square", run)
    assert verdict.bugs == [name] and verdict.verdict == "bug", verdict


@pytest.mark.parametrize("name", ["gelu", "keys not rotated", "halves in parallel", "BOS put in front"])
def test_a_bug_is_named_on_any_model(name: str) -> None:
    """Of two layers, whose candidates are computed here."""
    with in_transformers(MODEL, name) as run:
        verdict = diff(MODEL, run)
    assert verdict.bugs == [name] and verdict.verdict == "bug", verdict


def test_what_looks_alike_is_named_together() -> None:
    """Two layers in reverse are those of a circle too. What tells them apart is said."""
    with in_transformers(MODEL, "layers reversed") as run:
        verdict = diff(MODEL, run)
    assert sorted(verdict.bugs) == ["layers reversed", "weights of the next layer in a circle"]
    assert verdict.verdict == "several" and "in a circle” takes more than two layers" in str(verdict)


@pytest.mark.parametrize("name", UNLISTED)
def test_a_fault_that_nobody_has_listed_gets_no_name(name: str) -> None:
    with in_transformers(MODEL, name) as run:
        verdict = diff(MODEL, run)
    assert verdict.verdict == "none" and not verdict.bugs, verdict


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_correct_program_is_called_so(dtype: Any) -> None:
    with in_transformers(MODEL, None, dtype) as run:
        verdict = diff(MODEL, run)
    assert verdict.verdict == "same" and verdict.first is None and not verdict.bugs, verdict
    assert verdict.dtype == str(dtype).removeprefix("torch.")
    assert "The same: theirs are" in str(verdict)


@pytest.mark.parametrize("name", ["gelu", "theta 1e4", "k and v exchanged", "1 + gain", "no mask", "layers reversed"])
def test_a_bug_in_half_precision(name: str) -> None:
    """Nothing else is named for it."""
    with in_transformers(MODEL, name, torch.bfloat16) as run:
        verdict = diff(MODEL, run)
    assert verdict.verdict in ("bug", "several") and name in verdict.bugs, verdict


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("which", ["grouped", "square"])
def test_a_correct_torch_llama_is_the_same(which: str, dtype: Any, probe: Path) -> None:
    model = load(probe / which / "model")
    verdict = diff(probe / which, in_torch(model, None, dtype))
    assert verdict.verdict == "same" and verdict.dtype == str(dtype).removeprefix("torch."), verdict
    assert len(verdict.positions) == 272


def test_nothing_is_named_wrongly_in_bfloat16(probe: Path) -> None:
    model = load(probe / "square" / "model")
    for name in ("attention added to the norm", "1 + gain", "log-probabilities"):
        verdict = diff(model, in_torch(model, name, torch.bfloat16))
        assert verdict.verdict in ("bug", "several") and name in verdict.bugs, verdict


def test_a_bug_that_brings_ours_no_nearer_is_not_named() -> None:
    """Rounded to bfloat16 before float16, weights are others than the other way round; the cache is not to blame."""
    with in_transformers(MODEL, "weights rounded to bfloat16", torch.float16) as run:
        verdict = diff(MODEL, run)
    assert verdict.verdict == "none" and verdict.dtype == "float16", verdict


def test_positions_that_bfloat16_does_not_count(probe: Path) -> None:
    """With more tokens than it counts, two bugs are told apart that look alike before."""
    model, ids = load(probe / "square" / "model"), json.loads((probe / "manifest.json").read_text())
    theirs: Any = in_torch(model, None)
    theirs.replaced(angles=lambda m, n: torch.outer(torch.arange(n).bfloat16().float(), m.frequencies()))
    verdict = diff(probe / "square", theirs)
    assert verdict.bugs == ["positions in bfloat16"] and verdict.first and verdict.first >= 257, verdict
    short = diff(probe / "square", theirs, ids["models"]["square"]["tokens"][:40])  # whose answers are computed
    assert short.verdict == "same" and len(short.positions) == 40


def test_the_probe_knows_whose_prompt_it_is(probe: Path) -> None:
    """All of it may be named, and the model is told by its tokens."""
    for which in ("grouped", "square", "yarn"):
        found = load_file(probe / which / "logits.safetensors")
        verdict = diff(probe, found["logits"], found["tokens"])
        assert verdict.verdict == "same" and verdict.error < 1e-5, which
    with pytest.raises(LlamaError, match="tokens: got no model's prompt, expected that of grouped, square, yarn"):
        diff(probe, found["logits"][:9], found["tokens"][:9])


def test_two_bugs_at_once_are_found(probe: Path) -> None:
    """From logits alone, where it is asked for."""
    model = load(probe / "square" / "model")
    with in_transformers(model, "relu") as run:
        theirs = AROUND["ids one too high"](run, model)
        verdict = diff(probe / "square", theirs, pairs=60)
    assert verdict.verdict == "several" and verdict.together, verdict
    assert sorted(verdict.bugs) == ["ids one too high", "relu"] and verdict.error < 1e-5
    assert "They are there at once" in str(verdict)


def test_another_checkpoint_is_said_to_be_one() -> None:
    other = random_params(SMALL, seed=9)
    verdict = diff(MODEL, lambda ids: ll.logits(other, ids, SMALL))
    assert verdict.verdict == "none" and "of another checkpoint" in str(verdict), verdict


def test_a_number_that_is_not_the_right_one_is_found() -> None:
    for name, change in (("theta", {"rope_theta": 3e3}), ("eps", {"rms_norm_eps": 4e-3})):
        model, _ = oracle_with(None, MODEL.params, SMALL, change)
        verdict = diff(MODEL, run(model))
        (want,) = change.values()
        assert verdict.verdict == "bug" and not verdict.bugs, verdict
        assert verdict.dial and verdict.dial["name"] == name and verdict.dial["ours"] == getattr(SMALL, name)
        assert abs(verdict.dial["theirs"] / want - 1) < 0.01
    assert "Found: eps 0.004 instead of 0.0003\n" in str(verdict)


@pytest.mark.parametrize("factor", [5.0, 8.02])
def test_another_factor_is_a_number_and_not_the_bug_that_comes_near(factor: float) -> None:
    """Of 8.02 the factor of another model, 8, explains all but a little."""
    theirs, _ = oracle_with(None, MODEL.params, SMALL, {"factor": factor})
    verdict = diff(MODEL, run(theirs))
    assert verdict.verdict == "bug" and not verdict.bugs and verdict.dial, verdict
    assert verdict.dial["name"] == "the scaling's factor"
    assert verdict.dial["theirs"] == pytest.approx(factor, rel=1e-4)


def test_the_width_of_a_window_is_found() -> None:
    def mask(ids: Any) -> Any:
        distance = torch.arange(ids.shape[1])[:, None] - torch.arange(ids.shape[1])
        return torch.where((distance >= 0) & (distance < 11), 0.0, -torch.inf)[None, None]

    verdict = diff(MODEL, run(oracle_with(None, MODEL.params, SMALL)[0], mask))
    assert verdict.first == 11 and not verdict.bugs, verdict
    assert verdict.dial == {"name": "sliding window", "theirs": 11, "ours": SMALL.ctx}


def test_rows_that_are_not_numbers_are_left_out() -> None:
    rows = np.array(ll.logits(MODEL.params, IDS, SMALL))
    rows[3] = np.nan
    right = diff(MODEL, rows)
    assert right.verdict == "same" and right.notes == ["NaN or infinite in 1 row, from position 3 on: left out"]
    assert "note:     NaN or infinite in 1 row" in str(right)
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
    rows = np.asarray(ll.logits(MODEL.params, IDS, SMALL))
    with in_transformers(MODEL, "gelu") as theirs:
        wrong = theirs(IDS).numpy()
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
