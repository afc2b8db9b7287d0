"""The command `train`: what it computes, as torch does; what it leaves; and that no interruption changes either."""

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np
import pytest
import soak
import torch
import transformers
from asserts import assert_close
from builders import random_params, tiny_arrays, tiny_fields, write_gguf
from small_runs import (
    SCHEDULE,
    TINY,
    assert_same,
    hasten,
    rows,
    rows_without_speed,
    words,
    write_sums,
)

from lovely_llama import Config, count, learning_rate
from lovely_llama_tools.commands import arguments as parser
from lovely_llama_tools.commands import main, train
from lovely_llama_tools.data.prepare import prepare
from lovely_llama_tools.formats.files import load, save
from lovely_llama_tools.formats.hugging_face import to_hf
from lovely_llama_tools.formats.model import Model
from lovely_llama_tools.interrupts import ending, taken
from lovely_llama_tools.training import loop, metrics, run_folder, settings


class Done(NamedTuple):
    status: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command in this process."""
    hasten(monkeypatch)

    def command(*arguments: object) -> Done:
        status = main(words(*arguments))
        out, err = capsys.readouterr()
        return Done(status, out, err)

    return command


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sums(tmp_path_factory.mktemp("text") / "sums.txt")


@pytest.fixture(scope="module")
def unbroken(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts, to the bits of a fresh process: what jax has traced before may change the last."""
    jax.clear_caches()
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    with pytest.MonkeyPatch.context() as patch:
        hasten(patch)
        assert main(words(text, "--out", folder, TINY, SCHEDULE, "--keep 99")) == 0
    return folder


# ---- What it computes ------------------------------------------------------------------------------------------------


def test_the_same_course_in_torch(text: Path, unbroken: Path, tmp_path: Path) -> None:
    """transformers' Llama and torch's AdamW on the same batches, from the same first parameters; some steps clip."""
    model: Any = transformers.LlamaForCausalLM.from_pretrained(unbroken / "step-0")
    gains = [w for name, w in model.named_parameters() if "norm" in name]
    matrices = [w for name, w in model.named_parameters() if "norm" not in name]
    groups = [{"params": gains, "weight_decay": 0.0}, {"params": matrices, "weight_decay": 0.1}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    corpus = prepare([str(text)], tmp_path, tokenizer="chars", vocab=None, seq=8, fraction=0.2, pack=False)
    for step, row in enumerate(rows(unbroken)):
        batch = corpus.train.batch(0, step, 4)
        tokens, targets = (torch.tensor(ids, dtype=torch.long) for ids in batch[:2])
        scores = model(tokens).logits
        loss = torch.nn.functional.cross_entropy(scores.reshape(-1, scores.shape[-1]), targets.reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.6)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 1e-2, 2, 12, 1e-3)
        optimizer.step()
        assert row["lr"] == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-7)
        assert_close([row["train_loss"], row["grad_norm"]], [loss.item(), norm.item()], 1e-4, f"step {step}")
    assert {row["grad_norm"] > 0.6 for row in rows(unbroken)} == {False, True}
    saved = run_folder.read_checkpoint(unbroken, 12)
    got = to_hf(saved.model.params, saved.model.config)
    for name, w in model.named_parameters():
        assert_close(got[name], w.detach().numpy(), 1e-3, name)
        states = optimizer.state[w]
        for moment, known in (("first", "exp_avg"), ("second", "exp_avg_sq")):
            assert_close(saved.arrays[f"{moment}.{name}"], states[known].numpy(), 1e-3, f"{moment}.{name}")


def test_validation_loss_is_the_mean_over_all_of_it(text: Path, unbroken: Path, tmp_path: Path) -> None:
    model: Any = transformers.LlamaForCausalLM.from_pretrained(unbroken / "best")
    corpus = prepare([str(text)], tmp_path, tokenizer="chars", vocab=None, seq=8, fraction=0.2, pack=False)
    assert corpus.validation
    total, targets = 0.0, 0
    for batch in corpus.validation.sweep(4, 32):
        ids, wanted = (torch.tensor(ids, dtype=torch.long) for ids in batch[:2])
        scores = model(ids).logits.detach()
        flat, wanted = scores.reshape(-1, scores.shape[-1]), wanted.reshape(-1)
        total += torch.nn.functional.cross_entropy(flat, wanted, ignore_index=-1, reduction="sum").item()
        targets += int((wanted >= 0).sum())
    progress = run_folder.read_checkpoint(unbroken, 12).progress
    best = min(row["val_loss"] for row in rows(unbroken) if "val_loss" in row)
    assert progress.best == best == pytest.approx(total / targets, rel=1e-5)


