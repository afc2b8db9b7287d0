"""The README and docs/ are correct: commands and examples run, names exist, tables and counts are up to date."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import bench
import numerics
import numpy as np
import pytest
import torch
from asserts import assert_close
from mutants import MUTANTS

import lovely_llama

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# ---- The README ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("example", EXAMPLES, ids=[example.splitlines()[0] for example in EXAMPLES])
def test_examples_run(example: str) -> None:
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command: str) -> None:
    """Except `./dev` by itself, which would run this test again."""
    program, *arguments = shlex.split(command)
    if program == "./dev" and not arguments:
        return
    arguments += ["--max-new", "4"] * ("chat" in arguments)  # an answer could otherwise fill the context
    if program == "./dev":
        run = [sys.executable, str(ROOT / "dev"), *arguments]
    else:
        run = [str(Path(sys.executable).with_name(program)), *arguments]
    done = subprocess.run(
        run, input="Hello\n/bye\n", capture_output=True, text=True, timeout=300, cwd=ROOT.parent, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= 900


def test_the_fault_counts_are_correct() -> None:
    happened = len([mutant for mutant in MUTANTS if mutant.bug])
    counts = re.search(r"puts (\d+) faults into the code, (\d+) of which have happened", README)
    assert counts and [*map(int, counts.groups())] == [len(MUTANTS), happened]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_and_links_exist(page: Path) -> None:
    """Links resolve, and paths and names in backticks exist in the repository."""
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (page.parent / link).exists(), link
    code = "".join(path.read_text() for path in ROOT.glob("**/*.py") if ".venv" not in path.parts)
    for name in re.findall(r"`([\w/.]+)`", text):
        path, found = name.rstrip("/"), [*ROOT.glob(f"**/{name.rstrip('/')}")]
        assert found or re.search(rf"\b{re.escape(path)}\b", code), name


def test_every_part_is_listed() -> None:
    rulers = re.findall(r"^# ---- \d+\. ([\w ]+)", Path(lovely_llama.__file__).read_text(), re.MULTILINE)
    listed = re.search(r"nine parts, read from the top: ([^|]+) \|", README)
    assert listed and [part.strip().lower() for part in rulers] == listed[1].split(", ")


# ---- Speed -----------------------------------------------------------------------------------------------------------


def test_the_speed_tables_have_every_row_and_floor() -> None:
    """The figures, from one machine on one day, are not compared; ./dev bench --write updates them."""
    table = bench.PAGE.read_text().split(bench.BEGIN)[1].split(bench.END)[0]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.strip().splitlines() if line[:1] == "|"]
    shown = {(work, floor.removesuffix(" **missed**")) for work, _, _, _, _, floor, _ in lines[2:]}
    expected = {(work, floor) for work, (_, floors) in bench.ROWS.items() for floor in floors.values()}
    assert {row for row in shown if row[1] != "–"} == expected, "docs/performance.md is stale: run ./dev bench --write"
    short = README.split(bench.SHORT[0])[1].split(bench.SHORT[1])[0]
    assert [line.split("|")[1].strip() for line in short.splitlines() if line[:1] == "|"][2:] == [*bench.IN_README]


# ---- Numerics --------------------------------------------------------------------------------------------------------

FIGURE = re.compile(r"\d\.\de[+-]\d\d")
Columns = dict[str, dict[str, float]]


@pytest.fixture(scope="module")
def errors() -> Iterator[Columns]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small gain nothing from a second thread
    yield numerics.errors()
    torch.set_num_threads(threads)


def test_the_error_table_is_up_to_date(errors: Columns) -> None:
    """Rows, columns and text are the same, and figures agree within a factor of 2.

    On one machine they are reproducible. Another may sum in a different order and round bfloat16 in other places, but a
    norm over thousands of rounding errors hardly moves: more than a factor of 2 means that the arithmetic has changed.
    """
    _, written, _ = numerics.split(numerics.PAGE.read_text())
    made = numerics.table(errors)
    stale = "docs/numerics.md is stale: run ./dev numerics --write"
    assert FIGURE.sub("#", written) == FIGURE.sub("#", made), stale
    for then, now in zip(written.splitlines(), made.splitlines(), strict=True):
        for a, b in zip(FIGURE.findall(then), FIGURE.findall(now), strict=True):
            assert 1 / 2 <= float(a) / float(b) <= 2, f"{stale}: got {now}, expected {then}"


@pytest.mark.parametrize("row", [*numerics.FUNCTIONS, *numerics.DEPTHS])
def test_float32_is_close(row: str, errors: Columns) -> None:
    """A few rounding errors of 2⁻²⁴ = 6e-8 and, where pairs are rotated, those of angles of up to 300 radians."""
    assert errors["float32"][row] < (3e-6 if row in numerics.DEPTHS else 1.5e-6)


@pytest.mark.parametrize("row", ["rms_norm", "rope", "softmax", "attend", "silu"])
def test_bfloat16_is_rounded_once(row: str, errors: Columns) -> None:
    """With float32 inside, only the result is rounded: a relative error of at most 2⁻⁸, and half of that on average."""
    assert errors["bfloat16"][row] < 2**-9


def test_the_float64_reference(x64: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is float64 throughout, to the last digits: transformers agrees, once its float32 is replaced by float64."""
    for name in ("float", "float32"):
        monkeypatch.setattr(torch, name, torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    given = numerics.widen(numerics.draw("float32"))
    ours, theirs = numerics.ours(given), numerics.theirs(given, torch.float64)
    assert {str(result.dtype) for result in ours.values()} == {"float64"}
    assert ours.keys() - theirs.keys() == {"softmax"}
    assert_close({row: ours[row] for row in theirs}, theirs, 1e-13)
    exact = np.exp(np.asarray(given.scores, np.longdouble))
    assert_close(ours["softmax"], exact / exact.sum(axis=1, keepdims=True), 1e-15, "softmax")
