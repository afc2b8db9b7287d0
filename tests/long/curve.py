"""The loss curve here and in torch: one model, the same 200 batches from the same start.

    ./dev curve            print the losses and how far they are apart
    ./dev curve --write    and put them into docs/training.md, with docs/curve.png

test_6_learning.py does the same for 50 steps. The other side is transformers' LlamaForCausalLM under torch's AdamW and
clip_grad_norm_. The text is the library's own source, read as bytes.
"""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from jax import numpy as jnp
from jaxtyping import Int
from transformers import LlamaConfig, LlamaForCausalLM

import lovely_llama as ll
from lovely_llama_tools.formats.hugging_face import to_hf
from lovely_llama_tools.formats.hugging_face_config import config_to_hf
from lovely_llama_tools.pictures.style import COLOURS, new_figure, style, write_figure

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE, PICTURE, MARKS = DOCS / "training.md", DOCS / "curve.png", ("<!-- curve -->\n", "<!-- /curve -->")
CONFIG = ll.Config(
    vocab=256, dim=64, layers=3, kv_heads=2, q_per_kv=2, head_dim=16, hidden_dim=172, ctx=64, eps=1e-5, theta=1e4,
    rope_scaling=None, tied=True,
)  # fmt: skip
ROWS, PEAK, WARMUP, DECAY, LIMIT, BETAS, EPS = 8, 1e-3, 20, 0.1, 1.0, (0.9, 0.95), 1e-8
Batch = tuple[Int[np.ndarray, "rows seq"], Int[np.ndarray, "rows seq"]]
BOUND = 1e-5  # of the difference of two losses in nats; either is 1e-6 from the curve in float64


def batches(steps: int) -> list[Batch]:
    """Windows of the text at random places, and each token's successor."""
    text = np.frombuffer(Path(ll.__file__).read_bytes(), np.uint8).astype(np.int32)
    starts = np.random.default_rng(0).integers(len(text) - CONFIG.ctx, size=(steps, ROWS, 1))
    return [(ids[:, :-1], ids[:, 1:]) for ids in text[starts + np.arange(CONFIG.ctx + 1)]]


def rates(steps: int) -> list[float]:
    return [ll.learning_rate(step, PEAK, WARMUP, steps, 0.0) for step in range(steps)]


def ours(params: ll.Params, steps: int) -> Iterator[float]:
    """The loss of each step, in the dtype of the parameters."""

    @jax.jit
    def step(
        params: ll.Params, moments: ll.Moments, batch: tuple[Any, Any], rate: Any
    ) -> tuple[Any, ll.Params, ll.Moments]:
        loss, gradients = jax.value_and_grad(ll.loss)(params, *batch, CONFIG)
        return loss, *ll.adamw(params, ll.clip(gradients, LIMIT)[0], moments, rate, DECAY, BETAS, EPS)

    moments = ll.moments(params)
    for batch, rate in zip(batches(steps), rates(steps), strict=True):
        loss, params, moments = step(params, moments, batch, jnp.asarray(rate, params.norm.dtype))
        yield float(loss)


def theirs(
    params: ll.Params, batches: Iterable[Batch], rates: Iterable[float], config: ll.Config = CONFIG,
    decay: float = DECAY, betas: tuple[float, float] = BETAS,
) -> Iterator[float]:  # fmt: skip
    """The loss of each step in torch. Gains of norms do not decay, there either."""
    model: Any = LlamaForCausalLM(LlamaConfig(**config_to_hf(config)))
    tensors = {name: torch.tensor(np.asarray(array)) for name, array in to_hf(params, config).items()}
    model.load_state_dict(tensors, strict=False)  # a tied model has no unembedding of its own
    gains = [parameter for name, parameter in model.named_parameters() if "norm" in name]
    matrices = [parameter for name, parameter in model.named_parameters() if "norm" not in name]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, weight_decay=decay, betas=betas, eps=EPS)
    for batch, rate in zip(batches, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        tokens, targets = (torch.tensor(ids, dtype=torch.long) for ids in batch)
        scores = model(tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), LIMIT)
        optimizer.step()
        yield loss.item()


def table(left: list[float], right: list[float]) -> str:
    """The losses in Markdown at some of the steps, and how far apart they are at most."""
    lines = ["| step | here | torch | difference |", "|---|---|---|---|"]
    for step in (0, 10, 25, 50, 100, len(left) - 1):
        lines.append(f"| {step} | {left[step]:.5f} | {right[step]:.5f} | {left[step] - right[step]:+.1e} |")
    most = max(abs(a - b) for a, b in zip(left, right, strict=True))
    says = f"The losses of {len(left)} steps in float32 differ by at most {most:.1e} nats; the bound is {BOUND:.0e}."
    return "\n".join([*lines, "", says, ""])


def draw(left: list[float], right: list[float]) -> None:
    """Both curves, and below them their difference."""
    figure = new_figure(7, 5)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for losses, name, colour, width in ((right, "torch", COLOURS[1], 4.0), (left, "here", COLOURS[0], 1.4)):
        above.plot(losses, color=colour, linewidth=width, label=name)
    above.legend(frameon=False)
    style(above, "One model, the same batches: the loss of each step", y="loss in nats")
    below.semilogy([max(abs(a - b), 1e-9) for a, b in zip(left, right, strict=True)], color=COLOURS[2], linewidth=1)
    below.axhline(BOUND, color=COLOURS[6], linewidth=0.8, linestyle="--")
    style(below, x="step", y="difference, and bound")
    write_figure(figure, PICTURE)


def main() -> None:
    parser = argparse.ArgumentParser(prog="./dev curve", description="The loss curve here and in torch.")
    parser.add_argument("--write", action="store_true", help="put it into docs/training.md, with docs/curve.png")
    write, params = parser.parse_args().write, ll.init(jax.random.key(0), CONFIG)
    left, right = list(ours(params, 200)), list(theirs(params, batches(200), rates(200)))
    text = table(left, right)
    print(text, end="")
    if write:
        draw(left, right)
        before, rest = PAGE.read_text().split(MARKS[0])
        PAGE.write_text(before + MARKS[0] + text + MARKS[1] + rest.split(MARKS[1])[1])


if __name__ == "__main__":
    main()
