"""Public Llamas held against the reference: the tables of docs/conformance.md.

    ./dev conformance               run all programs, each in an environment of its own under .venv, and write the page
    ./dev conformance PROGRAM ...   run only some, and write their rows; with VERBOSE=1 all that they print is shown

Programs are conformance/run_PROGRAM.py: what is installed, and how it loads, computes logits and decodes. Where one has
been found to differ, conformance/finding_PROGRAM_WHAT.py says in what and where, and holds the cure; run by itself in
that environment it prints both numbers.
"""

import argparse
import ast
import datetime
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from machine import processor
from numerics import split

from lovely_llama import Config, Params, RopeScaling, cross_entropy, logits
from lovely_llama_tools import Model, diff, save
from lovely_llama_tools.comparing.candidates import SAME, candidates_of, distance, renumbered
from lovely_llama_tools.comparing.golden import CORPUS, VOCAB, Probe, parameters
from lovely_llama_tools.comparing.judging import NEAR
from lovely_llama_tools.tokens.training import train_sentencepiece

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "conformance.md"
README = ROOT / "README.md"
FOLDER = Path(__file__).with_suffix("")
ENVIRONMENTS = ROOT / ".venv" / "conformance"
MARKS = {name: (f"<!-- {name} -->\n", f"<!-- /{name} -->") for name in ("table", "findings", "conformance")}
ALONE = {  # for programs: nothing from the hub, no accelerator, no packages but those of the two environments
    "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "PYTHONNOUSERSITE": "1",
    "PYTHONPATH": "",
}  # fmt: skip
LIMIT = 900  # seconds that installing or running may take

PLAIN = Config(VOCAB, 96, 4, 2, 3, 16, 220, 512, 3e-5, 7e3, None, False)
YARN = RopeScaling("yarn", 8.0, 64, 1.0, 32.0, 0.1 * math.log(8.0) + 1)
CONFIGS = {
    "plain": PLAIN,
    "head_dim": replace(PLAIN, head_dim=20),  # 6 heads of it are not dim
    "tied": replace(PLAIN, tied=True),
    "llama3": replace(PLAIN, theta=9e2, rope_scaling=RopeScaling("llama3", 8.0, 64, 1.0, 4.0)),
    "linear": replace(PLAIN, rope_scaling=RopeScaling("linear", 4.0)),
    "yarn": replace(PLAIN, theta=9e2, rope_scaling=YARN),
}
SPELLINGS = {"rope_theta": ("rope_parameters",), "rope_parameters": ("rope_theta", "rope_scaling")}  # what is left out


class Check(NamedTuple):
    """What is asked of a program, on a checkpoint."""

    name: str
    how: str  # "whole", "cache" or "gradient"
    prompt: int  # ids
    dtype: str = "float32"


ALWAYS = (Check("40", "whole", 40), Check("300", "whole", 300), Check("cache", "cache", 40))
SLOW = ("cache", "gradient")  # which tell nothing more about a cause
PLAINLY = (
    Check("bfloat16", "whole", 40, "bfloat16"), Check("bfloat16 300", "whole", 300, "bfloat16"),
    Check("gradient", "gradient", 40),
)  # fmt: skip
COLUMNS = {
    "40 ids": ("plain", "40"), "300 ids": ("plain", "300"), "its cache": ("plain", "cache"),
    **{name: (name, "40", "300", "cache") for name in CONFIGS if name != "plain"},
    "bfloat16": ("plain", "bfloat16", "bfloat16 300"), "gradient": ("plain", "gradient"),
}  # fmt: skip
SHOWN = ("litgpt", "mlx-lm", "node-llama-cpp")  # rows of the README, and their columns
BRIEFLY = ("program", "version", "40 ids", "its cache", "head_dim", "llama3", "yarn")
Key = tuple[str, str, str]  # the spelling, the checkpoint and the check


class Cell(NamedTuple):
    """How far a program is from the reference, or why that is not known."""

    multiple: float  # of the rounding that is to be expected; NaN: it refused
    says: str = ""

    def __str__(self) -> str:
        if math.isnan(self.multiple):
            return "refused"
        return f"{self.multiple:.1f}" if self.multiple <= NEAR else f"**{self.multiple:.0e}**"


