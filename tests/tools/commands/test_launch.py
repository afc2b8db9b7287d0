"""Processes that train one model: how they are started, watched and ended; and that together they train as one does."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from small_runs import assert_same, hasten, rows, words, write_sums
from soak import QUICK

from lovely_llama import LlamaError
from lovely_llama_tools.commands import main
from lovely_llama_tools.data.prepare import prepare
from lovely_llama_tools.devices import processes as children
from lovely_llama_tools.devices.cluster import ADDRESS, COUNT, INDEX, environments, place, several
from lovely_llama_tools.devices.processes import Watch, watched
from lovely_llama_tools.interrupts import PARENT, taken
from lovely_llama_tools.training.run_folder import steps


@pytest.fixture(autouse=True)
def in_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "GRACE", 0.5)


# ---- The parent, with processes that only play their part ------------------------------------------------------------

PLAYER = f"""
import os, signal, sys, time
def tell(line):
    os.write(int(os.environ["{PARENT}"]), line.encode() + b"\\n")
def heard():
    return os.read(int(os.environ["{PARENT}"]), 1)[0]
def end(number):
    os.kill(os.getpid(), number)
exec(os.environ["PART"])
"""
JOIN = "tell('here'); tell('joined ' + os.environ['INDEX']); "
WORK = JOIN + "time.sleep(100)"


def play(*parts: str, wait: float = 25.0) -> int:
    """Processes with these parts."""
    return watched(
        [sys.executable, "-I", "-S", "-c", PLAYER],
        [{"PART": part, "INDEX": str(i)} for i, part in enumerate(parts)],
        wait,
    )


def ends_in(capfd: pytest.CaptureFixture[str], line: str, *parts: str, wait: float = 25.0) -> None:
    """The parent says this about processes with these parts, and leaves none behind."""
    with pytest.raises(ChildProcessError) as caught:
        play(*parts, wait=wait)
    assert str(caught.value) == f"launch: {line}"
    assert capfd.readouterr() == ("", "")


def test_only_process_0_is_heard(capfd: pytest.CaptureFixture[str]) -> None:
    """And all have ended when the parent does."""
    say = JOIN + "print('mine'); print('too', file=sys.stderr)"
    assert play(say, say, say + "; time.sleep(0.3)") == 0
    assert capfd.readouterr() == ("mine\n", "too\n")


def test_one_that_is_killed_ends_all(capfd: pytest.CaptureFixture[str]) -> None:
    for parts in ((WORK, JOIN + "end(9)"), (WORK, "end(9)"), (WORK, WORK, JOIN + "end(9)")):
        line = f"process {len(parts) - 1}: got signal 9, expected status 0; --resume goes on"
        ends_in(capfd, line, *parts)
    ends_in(capfd, "process 0: got status 7, expected status 0; --resume goes on", JOIN + "sys.exit(7)", WORK)


def test_who_is_killed_is_to_blame_before_those_whom_that_ends(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runtime aborts them, or they say that they lost a connection, perhaps before the parent has looked."""
    run = Watch.run
    monkeypatch.setattr(Watch, "run", lambda watch: (time.sleep(1), run(watch)))
    line = "process 1: got signal 9, expected status 0; --resume goes on"
    ends_in(capfd, line, JOIN + "tell('1 error: connection lost'); sys.exit(1)", JOIN + "end(9)")
    ends_in(capfd, line, JOIN + "end(6)", JOIN + "end(9)")


def test_one_that_no_longer_answers(capfd: pytest.CaptureFixture[str]) -> None:
    """The runtime aborts those that wait for it, not itself."""
    line = "process 0: got signal 6, of itself or for want of an answer by process 1, expected status 0"
    ends_in(capfd, line + "; --resume goes on", JOIN + "end(6)", WORK)


def test_a_line_of_one_or_of_all_is_shown_once(capfd: pytest.CaptureFixture[str]) -> None:
    say = "tell('2 error: data: path: got no such file, expected a file'); "
    refuse, aborted = say + "sys.exit(2)", say + "end(6)"  # by the runtime
    for parts in ((refuse, refuse), (WORK, refuse), (refuse, WORK), (JOIN + refuse, JOIN + refuse), (JOIN + aborted,)):
        assert play(*parts) == 2
        assert capfd.readouterr() == ("", "error: data: path: got no such file, expected a file\n")
    assert play(WORK, JOIN + "tell('1 error: no space'); sys.exit(1)") == 1
    assert capfd.readouterr() == ("", "error: no space\n")


