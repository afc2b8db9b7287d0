"""`golden`: the probe, and that transformers computes from it what stands beside it."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from asserts import assert_close
from builders import cache_name
from safetensors.numpy import load_file
from test_trace import hooked
from transformers import AutoTokenizer, LlamaForCausalLM

from lovely_llama_tools import load
from lovely_llama_tools.commands import main
from lovely_llama_tools.comparing.golden import PROBES
from lovely_llama_tools.comparing.naming import NAMINGS, renamed
from lovely_llama_tools.comparing.recordings.theirs import read_theirs

PAGE = Path(__file__).parents[3] / "docs" / "diff.md"


def test_the_manifest_describes_what_is_there(probe: Path, tmp_path: Path) -> None:
    """Every file by its size and hash, tensors by their shapes; together under 8 MB, and the same when made again."""
    manifest = json.loads((probe / "manifest.json").read_text())
    there = {str(path.relative_to(probe)): path.read_bytes() for path in probe.rglob("*.*") if path.is_file()}
    del there["manifest.json"]
    assert manifest["files"] == {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in there.items()
    }
    assert sum(map(len, there.values())) < 8_000_000
    for name, model in manifest["models"].items():
        for file, told in model["computed"].items():
            arrays = load_file(probe / name / f"{file}.safetensors")
            assert told["tensors"] == {key: [*array.shape] for key, array in arrays.items()}
    subprocess.run([sys.executable, "-m", "lovely_llama_tools", "golden", tmp_path / "again"], check=True)
    assert (tmp_path / "again" / "manifest.json").read_bytes() == (probe / "manifest.json").read_bytes()


@pytest.mark.parametrize("name", PROBES)
def test_transformers_computes_the_same(name: str, probe: Path) -> None:
    """Within the tolerances of the manifest: logits, intermediates, gradients, a step of torch's AdamW, decoding."""
    manifest = json.loads((probe / "manifest.json").read_text())
    told, found = manifest["models"][name], dict[str, Any]()
    for file in told["computed"]:
        found[file] = load_file(probe / name / f"{file}.safetensors")
    oracle: Any = LlamaForCausalLM.from_pretrained(probe / name / "model", attn_implementation="eager")
    tokens, first = torch.tensor(told["tokens"])[None], found["trace"].pop("tokens")
    with torch.no_grad():
        got: dict[str, Any] = {"logits": {"tokens": found["logits"]["tokens"], "logits": oracle(tokens).logits[0]}}
        given, decoded = cache_name(oracle), oracle(tokens[:, :4], use_cache=True)
        rows = [decoded.logits[0]]
        for i in range(4, 16):
            decoded = oracle(tokens[:, i : i + 1], use_cache=True, **{given: decoded[given]})
            rows.append(decoded.logits[0])
    for file, backward in (("trace", False), ("trace_gradients", True)):
        oracle.zero_grad()
        theirs = hooked(oracle, first, backward)
        found[file] = renamed(found[file], NAMINGS["hf"], PROBES[name].config)
        got[file] = {key: theirs[key] for key in found[file]}
    weights = {key: p for key, p in oracle.named_parameters()}
    loss, norm = found["gradients"].pop("loss"), found["gradients"].pop("norm")
    got["gradients"] = {key: p.grad.numpy().copy() for key, p in weights.items()}
    step = manifest["step"]
    assert_close(torch.nn.utils.clip_grad_norm_(oracle.parameters(), step["clip"]).numpy()[None], norm, 1e-4)
    assert_close(torch.nn.functional.cross_entropy(torch.cat(rows)[:-1], tokens[0, 1:16]).numpy()[None], loss, 1e-5)
    gains = [p for key, p in weights.items() if "norm" in key]
    groups = [{"params": gains, "weight_decay": 0.0}, {"params": [p for p in weights.values() if p.ndim > 1]}]
    torch.optim.AdamW(
        groups, lr=step["rate"], betas=(step["beta1"], step["beta2"]), eps=step["eps"], weight_decay=step["decay"]
    ).step()
    got["step"] = {key: p.detach() for key, p in weights.items()}
    got["decoding"] = {"logits": torch.cat(rows), "keys": None, "values": None}
    for file in told["computed"]:
        ours = {key: array for key, array in found[file].items() if got[file].get(key) is not None}
        theirs = {key: np.asarray(got[file][key]) for key in ours}
        assert_close(ours, theirs, told["computed"][file]["tolerance"], file)
    rotated = [found_k for key, found_k in load_file(probe / name / "trace.safetensors").items() if "k_rotated" in key]
    assert_close(found["decoding"]["keys"], np.stack(rotated), 1e-5, "keys")
    texts = AutoTokenizer.from_pretrained(probe / name / "model")
    for case in manifest["tokenizer"]:
        assert texts(case["text"])["input_ids"] == case["ids"], case["text"]