class Outcome(NamedTuple):
    """What a program computed."""

    version: str
    cells: dict[Key, Cell]
    rows: dict[Key, Any]


class Program(NamedTuple):
    """A row: `run_NAME.py`, and the findings about it."""

    name: str
    why: str  # what keeps it from being run
    install: tuple[str, ...]
    log_probabilities: bool  # which it gives for logits
    findings: dict[str, dict[str, Any]]  # by the name of the module


# ---- Checkpoints, and what is right ----------------------------------------------------------------------------------


class Reference:
    """The checkpoints, and how far somebody's numbers are from the right ones."""

    def __init__(self, folder: Path) -> None:
        tokenizer = train_sentencepiece([CORPUS * 3], VOCAB)
        self.models = dict[str, Model]()
        self.folders = dict[tuple[str, str], Path]()
        for seed, (name, config) in enumerate(CONFIGS.items()):
            self.models[name] = Model(config, parameters(Probe(config, seed)), tokenizer)
            for spelling, without in SPELLINGS.items():
                self.folders[spelling, name] = path = folder / spelling / name
                path.parent.mkdir(parents=True, exist_ok=True)
                save(self.models[name], path)
                save(self.models[name], path.with_suffix(".gguf"))
                stated = json.loads((path / "config.json").read_text())
                for rope in (stated["rope_scaling"] or {}, stated["rope_parameters"]):
                    rope.pop("attention_factor", None)  # the usual one, which published configs do not state
                stated = {field: value for field, value in stated.items() if field not in without}
                (path / "config.json").write_text(json.dumps(stated, indent=2))
        self.prompts = {length: prompt(length) for length in (40, 300)}
        self.gradients = dict[str, tuple[Any, Any]]()

    def cell(self, name: str, check: Check, theirs: Any, log_probabilities: bool) -> Cell:
        """Their error as a multiple of the rounding that is to be expected."""
        if check.how == "gradient":
            right, again = self.gradient(name)
            return Cell(float(np.linalg.norm(theirs - right) / np.linalg.norm(again - right)))
        known = np.ones((check.prompt, VOCAB), bool) if log_probabilities else None
        found = candidates_of(self.models[name], self.prompts[check.prompt], check.dtype, known)
        if theirs.shape != (check.prompt, VOCAB):
            return Cell(math.nan, f"logits of shape {theirs.shape}")
        if not np.isfinite(theirs).all():
            return Cell(math.inf)
        return Cell(distance(found.cut(theirs), found.right).whole / found.noise(SAME).whole)

    def gradient(self, name: str) -> tuple[Any, Any]:
        """The gradient with respect to the embedding, and another one that differs by rounding alone."""
        if name not in self.gradients:
            config, ids = self.models[name].config, self.prompts[40]
            order = np.random.RandomState(0).permutation(config.dim)

            def loss(params: Params) -> Any:
                return cross_entropy(logits(params, ids[:-1], config), ids[1:]).mean()

            params = jax.tree.map(jnp.asarray, self.models[name].params)
            right = jax.grad(loss)(params).embed
            again = jax.grad(loss)(renumbered(params, order, np.arange(config.hidden_dim))).embed
            self.gradients[name] = np.asarray(right), np.asarray(again)[:, np.argsort(order)]
        return self.gradients[name]


def prompt(length: int) -> Any:
    """Ids with 0 among them."""
    ids = np.random.RandomState(length).randint(1, VOCAB, length)
    ids[[5, 11, 33]] = 0
    return ids.astype(np.int32)


# ---- Programs --------------------------------------------------------------------------------------------------------


def programs() -> dict[str, Program]:
    """All rows, the control first."""
    found = {path.stem.removeprefix("run_").replace("_", "-"): path for path in sorted(FOLDER.glob("run_*.py"))}
    names = sorted(found, key=lambda name: (name != "transformers", name))
    facts = {name: stated(found[name]) for name in names}
    return {
        name: Program(name, said.get("WHY", ""), said["INSTALL"], said.get("LOG_PROBABILITIES", False), findings(name))
        for name, said in facts.items()
    }