def test_one_that_never_comes_or_never_ends(capfd: pytest.CaptureFixture[str]) -> None:
    line = "process 1: got no word in 1 seconds, expected it to join the others"
    ends_in(capfd, line, "tell('here'); time.sleep(100)", "time.sleep(100)", wait=1.0)
    ends_in(capfd, line, WORK, "tell('here'); time.sleep(100)", wait=1.0)
    ends_in(capfd, "process 1: got no end within 1 seconds of process 0's, expected one", JOIN, WORK, wait=1.0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_passed_on(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    """To all; and they may take their time to save."""
    save = JOIN + "n = heard(); time.sleep(0.3); print(n); sys.exit(128 + n)"
    threading.Timer(0.5, taken, [number]).start()
    assert play(save, save) == 128 + number
    assert capfd.readouterr() == (f"{int(number)}\n", "")


def test_a_second_signal_ends_all() -> None:
    """And the parent, whose process ends where a signal is not taken."""
    took = list[bool]()
    for seconds in (0.5, 0.6):
        threading.Timer(seconds, lambda: took.append(taken(signal.SIGINT))).start()
    with pytest.raises(ChildProcessError):
        play(WORK, WORK)
    assert took == [True, False]


def test_environments() -> None:
    """Each process has its number, and devices of its own."""
    found = environments(3, 2)
    assert [place["JAX_PROCESS_ID"] for place in found] == ["0", "1", "2"]
    assert [place["JAX_LOCAL_DEVICE_IDS"] for place in found] == ["0,1", "2,3", "4,5"]
    assert len({place["JAX_COORDINATOR_ADDRESS"] for place in found}) == 1
    assert found[0]["JAX_COORDINATOR_BIND_ADDRESS"].startswith("127.0.0.1:")


# ---- What the environment says ---------------------------------------------------------------------------------------

STARTED = {
    "a shell": ({}, False),
    "salloc -n 4": ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, False),
    "srun -n 4": ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}, True),
    "mpirun -n 1": ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
    "mpirun -n 4": ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
    "a pod": ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
    "a pod of a job": ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
    "by hand": ({"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, True),
}


@pytest.mark.parametrize("name", STARTED)
def test_one_of_several_processes_knows_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that is alone does not wait for others, even where there is a scheduler."""
    environment, want = STARTED[name]
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert several() == want
    assert bool(place()) == (name == "by hand")


@pytest.mark.parametrize(
    ("field", "values"),
    {
        "environment": ("host:1", "2", ""), "JAX_NUM_PROCESSES": ("host:1", "two", "1"),
        "JAX_PROCESS_ID": ("host:1", "2", "2"),
    }.items(),
)  # fmt: skip
def test_a_place_that_cannot_be(field: str, values: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip((ADDRESS, COUNT, INDEX), values, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(LlamaError) as caught:
        place()
    assert caught.value.field == field


# ---- Two processes that train ----------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[3]
MODEL = "--layers 1 --dim 8 --heads 2 --hidden-dim 12 --ctx 8 --batch 4 --sample 3 --lr 1e-2 --warmup 2"
SCHEDULE = "--steps 24 --save-every 4 --eval-every 8"
MESH = "--mesh data=2,seq=2"  # each process has half of the rows, and each of its devices half of their tokens


class Runs:
    """Command lines in processes of their own, which share their compiled programs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.text = folder, write_sums(folder / "sums.txt", 60)

    def start(self, *arguments: object, **environment: str) -> "subprocess.Popen[str]":
        own = {"XDG_CACHE_HOME": str(self.folder), "XLA_FLAGS": QUICK, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "lovely_llama_tools", *map(str, arguments)],
            env=os.environ | own | environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def launch(self, *arguments: object) -> "subprocess.Popen[str]":
        """Two processes, of two devices each."""
        return self.start("launch", "-n", 2, "--devices-per-process", 2, "--", *words(*arguments))

    def wait_for(self, run: Path, step: int, process: "subprocess.Popen[str]") -> None:
        """Wait for a step of a run."""
        while not any(row["step"] >= step for row in (rows(run) if (run / "metrics.jsonl").exists() else [])):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)