# ---- Which model -----------------------------------------------------------------------------------------------------


def test_sizes_are_those_asked_for(unbroken: Path) -> None:
    config = load(unbroken / "best").config
    assert config == Config(13, 8, 2, 1, 2, 4, 12, 8, 1e-5, 1e4, None, True)


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ("", {}),
        ("--dim 192 --heads 6", {"dim": 192, "kv_heads": 6, "hidden_dim": 512}),
        (
            "--dim 288 --heads 6 --no-tied",
            {"dim": 288, "kv_heads": 6, "head_dim": 48, "hidden_dim": 768, "tied": False},
        ),
        ("--heads 8 --kv-heads 2", {"kv_heads": 2, "q_per_kv": 4, "head_dim": 16}),
        ("--ctx 64 --layers 3 --theta 500", {"ctx": 64, "layers": 3, "theta": 500.0}),
    ],
)
def test_sizes_follow_from_others(options: str, changed: dict[str, Any]) -> None:
    """hidden_dim by Llama's rule: ⅔ · 4 · dim, up to a multiple of 32."""
    small = Config(65, 128, 4, 4, 1, 32, 352, 256, 1e-5, 1e4, None, True)
    assert settings.new_config(settled(options), 65) == replace(small, **changed)


def settled(options: str) -> settings.Settings:
    return settings.settle(train.given(parser().parse_args(words(options))), {})


def test_a_published_shape() -> None:
    assert count(settings.new_config(settled("--config stories15m"), 32000)) == 15191712
    smaller = settings.new_config(settled("--config llama-3.2-1b --layers 2 --ctx 512"), 300)
    assert (smaller.layers, smaller.vocab, smaller.ctx, smaller.q_per_kv) == (2, 128256, 131072, 4)


def test_defaults() -> None:
    s = settled("")
    assert (s.beta1, s.beta2, s.lr, s.final_lr, s.clip, s.warmup) == (0.9, 0.95, 3e-4, 3e-4 / 10, 1.0, 100)
    assert settings.row_length(s, None) == 256


# ---- What it says of its data ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Conversations, and a model with a chat template."""
    folder = tmp_path_factory.mktemp("talks")
    said = [{"role": "user", "content": "the sea"}, {"role": "assistant", "content": "the é"}]
    (folder / "talks.jsonl").write_text((json.dumps({"messages": said}) + "\n") * 20 + json.dumps(said[:1]))
    save(load(write_gguf(folder / "tiny.gguf", tiny_fields(), tiny_arrays())), folder / "model")
    return folder / "talks.jsonl", folder / "model"


def test_a_row_is_shown_as_the_model_sees_it(talks: tuple[Path, Path], run: Run, tmp_path: Path) -> None:
    """And nothing is trained, nor written."""
    path, model = talks
    done = run(path, "--init-from", model, "--show", "--out", tmp_path / "run")
    assert (done.status, done.out) == (
        0, "<|im_start|>user\nthe sea<|im_end|>\n<|im_start|>assistant\n⟦the é<|im_end|>⟧\n\n"
    )  # fmt: skip
    data, note = done.err.splitlines()
    assert data == "data: 20 rows, 620 tokens, 100 of them to learn from"  # t, he, a space, é and <|im_end|>
    assert note.startswith(
        f"note: 1 row left out: {path}:21: messages: got 1 of the roles 'user', none of an assistant"
    )
    assert not (tmp_path / "run").exists()
    np.save(tmp_path / "ids.npy", np.arange(40, dtype=np.uint16))
    shown = run(tmp_path / "ids.npy", "--vocab 50 --ctx 3 --show")
    assert (shown.status, shown.out) == (0, "0 ⟦1⟧ ⟦2⟧ ⟦3⟧\n")


def test_a_sample_answers_a_prompt_held_out(talks: tuple[Path, Path], run: Run, tmp_path: Path) -> None:
    path, model = talks
    how = "--steps 1 --batch 2 --sample 5 --ctx 60"
    assert run(path, "--init-from", model, how, "--out", tmp_path / "run").status == 0
    (line,) = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    assert json.loads(line)["text"].startswith("user\nthe sea\nassistant\n")


# ---- Interrupted, and resumed ----------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process ends here."""


