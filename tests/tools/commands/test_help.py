"""Every `--help` is a manual: options in named groups, each with its help, examples that run, and what extras add."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from lovely_llama_tools import commands
from lovely_llama_tools.extras import PACKAGES
from lovely_llama_tools.planning.chips import CHIPS
from lovely_llama_tools.training.settings import Settings

ROOT = Path(__file__).resolve().parents[3]
LIBTPU = ROOT / ".venv" / "tpu" / "libtpu" / "libtpu.so"


def printed(*words: str) -> str:
    """What a command prints, which ends well."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            assert commands.main(words) == 0
        except SystemExit as end:
            assert not end.code
    return out.getvalue()


def sections(help: str) -> dict[str, list[str]]:
    """The groups of a help text by their titles: their entries, each with the lines below it."""
    found = dict[str, list[str]]()
    for block in re.split(r"\n\n(?=\S)", help):
        title, colon, body = block.partition(":\n")
        if colon and "\n" not in title:
            found[title] = re.split(r"\n(?=  \S)", body.rstrip())
    return found


def manuals(*words: str) -> dict[tuple[str, ...], str]:
    """The help of a command, and of the commands within it."""
    help = printed(*words, "--help")
    within = [
        name for entry in sections(help).get("commands", []) for name in re.findall(r"^    ([\w-]+)\s", entry, re.M)
    ]
    return {words: help} | {key: text for name in within for key, text in manuals(*words, name).items()}


MANUALS = manuals()
EXAMPLES = [*dict.fromkeys(line.strip() for help in MANUALS.values() for line in sections(help)["examples"])]


def test_every_command_has_a_manual() -> None:
    assert len(MANUALS) == 21 and len(EXAMPLES) > 30
    assert all(words == () or words[0] in printed() for words in MANUALS)


@pytest.mark.parametrize("words", MANUALS, ids=" ".join)
def test_options_have_help_in_named_groups(words: tuple[str, ...]) -> None:
    help = MANUALS[words]
    assert help.startswith(f"usage: {' '.join(('lovely-llama', *words))} ")
    groups = sections(help)
    assert not groups.keys() & {"options", "positional arguments", "optional arguments"}
    described = set[str]()
    for title, entries in groups.items():
        for entry in entries if title not in ("examples", "extras", "chips", "commands") else ():
            name, says = re.fullmatch(r"  (\S.*?)(?:  +|\n +)(\S.*)", entry, re.DOTALL).groups()  # pyright: ignore
            assert len(says.split()) >= 2, entry
            described |= {*re.findall(r"--?[a-z][\w-]*|[A-Z]{3,}$", name)}
    usage = help.partition("\n\n")[0]
    assert {*re.findall(r"(?<=[\[ ])-{1,2}[a-z][a-z0-9-]*", usage)} <= described | {"--"}
    assert 1 <= len(groups["examples"]) <= 3
    assert {line.split()[0] for line in groups.get("extras", [])} <= PACKAGES.keys()


@pytest.mark.parametrize("words", [(), ("plot",), ("tokenize",)], ids=" ".join)
def test_a_command_of_commands_prints_its_help(words: tuple[str, ...]) -> None:
    assert printed(*words) == MANUALS[words]


def test_what_it_takes_to_use_a_command() -> None:
    """The chips that `plan` knows, the data that `train` takes, and all of its settings."""
    chips = "\n".join(sections(MANUALS[("plan",)])["chips"])
    assert all(f"{name}:" in chips for name in (*CHIPS, "cpu"))
    train = MANUALS[("train",)]
    assert all(word in train for word in (".jsonl", '"messages"', '"text"', ".npy", ".bin", "plain text"))
    assert all(f"--{name.replace('_', '-')}" in train for name in Settings._fields if name != "data")


# ---- Examples --------------------------------------------------------------------------------------------------------

SMALL = " --steps 2 --eval-every 2 --ctx 64 --layers 1 --dim 32 --hidden-dim 32 --sample 2"


def shell(line: str, folder: Path) -> str:
    """Run a line in a folder, without a network, as a user whose shell finds the program."""
    paths = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": paths, "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu", "TPU_LIBRARY_PATH": str(LIBTPU)}
    env |= {"HF_HOME": str(folder / "hub")}
    done = subprocess.run(
        ["sh", "-c", line], cwd=folder, env=env, input="", capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the examples name, and the run that the first one of `train` makes, but smaller."""
    where = tmp_path_factory.mktemp("examples")
    shutil.copy(ROOT / "README.md", where / "book.txt")
    (where / "notes.txt").write_text(200 * "To be, or not to be: that is the question.\n")
    (where / "prompts.txt").write_text("To be\nHello\n")
    (where / "tasks").mkdir()
    (where / "tasks" / "own.jsonl").write_text(
        "".join(f'{{"q": "To be, or", "a": "{a}"}}\n' for a in ("not", "so", "be"))
    )
    read = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(where / "tasks" / "own.jsonl")}}}
    task = {"task": "own", **read, "test_split": "test", "fewshot_split": "test", "output_type": "loglikelihood"}
    task |= {"doc_to_text": "{{q}}", "doc_to_target": "{{a}}", "metric_list": [{"metric": "perplexity"}]}
    (where / "tasks" / "own.yaml").write_text(json.dumps(task))
    shell(sections(MANUALS[("train",)])["examples"][0].strip() + SMALL, where)
    return where


@pytest.mark.parametrize("line", EXAMPLES)
def test_an_example_runs(line: str, folder: Path, tmp_path: Path) -> None:
    """Training takes fewer steps, and texts end sooner."""
    here = tmp_path / "here"
    shutil.copytree(folder, here, symlinks=True)
    (out,) = re.findall(r"--out (\S+)", line) or [""]
    if re.search("(llama|--) train ", line) and "--resume" not in line:
        shutil.rmtree(here / out, ignore_errors=True)
        line += SMALL if "--init-from" not in line else " --steps 2 --eval-every 2 --sample 2"
    if re.search(" (chat|generate) ", f"{line} "):
        line += " --max-new 3"
    before = {path.name for path in here.iterdir()}
    said = shell(line, here)
    assert said.strip() or line == "lovely-llama chat --max-new 3"
    if out and out not in before:
        assert (here / out).exists()
