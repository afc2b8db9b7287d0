"""The README and docs/ are correct: commands and examples run, names exist, tables and counts are up to date.

Examples run in both environments that `./dev test` makes: .venv, where the project is editable, and .venv/readme, made
by the README's `pip` lines, which has a copy of it. Packages that a section names besides come from .venv for both.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import bench
import catalogue
import formats
import numerics
import numpy as np
import pytest
import scale
import torch
from asserts import assert_close
from mutants import MUTANTS
from soak import QUICK
from test_dev import load_dev

import lovely_llama
from lovely_llama_tools.commands import chat as talk
from lovely_llama_tools.commands import main
from lovely_llama_tools.comparing import properties
from lovely_llama_tools.formats import files

ROOT = Path(__file__).parents[1]
DEV = load_dev()
README = (ROOT / "README.md").read_text()
SECTIONS = re.split(r"^## ", README, flags=re.MULTILINE)
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# ---- The README ------------------------------------------------------------------------------------------------------

# The examples, each with the packages that its section names besides those of the `pip` lines.
EXAMPLES = [
    (example, " ".join(re.findall(r"`pip install ([\w ]+)`", section)).split())
    for section in SECTIONS
    for example in re.findall(r"```python\n(.*?)```", section, re.DOTALL)
]
(VERDICT,) = re.findall(r"```text\n(.*?)```", SECTIONS[0], re.DOTALL)
PRINTED = [
    re.sub(r"\d\\\.\de\\-\d\d", r"\\d\\.\\de-\\d\\d", re.escape(VERDICT)),
    r"260032 \(5, 512\)\n.*Paris.*",
    r"\(5, 64\)\n.*lovely_llama\.rms_norm.*\n",
]


@pytest.fixture(scope="module")
def programs() -> Path:
    """The programs of .venv/readme."""
    assert DEV.readme_mark().exists(), ".venv/readme is missing, or not as the README now says: run ./dev test"
    return DEV.README / "bin"


def run(
    programs: Path, *command: str | Path, cwd: Path, text: str = "", path: str = ""
) -> "subprocess.CompletedProcess[str]":
    """A command that succeeds, in an environment."""
    own = {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": path, "XLA_FLAGS": QUICK}
    env = {**os.environ, **own}
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=300, cwd=cwd, env=env)
    assert done.returncode == 0, done.stderr
    return done


OWN, BESIDES = Path(sys.executable).parent, sysconfig.get_path("purelib")  # .venv's programs and packages


@pytest.mark.parametrize("editable", [True, False], ids=["editable", "copied"])
@pytest.mark.parametrize(
    ("example", "packages", "printed"),
    [(*example, printed) for example, printed in zip(EXAMPLES, PRINTED, strict=True)],
    ids=["diff", "library", "shapes"],
)
def test_examples_run(
    example: str, packages: list[str], printed: str, editable: bool, programs: Path, probe: Path, tmp_path: Path
) -> None:
    """All that an example imports is there, but for the packages that its section names."""
    (tmp_path / "probe").symlink_to(probe)
    imports = {*re.findall(r"^ *(?:from|import) (\w+)", example, re.MULTILINE)} - {*packages}
    run(programs, programs / "python", "-c", f"import {', '.join(imports)}", cwd=tmp_path)
    own, path = (OWN, "") if editable else (programs, BESIDES if packages else "")
    output = run(own, own / "python", "-c", example, cwd=tmp_path, path=path).stdout
    assert re.fullmatch(printed, output, re.DOTALL), output


def test_the_checks_of_a_page_run(tmp_path: Path) -> None:
    section = (ROOT / "docs" / "diff.md").read_text().split("## What holds for any Llama\n")[1]
    (example, *_) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert run(OWN, OWN / "python", "-c", example, cwd=tmp_path).stdout == "the same logits\ncausal\n"


HOOKED = """
import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import TypeCheckError, install_import_hook

with install_import_hook("lovely_llama", "beartype.beartype"):
    import lovely_llama as ll

config = ll.CONFIGS["stories260k"]
params = ll.init(jax.random.key(0), config)
w, x, where = params.blocks[0], jnp.ones((3, 64)), ll.positions(0, 3, config)
(cache, *_) = ll.empty_cache(config, 3, jnp.float32)
for ids in (jnp.arange(3), np.arange(3), np.arange(3, dtype=np.uint16), [0, 1, 2], range(3)):
    assert ll.logits(params, ids, config, first=np.zeros(3, int)).shape == (3, 512)