def strike(monkeypatch: pytest.MonkeyPatch, name: str, at: int, blow: Callable[[], object]) -> None:
    """Let a blow fall as a function is called for the nth time."""
    original, calls = attrgetter(name)(loop), list[int]()

    def struck(*arguments: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            blow()
        return original(*arguments, **more)

    monkeypatch.setattr(f"lovely_llama_tools.training.loop.{name}", struck)


def kill() -> None:
    raise Killed


@pytest.mark.parametrize(
    ("place", "at", "saved", "number"),
    [
        ("initialised", 1, 0, signal.SIGTERM),
        ("step", 1, 1, signal.SIGINT),
        ("step", 8, 8, signal.SIGTERM),
        ("batch_loss", 2, 4, signal.SIGINT),
        ("Checkpointer.save", 3, 4, signal.SIGTERM),
        ("step", 12, 12, signal.SIGINT),
    ],
)
def test_a_signal_saves_the_last_whole_step(
    run: Run, text: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, at: int,
    saved: int, number: int,
) -> None:  # fmt: skip
    """In a step, in an evaluation, while saving, before an evaluation that is due, before everything."""
    with monkeypatch.context() as patch:
        strike(patch, place, at, lambda: taken(number))
        done = run(text, "--out", tmp_path / "run", TINY, SCHEDULE)
    assert done.status == 128 + number and done.out == ""
    assert f"step-{saved} is saved" in done.err
    assert run_folder.steps(tmp_path / "run")[-1] == saved
    assert not taken(number)
    assert run("--out", tmp_path / "run", "--resume").status == 0
    assert_same(tmp_path / "run", unbroken)


def test_a_second_signal_is_not_taken(text: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process then ends as it would without a run."""
    seen = list[bool]()
    strike(monkeypatch, "step", 2, lambda: seen.extend([taken(signal.SIGTERM), taken(signal.SIGINT)]))
    run(text, "--out", tmp_path / "run", TINY, SCHEDULE)
    assert seen == [True, False]


def test_the_last_to_come_is_asked_first() -> None:
    asked = list[str]()
    with ending(lambda n: bool(asked.append("outer")) or n == 2), ending(lambda n: bool(asked.append("inner"))):
        assert taken(2) and not taken(15)
    assert asked == ["inner", "outer"] * 2
    assert not taken(2)


def assert_killed_ends_as(
    whole: Path, run: Run, folder: Path, patch: pytest.MonkeyPatch, place: str, *of: object
) -> None:
    """Killed where a function is called for the second time, and resumed, it ends as another run did."""
    with patch.context() as context:
        strike(context, place, 2, kill)
        with pytest.raises(Killed):
            run("--out", folder, *of)
    assert run("--out", folder, "--resume").status == 0
    assert_same(folder, whole)


def test_micro_batches_change_only_the_rounding(
    run: Run, text: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = [text, TINY, SCHEDULE, "--micro-batch 2"]
    assert run("--out", tmp_path / "whole", *schedule).status == 0
    for row, want in zip(rows(tmp_path / "whole"), rows(unbroken), strict=True):
        assert_close([row["train_loss"], row["grad_norm"]], [want["train_loss"], want["grad_norm"]], 1e-4)
    assert_killed_ends_as(tmp_path / "whole", run, tmp_path / "run", monkeypatch, "evaluate", *schedule)


def test_packed_documents(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has the loss that it has alone. An epoch, of six rows, ends within the step where the run is killed."""
    path, whole = tmp_path / "documents.jsonl", tmp_path / "whole"
    path.write_text("".join(json.dumps({"text": "abcdefgh"[: n % 7 + 2]}) + "\n" for n in range(12)))
    schedule = [path, TINY, SCHEDULE.replace("--val-fraction 0.2", "--val-fraction 0.3"), "--pack --keep 9"]
    assert run("--out", whole, *schedule).status == 0
    corpus = prepare([str(path)], tmp_path, tokenizer="chars", vocab=None, seq=8, fraction=0.3, pack=True)
    model: Any = transformers.LlamaForCausalLM.from_pretrained(whole / "step-12")
    surprises = list[float]()
    for batch in corpus.validation.sweep(4) if corpus.validation else ():
        for row, targets, first in zip(*cast(Any, batch), strict=True):
            for begin in np.unique(first[targets >= 0]):
                own = (first == begin) & (targets >= 0)
                scores = model(torch.tensor(row[own][None], dtype=torch.long)).logits[0].detach()
                wanted = torch.tensor(targets[own], dtype=torch.long)
                surprises += torch.nn.functional.cross_entropy(scores, wanted, reduction="none").tolist()
    assert len(surprises) > 10
    assert rows(whole)[-1]["val_loss"] == pytest.approx(np.mean(surprises), rel=1e-5)
    assert_killed_ends_as(whole, run, tmp_path / "run", monkeypatch, "step", *schedule)


def test_bfloat16_keeps_master_weights(run: Run, text: Path, unbroken: Path, tmp_path: Path) -> None:
    """The losses differ by rounding; what is saved has more digits than bfloat16."""
    schedule = SCHEDULE.replace("--steps 12", "--steps 3").replace("--eval-every 4", "--eval-every 3")
    assert run(text, "--out", tmp_path / "run", TINY, schedule, "--dtype bfloat16", "--remat nothing").status == 0
    losses, want = ([row["train_loss"] for row in rows(folder)[:2]] for folder in (tmp_path / "run", unbroken))
    assert losses != want
    assert_close(losses, want, 1e-2)
    embed = run_folder.read_checkpoint(tmp_path / "run", 3).model.params.embed
    assert (embed.astype("bfloat16").astype("float32") != embed).any()


def test_a_soak(tmp_path: Path) -> None:
    """Processes of its own, killed at random; `./dev soak` does it more often, and with other signals."""
    assert soak.soak(tmp_path, 4, signal.SIGKILL) == soak.Verdict(4, [])


def test_going_back_to_an_earlier_checkpoint(run: Run, text: Path, unbroken: Path, tmp_path: Path) -> None:
    assert run(text, "--out", tmp_path / "run", TINY, SCHEDULE, "--keep 9").status == 0
    assert run("--out", tmp_path / "run", "--resume step-6", "--keep 9").status == 0
    assert_same(tmp_path / "run", unbroken)


def test_a_finished_run_stays_as_it_is(run: Run, text: Path, unbroken: Path, tmp_path: Path) -> None:
    first = run(text, "--out", tmp_path / "run", TINY, SCHEDULE)
    before = rows_without_speed(tmp_path / "run")
    again = run("--out", tmp_path / "run", "--resume")
    assert (again.status, again.out) == (0, first.out)
    assert rows_without_speed(tmp_path / "run") == before


# ---- Early stopping --------------------------------------------------------------------------------------------------


def test_patience_ends_a_run_and_the_best_stays(run: Run, text: Path, tmp_path: Path) -> None:
    """A rate so low that no parameter changes: the first evaluation is as good as any after it."""
    schedule = "--steps 40 --eval-every 2 --warmup 0 --lr 1e-30 --patience 3 --keep 1"
    done = run(text, "--out", tmp_path / "run", TINY, schedule)
    progress = run_folder.read_checkpoint(tmp_path / "run", run_folder.steps(tmp_path / "run")[-1]).progress
    assert done.status == 0 and (progress.best_step, progress.step, progress.stale) == (2, 8, 3)
    assert run_folder.steps(tmp_path / "run") == [2, 8]
    assert f"after {progress.best_step} steps" in done.out
    assert run("--out", tmp_path / "run", "--resume").out == done.out


# ---- Fine-tuning and adapters ----------------------------------------------------------------------------------------


@pytest.fixture
def base(unbroken: Path, tmp_path: Path) -> Path:
    """A model to train on from: not tied, with grouped queries."""
    tokenizer = load(unbroken / "best").tokenizer
    config = Config(13, 8, 3, 2, 2, 6, 12, 16, 1e-4, 500.0, None, False)
    save(Model(config, random_params(config), tokenizer), tmp_path / "base")
    return tmp_path / "base"


def test_a_model_is_trained_on(run: Run, text: Path, unbroken: Path, tmp_path: Path) -> None:
    """The sizes and the tokenizer are the model's."""
    more = "--batch 4 --sample 0 --steps 4 --keep 9"
    assert run(text, "--out", tmp_path / "run", "--init-from", unbroken / "best", more).status == 0
    first, model = load(tmp_path / "run" / "step-0"), load(unbroken / "best")
    assert rows(tmp_path / "run")[0]["train_loss"] < rows(unbroken)[0]["train_loss"] - 0.05
    assert first.config == model.config
    jax.tree.map(np.testing.assert_array_equal, first.params, model.params)
    assert (load(tmp_path / "run" / "step-4").params.embed != model.params.embed).any()


@pytest.mark.parametrize("targets", ["q,o,up"])
def test_adapters(
    run: Run, text: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, targets: str
) -> None:
    """What is saved is W + α/r BA in their places, and the base elsewhere; resumed, the same bits."""
    more = f"--ctx 8 --batch 4 --sample 0 --lora 2 --lora-alpha 3 --lora-targets {targets} --keep 9"
    schedule = "--steps 6 --lr 1e-2 --warmup 0 --save-every 2"
    assert run(text, "--out", tmp_path / "run", "--init-from", base, more, schedule).status == 0
    saved, first, model = (run_folder.read_checkpoint(tmp_path / "run", n) for n in (6, 0)), None, load(base)
    last, first = saved
    jax.tree.map(np.testing.assert_array_equal, first.model.params, model.params)
    blocks: Any = model.params.blocks
    for i, (got, was) in enumerate(zip(last.model.params.blocks, blocks, strict=True)):
        for name in ("q", "k", "v", "o", "gate", "up", "down"):
            part = "attn" if name in "qkvo" else "ffn"
            w, new = (np.asarray(getattr(getattr(block, part), name), np.float64) for block in (was, got))
            if name not in targets.split(","):
                np.testing.assert_array_equal(new, w)
                continue
            a, b = (last.arrays[f"adapters.{part}.{name}.{which}"].reshape(3, -1)[i] for which in "ab")
            change = b.reshape(-1, 2) @ a.reshape(2, -1)
            assert np.abs(change).max() > 1e-3
            assert_close(new - w, 1.5 * change.reshape(w.shape), 1e-4, name)
    np.testing.assert_array_equal(last.model.params.embed, model.params.embed)
    alone = load(tmp_path / "run" / "best" / "adapter")
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), alone.params, load(tmp_path / "run").params)
    with monkeypatch.context() as patch:
        strike(patch, "step", 4, kill)
        with pytest.raises(Killed):
            run(text, "--out", tmp_path / "again", "--init-from", base, more, schedule)
    assert run("--out", tmp_path / "again", "--resume").status == 0
    assert_same(tmp_path / "again", tmp_path / "run")


