"""The folder of a run: checkpoints that come back as they were, in order, and that other programs read."""

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from asserts import assert_close, jit
from builders import SMALL, letter_tokenizer, random_params

from lovely_llama import LlamaError, logits
from lovely_llama_tools.formats.files import load
from lovely_llama_tools.formats.model import Model
from lovely_llama_tools.tokens.characters import characters_tokenizer
from lovely_llama_tools.training.run_folder import (
    BEST,
    Progress,
    check_fingerprints,
    locked,
    read_checkpoint,
    save_checkpoint,
    steps,
    write_hf,
)

MODEL = Model(SMALL, random_params(SMALL), characters_tokenizer("abcdefghijklmnopqrstuvwxyz .\n"))
EMBED = np.arange(6, dtype=np.float32).reshape(2, 3) / 7
ARRAYS: dict[str, Any] = {"first.embed": EMBED, "second.a": np.array([1e-30], np.float32)}
FINGERPRINTS: dict[str, Any] = {"config.dim": 14, "lr": 3e-4, "data": "abc", "versions": "jax 1"}


WRITE = partial(write_hf, MODEL, ARRAYS)


def save(run: Path, step: int, last: int = 9, **more: Any) -> Path:
    save_checkpoint(run, WRITE, Progress(step, **more), FINGERPRINTS, last)
    return run / f"step-{step}"


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    progress = Progress(7, 5, 2, 1, 0.1 + 0.2, 7, 0, True)
    save_checkpoint(tmp_path, WRITE, progress, FINGERPRINTS, 1)
    saved = read_checkpoint(tmp_path, 7)
    jax.tree.map(np.testing.assert_array_equal, saved.model.params, MODEL.params)
    assert saved.progress == progress and saved.fingerprints == FINGERPRINTS and saved.model.config == SMALL
    assert saved.arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(saved.arrays[name], array)


def test_load_and_transformers_read_a_checkpoint_and_the_best(tmp_path: Path) -> None:
    config = replace(SMALL, dim=24)  # transformers has no other than multiples of the number of heads
    model = Model(config, random_params(config), MODEL.tokenizer)
    save_checkpoint(tmp_path, partial(write_hf, model, ARRAYS), Progress(3, best=1.0, best_step=3), FINGERPRINTS, 1)
    tokens = np.array([5, 17, 3, 28, 11], np.int32)
    want = jit(logits, static_argnums=2)(model.params, tokens, config)
    reference = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "step-3")
    with torch.no_grad():
        assert_close(reference(torch.tensor(tokens[None], dtype=torch.long)).logits[0].numpy(), want, 1e-5)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / BEST).params, model.params)


def test_the_last_ones_stay_by_number_and_so_does_the_best(tmp_path: Path) -> None:
    """Step 10 comes after step 9, whatever the clock says."""
    for step in (2, 9, 10, 11):
        path = save(tmp_path, step, 2, best=1.0, best_step=2)
        os.utime(path, (10**9 - step, 10**9 - step))
    assert steps(tmp_path) == [2, 10, 11]
    assert (tmp_path / BEST).readlink() == Path("step-2")
    save(tmp_path, 12, 2, best=0.5, best_step=12)
    assert steps(tmp_path) == [11, 12]
    assert (tmp_path / BEST).readlink() == Path("step-12")


def test_going_back_drops_what_came_after(tmp_path: Path) -> None:
    """Else the later ones of the abandoned schedule would count as the last."""
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    save(tmp_path, 2, 2)
    assert steps(tmp_path) == [1, 2]
    assert read_checkpoint(tmp_path, 2).progress.step == 2


def test_names_of_other_things_are_no_checkpoints(tmp_path: Path) -> None:
    for name in ("step-", "step-03", "step-x", "step-5.old", ".step-5.part", "step--1", "step-²"):
        (tmp_path / name).mkdir()
    save(tmp_path, 4)
    assert steps(tmp_path) == [4]


def test_what_was_left_half_written_is_removed(tmp_path: Path) -> None:
    half = tmp_path / ".step-5.part" / "step-5"
    half.mkdir(parents=True)
    (tmp_path / ".metrics.jsonl.part").write_text("{")
    (tmp_path / "notes.part").write_text("mine")
    with locked(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "notes.part"]


def test_a_resume_agrees_or_is_told_what_differs(tmp_path: Path) -> None:
    save(tmp_path, 1)
    saved, said = read_checkpoint(tmp_path, 1), list[str]()
    check_fingerprints(saved, FINGERPRINTS, [], said.append)
    assert not said
    with pytest.raises(LlamaError, match=r"lr: got 0.1, expected 0.0003 as before, or --allow lr"):
        check_fingerprints(saved, FINGERPRINTS | {"lr": 0.1}, ["data"], said.append)
    check_fingerprints(saved, FINGERPRINTS | {"lr": 0.1}, ["lr"], said.append)
    check_fingerprints(saved, FINGERPRINTS | {"versions": "jax 2"}, [], said.append)
    assert len(said) == 1 and "jax 1" in said[0] and "jax 2" in said[0]


def test_a_state_without_a_tokenizer(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, partial(write_hf, MODEL._replace(tokenizer=None), ARRAYS), Progress(1), FINGERPRINTS, 1)
    assert read_checkpoint(tmp_path, 1).model.tokenizer is None
    assert json.loads((tmp_path / "step-1" / "state.json").read_text())["best"] is None


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    """A tokenizer that was made by hand has no files."""
    save(tmp_path, 1)
    odd = Model(replace(SMALL), MODEL.params, letter_tokenizer([b"a"] * SMALL.vocab))
    with pytest.raises(LlamaError):
        save_checkpoint(tmp_path, partial(write_hf, odd, ARRAYS), Progress(2), FINGERPRINTS, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1"]