def findings(name: str) -> dict[str, dict[str, Any]]:
    """What a program has been found to differ by."""
    pattern = f"finding_{name.replace('-', '_')}_*.py"
    return {path.stem: stated(path) for path in sorted(FOLDER.glob(pattern))}


def stated(path: Path) -> dict[str, Any]:
    """The constants of a file and its docstring, without running it: what it imports is not in this environment."""
    tree = ast.parse(path.read_text())
    found: dict[str, Any] = {"says": ast.get_docstring(tree) or ""}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.isupper():
            found[node.targets[0].id] = ast.literal_eval(node.value)
    return found


def installed(program: Program) -> Path:
    """The Python of a program's environment, which sees this one's packages too; made unless it is there."""
    where, packages = ENVIRONMENTS / program.name, sysconfig.get_path("purelib")
    python = where / "bin" / "python"
    done = where / f"installed-{hashlib.sha256(repr(program.install).encode()).hexdigest()[:16]}"
    if not program.install:
        return Path(sys.executable)
    if done.exists():
        return python
    venv.create(where, clear=True)
    library = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    )
    (Path(library.strip()) / "base.pth").write_text(f"{packages}\n")
    for step in program.install:
        tool, *arguments = shlex.split(step)
        quiet = ["--quiet", "--disable-pip-version-check", "--retries", "1"] if tool == "pip" else ["--no-audit"]
        command = [str(python), "-m", "pip"] if tool == "pip" else [shutil.which(tool) or tool]
        run([*command, *arguments, *quiet], where, {})
    done.touch()
    return python


def run(command: Sequence[str], folder: Path, environment: dict[str, str]) -> None:
    """Run a command; what it says is shown where it fails, in a line."""
    said = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, timeout=LIMIT, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace", check=False,
    )  # fmt: skip
    if said.returncode:
        lines = [line for line in said.stdout.splitlines() if line.strip()] or [""]
        telling = [
            line for line in lines if re.match(r"(npm )?error|[\w.]+(Error|Exception|Exit): ", line, re.IGNORECASE)
        ]
        cause = [*lines, *telling][-1]
        raise RuntimeError(f"{Path(command[0]).name}: status {said.returncode}: {cause[:200]}")
    if os.environ.get("VERBOSE"):
        print(said.stdout, file=sys.stderr)


def computed(
    program: Program, reference: Reference, cures: Sequence[str] = (), wanted: Callable[[Key], bool] = lambda key: True
) -> Outcome:
    """Run a program on what is wanted of the checkpoints, with some places mended."""
    python, cells, rows = installed(program), dict[Key, Cell](), dict[Key, Any]()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        asked = {key: [c for c in checks_of(key[1]) if wanted((*key, c.name))] for key in reference.folders}
        checkpoints = {
            str(reference.folders[key]): [
                check._asdict() | {"file": f"{' '.join(key)} {check.name}"} for check in checks
            ]
            for key, checks in asked.items()
        }
        prompts = {str(length): ids.tolist() for length, ids in reference.prompts.items()}
        job = {"out": str(out), "cures": cures, "prompts": prompts, "checkpoints": checkpoints}
        (out / "job.json").write_text(json.dumps(job))
        script = FOLDER / f"run_{program.name.replace('-', '_')}.py"
        run([str(python), str(script), str(out / "job.json")], out, ALONE)
        for key, checks in asked.items():
            for check in checks:
                path = out / f"{' '.join(key)} {check.name}"
                numbers, error = Path(f"{path}.npy"), Path(f"{path}.error")
                if error.exists():
                    cells[*key, check.name] = Cell(math.nan, error.read_text())
                elif numbers.exists():
                    rows[*key, check.name] = theirs = np.load(numbers)
                    cells[*key, check.name] = reference.cell(key[1], check, theirs, program.log_probabilities)
        return Outcome((out / "version").read_text(), cells, rows)


def checks_of(name: str) -> tuple[Check, ...]:
    return ALWAYS + PLAINLY * (name == "plain")


# ---- The page --------------------------------------------------------------------------------------------------------


