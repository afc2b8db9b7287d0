"""lm-eval drives a model of this library to the same numbers as its own backend for transformers. No network."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from builders import counting_model, tiny_arrays, tiny_fields, write_gguf

from lovely_llama import LlamaError
from lovely_llama_tools import harness, load, save
from lovely_llama_tools.commands import main
from lovely_llama_tools.extras import extra

QUESTIONS = [
    {"q": "the sea is", "options": [" the", " blue", "x"], "gold": 1, "answer": "b"},
    {"q": "why", "options": [" é", "why not"], "gold": 0, "answer": "the the"},
    {"q": "the é " * 9, "options": ["the", " sky"], "gold": 1, "answer": "é"},
]
PAGES = [{"page": "the theory of the é, " * 12}, {"page": "blue"}]

TASKS = {
    "choice": {
        "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_target": "gold",
        "doc_to_choice": "{{options}}", "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "pages": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{page}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "answers": {
        "output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["t", "zz"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}  # fmt: skip


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tasks, in YAML, of which JSON is a part, and their documents."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, documents in (("questions", QUESTIONS), ("pages", PAGES)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in documents))
    for name, task in TASKS.items():
        documents = folder / f"{'pages' if name == 'pages' else 'questions'}.jsonl"
        read = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(documents)}}}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, "test_split": "test", **read, **task}))
    return folder


@pytest.mark.filterwarnings("ignore")  # of lm-eval, datasets and what they import: not ours to change
def test_the_numbers_are_those_of_the_backend_for_transformers(
    tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-likelihoods, generated texts and metrics; and the command prints the same metrics."""
    folder = tmp_path / "model"
    save(load(write_gguf(tmp_path / "tiny.gguf", tiny_fields(), tiny_arrays())), folder)
    lm_eval, backend, registry, managers = (
        extra(name, "eval")  # imported here, as it takes seconds
        for name in ("lm_eval", "lm_eval.models.huggingface", "lm_eval.api.registry", "lm_eval.tasks")
    )
    ours, manager = harness(load(folder)), managers.TaskManager(include_path=str(tasks), include_defaults=False)
    theirs = backend.HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)
    found, want = (
        lm_eval.simple_evaluate(model=model, tasks=[*TASKS], task_manager=manager, bootstrap_iters=0)
        for model in (ours, theirs)
    )
    for name in TASKS:
        for a, b in zip(found["samples"][name], want["samples"][name], strict=True):
            assert a["doc"] == b["doc"]
            for got, expected in zip(flat(a["resps"]), flat(b["resps"]), strict=True):
                assert got == (pytest.approx(expected, rel=1e-4) if isinstance(expected, float) else expected)
        for metric, value in want["results"][name].items():
            got = found["results"][name][metric]
            assert got == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), metric
    texts = [text for sample in want["samples"]["answers"] for text in flat(sample["resps"])]
    assert any(texts)
    assert registry.get_model("lovely-llama")(pretrained=str(folder)).max_length == 64
    capsys.readouterr()
    command = ["evaluate", str(folder), "--include-path", str(tasks), "--json", "--tasks"]
    assert main([*command, "choice,pages"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["choice acc"] == found["results"]["choice"]["acc,none"]
    assert math.isclose(printed["pages bits_per_byte"], want["results"]["pages"]["bits_per_byte,none"], rel_tol=1e-4)
    with monkeypatch.context() as patch:  # lm-eval's own tasks take it 20 seconds to list
        patch.setattr(managers, "TaskManager", partial(managers.TaskManager, include_defaults=False))
        assert main([*command, "choice,nothing"]) == 2
    assert "tasks: got nothing, expected names of lm-eval's tasks" in capsys.readouterr().err


def flat(value: Any) -> list[Any]:
    """The values in nested sequences."""
    return [x for part in value for x in flat(part)] if isinstance(value, list | tuple) else [value]


def test_a_model_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(LlamaError, match="tokenizer: got none"):
        harness(counting_model([b"a"])._replace(tokenizer=None))
