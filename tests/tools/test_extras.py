"""Each extra in a process of its own: elsewhere another test may have loaded what a package loads only on demand."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from builders import SMALL, random_params, tiny_arrays, tiny_fields, write_gguf
from meta_files import META, meta_weights, write_meta
from soak import QUICK

from lovely_llama_tools import Model, save
from lovely_llama_tools.extras import PACKAGES

ROOT = Path(__file__).resolve().parents[2]
# The command line on a terminal. It loads these modules, and not before it runs.
RUN = """
import sys
wanted = {*sys.argv.pop(1).split()}
assert not wanted & {*sys.modules}
sys.stderr.isatty = lambda: True
import lovely_llama_tools.__main__ as program
status = program.run()
assert status or wanted <= {*sys.modules}, wanted - {*sys.modules}
sys.exit(status)
"""
TRAIN = "--steps 1 --layers 1 --dim 8 --heads 2 --hidden-dim 8 --ctx 8 --batch 1 --sample 0 --out run"
# By extras: the modules of their packages, and a command that needs all of them.
USES = {
    "chat": ("gguf tokenizers jinja2 tqdm", "chat hello --model quantised.gguf --max-new 2"),
    "hub": ("huggingface_hub", "inspect own/tiny"),
    "train scale": ("matplotlib tensorboardX tqdm orbax.checkpoint", f"train text.txt {TRAIN} --checkpoints orbax"),
    "plot": ("matplotlib", "plot spectra quantised.gguf --out spectra.svg"),
    "eval": ("lm_eval", "evaluate quantised.gguf --tasks pages --include-path tasks"),
    "tpu": ("libtpu", "plan stories260k --chips v5e:1x1 --mesh data=1 --batch 1 --seq 8"),
    "torch": ("torch", "inspect meta"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands name, and a cache of the hub."""
    folder = tmp_path_factory.mktemp("extras")
    write_gguf(folder / "quantised.gguf", tiny_fields(), tiny_arrays(), quantised=["token_embd.weight"])
    write_meta(folder / "meta", meta_weights(META))
    (folder / "text.txt").write_text("To be, or not to be.\n" * 99)
    pages = {"task": "pages", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "pages.jsonl"}}}
    pages |= {"test_split": "test", "output_type": "loglikelihood_rolling", "doc_to_text": ""}
    pages |= {"doc_to_target": "{{page}}", "metric_list": [{"metric": "byte_perplexity"}]}
    (folder / "tasks").mkdir()
    (folder / "tasks" / "pages.yaml").write_text(json.dumps(pages))
    (folder / "pages.jsonl").write_text('{"page": "hello"}\n')
    repository = folder / "hub" / "models--own--tiny"
    save(Model(SMALL, random_params(SMALL), None), repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    return folder


def run(folder: Path, *command: str) -> "subprocess.CompletedProcess[str]":
    """Run code in the folder, without a network."""
    env = {"HF_HOME": str(folder), "HF_DATASETS_OFFLINE": "1", "TIKTOKEN_CACHE_DIR": str(folder), "XLA_FLAGS": QUICK}
    env |= {"HTTPS_PROXY": "http://127.0.0.1:9", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / '.venv' / 'tpu'}"}
    env |= {name: value for name, value in os.environ.items() if name not in {*env, "TPU_LIBRARY_PATH"}}
    return subprocess.run([sys.executable, "-c", *command], cwd=folder, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("extras", USES)
def test_an_extra_in_a_process_of_its_own(extras: str, folder: Path) -> None:
    modules, command = USES[extras]
    done = run(folder, RUN, modules, *command.split())
    assert done.returncode == 0 and "error:" not in done.stderr, done.stderr[-999:]


def test_gpt2s_vocabulary_without_a_connection(folder: Path) -> None:
    """tiktoken would fetch it."""
    *_, line = run(folder, "from lovely_llama_tools import tokens; tokens.gpt2_tokenizer()").stderr.splitlines()
    assert line.endswith(
        "LlamaError: tiktoken's gpt2: vocabulary: got none in its cache, and no connection, expected one"
    )


def test_every_extra_is_tried() -> None:
    """And its packages are those that an error names."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras.pop("dev")
    assert {extra: tuple(re.split(">=", name)[0] for name in names) for extra, names in extras.items()} == PACKAGES
    assert extras.keys() == {*" ".join(USES).split(), "tiktoken"}