def test_every_form_holds_the_same_model(probe: Path) -> None:
    for name in PROBES:
        model = load(probe / name / "model")
        forms = json.loads((probe / "manifest.json").read_text())["models"][name]["forms"]
        assert len(forms) == (3 if name == "square" else 2)
        for form in forms:
            other = load(probe / name / form)
            assert_close(jax.tree.leaves(other.params), jax.tree.leaves(model.params), 0, form)
            assert other.tokenizer and other.tokenizer.begin("the cat") == [1, 263, 270, 259]


def test_distributions_are_those_of_their_definitions(probe: Path) -> None:
    found = {key: x.astype(np.float64) for key, x in load_file(probe / "samplers.safetensors").items()}
    logits, seen = found["logits"], found["seen"] > 0

    def softmax(x: Any) -> Any:
        p = np.exp(x - x.max())
        return p / p.sum()

    p, order = softmax(logits), np.argsort(-logits)
    penalised = np.where(seen, np.where(logits > 0, logits / 1.3, logits * 1.3), logits)
    nucleus = order[: int((np.cumsum(p[order]) < 0.6).sum()) + 1]
    kept = {"top_k": order[:5], "top_p": nucleus, "min_p": np.flatnonzero(p >= 0.2 * p.max())}
    want = {name: softmax(np.where(np.isin(np.arange(288), ids), logits, -np.inf)) for name, ids in kept.items()}
    want |= {"temperature": softmax(logits / 0.7), "repetition_penalty": softmax(penalised)}
    assert 1 < len(kept["min_p"]) < len(nucleus) < 100
    assert_close({name: found[name] for name in want}, want, 1e-5)


def compile_c(source: str, folder: Path) -> None:
    """The program `check`, by the system's compiler, or by zig's."""
    compiler = ["cc"] if shutil.which("cc") else [sys.executable, "-m", "ziglang", "cc"]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "ZIG_GLOBAL_CACHE_DIR": str(folder / "zig")}
    (folder / "check.c").write_text(source)
    command = [*compiler, "-std=c99", "-Wall", "-Werror", "-o", "check", "check.c", "-lm"]
    subprocess.run(command, cwd=folder, check=True, env=environment)


def test_the_page_s_lines_of_json_in_c_are_read(tmp_path: Path) -> None:
    record, _ = re.findall(r"```c\n(.*?)```", PAGE.read_text(), re.DOTALL)
    numbers = "{0.1f, -3e-9f, 1e30f}"
    main = f"int main(void) {{ const float x[] = {numbers}; for (int i = 7; i < 9; i++) record(stdout, i, x, 3); }}"
    compile_c(f"#include <stdio.h>\n{record}\n{main}\n", tmp_path)
    lines = subprocess.run([tmp_path / "check"], capture_output=True, check=True).stdout
    (tmp_path / "theirs.jsonl").write_bytes(lines)
    found = read_theirs(tmp_path / "theirs.jsonl")
    assert found.tokens.tolist() == [7, 8]
    assert (np.asarray(found.logits, np.float32) == np.array([[0.1, -3e-9, 1e30]] * 2, np.float32)).all()


def test_the_page_s_program_in_c_reads_it(probe: Path, tmp_path: Path) -> None:
    """It finds a right function right, and a wrong one wrong."""
    _, program = re.findall(r"```c\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for source, status, says in (
        (program, 0, r"rms_norm: relative error \d\.\de-0[78], tolerance 1e-5\n"),
        (program.replace("sqrt(squares / dim + eps)", "(sqrt(squares / dim) + eps)"), 1, r"rms_norm: .*"),
    ):
        compile_c(source, tmp_path)
        done = subprocess.run([tmp_path / "check", probe / "yarn"], capture_output=True, text=True)
        assert done.returncode == status and re.fullmatch(says, done.stdout, re.DOTALL), done
    done = subprocess.run([tmp_path / "check", tmp_path], capture_output=True, text=True)
    assert done.returncode not in (0, 1) and done.stderr == f"{tmp_path}/trace.safetensors: cannot be read\n"


def test_what_is_there_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for name, says in (("file", "path: got a path that exists, expected a new one"), ("file/in", "path: got ")):
        assert main(["golden", str(tmp_path / name)]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {tmp_path / name}: {says}") and said.count("\n") == 1
    assert main(["golden", str(tmp_path / "a\0b")]) == 2
    assert "path: got a NUL character, expected a name without" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