def kill(parent: "subprocess.Popen[str]", number: int) -> None:
    """Kill a process of those that have this parent."""
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    os.kill(int(children[number]), signal.SIGKILL)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A run of two processes that nothing disturbs, in the folder "whole"."""
    runs = Runs(tmp_path_factory.mktemp("runs"))
    process = runs.launch(runs.text, MODEL, SCHEDULE, MESH, "--out", runs.folder / "whole")
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.startswith(f"{runs.folder / 'whole' / 'best'}: validation loss")
    assert err.count("sample: ") == 3 and err.endswith("\n24 steps\n") and "Gloo" not in err
    return runs


def test_two_processes_train_as_one(both: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On several devices; the losses and gradients are those of one process with one device."""
    hasten(monkeypatch)
    assert main(words(both.text, MODEL, SCHEDULE, "--out", tmp_path / "run")) == 0
    for name in ("train_loss", "grad_norm", "val_loss"):
        one, two = (
            [row[name] for row in rows(run) if name in row] for run in (tmp_path / "run", both.folder / "whole")
        )
        np.testing.assert_allclose(two, one, rtol=1e-5)
    assert len(rows(both.folder / "whole")) == 24


@pytest.mark.parametrize("pack", [False, True])
def test_each_reads_its_own_rows_of_a_batch(pack: bool, tmp_path: Path) -> None:
    """The rows of all, which may be divided in any way, are the batch of a single process."""
    text = write_sums(tmp_path / "sums.jsonl" if pack else tmp_path / "sums.txt", 60)
    if pack:
        text.write_text("".join(json.dumps({"text": line}) + "\n" for line in text.read_text().splitlines()))
    split = prepare([str(text)], tmp_path / "data", seq=8, pack=pack).train
    whole = split.batch(3, 5, 6)
    for own in ([0, 1, 2], [1, 4], [5]):
        part = split.batch(3, 5, 6, own)
        assert (part.first is None) != pack
        for mine, all_rows in zip(part, whole, strict=True):
            if all_rows is not None:
                np.testing.assert_array_equal(mine, all_rows[own])


def test_killed_interrupted_and_resumed_they_come_to_the_same_bits(both: Runs) -> None:
    run = both.folder / "run"
    process = both.launch(both.text, MODEL, SCHEDULE, MESH, "--out", run)
    both.wait_for(run, 7, process)
    kill(process, 1)
    out, err = process.communicate()
    line = "error: launch: process 1: got signal 9, expected status 0; --resume goes on"
    assert (process.returncode, out, err.splitlines()[-1]) == (1, "", line)
    assert err.count("error") == 1 and "Traceback" not in err
    process = both.launch("--resume", "--out", run)
    both.wait_for(run, 13, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    last = steps(run)[-1]
    line = f"interrupted after {last} steps; {run / f'step-{last}'} is saved, --resume goes on"
    assert (process.returncode, out, err.splitlines()[-1]) == (143, "", line)
    process = both.launch("--resume", "--out", run)
    process.communicate()
    assert process.returncode == 0
    assert_same(run, both.folder / "whole")


def test_each_must_see_the_folder_of_the_run(both: Runs) -> None:
    """Here they are started by hand, in folders of their own."""
    shared = {ADDRESS: f"127.0.0.1:{57344 + os.getpid() % 4096}", COUNT: "2"}
    arguments = words(both.text, MODEL, "--steps 4 --out")
    tasks = [both.start(*arguments, both.folder / f"own{i}", **shared, **{INDEX: str(i)}) for i in range(2)]
    said = [task.communicate() for task in tasks]
    line = r"error: process 1: out: got another folder, expected \d+, as process 0 has\n"
    assert [task.returncode for task in tasks] == [2, 2] and all(re.fullmatch(line, err) for _, err in said), said
    assert not (both.folder / "own0" / "metrics.jsonl").exists()


def test_a_scheduler_starts_them(both: Runs) -> None:
    """Here one that looks like SLURM. Each process then has a parent of its own, which says how it ended."""
    run, port = both.folder / "scheduled", 61440 + os.getpid() % 4096
    shared = {
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2", "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",
    }  # fmt: skip
    arguments = words(both.text, MODEL, "--steps 9999 --eval-every 9999 --save-every 4", "--out", run)
    tasks = [both.start(*arguments, **shared, SLURM_PROCID=str(i), SLURM_LOCALID=str(i)) for i in range(2)]
    both.wait_for(run, 5, tasks[0])
    kill(tasks[1], 0)
    (out, err), (_, other) = (task.communicate() for task in tasks)
    assert [task.returncode for task in tasks] == [1, 1] and not out
    assert other == "error: launch: process 1: got signal 9, expected status 0; --resume goes on\n"
    assert [line.split()[0] for line in err.splitlines()] == ["data:", "step", "error:"]
    assert err.splitlines()[-1].startswith("error: ") and "***" not in err
