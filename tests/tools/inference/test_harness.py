"""lm-eval drives a model of this library to the same numbers as its own backend for transformers. No network."""

import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from builders import CHATML, TINY, counting_model, random_params, tiny_arrays, tiny_fields, write_gguf
from jax import numpy as jnp

from lovely_llama import Config, LlamaError
from lovely_llama_tools import Model, harness, load, save
from lovely_llama_tools.commands import main
from lovely_llama_tools.extras import extra

pytestmark = pytest.mark.filterwarnings("ignore")  # of lm-eval, datasets and what they import: not ours to change

LONG = replace(TINY, ctx=256)
QUESTIONS = [
    {"q": "the sea is", "options": [" the", " blue", "x"], "gold": 1, "answer": "b"},
    {"q": "why", "options": [" é", "why not"], "gold": 0, "answer": "the the"},
    {"q": "the é " * 90, "options": ["the", " sky"], "gold": 1, "answer": "é"},
]
PAGES = [{"page": "the theory of the é, " * 40}, {"page": "blue"}, {"page": "é"}, {"page": "so it goes"}]

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
    "begun": {
        "output_type": "loglikelihood", "doc_to_text": "{{q}}", "doc_to_target": "{{answer}}", "gen_prefix": "So: ",
        "description": "the ", "metric_list": [{"metric": "perplexity"}],
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
        read["fewshot_split"] = "test"
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, "test_split": "test", **read, **task}))
    return folder


def gpt2(folder: Path) -> None:
    """A model whose tokenizer adds no BOS."""
    save(load(write_gguf(folder.with_suffix(".gguf"), tiny_fields(LONG), tiny_arrays(LONG))), folder)


def llama2(folder: Path) -> None:
    """A model with a tokenizer like Llama 2's: a text gets BOS and a space. It mostly says pieces with one."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*(f"▁ {letter}" for letter in letters), "h e", "▁t he"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters]
    names += [word.replace(" ", "") for word in words]
    begin = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    space = {"pattern": {"String": " "}, "content": "▁"}
    back = {"pattern": {"String": "▁"}, "content": " "}
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    config = Config(len(names), 32, 2, 2, 2, 8, 24, 256, 1e-5, 1e4, None, False)
    params = random_params(config)
    assert params.unembed is not None
    spaced = jnp.array([[3.0 if name.startswith("▁") else 0.1] for name in names])
    save(Model(config, params._replace(unembed=params.unembed * spaced), None), folder)
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "pre_tokenizer": None,
        "added_tokens": [{"id": i, "content": name, **flags} for i, name in enumerate(names[:3])],
        "normalizer": {
            "type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", **space}],
        },
        "post_processor": {
            "type": "TemplateProcessing", "single": begin, "pair": [*begin, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence", "decoders": [
                {"type": "Replace", **back}, {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True,
            "vocab": {name: i for i, name in enumerate(names)}, "merges": words,
        },
    }  # fmt: skip
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    template = CHATML.replace("<|im_start|>", "<s>").replace("<|im_end|>", "</s>")
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": refuses + template}))


@pytest.mark.parametrize(
    ("write", "batch", "how"),
    [
        (gpt2, 1, {}),
        (gpt2, 4, {"num_fewshot": 1, "limit": 2, "apply_chat_template": True}),
        (llama2, 4, {"num_fewshot": 2, "limit": 2}),
        (llama2, 1, {"apply_chat_template": True}),
    ],
    ids=["as it comes", "all at once", "few-shot", "a template"],
)
def test_the_numbers_are_those_of_the_backend_for_transformers(
    write: Callable[[Path], None], batch: int, how: dict[str, Any], tasks: Path, tmp_path: Path
) -> None:
    """Log-likelihoods and texts of every request, and metrics; one request at a time, or four."""
    folder = tmp_path / "model"
    write(folder)
    lm_eval, backend, managers = (
        extra(name, "eval")  # imported here, as it takes seconds
        for name in ("lm_eval", "lm_eval.models.huggingface", "lm_eval.tasks")
    )
    manager = managers.TaskManager(include_path=str(tasks), include_defaults=False)
    theirs = backend.HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)
    found, want = (
        lm_eval.simple_evaluate(model=model, tasks=[*TASKS], task_manager=manager, bootstrap_iters=0, **how)
        for model in (harness(load(folder), batch), theirs)
    )
    for task in TASKS:
        for a, b in zip(found["samples"][task], want["samples"][task], strict=True):
            assert (a["doc"], a["arguments"]) == (b["doc"], b["arguments"])
            for got, expected in zip(flat(a["resps"]), flat(b["resps"]), strict=True):
                near = pytest.approx(expected, rel=1e-4) if isinstance(expected, float) else expected
                assert got == near, (task, a["arguments"])
        for metric, value in want["results"][task].items():
            got = found["results"][task][metric]
            assert got == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), metric
    assert any(text for sample in want["samples"]["answers"] for text in flat(sample["resps"]))


def flat(value: Any) -> list[Any]:
    """The values in nested sequences."""
    return [x for part in value for x in flat(part)] if isinstance(value, list | tuple) else [value]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's folder, where lm-eval lists none of its own tasks, which takes it 20 seconds."""
    gpt2(tmp_path / "model")
    managers = extra("lm_eval.tasks", "eval")
    monkeypatch.setattr(managers, "TaskManager", partial(managers.TaskManager, include_defaults=False))
    return tmp_path / "model"