def text_of(program: Program, reference: Reference) -> tuple[str, str]:
    """A program's row, and its section, if there is something to say."""
    today = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
    cures = [name for name, finding in program.findings.items() if "CURE" in finding]
    try:
        before = computed(program, reference)
        after = computed(program, reference, cures, lambda key: key in before.rows) if cures else before
        parts = [told(program, name, before, after, cures, reference) for name in program.findings]
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        said = " ".join(str(error).split())[:200]
        section = f"### {program.name}\n\n{program.why}\n" if program.why else ""
        return f"| {program.name} | – | {today} | not run: {said} {'|' * len(COLUMNS)}", section
    cells = [column(before.cells, after.cells, *where) for where in COLUMNS.values()]
    row = f"| {program.name} | {before.version} | {today} | {' | '.join(cells)} |"
    explained = {name for finding in program.findings.values() for name in finding["SHOWS"]}
    for key in dict.fromkeys(
        key[:2] for key, cell in before.cells.items() if differs(cell) and not shows(key, explained)
    ):
        verdict = judged(program, before, [found for found in before.rows if found[:2] == key], reference)
        parts.append(f"Not explained: {', '.join(key)}\n\n```text\n{verdict}\n```\n")
    refused = dict[str, list[str]]()
    for key, cell in before.cells.items():
        if math.isnan(cell.multiple):
            where = "bfloat16" if key[2].startswith("bfloat16") else key[1]
            refused.setdefault(" ".join(cell.says.split())[:160].replace("`", "'"), []).append(where)
    parts += [f"Refused, {', '.join(dict.fromkeys(names))}: `{said}`\n" for said, names in refused.items()]
    return row, "\n".join([f"### {program.name} {before.version}\n", *parts]) if parts else ""


def differs(cell: Cell) -> bool:
    return cell.multiple > NEAR


def shows(key: Key, names: Collection[str]) -> bool:
    """Whether a cell belongs to checkpoints or columns of these names."""
    columns = [COLUMNS[name] for name in names if name in COLUMNS]
    return key[1] in names or any(key[1] == name and key[2] in checks for name, *checks in columns)


def column(before: Mapping[Key, Cell], after: Mapping[Key, Cell], name: str, *checks: str) -> str:
    """A cell of the table: the worst of some checks, in both spellings where these differ, and mended where it is."""
    said = list[str]()
    for spelling in SPELLINGS:
        found = [
            [cells[spelling, name, c] for c in checks if (spelling, name, c) in cells] for cells in (before, after)
        ]
        worst = [max(cells, key=severity) for cells in found if cells]
        shown = worst if any(map(differs, worst)) else worst[:1]
        said.append(" → ".join(dict.fromkeys(map(str, shown))))
    return " / ".join(dict.fromkeys(said)) or "–"


def severity(cell: Cell) -> float:
    return math.inf if math.isnan(cell.multiple) else cell.multiple


def judged(program: Program, outcome: Outcome, keys: Sequence[Key], reference: Reference) -> Any:
    """What `diff` says of the first of these numbers that are logits and differ."""
    for key in sorted(keys, key=lambda key: (key[2] == "gradient", [*SPELLINGS].index(key[0]))):
        check = next(check for check in checks_of(key[1]) if check.name == key[2])
        if key in outcome.rows and differs(outcome.cells[key]) and check.how != "gradient":
            model, ids, rows = reference.models[key[1]], reference.prompts[check.prompt], outcome.rows[key]
            return diff(model, rows, ids, dtype=check.dtype, log_probabilities=program.log_probabilities)
    return None


