"""The README is true: its commands exist, its examples run, and its parts are the file's."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from bench import BEGIN, END, ROWS
from mutants import MUTANTS

import lovely_llama

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]


@pytest.mark.parametrize("example", EXAMPLES, ids=[example.splitlines()[0] for example in EXAMPLES])
def test_examples_run(example: str) -> None:
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command: str) -> None:
    """`./dev` itself is what runs this test; its other commands and the console script run here."""
    program, *arguments = shlex.split(command)
    if program == "./dev" and not arguments:
        return
    arguments += ["--max-new", "4"] * ("chat" in arguments)  # an answer that is drawn may be as long as the context
    if program == "./dev":
        run = [sys.executable, str(ROOT / "dev"), *arguments]
    else:
        run = [str(Path(sys.executable).with_name(program)), *arguments]
    done = subprocess.run(run, input="Hello\n/bye\n", capture_output=True, text=True, timeout=300, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_parts_are_the_files() -> None:
    rulers = re.findall(r"^# ---- (\d+)\. ", Path(lovely_llama.__file__).read_text(), re.MULTILINE)
    assert re.findall(r"^\| (\d+) \|", README, re.MULTILINE) == ["1", *rulers]


def test_the_faults_are_counted() -> None:
    happened = len([mutant for mutant in MUTANTS if mutant.bug])
    counts = re.search(r"puts (\d+) faults .*?: (\d+) that have .*?\s(\d+) of our own", README, re.DOTALL)
    assert counts and [*map(int, counts.groups())] == [len(MUTANTS), happened, len(MUTANTS) - happened]


def test_every_name_in_backticks_exists() -> None:
    table = README[README.index("## The parts of the file") : README.index("## Not done yet")]
    for name in re.findall(r"`(\w+)`", table):
        assert hasattr(lovely_llama, name), name


def test_the_maths_is_short_and_plain() -> None:
    """Parts 1 to 5: 300 lines at most, blank ones aside, and nothing there but the equations."""
    maths = Path(lovely_llama.__file__).read_text().split("# ---- 6. ")[0]
    assert len([line for line in maths.splitlines() if line.strip()]) <= 300
    assert not re.search("jit|grad|batch", maths)


def test_the_table_of_speed_has_every_row_and_floor() -> None:
    """Its figures are of one machine, on one day; ./dev bench --write makes others."""
    table = README.split(BEGIN)[1].split(END)[0]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.strip().splitlines() if line[:1] == "|"]
    shown = {(work, floor.removesuffix(" **missed**")) for work, _, _, _, _, floor, _ in lines[2:]}
    expected = {(work, floor) for work, (_, floors) in ROWS.items() for floor in floors.values()}
    assert {row for row in shown if row[1] != "–"} == expected, "README.md is stale: run ./dev bench --write"
