"""Runs whose loss is no number, starts that fail, folders with strange files, and runs resumed from elsewhere."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from small_runs import TINY, hasten, rows, words, write_sums

from lovely_llama import LlamaError
from lovely_llama_tools import load
from lovely_llama_tools.commands import main
from lovely_llama_tools.data import prepare
from lovely_llama_tools.training import loop, run_folder

pytestmark = pytest.mark.usefixtures("no_type_checks", "fewer_optimisations")
Run = Callable[..., tuple[int, str, list[str]]]
SHORT = "--steps 2 --eval-every 1"


class Killed(BaseException):
    """The process ends here."""


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run the command in this process, in a folder of its own: its status, stdout, and lines of stderr."""
    hasten(monkeypatch)
    monkeypatch.chdir(tmp_path)
    write_sums(Path("sums.txt"))

    def command(*arguments: object) -> tuple[int, str, list[str]]:
        status = main(words(*arguments))
        out, err = capsys.readouterr()
        return status, out, err.splitlines()

    return command


# ---- What is not a number --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "warmup", "when", "best"), [(1, 0, "1 step", []), (9, 1, "2 steps", ["step-1"])])
def test_an_evaluation_that_is_no_number_ends_a_run(
    steps: int, warmup: int, when: str, best: list[str], run: Run
) -> None:
    """It is neither the best nor saved. Resumed as it was, the run ends in the same way; at another rate it goes on."""
    options = f"sums.txt {TINY} --lr 1e10 --warmup {warmup} --steps {steps} --eval-every 1"
    for again in (options, "--resume"):
        status, out, err = run(again)
        assert (status, out) == (1, "")
        assert err[-1].startswith(f"error: run: validation loss: got nan after {when}, which is not a number, expected")
        assert f"run/step-{len(best)} is still good" in err[-1]
        assert [path.readlink().name for path in Path("run").glob("best")] == best
        assert rows(Path("run"))[-1]["val_loss"] is None
    status, out, err = run("--resume --lr 1e-3 --final-lr 0 --allow lr --allow final_lr")
    assert status == 0 and math.isfinite(float(out.split("validation loss ")[1].split()[0]))
    assert err[-1] == ("1 step" if steps == 1 else "9 steps")