def told(
    program: Program, name: str, before: Outcome, after: Outcome, cures: Sequence[str], reference: Reference
) -> str:  # fmt: skip
    """A finding, with what `diff` says of it alone, all others being mended, and what its cure does."""
    finding = program.findings[name]
    title, _, text = finding["says"].partition("\n")
    keys = [key for key, cell in before.cells.items() if differs(cell) and shows(key, finding["SHOWS"])]
    shown = "shows on " + ", ".join(finding["SHOWS"]) if keys else "is not in the table"
    parts = [
        f"#### {title.rstrip('.')}\n",
        f"{finding['KIND']}, `{finding['WHERE']}`; {shown}; [both numbers](../tests/long/conformance/{name}.py).\n",
        f"{text.strip()}\n",
    ]
    if keys:
        names, others = list(dict.fromkeys(key[1] for key in keys)), [cure for cure in cures if cure != name]
        few = [where for where in names if where == names[0] or CONFIGS[where].rope_scaling]
        asked = [key for key in keys if key[1] in few and key[2] not in SLOW]
        alone = computed(program, reference, others, lambda key: key in asked) if others else before
        verdicts = {
            where: judged(program, alone, [key for key in asked if key[1] == where], reference) for where in few
        }
        found = {where: verdict for where, verdict in verdicts.items() if verdict}
        first = next(iter(found.values()), None)
        said, *_ = str(first or "the same").partition("\n\nWhat these logits could not show")
        parts.append(f"```text\n{said}\n```\n")
        for where, verdict in found.items():
            if first and (verdict.bugs, verdict.dial) != (first.bugs, first.dial):
                parts.append(f"On {where}: {' or '.join(verdict.bugs) or verdict.dial or 'without a name'}.\n")
    if keys and "CURE" in finding:
        left = [after.cells[key] for key in keys if not math.isnan(after.cells[key].multiple)]
        gone = dict.fromkeys(key[1] for key in keys if math.isnan(after.cells[key].multiple))
        mended = [f"{max(left)} × rounding is left"] if left else []
        mended += [f"{' and '.join(gone)} refused"] if gone else []
        parts.append(f"Cure: {finding['CURE']}; then {', '.join(mended)}.\n")
    elif "CURE" in finding:
        parts.append(f"Cure: {finding['CURE']}.\n")
    parts.append(f"Seen: {finding['SEEN'] or 'no public thread was found'}.\n")
    return "\n".join(parts)


def written(page: str, texts: dict[str, tuple[str, str]]) -> str:
    """The page with the rows and sections of some programs in the place of their former ones."""
    before, old, after = split(page, MARKS["table"])
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in old.splitlines()[2:]}
    rows |= {name: row for name, (row, _) in texts.items()}
    head = ("program", "version", "date", *COLUMNS)
    order = [name for name in programs() if name in rows]
    page = (
        before + "\n".join([f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(rows[x] for x in order), ""]) + after
    )
    before, old, after = split(page, MARKS["findings"])
    sections = {part.split()[0]: f"### {part}" for part in re.split(r"^### ", old, flags=re.MULTILINE)[1:]}
    sections |= {name: section for name, (_, section) in texts.items()}
    return before + "\n".join(f"{sections[x].strip()}\n" for x in order if sections.get(x)) + after


def shown(page: str) -> str:
    """The rows of the README, out of the page."""
    table = [line.strip("| ").split(" | ") for line in split(page, MARKS["table"])[1].splitlines()]
    rows = [dict(zip(table[0], row, strict=False)) for row in table[2:] if row[0] in SHOWN]
    lines = [BRIEFLY, *([row.get(name, "") for name in BRIEFLY] for row in rows)]
    head, *rest = (f"| {' | '.join(line)} |\n" for line in lines)
    return "".join([head, f"|{'---|' * len(BRIEFLY)}\n", *rest])


def main() -> None:
    known = programs()
    parser = argparse.ArgumentParser("./dev conformance", description="Public Llamas held against the reference.")
    parser.add_argument("programs", nargs="*", metavar="PROGRAM", help=f"of {', '.join(known)} (default: all)")
    chosen = parser.parse_args().programs or [*known]
    if unknown := [name for name in chosen if name not in known]:
        parser.error(f"got {', '.join(unknown)}, expected programs of {', '.join(known)}")
    with tempfile.TemporaryDirectory() as folder:
        reference = Reference(Path(folder))
        for name in chosen:
            start = time.monotonic()
            texts = {name: text_of(known[name], reference)}
            print(f"{texts[name][0]}  {time.monotonic() - start:.0f} s", flush=True)
            PAGE.write_text(written(PAGE.read_text(), texts))
        before, _, after = split(README.read_text(), MARKS["conformance"])
        README.write_text(before + shown(PAGE.read_text()) + after)
    print(f"on {processor()}")


if __name__ == "__main__":
    main()
