"""TinyShakespeare: a run of `lovely-llama train` with the settings of docs/training.md, and what came of it.

./dev shakespeare TEXT RUN             train on TEXT, unless the folder RUN is there, and print the losses
./dev shakespeare TEXT RUN --ladder    train smaller models the same way: what each part of a Llama is worth
./dev shakespeare TEXT RUN --time      some of the steps here and in torch, in turn, and what each takes
    --write                            and put it into docs/training.md, the losses also into docs/shakespeare.png
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import curve
import jax
import numpy as np
from jax import numpy as jnp
from jax import vmap
from jaxtyping import Array, Float, Int
from machine import processor

import lovely_llama as ll
from lovely_llama_tools import fast
from lovely_llama_tools.commands import arguments, train
from lovely_llama_tools.commands import main as lovely_llama
from lovely_llama_tools.commands.plot import draw_losses
from lovely_llama_tools.data.prepare import Corpus, prepare
from lovely_llama_tools.fast.attention import attention as blockwise
from lovely_llama_tools.fast.layers import in_tuple
from lovely_llama_tools.training import loop, settings
from lovely_llama_tools.training import step as training_step

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE, PICTURE = DOCS / "training.md", DOCS / "shakespeare.png"
FLAGS = """--tokenizer chars --layers 4 --heads 8 --dim 128 --hidden-dim 344 --ctx 64 --batch 12 --micro-batch 6
    --steps 2000 --lr 6e-3 --final-lr 0 --warmup 200 --weight-decay 0.3 --beta2 0.98 --theta 100 --init-std 0.05
    --eval-every 500 --eval-batches 1000"""
S = settings.settle(train.given(arguments().parse_args(["train", *shlex.split(FLAGS)])), {})
BETAS, SCALE = (S.beta1, S.beta2), (S.init_std or loop.INIT_STD) / loop.INIT_STD


def rate(step: int) -> float:
    return ll.learning_rate(step, S.lr, S.warmup or 0, S.steps, S.final_lr or 0)


def report(run: Path) -> str:
    """The command, the losses of its evaluations, and its last sample, in Markdown."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    command = textwrap.wrap(" ".join(f"lovely-llama train tinyshakespeare.txt {FLAGS}".split()), 110)
    lines = ["```text", " \\\n    ".join(command), "```", "", "| step | training | validation |", "|---|---|---|"]
    for i, row in enumerate(rows):
        if "val_loss" in row:
            recent = [other["train_loss"] for other in rows[max(i - 99, 0) : i + 1]]
            lines.append(f"| {row['step']} | {sum(recent) / len(recent):.3f} | {row['val_loss']:.4f} |")
    sample = json.loads((run / "samples.jsonl").read_text().splitlines()[-1])["text"].strip()
    lines += ["", "Training losses are means of the last 100 steps. What it writes in the end:", "", "```text", sample]
    return "\n".join([*lines, "```", ""])


# ---- What each part is worth -----------------------------------------------------------------------------------------

RUNGS = (
    "embedding → feed-forward → logits",
    "+ RMSNorm",
    "+ attention with rotary positions",
    "+ SwiGLU",
    "+ 4 blocks",
)


def model(rung: int, params: ll.Params, tokens: Int[Array, " seq"], config: ll.Config) -> Float[Array, "seq vocab"]:
    """The logits of a part of a Llama. The feed-forward layer is ReLU's at first; every layer adds to its input."""
    if rung == 4:
        return fast.logits(params, tokens, config)
    x, w = ll.embed(params, tokens), params.blocks[0]
    norm: Callable[..., Array] = partial(ll.rms_norm, eps=config.eps) if rung else lambda x, gain: x
    if rung >= 2:
        normed, cache = vmap(lambda x: norm(x, w.attn_norm))(x), ll.empty_cache(config, len(tokens), x.dtype)[0]
        x = x + blockwise(w.attn, normed, cache, ll.positions(0, len(tokens), config))[0]
    relu: Callable[..., Array] = lambda x, gate, up, down: down @ jnp.maximum(up @ x, 0)  # noqa: E731
    forward = ll.swiglu if rung >= 3 else relu
    x = x + vmap(lambda x: forward(norm(x, w.ffn_norm), *w.ffn))(x)
    return vmap(lambda x: jnp.inner(norm(x, params.norm), params.embed))(x)