assert ll.learning_rate(0, 1, 0, 10, 0) == 1 and ll.clip(params, 1)[1] > 0
ll.adamw(params, params, ll.moments(params), 1, 0)
for wrong in (
    lambda: ll.logits(params, np.ones((2, 3), int), config),
    lambda: ll.logits(params, np.ones(3), config),
    lambda: ll.logits(params, np.arange(3), config, first=np.zeros(4, int)),
    lambda: ll.loss(params, np.ones((2, 3), int), np.ones((2, 4), int), config),
    lambda: ll.block(w._replace(attn_norm=jnp.ones(63)), x, cache, where, 1e-5),
    lambda: ll.block(w._replace(ffn=w.ffn._replace(gate=w.ffn.gate.T)), x, cache, where, 1e-5),
    lambda: jax.jit(ll.attention)(w.attn._replace(k=w.attn.k.astype(int)), x, cache, where),
    lambda: ll.logits(params._replace(norm=jnp.ones(63)), np.arange(3), config),
    lambda: ll.logits(params._replace(norm=jnp.ones(64, int)), np.arange(3), config),
):
    try:
        wrong()
    except (TypeCheckError, ll.LlamaError) as error:
        print(type(error).__name__, str(error).splitlines()[0])
"""
REFUSED = """
TypeCheckError Type-check error whilst checking the parameters of lovely_llama.logits.
TypeCheckError Type-check error whilst checking the parameters of lovely_llama.logits.
TypeCheckError Type-check error whilst checking the parameters of lovely_llama.logits.
TypeCheckError Type-check error whilst checking the parameters of lovely_llama.loss.
TypeCheckError Type-check error whilst checking the parameters of lovely_llama.rms_norm.
TypeCheckError Type-check error whilst checking the parameters of lovely_llama.swiglu.
TypeCheckError Type-check error whilst checking the parameters of lovely_llama.attention.<locals>.remember.
LlamaError params: .norm: got (63,), expected (64,)
LlamaError params: .norm: got int32, expected a floating-point dtype
"""


@pytest.mark.parametrize("editable", [True, False], ids=["editable", "copied"])
def test_the_import_hook_checks_what_the_signatures_declare(editable: bool, programs: Path, tmp_path: Path) -> None:
    """Ids of numpy, and fields of the parameters: of a layer by the hook, of a model by name, with or without it."""
    own, path = (OWN, "") if editable else (programs, BESIDES)
    assert run(own, own / "python", "-c", HOOKED, cwd=tmp_path, path=path).stdout == REFUSED.lstrip()


DATA = (ROOT / "docs" / "data.md").read_text()
ROWS = re.findall(r"^\*([\w.]+)\*.*?```json\n(.*?)```", DATA, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("name", "rows"), ROWS, ids=[name for name, _ in ROWS])
def test_examples_of_data_are_seen_as_the_page_shows(
    name: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(rows * 2)
    (command,) = re.findall(r"```sh\nlovely-llama (.*)\n", DATA)
    words = command.replace("messages.jsonl", str(tmp_path / name)).replace("MODEL", str(files.default_model())).split()
    if name == "alpaca.json":  # one array
        (tmp_path / name).write_text(rows)
    more = ["--pack"] if "text" in name else []
    assert main([*words, *more, "--val-fraction", "0"]) == 0
    (shown,) = re.findall(r"```text\n(.*?)```", DATA, re.DOTALL)
    text = "The⟦ sky is blue because of Rayleigh scattering.<|im_end|>⟧" if "text" in name else shown
    assert capsys.readouterr().out.startswith(text.rstrip())


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "./dev"])
def test_commands_run(command: str, programs: Path, tmp_path: Path) -> None:
    """As a shell runs them. `./dev` by itself, which would run this test again, is left out."""
    if command.startswith("pip "):
        assert shlex.split(command)[2:] in [step[:-2] for step in DEV.readme_steps()]  # but for the versions
        return
    script = f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT / 'dev'))}"
    command = re.sub(r"^\./dev", script, command)
    talks = re.search(" (chat|generate) ", command)
    command += " --max-new 4" * bool(talks)  # an answer could otherwise fill the context
    conversation = "/help\nHello\n/bye\n" if "--system" in command else ""
    (tmp_path / "LICENSE").symlink_to(ROOT / "LICENSE")
    done = run(programs, "sh", "-c", command, cwd=tmp_path, text=conversation)
    assert done.stdout.strip()
    assert ("; new 4, " in done.stderr) == bool(talks and "--quiet" not in command)
    assert (talk.HELP in done.stderr) == bool(conversation)


def test_pip_installs_every_module(programs: Path) -> None:
    """`pip` copies the project: each module of this tree has a copy."""
    command = [programs / "python", "-I", "-c", "import lovely_llama; print(lovely_llama.__file__)"]
    copies = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()).parent
    modules = [path.relative_to(ROOT) for path in ROOT.glob("lovely_llama_tools/**/*.py")]
    assert copies != ROOT and modules
    assert not [path for path in modules if not (copies / path).exists()]


def test_the_default_model_is_the_same_everywhere() -> None:
    """In the README, in ./dev, and in what is said where it is missing."""
    line = f"pip install {shlex.join(DEV.SMOLLM2)}"
    assert line in COMMANDS and line in Path(files.__file__).read_text()


def expected_error() -> tuple[float, float]:
    """The figure of docs/numerics.md for a program's logits that the README gives, and the sum for two."""
    figures = re.search(
        r"are (\S+)\s+from\s+float64\s+in\s+either\s+program.*?so\s+(\S+)\s+is\s+rounding", README, re.DOTALL
    )
    assert figures
    return float(figures[1]), float(figures[2])