# ---- What it leaves and says -----------------------------------------------------------------------------------------


def test_metrics(unbroken: Path) -> None:
    lines = rows(unbroken)
    assert [row["step"] for row in lines] == [*range(1, 13)]
    assert [row["step"] for row in lines if "val_loss" in row] == [4, 8, 12]
    assert all({"train_loss", "lr", "grad_norm", "tokens_per_s"} <= row.keys() for row in lines)


def test_events_a_picture_and_samples(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loss falls. After a resume no sample stands twice."""
    schedule = "--steps 30 --eval-every 10 --lr 3e-2 --warmup 2 --sample 5"
    assert main(words(text, "--out", tmp_path / "run", TINY.replace("--sample 0", ""), schedule)) == 0
    said = capsys.readouterr()
    lines = rows(tmp_path / "run")
    assert lines[-1]["val_loss"] < lines[0]["train_loss"] - 0.2
    events = b"".join(path.read_bytes() for path in (tmp_path / "run").glob("events.out.tfevents.*"))
    assert all(tag in events for tag in (b"train_loss", b"val_loss", b"grad_norm", b"lr"))
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    samples = (tmp_path / "run" / "samples.jsonl").read_text()
    assert [json.loads(line)["step"] for line in samples.splitlines()] == [10, 20, 30]
    assert len(said.err.splitlines()) >= 7 and said.out.count("\n") == 1
    metrics.cut_rows(tmp_path / "run" / "samples.jsonl", 20)
    assert (tmp_path / "run" / "samples.jsonl").read_text() == "".join(samples.splitlines(True)[:2])


def test_a_missing_package_is_a_note(run: Run, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lovely_llama import LlamaError

    def missing(*_: object) -> Any:
        raise LlamaError("environment", "tensorboardX", "no such package", "it: pip install tensorboardX")

    monkeypatch.setattr(metrics, "extra", missing)
    done = run(text, "--out", tmp_path / "run", TINY, "--steps 2")
    assert done.status == 0
    assert [line for line in done.err.splitlines() if line.startswith("note: ")] == [
        "note: no TensorBoard events: environment: tensorboardX: got no such package, "
        "expected it: pip install tensorboardX"
    ]