@pytest.mark.parametrize(
    ("field", "steps", "says"),
    [
        ("loss", 1, "loss: got nan in 1 step in a row"),
        ("loss", 9, "loss: got nan in 3 steps in a row"),
        ("grad_norm", 9, "gradient norm: got nan in 3 steps in a row"),
    ],
)
def test_steps_that_are_no_numbers_end_a_run(
    field: str, steps: int, says: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loop.step

    def poisoned(*arguments: Any) -> Any:
        trained, moments, measured = original(*arguments)
        return trained, moments, measured._replace(**{field: np.float32("nan"), "finite": np.bool_(False)})

    monkeypatch.setattr(loop, "step", poisoned)
    for again in (f"sums.txt {TINY} --steps {steps}", "--resume"):
        status, out, err = run(again)
        assert (status, out) == (1, "") and err[-1].startswith(f"error: run: {says}, which is not a number, expected")


# ---- Starts that fail ------------------------------------------------------------------------------------------------


def full(*_: object) -> Any:
    raise OSError(28, "No space left on device")


def exhausted(*_: object, **__: object) -> Any:
    raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")


def no_room(*_: object) -> Any:
    raise LlamaError("config", "memory", "1 GiB free", "2 GiB for the parameters")


def killed(*_: object) -> Any:
    raise Killed


FAILING: dict[str, tuple[str, object, str, Any]] = {
    "a text too short": ("short.txt", None, "", None),
    "not UTF-8": ("bytes.txt", None, "", None),
    "no such model": ("long.txt --init-from nowhere.gguf", None, "", None),
    "no such tokenizer": ("long.txt --tokenizer nowhere", None, "", None),
    "a mesh": ("long.txt --mesh tensor=64", None, "", None),
    "sizes": ("long.txt --heads 3", None, "", None),
    "a vocabulary": ("long.txt --config stories260k --vocab 9999", None, "", None),
    "memory": ("long.txt", loop, "check_memory", no_room),
    "memory of a step": ("long.txt", loop, "step", exhausted),
    "a full disk while encoding": ("long.txt", prepare.Writer, "add", full),
    "a full disk": ("long.txt", run_folder, "write_safetensors", full),
    "a full disk by orbax": ("long.txt --checkpoints orbax", run_folder, "digest", full),
    "killed while encoding": ("long.txt", prepare, "encode_file", killed),
    "killed before the first checkpoint": ("long.txt", run_folder, "write_safetensors", killed),
    "killed in the first step": ("long.txt", loop, "step", killed),
}


@pytest.mark.parametrize("case", FAILING)
def test_a_failed_start_stops_no_other(case: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next has another text, with other tokens, and the same folder."""
    Path("short.txt").write_text("abc")
    Path("bytes.txt").write_bytes(b"abc\n" * 99 + b"\xff")
    Path("long.txt").write_text("a long text of letters\n" * 40)
    arguments, owner, name, blow = FAILING[case]
    with monkeypatch.context() as patch:
        if owner:
            patch.setattr(owner, name, blow)
        try:
            assert run("" if "--config" in arguments else TINY, arguments)[0] in (1, 2)
        except Killed:
            assert case.startswith("killed")
    if owner is None:
        assert not Path("run").exists() or sorted(path.name for path in Path("run").iterdir()) == [".lock", "data"]
    status, _, err = run("sums.txt", TINY, SHORT)
    assert status == 0, err
    assert load("run/best").config.vocab == 13 and run("--resume")[0] == 0


def test_data_encoded_by_a_failed_start_are_used_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(loop, "check_memory", no_room)
        assert run("sums.txt", TINY)[0] == 2
    monkeypatch.setattr(prepare, "encode_file", killed)
    assert run("sums.txt", TINY, SHORT)[0] == 0


def test_a_run_is_not_taken_for_a_failed_start(run: Run) -> None:
    """Nor is a file of somebody else, wherever it is."""
    assert run("sums.txt", TINY, SHORT)[0] == 0
    before = rows(Path("run"))
    status, _, err = run("sums.txt", TINY, SHORT)
    assert status == 2 and "expected a new one, or --resume" in err[-1] and rows(Path("run")) == before
    Path("other").mkdir()
    Path("other/run.json").write_text('{"mine": 1}')
    assert run("sums.txt", TINY, "--out other")[0] == 2 and [*map(str, Path("other").iterdir())] == ["other/run.json"]


# ---- Strange files ---------------------------------------------------------------------------------------------------

LITTER = (".DS_Store", "Thumbs.db", "desktop.ini", "._config.json", "._book.txt", ".run.json.swp", "notes.txt~")


def scatter(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name in LITTER:
        (folder / name).write_bytes(b"\0\xff litter")


def test_files_that_a_run_did_not_write_are_no_reason_to_refuse(run: Run) -> None:
    """Before it starts, among its data, and when it is resumed. A file that would be read still is one."""
    for folder in (Path("texts"), Path("run"), Path("run/data")):
        scatter(folder)
    Path("texts/.ipynb_checkpoints").mkdir()
    Path("texts/.ipynb_checkpoints/old.txt").write_text("éèê" * 99)
    Path("sums.txt").rename("texts/sums.txt")
    assert run("texts", TINY, SHORT)[0] == 0
    for path in [Path("run"), *(path for path in Path("run").iterdir() if path.is_dir())]:
        scatter(path)
    status, _, err = run("--resume")
    assert status == 0 and load("run").config.vocab == 13, err
    Path("run/step-2/special_tokens_map.json").write_text("{}")
    assert run("--resume")[0] == 2


# ---- Samples ---------------------------------------------------------------------------------------------------------


def test_nothing_cuts_within_a_sampled_text(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step stands once after a resume. What an older version has written stays as it is."""
    texts = [f"---- step {n} ----\nétude\u2028\x85\r\n" for n in (1, 99)]
    monkeypatch.setattr(loop, "sample", lambda run, params: texts[0] + texts[1])
    with monkeypatch.context() as patch:
        original, calls = loop.train_step, list[int]()

        def until(*arguments: Any) -> Any:
            calls.append(1)
            return killed() if len(calls) == 9 else original(*arguments)

        patch.setattr(loop, "train_step", until)
        with pytest.raises(Killed):
            run("sums.txt", TINY.replace("--sample 0", ""), "--steps 12 --eval-every 4 --keep 9")
    Path("run/samples.txt").write_text("---- step 99 ----\nold\n\n")
    assert run("--resume step-4")[0] == 0
    found = [json.loads(line) for line in Path("run/samples.jsonl").read_text().splitlines()]
    assert found == [{"step": step, "text": texts[0] + texts[1]} for step in (4, 8, 12)]
    assert Path("run/samples.txt").read_text() == "---- step 99 ----\nold\n\n"


# ---- From elsewhere --------------------------------------------------------------------------------------------------


def test_a_run_resumes_from_another_folder(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its data, the model that it began with, and that one's tokenizer."""
    assert run("sums.txt", TINY, SHORT, "--out first")[0] == 0
    more = f"--batch 4 --ctx 8 --sample 0 {SHORT}"
    assert run("sums.txt --init-from first/best --tokenizer first/best --out second", more)[0] == 0
    options = json.loads(Path("second/run.json").read_text())["options"]
    named = [*options["data"], options["init_from"], options["tokenizer"]]
    assert named == [os.path.abspath(name) for name in ("sums.txt", "first/best", "first/best")]
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert run("--resume --out ../second --steps 3 --warmup 0 --allow steps")[0] == 0


def test_a_mesh_of_other_devices_says_what_there_is(run: Run) -> None:
    status, _, err = run("sums.txt", TINY, "--mesh tensor=64")
    assert status == 2 and f"--mesh data={jax.device_count()}" in err[-1]


def test_a_run_is_its_best_model(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Where it has none yet, the checkpoints that it has are named."""
    assert run("sums.txt", TINY, SHORT)[0] == 0
    jax.tree.map(np.testing.assert_array_equal, load("run").params, load("run/best").params)
    for command in (
        "inspect M",
        "tokenize show 1+1 --model M",
        "generate 1 --model M --max-new 2 --temperature 0 --quiet",
    ):
        said = list[str]()
        for model in ("run", "run/best"):
            assert main(command.replace("M", model).split()) == 0, command
            said.append(capsys.readouterr().out)
        assert said[0] == said[1] != ""
    Path("run/best").unlink()
    Path("run/step-10").mkdir()
    says = "run: path: got a run without a best model yet, expected step-1 or step-2 or step-10 in it"
    assert main(["inspect", "run"]) == 2 and capsys.readouterr().err == f"error: {says}\n"


def test_no_link_leads_out_of_a_run(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither when it is resumed nor when it is read as a model; its own, from best to a step, is followed."""
    assert run("sums.txt", TINY, SHORT)[0] == 0
    for moved, link, command in (
        ("run.json", "run.json", "train --resume --out run"),
        ("step-2/state.json", "step-2/state.json", "train --resume --out run"),
        ("step-2/optimizer.safetensors", "step-2/optimizer.safetensors", "train --resume --out run"),
        ("step-2", "best", "inspect run"),
    ):
        path, elsewhere = Path("run", moved), Path("elsewhere").absolute()
        path.rename(elsewhere)
        Path("run", link).unlink(missing_ok=True)
        Path("run", link).symlink_to(elsewhere)
        assert main(command.split()) == 2
        assert f"{link}: path: got a link to {elsewhere}" in capsys.readouterr().err
        Path("run", link).unlink()
        elsewhere.rename(path)
