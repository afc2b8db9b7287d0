"""`plan`: the compiler's figures agree with what is known of a step; what cannot be planned is refused in one line."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from builders import TINY, write_talker

from lovely_llama import CONFIGS, Config, count
from lovely_llama_tools.commands import main
from lovely_llama_tools.planning.chips import CHIPS, links, parse_chips
from lovely_llama_tools.planning.estimates import Share, Task, computed_flops, meshes, model_flops

ROOT = Path(__file__).resolve().parents[3]
LIBTPU = ROOT / ".venv" / "tpu" / "libtpu" / "libtpu.so"
SMALL = CONFIGS["stories260k"]
CPU = ("plan", "stories260k", "--chips", "cpu:8", "--mesh", "data=2,fsdp=2,tensor=2", "--batch", "8", "--seq", "64")


@pytest.fixture(scope="module")
def tpu() -> Any:
    """libtpu, which `./dev test` installs where jax does not find it by itself."""
    assert LIBTPU.exists(), ".venv/tpu is missing: run ./dev test"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_LIBRARY_PATH", str(LIBTPU))
        yield


def planned(capfd: pytest.CaptureFixture[str], *arguments: object) -> Any:
    """What a command prints as JSON, and nothing on stderr, by whatever process."""
    status = main([*map(str, arguments), "--json"])
    out, err = capfd.readouterr()
    assert (status, err) == (0, "")
    return json.loads(out)


def gains(config: Config) -> int:
    return (2 * config.layers + 1) * config.dim


def on_a_device(config: Config, fsdp: int, tensor: int) -> float:
    """Parameters of a device: matrices are divided by both axes, the gains of norms, of one axis, by fsdp alone."""
    return (count(config) - gains(config)) / (fsdp * tensor) + gains(config) / fsdp


# ---- What is planned -------------------------------------------------------------------------------------------------


def test_a_training_step_on_a_cpu(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments are the float32 weights, two moments and a counter, a rate, and the tokens and targets of a row."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
    report = planned(capfd, *CPU)
    weights = 4 * on_a_device(SMALL, 2, 2)
    assert report["fits"] and report["held"] == {
        "weights": weights,
        "moments": 2 * weights + 4,
        "tokens": 2 * 2 * 64 * 4,
    }
    assert report["arguments"] == pytest.approx(sum(report["held"].values()), abs=64)
    assert report["peak"] >= report["arguments"] + report["gradients"] and report["gradients"] == weights
    assert {one["times"] for one in report["collectives"]} >= {1, SMALL.layers}
    assert report["model_flops"] == 8 * 64 * (6 * (count(SMALL) - gains(SMALL)) + 12 * 5 * 8 * 8 * 64)
    assert not {"seconds", "bound", "tokens_per_second"} & report.keys()  # there is no data sheet


def test_the_text_says_where_figures_are_from(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """For a checkpoint, of which no tensor is read, and in decoding."""
    path = write_talker(tmp_path / "talker.gguf")
    options = ("--chips", "cpu:2", "--mesh", "data=2", "--batch", 4, "--seq", 32, "--decode", "--dtype", "float32")
    assert main(["plan", str(path), *map(str, options)]) == 0
    out, err = capfd.readouterr()
    rows = {name: cells for line in out.splitlines()[2:] for name, *cells in [re.split("  +", line.strip())]}
    assert not err and out.startswith(f"{path}, decoding one token for 4 sequences of 32, cpu:2, data=2\n")
    cache = 2 * TINY.layers * 4 * TINY.kv_heads * 32 * TINY.head_dim * 4 / 2
    assert rows["cache"] == [f"{cache / 1024:.4g} KiB", "shardings"]
    assert rows["peak"][-1] == "compiler" and rows["model FLOPs, all"][-1] == "formula"


def test_a_sweep_ranks_the_meshes_that_divide(capfd: pytest.CaptureFixture[str]) -> None:
    """Two devices cannot divide three rows among them, but the heads; and the weights, which would have to be sent."""
    options = ("--chips", "cpu:2", "--sweep", "--batch", "3", "--seq", "16", "--decode")
    assert main(["plan", "stories260k", *options]) == 0
    out, err = capfd.readouterr()
    assert not err
    first, second = (
        part.splitlines() for part in out.split("\n\nBy formula: the best 1 of 1, per device and step.\n\n")
    )
    for (head, row, *_), what in ((first, "held"), (second, "peak")):
        assert re.split("  +", head)[:3] == ["mesh", "fits", what] and re.split("  +", row)[:2] == ["tensor=2", "yes"]
    assert second[-1].startswith("Compiled: the best 1 by formula. All 2 devices share this machine's memory, ")


def test_a_sweep_says_at_once_what_formulas_say(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a terminal there is a bar before the first mesh has been compiled; as JSON there is nothing else."""
    said = list[tuple[str, str]]()

    def compiling(*_: object) -> Any:
        said.append(capsys.readouterr())
        raise ChildProcessError("no compiler")

    monkeypatch.setattr("lovely_llama_tools.commands.plan.planned", compiling)
    sweep = ["plan", "stories260k", "--chips", "v5e:4x4", "--sweep", "--batch", "16", "--seq", "64"]
    assert main(sweep) == 1
    capsys.readouterr()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main([*sweep, "--json"]) == 1
    (out, err), (json_out, bar) = said
    assert not err and out.splitlines()[0].split() == ["mesh", "fits", "held", "sent", "seconds"]
    assert "\n\nBy formula: the best 12 of " in out and out.count("\n") == 16
    assert not json_out and bar.startswith("\rcompiling:   0%") and "0/4" in bar