def test_the_expected_error_is_that_of_the_table() -> None:
    """Within a factor of 2, as the table itself."""
    one, two = expected_error()
    _, table, _ = numerics.split(numerics.PAGE.read_text())
    rows = [line.split("|") for line in table.splitlines() if re.match(r"\| [48] layers ", line)]
    assert len(rows) == 2
    for figure in (float(cell) for row in rows for cell in row[2:4]):
        assert 1 / 2 <= figure / one <= 2
    assert two == pytest.approx(2 * one) and 3 * two < properties.BOUND


def test_a_sampler_is_added_as_described(tmp_path: Path) -> None:
    """A function, a row of the table, a field, limits and help: the command has an option for it, and it acts."""
    source = Path(lovely_llama.__file__).read_text()
    function = "def sparse(logits, n):\n    return jnp.where(jnp.arange(len(logits)) % n, -jnp.inf, logits)\n\n\n"
    for added, before in (
        (function, "def categorical("),
        ('    "sparse": lambda x, _, n: sparse(x, n),\n', "}\n\n\nclass Sampling("),
        ("    sparse: int | None = None\n", "\n    def __call__(self, logits"),
        ('    "sparse": ("from", 1, None),\n', "}\n\n\nclass LlamaError("),
    ):
        assert source.count(before) == 1, before
        source = source.replace(before, added + before)
    (tmp_path / "lovely_llama.py").write_text(source)
    shutil.copytree(ROOT / "lovely_llama_tools", tmp_path / "lovely_llama_tools")
    talk, says = tmp_path / "lovely_llama_tools" / "commands" / "chat.py", '    "min_p": "keep'
    talk.write_text(talk.read_text().replace(says, '    "sparse": "keep every n-th token",\n' + says))
    code = (
        "import jax.numpy as jnp; from lovely_llama import Sampling; from lovely_llama_tools import commands\n"
        "print(Sampling(None, None, None, None, None, sparse=2)(jnp.zeros(4), jnp.zeros(4, bool)))\n"
        "commands.main(['generate', '--help'])"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.stdout.startswith("[  0. -inf   0. -inf]"), done.stderr
    assert re.search(r"--sparse N +keep every n-th token", done.stdout)


def test_the_readme_is_short() -> None:
    """Of words; bars of tables and other marks are none."""
    assert len([word for word in README.split() if re.search(r"\w", word)]) <= 900


def test_the_fault_counts_are_correct() -> None:
    happened = len([mutant for mutant in MUTANTS if mutant.bug])
    counts = re.search(r"puts (\d+) faults into the code, (\d+) of which have happened", README)
    assert counts and [*map(int, counts.groups())] == [len(MUTANTS), happened]


def own_files() -> list[Path]:
    """What the repository consists of, without environments, caches and build outputs."""
    tops = [path for path in ROOT.iterdir() if not re.match(r"\.|build$|.*\.egg-info$", path.name)]
    return [path for top in tops for path in (top, *top.rglob("*")) if "upstream" not in path.parts]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_and_links_exist(page: Path) -> None:
    """Links resolve, and paths and names in backticks exist in the repository; no link leads to a package registry."""
    text, present = page.read_text(), own_files()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (page.parent / link).exists(), link
    registries = r"pypi|pythonhosted|anaconda|conda-forge|npmjs|crates\.io|docs\.rs|rubygems|pkg\.go\.dev"
    for url in re.findall(r"https?://[^\s)>\"]+", text):
        assert not re.search(registries, url), url
    paths = {str(path.relative_to(ROOT)) for path in present}
    code = "".join(path.read_text() for path in present if path.suffix == ".py" and path != Path(__file__))
    for name in re.findall(r"`([\w/.]+)`", text):
        path = name.rstrip("/")
        found = any(f"/{known}".endswith(f"/{path}") for known in paths)
        assert found or re.search(rf"(?<!\w){re.escape(path)}(?!\w)", code), name


def test_every_part_is_listed() -> None:
    rulers = re.findall(r"^# ---- \d+\. ([\w ]+)", Path(lovely_llama.__file__).read_text(), re.MULTILINE)
    listed = re.search(r"eight parts: ([^.]+)\.", README)
    assert listed and [part.strip().lower() for part in rulers] == re.split(r",\s+", listed[1])


# ---- Speed -----------------------------------------------------------------------------------------------------------


def test_the_speed_tables_have_every_row_and_floor() -> None:
    """The figures, from one machine on one day, are not compared; ./dev bench --write updates them."""
    sections = bench.PAGE.read_text().split(bench.BEGIN)[1].split(bench.END)[0].split("\n### ")[1:]
    expected = {(work, floor) for work, (_, floors) in bench.ROWS.items() for floor in floors.values()}
    shown = [{(line[0], line[5].removesuffix(" **missed**")) for line in rows(section)} for section in sections]
    floors = [{(work, floor) for work, floor in section if floor != "–"} for section in shown]
    assert all(section <= expected for section in floors), "docs/performance.md: a row or floor that is no more"
    assert expected in floors, "docs/performance.md is stale: run ./dev bench --write"
    short = README.split(bench.SHORT[0])[1].split(bench.SHORT[1])[0]
    assert [line[0] for line in rows(short)] == [*bench.IN_README]


def rows(markdown: str) -> list[list[str]]:
    """The cells of a table's rows, without its head."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


def test_a_machine_replaces_its_own_section() -> None:
    """Sections of other processors, and of the same with other products, stay as they are."""

    def made(name: str, torch: int, jax: int, row: str) -> str:
        return f"### {name}, matrix products of {torch} GFLOP/s in torch and {jax} in jax\n\n| {row} |"

    page = f"before\n{bench.BEGIN}\n{bench.END}\nafter\n"
    machines = [made("A", 180, 400, "1"), made("A", 130, 130, "2"), made("B", 130, 130, "3")]
    for section in machines:
        page = bench.with_section(page, section)
    assert page == "\n".join(["before", bench.BEGIN, "\n\n".join(machines), bench.END, "after", ""])
    again = made("A", 120, 150, "4")
    assert bench.with_section(page, again) == page.replace(machines[1], again)


# ---- Formats ---------------------------------------------------------------------------------------------------------


def test_the_tables_of_formats_are_up_to_date() -> None:
    _, written, _ = formats.split(formats.PAGE.read_text())
    assert written == formats.table(), "docs/files.md is stale: run ./dev formats --write"


def test_the_catalogue_is_up_to_date() -> None:
    _, written, _ = numerics.split(catalogue.PAGE.read_text(), catalogue.MARKS)
    assert written == catalogue.table(), "docs/diff.md is stale: run ./dev catalogue --write"
    assert f"(docs/diff.md) lists {len(catalogue.BUGS)} bugs" in README


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
    Ours in bfloat16 depend on how XLA fuses products, and are compared for the pinned jaxlib alone.
    """
    pinned = f"jaxlib=={version('jaxlib')}" in (ROOT / "requirements.txt").read_text().split()
    _, written, _ = numerics.split(numerics.PAGE.read_text())
    made = numerics.table(errors)
    stale = "docs/numerics.md is stale: run ./dev numerics --write"
    assert FIGURE.sub("#", written) == FIGURE.sub("#", made), stale
    for then, now in zip(written.splitlines(), made.splitlines(), strict=True):
        for column, a, b in zip(errors, then.split("|")[2:], now.split("|")[2:], strict=False):
            if FIGURE.search(a) and (pinned or column != "bfloat16"):
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


# ---- Scale -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", scale.TABLES)
def test_the_plans_are_those_of_the_command(name: str) -> None:
    """The figures take minutes to compile: ./dev scale --write updates them."""
    begin, end = scale.marks(name)
    table = rows(scale.PAGE.read_text().split(begin)[1].split(end)[0])
    assert [line[:4] for line in table] == [scale.given(row) for row in scale.TABLES[name]]
    assert all(line[4] == "yes" for line in table)