def climb(rung: int, corpus: Corpus) -> tuple[int, float, float]:
    """Train it: how many parameters it uses, its mean loss in the last 100 steps, and that on the validation data."""
    config = settings.new_config(S._replace(layers=4 if rung == 4 else 1), corpus.vocab)

    def loss(params: ll.Params, tokens: Any, targets: Any) -> Array:
        scores = jax.nn.log_softmax(vmap(lambda row: model(rung, params, row, config))(tokens))
        chosen = jnp.take_along_axis(scores, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
        return -(chosen * (targets >= 0)).sum() / (targets >= 0).sum()

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: ll.Params, moments: ll.Moments, tokens: Any, targets: Any, rate: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(params, tokens, targets)
        used = jax.tree.map(lambda g: g.any(), gradients)
        return value, used, *ll.adamw(params, ll.clip(gradients, S.clip)[0], moments, rate, S.weight_decay, BETAS)

    params = in_tuple(training_step.new_params(jax.random.key(S.seed), config, SCALE))
    moments, losses, used = ll.moments(params), list[float](), None
    for n in range(S.steps):
        batch = corpus.train.batch(S.seed, n, S.batch)
        value, used, params, moments = step(params, moments, *batch[:2], np.float32(rate(n)))
        losses.append(float(value))
    count = sum(leaf.size for leaf, one in zip(jax.tree.leaves(params), jax.tree.leaves(used), strict=True) if one)
    assert corpus.validation
    totals = np.zeros(2)
    for batch in corpus.validation.sweep(S.batch):
        n = (batch.targets >= 0).sum()
        totals += n * float(jax.jit(loss)(params, *batch[:2])), n
    return count, float(np.mean(losses[-100:])), totals[0] / totals[1]


def ladder(corpus: Corpus) -> str:
    """All of them in Markdown, each with what it is better by than the one before."""
    lines = ["| model | parameters | training | validation | gain |", "|---|---|---|---|---|"]
    before = None
    for rung, name in enumerate(RUNGS):
        count, training, validation = climb(rung, corpus)
        gain = "" if before is None else f"{before - validation:.3f}"
        lines.append(f"| {name} | {count:,} | {training:.3f} | {validation:.4f} | {gain} |")
        print(lines[-1], file=sys.stderr)
        before = validation
    return "\n".join([*lines, ""])


# ---- How long it takes -----------------------------------------------------------------------------------------------


def steps_here(corpus: Corpus) -> Iterator[float]:
    """Step after step of `train`, from its data to the loss."""
    config = settings.new_config(S, corpus.vocab)
    learner = training_step.initial_state(None, training_step.new_params(jax.random.key(S.seed), config, SCALE))
    trained, moments, options = learner.trained, learner.moments, settings.step_options(S, config)
    for n in range(S.steps):
        rows: Any = corpus.train.batch(S.seed, n, S.batch)[:2]
        trained, moments, report = training_step.step(None, trained, moments, np.float32(rate(n)), rows, options)  # pyright: ignore
        yield float(report.loss)


def steps_in_torch(corpus: Corpus) -> Iterator[float]:
    """The same in torch."""
    config = settings.new_config(S, corpus.vocab)
    params = in_tuple(training_step.new_params(jax.random.key(S.seed), config, SCALE))
    batches = (corpus.train.batch(S.seed, n, S.batch)[:2] for n in range(S.steps))
    return curve.theirs(params, batches, map(rate, range(S.steps)), config, S.weight_decay, BETAS)


def times(corpus: Corpus, segments: int = 5, size: int = 100) -> str:
    """The milliseconds of a step, in segments that alternate; the first ten steps of each side come before."""
    sides = {"here": steps_here(corpus), "torch": steps_in_torch(corpus)}
    losses = {name: [next(steps) for _ in range(10)] for name, steps in sides.items()}
    took: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(segments):
        for name, steps in sides.items():
            began = time.perf_counter()
            losses[name] += [next(steps) for _ in range(size)]
            took[name].append((time.perf_counter() - began) / size * 1000)
    lines = ["| | a step, median and range in ms | 2000 steps | loss of the last step here |", "|---|---|---|---|"]
    for name, all_of in took.items():
        middle = statistics.median(all_of)
        span = f"{middle:.1f} ({min(all_of):.1f}–{max(all_of):.1f})"
        lines.append(f"| {name} | {span} | {middle * S.steps / 1000:.0f} s | {losses[name][-1]:.4f} |")
    return "\n".join([*lines, "", f"In float32 on {os.cpu_count()} cores of {processor()}.", ""])


# ---- The command -----------------------------------------------------------------------------------------------------


def write(name: str, text: str) -> None:
    """Put it into the page, between its marks."""
    before, rest = PAGE.read_text().split(f"<!-- {name} -->\n")
    end = f"<!-- /{name} -->"
    PAGE.write_text(f"{before}<!-- {name} -->\n{text}{end}{rest.split(end)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="./dev shakespeare", description="Train on TinyShakespeare.")
    parser.add_argument("text", metavar="TEXT", help="tinyshakespeare.txt")
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of the run")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--ladder", action="store_true", help="what each part of a Llama is worth")
    what.add_argument("--time", action="store_true", help="how long it takes, here and in torch")
    parser.add_argument("--write", action="store_true", help="put the result into docs/training.md")
    args = parser.parse_args()
    if args.ladder or args.time:
        corpus = prepare([args.text], args.run / "data", seq=64, fraction=S.val_fraction)
        name, text = ("ladder", ladder(corpus)) if args.ladder else ("time", times(corpus))
    else:
        train_it = ["train", args.text, "--out", str(args.run), *shlex.split(FLAGS)]
        if not args.run.exists() and (status := lovely_llama(train_it)):
            sys.exit(status)
        name, text = "shakespeare", report(args.run)
    print(text, end="")
    if args.write:
        write(name, text)
        if name == "shakespeare":
            draw_losses([args.run], PICTURE)


if __name__ == "__main__":
    main()