def test_devices_of_a_cpu_share_its_memory(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """What each of them needs fits, and what all of them need does not."""
    argv = ("plan", "stories260k", "--chips", "cpu:2", "--mesh", "data=2", "--batch", "2", "--seq", "8", "--decode")
    peak = planned(capfd, *argv)["peak"]
    monkeypatch.setattr("lovely_llama_tools.planning.plans.capacity", lambda part: 1.5 * peak)
    report = planned(capfd, *argv)
    assert not report["fits"] and report["together"] == 2 * peak
    assert main([*argv]) == 0
    out = capfd.readouterr().out
    assert "\n\n2 devices share this machine's memory\n\n" in out
    assert re.search(r"fits +no .*\nmemory, of all devices .*\npeak .*\npeak of 2 devices ", out)


def test_a_training_step_on_chips_that_are_not_there(tpu: None, capfd: pytest.CaptureFixture[str]) -> None:
    """By the TPU's own compiler. What it computes is what the model requires, and once more what is not kept."""
    report = planned(
        capfd, "plan", "stories260k", "--chips", "v5e:2x2", "--mesh", "fsdp=2,tensor=2", "--batch", 8, "--seq", 256
    )
    assert report["fits"] and report["capacity"] == 16 * 2**30
    assert report["arguments"] <= report["peak"] < 1e9
    assert report["held"]["weights"] == 4 * on_a_device(SMALL, 2, 2)
    assert {"all-gather", "all-reduce"} <= {one["kind"] for one in report["collectives"]}
    assert {one["group"] for one in report["collectives"]} <= {2, 4}
    assert SMALL.layers in {one["times"] for one in report["collectives"]}
    task = Task(SMALL, 8, 256, False, "bfloat16", "nothing")
    assert report["sources"]["flops"] == "compiler" and report["flops"] * 4 == pytest.approx(
        computed_flops(task), rel=0.02
    )
    times = report["seconds"]
    assert times["compute"] == pytest.approx(report["flops"] / 197e12)
    assert times[report["bound"]] == max(times.values())
    assert report["tokens_per_second"] == pytest.approx(8 * 256 / max(times.values()))
    assert report["utilisation"] == pytest.approx(report["model_flops"] / max(times.values()) / (4 * 197e12))


def test_what_does_not_fit_is_an_answer(tpu: None, capfd: pytest.CaptureFixture[str]) -> None:
    options = ("--chips", "v5e:2x2", "--mesh", "tensor=4", "--batch", 2**21, "--seq", 512, "--decode")
    report = planned(capfd, "plan", "stories260k", *options)
    assert not report["fits"] and "exceeds available HBM (15.75G)" in report["reason"]
    assert report["held"]["cache"] == 2 * 5 * 2**21 * 512 * 8 * 2
    assert "peak" not in report


# ---- What is refused -------------------------------------------------------------------------------------------------

BASE = {"model": "stories260k", "--chips": "cpu:8", "--mesh": "fsdp=4,tensor=2", "--batch": 8, "--seq": 64}
REFUSED = {
    "a name of no model": ({"model": "llama-9"}, "path"),
    "a chip that does not exist": ({"--chips": "v9:4x4"}, "chips"),
    "no shape": ({"--chips": "v5e"}, "chips"),
    "a shape of no chips": ({"--chips": "v5e:0x4"}, "chips"),
    "a torus of too few axes": ({"--chips": "v5p:4x4"}, "chips"),
    "more chips than a slice has": ({"--chips": "v5e:32x32"}, "chips"),
    "no mesh": ({"--mesh": None}, "mesh"),
    "an axis that does not exist": ({"--mesh": "pipeline=8"}, "mesh"),
    "a mesh of fewer devices": ({"--mesh": "fsdp=4"}, "mesh"),
    "a mesh and a sweep": ({"--sweep": True}, "mesh"),
    "a batch that does not divide": ({"--batch": 6}, "batch"),
    "no rows": ({"--batch": 0}, "batch"),
    "tokens that do not divide": ({"--mesh": "fsdp=2,seq=4", "--seq": 66}, "ctx"),
    "more tokens than the context": ({"--seq": 513}, "seq"),
    "tokens of a row in decoding": ({"--mesh": "fsdp=2,seq=4", "--decode": True}, "mesh"),
    "no mesh that divides": ({"--mesh": None, "--sweep": True, "--batch": 7, "--chips": "cpu:11"}, "mesh"),
}


def words(options: dict[str, Any]) -> list[str]:
    """A command line."""
    given = {name: value for name, value in options.items() if value is not None and name != "model"}
    named = [text for name, value in given.items() for text in ([name] if value is True else [name, str(value)])]
    return ["plan", options["model"], *named]


def refusal(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which a command ends."""
    assert main([*arguments]) == 2
    out, err = capfd.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_planned_is_refused(case: str, capfd: pytest.CaptureFixture[str]) -> None:
    changes, field = REFUSED[case]
    assert f": {field}: got " in refusal(capfd, *words(BASE | changes))


def test_a_model_that_does_not_divide(capfd: pytest.CaptureFixture[str]) -> None:
    """Neither four key/value heads nor the two queries of each have a factor of 8: their name is said."""
    assert "mesh: q_per_kv: got 2" in refusal(capfd, *words(BASE | {"--mesh": "tensor=8"}))


def test_a_vocabulary_that_does_not_divide(capfd: pytest.CaptureFixture[str]) -> None:
    """What would."""
    line = refusal(capfd, *words(BASE | {"--chips": "cpu:3", "--mesh": "tensor=3", "--batch": 3}))
    assert "mesh: vocab: got 512, expected a multiple of 3, such as 513 (--vocab pads a new model's), or a mesh" in line


def test_a_shape_that_libtpu_refuses(tpu: None, capfd: pytest.CaptureFixture[str]) -> None:
    line = refusal(capfd, *words(BASE | {"--chips": "v5e:3x3", "--mesh": "data=9", "--batch": 9}))
    assert line.startswith("error: arguments: chips: got v5e:3x3, expected a shape that libtpu knows")


@pytest.mark.parametrize(
    ("library", "line"),
    [
        (None, "environment: libtpu: got no such package, expected it: pip install 'jax[tpu]'"),
        ("nowhere.so", "environment: TPU_LIBRARY_PATH: got nowhere.so, expected libtpu.so"),
        (__file__, f"environment: libtpu: got Failed to open {__file__}: {__file__}: "),
    ],
)
def test_without_libtpu(
    library: str | None, line: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    if library:
        monkeypatch.setenv("TPU_LIBRARY_PATH", library)
    options = {"--chips": "v5e:2x2", "--mesh": "fsdp=2,tensor=2"}
    assert refusal(capfd, *words(BASE | options)).startswith(f"error: {line}")


def compilers(process: int) -> list[int]:
    """The compilers that a process has started, which may start other programs too."""
    started = [int(n) for n in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    return [one for one in started if b"lovely_llama_tools.planning.compiling" in command_line(one)]


def test_the_compiler_ends_with_its_command() -> None:
    """And a command says in a line when its compiler was ended."""
    ends = list[tuple[int, str]]()
    for ended in ("command", "compiler"):
        process = subprocess.Popen(
            [sys.executable, "-m", "lovely_llama_tools", *CPU], stderr=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        while not (compiler := compilers(process.pid)):
            time.sleep(0.1)
        os.kill(process.pid if ended == "command" else compiler[0], signal.SIGKILL)
        _, err = process.communicate()
        ends.append((process.returncode, err))
        while Path(f"/proc/{compiler[0]}").exists() and "\nState:\tZ" not in state(compiler[0]):
            time.sleep(0.1)
    line = "error: the compiler ended with status -9; --debug shows what it printed\n"
    assert ends == [(-signal.SIGKILL, ""), (1, line)]


def command_line(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


def state(process: int) -> str:
    try:
        return Path(f"/proc/{process}/status").read_text()
    except OSError:
        return "\nState:\tZ"


# ---- Formulas --------------------------------------------------------------------------------------------------------


def test_flops_of_a_published_model() -> None:
    """Llama 3.1 405B took 3.8e25 operations for 15.6e12 tokens in rows of 8,192: arXiv:2407.21783, §3.2 and §3.4."""
    task = Task(CONFIGS["llama-3.1-405b"], 1024, 8192, False, "bfloat16", "nothing")
    assert model_flops(task) * 15.6e12 / task.tokens == pytest.approx(3.8e25, rel=0.1)


def test_a_share_of_all_is_all() -> None:
    """What one device of a mesh holds is the whole, divided by those that divide it."""
    task = Task(CONFIGS["llama-3.2-1b"], 16, 2048, False, "bfloat16", "dots")
    whole, part = Share(task, {}), Share(task, {"fsdp": 4, "tensor": 2})
    assert part.weights * 8 == whole.weights == count(task.config) and part.tokens * 4 == whole.tokens == task.tokens
    assert part.logits * 8 == whole.logits and whole.sent == 0 < part.sent


def test_every_mesh_of_a_number_of_devices() -> None:
    found = list(meshes(8))
    assert len(found) == len({tuple(sizes.items()) for sizes in found}) == 20  # three factors of 2 among four axes
    assert {math.prod(sizes.values()) for sizes in found} == {8}


@pytest.mark.parametrize(
    ("chips", "coordinates", "count"),
    [
        ("v5e:4x4", [(0, 0, 0), (1, 0, 0)], 1),
        ("v5e:4x4", [(i, 0, 0) for i in range(4)], 1),  # a line: only 16 close to a ring
        ("v5e:16x16", [(i, 0, 0) for i in range(16)], 2),
        ("v5p:8x8x8", [(i, j, 0) for i in range(8) for j in range(8)], 4),
        ("v5p:8x8x8", [(i, 0, 0) for i in range(4)], 1),
        ("tpu7x:4x4x4", [(0, 0, 0), (0, 0, 0)], 0),  # two devices of a chip
    ],
)
def test_links_to_reach_a_group(chips: str, coordinates: list[tuple[int, ...]], count: int) -> None:
    assert links(parse_chips(chips), coordinates) == count


def test_slices_have_the_devices_that_jax_sees() -> None:
    assert [parse_chips(text).devices for text in ("v5e:4x4", "v5p:16x16x16", "tpu7x:2x2x1", "cpu:8")] == [
        16,
        4096,
        8,
        8,
    ]
    assert all(chip.memory / chip.devices >= 16e9 for chip in CHIPS.values())