def test_the_command_prints_the_table_of_lm_eval(small: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", str(small), "--include-path", str(tasks), "--tasks"]
    options = ["--num-fewshot", "1", "--limit", "2", "--batch-size", "2", "--apply-chat-template"]
    assert main([*command, "choice,begun", *options]) == 0
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.split("\n") if line]
    assert table[0] == ["Tasks", "Version", "Filter", "n-shot", "Metric", "", "Value", "", "Stderr"]
    rows = {row[4]: row for row in table[2:]}
    assert rows.keys() == {"acc", "acc_norm", "perplexity"}
    assert all(row[3] == "1" and re.fullmatch(r"[\d.]+", row[8]) for row in rows.values())
    assert main([*command, "choice,begun", *options, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    for name, metric in (("choice acc", "acc"), ("choice acc_norm", "acc_norm"), ("begun perplexity", "perplexity")):
        shown = [float(cell) for cell in rows[metric][6::2]]
        assert shown == pytest.approx([printed[name], printed[f"{name}_stderr"]], rel=1e-3), name
    assert printed.keys() == {
        f"{name}{end}" for name in ("choice acc", "choice acc_norm", "begun perplexity") for end in ("", "_stderr")
    }
    assert main([*command, "choice,nothing"]) == 2
    assert "tasks: got nothing, expected names of lm-eval's tasks" in capsys.readouterr().err


def test_json_has_no_infinity(small: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A metric that is infinite, and the error of one with a single example, which is unknown."""
    (tasks / "endless.py").write_text("def found(doc, results):\n    return {'endless': float('inf')}\n")
    task = json.loads((tasks / "begun.yaml").read_text())
    metric = {"metric": "endless", "aggregation": "mean", "higher_is_better": True}
    listed = "\n".join(
        f"{name}: {json.dumps(value)}" for name, value in {**task, "task": "endless"}.items() if name != "metric_list"
    )
    (tasks / "endless.yaml").write_text(
        f"{listed}\nmetric_list: [{json.dumps(metric)}]\nprocess_results: !function endless.found\n"
    )
    command = ["evaluate", str(small), "--include-path", str(tasks), "--tasks", "endless", "--limit", "1", "--json"]
    assert main(command) == 0
    printed = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert printed == {"endless endless": None, "endless endless_stderr": None}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--limit", "0"], "limit: got 0.0, expected a whole number from 1, or a part below 1"),
        (["--limit", "1.5"], "limit: got 1.5, expected a whole number from 1, or a part below 1"),
        (["--num-fewshot", "-1"], "num_fewshot: got -1, expected a whole number from 0"),
        (["--batch-size", "0"], "batch_size: got 0, expected a whole number from 1"),
    ],
)
def test_bad_options_are_refused(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Before a model is read."""
    assert main(["evaluate", "no-such-model", "--tasks", "choice", *options]) == 2
    assert says in capsys.readouterr().err


def test_lm_evals_own_command_line(
    small: Path, tasks: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [])
    command = ["lm-eval", "--model", "lovely-llama", "--model_args", f"pretrained={small}", "--tasks", "choice"]
    assert main([*command, "--include_path", str(tasks), "--batch_size", "2", "--apply_chat_template"]) == 0
    out = capsys.readouterr().out
    assert "lovely-llama ({'pretrained': " in out and re.search(r"\|choice *\|", out)
    with pytest.raises(SystemExit) as caught:
        main(["lm-eval", "run", "--no-such-option"])
    assert caught.value.code == 2
    assert "unrecognized arguments: --no-such-option" in capsys.readouterr().err
    assert main([*command[:4], f"pretrained={small},revision=main", *command[5:], "--include_path", str(tasks)]) == 2
    assert "model_args: got revision, expected pretrained, base, allow, dtype and batch_size" in capsys.readouterr().err


def request(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("models") / "model"
    gpt2(folder)
    return harness(load(folder))


def test_repeats_differ_and_a_seed_repeats_them(small: Path) -> None:
    """lm-eval asks the same question several times for pass@k. Its --seed sets Python's."""
    model, warm = harness(load(small), 3), {"do_sample": True, "temperature": 1.0, "max_gen_toks": 16, "top_k": 0}

    def said(seed: int) -> list[str]:
        random.seed(seed)
        return model.generate_until([request("the sea", warm)] * 4)

    assert len({*said(0)}) == 4
    assert said(0) == said(0) != said(1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_gen_toks": 256}, "max_gen_toks: got 256, expected a number from 1 to 255"),
        ({"max_gen_toks": 8, "num_beams": 3}, "generation_kwargs: got num_beams=3, expected until, do_sample"),
        ({"max_gen_toks": 8, "do_sample": True}, "temperature: got 0.0 with do_sample, expected a number above 0"),
        ({"max_gen_toks": 8, "temperature": -1.0}, "temperature: got -1"),
        ({"max_gen_toks": 8, "top_k": -3}, "top_k: got -3"),
    ],
)
def test_what_a_task_may_not_ask(adapted: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(LlamaError) as caught:
        adapted.generate_until([request("the", {"max_gen_toks": 8}), request("the", options)])
    assert says in str(caught.value)


def test_what_a_task_may_ask(adapted: Any) -> None:
    plain = adapted.generate_until([request("the", {"max_gen_toks": 8})])
    same = {"max_new_tokens": 8, "top_k": 0, "num_beams": 1, "do_sample": False, "temperature": 0.7, "until": None}
    assert adapted.generate_until([request("the", same)]) == plain
    assert adapted.generate_until([request("the", {"max_gen_toks": 8, "until": [plain[0][2:4], ""]})]) == [plain[0][:2]]


def test_continuations_without_or_with_too_many_tokens(adapted: Any) -> None:
    """Nothing is not scored as a certainty; nor is a part of an answer as the whole."""
    for context in ("", "the"):
        with pytest.raises(LlamaError, match="continuation: got an empty text"):
            adapted.loglikelihood([request("the", " sea"), request(context, "")])
    with pytest.raises(LlamaError, match="continuation: got 0 tokens of 'e' after 'h', expected 1 to 256 tokens"):
        adapted.loglikelihood([request("h", "e")])
    with pytest.raises(LlamaError, match="continuation: got 300 tokens of 'xxx"):
        adapted.loglikelihood([request("the", "x" * 300)])
    ((whole, _),) = adapted.loglikelihood([request("the", "x" * 256)])
    assert whole < -256


def test_the_name_of_a_tokenizer_stands_for_its_template(small: Path) -> None:
    """lm-eval caches prompts under it."""
    model = load(small)
    assert model.tokenizer
    named = model._replace(tokenizer=model.tokenizer._replace(templates={"short": "{{ messages[0].content }}"}))
    ours = harness(named)
    usual = ours.tokenizer_name
    assert usual == harness(load(small)).tokenizer_name
    assert ours.chat_template(True) == CHATML and ours.tokenizer_name == usual
    assert ours.chat_template("short") == "{{ messages[0].content }}" and ours.tokenizer_name != usual
    assert ours.apply_chat_template([{"role": "user", "content": "hi"}]) == "hi"
    assert ours.chat_template(False) is None
    with pytest.raises(LlamaError, match="chat_template: got long, expected one of short"):
        ours.chat_template("long")


def test_a_model_without_a_template_is_refused_before_its_tasks_are_read(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (small / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((small / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (small / "tokenizer_config.json").write_text(json.dumps(settings))
    assert main(["evaluate", str(small), "--tasks", "nothing", "--apply-chat-template"]) == 2
    assert "chat_template: got none, expected a template" in capsys.readouterr().err


def test_a_model_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(LlamaError, match="tokenizer: got none"):
        harness(counting_model([b"a"])._replace(tokenizer=None))
