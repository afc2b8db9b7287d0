"""`diff` on a torch Llama in the manner of llama2.c, on models of the probe, in three dtypes."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch_llama import TorchLlama

from lovely_llama_tools import diff
from lovely_llama_tools.comparing.golden import PROBES, parameters, prompt
from lovely_llama_tools.formats.model import Model

MODELS = {name: Model(PROBES[name].config, parameters(PROBES[name]), None) for name in ("grouped", "square")}
Change = Callable[[TorchLlama], Any]


def methods(**changes: Any) -> Change:
    return lambda model: model.replaced(**changes)


def normed(self: Any, x: Any, at: str, which: str) -> Any:
    return self.norm(x, self.w[f"{at}{which}_norm.weight"])


def block(change: Callable[..., Any]) -> Change:
    """Another wiring of x, attention, feed-forward and the two norms, each of one argument."""

    def new(self: Any, x: Any, at: str, angles: Any) -> Any:
        return change(
            x, lambda y: self.attention(y, at, angles), lambda y: self.feed_forward(y, at),
            lambda y: normed(self, y, at, "attention"), lambda y: normed(self, y, at, "ffn"),
        )  # fmt: skip

    return methods(block=new)


def logits(change: Callable[[Any], Any]) -> Change:
    """Something else made of the logits."""
    return lambda model: lambda ids: change(model(ids))


def square(name: str) -> Change:
    """A matrix transposed."""

    def change(model: TorchLlama) -> None:
        model.w |= {key: w.T.contiguous() for key, w in model.w.items() if f".{name}." in key}

    return change


def one_short(self: Any, scores: Any) -> Any:
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(0)
    return scores.masked_fill(later, -1e9).softmax(-1)


def add_then_norm(x: Any, attend: Any, feed: Any, first: Any, second: Any) -> Any:
    x = first(x + attend(x))
    return second(x + feed(x))


def both_wirings(change: Callable[[Any, Any], Any], of_first: bool) -> Change:
    """The first or the second sum, of an input and its norm's answer, made otherwise."""

    def new(x: Any, attend: Any, feed: Any, first: Any, second: Any) -> Any:
        x = change(x, attend(first(x))) if of_first else x + attend(first(x))
        return x + feed(second(x)) if of_first else change(x, feed(second(x)))

    return block(new)


GROUPED: dict[str, Change] = {
    "exponent over dim": methods(exponents=lambda m: 2 * torch.arange(m.c.head_dim // 2) / m.c.dim),
    "exponent 2(i+1)/d": methods(exponents=lambda m: 2 * (torch.arange(m.c.head_dim // 2) + 1) / m.c.head_dim),
    "positions divided by 2": methods(angles=lambda m, n: torch.outer(torch.arange(n) / 2, m.frequencies())),
    "angles in bfloat16": methods(
        angles=lambda m, n: torch.outer(torch.arange(n).float(), m.frequencies()).bfloat16().float()),
    "values rotated": methods(turn_values=lambda m, v, angles: m.rotate(v, angles)),
    "query heads grouped the other way": methods(repeat=lambda m, x: x.repeat(1, m.c.q_per_kv, 1)),
    "heads not transposed back": methods(merge=lambda m, heads: heads.reshape(heads.shape[1], -1)),
    "mask one short, the first row an average": methods(weights=one_short),
    "masked scores are 0, not -inf": methods(weights=lambda m, s: s.tril().softmax(-1)),
    "attention not added to its input": both_wirings(lambda x, y: y, True),
    "feed-forward not added to its input": both_wirings(lambda x, y: y, False),
    "attention added to the norm": block(lambda x, a, f, n, o: (z := n(x) + a(n(x))) + f(o(z))),
    "feed-forward added to the norm": block(lambda x, a, f, n, o: o(z := x + a(n(x))) + f(o(z))),
    "halves in parallel": block(lambda x, a, f, n, o: x + a(n(x)) + f(o(x))),
    "feed-forward reads attention alone": block(lambda x, a, f, n, o: x + (y := a(n(x))) + f(o(y))),
    "norms after": block(add_then_norm),
    "attention's norm left out": block(lambda x, a, f, n, o: (z := x + a(x)) + f(o(z))),
    "attention's norm for both": block(lambda x, a, f, n, o: (z := x + a(n(x))) + f(n(z))),
    "last norm left out": methods(readout=lambda m, x: x @ m.w["output.weight"].T),
    "last norm applied twice": methods(
        readout=lambda m, x: m.norm(m.norm(x, m.w["norm.weight"]), m.w["norm.weight"]) @ m.w["output.weight"].T),
    "embedding scaled by sqrt(dim)": methods(
        embed=lambda m, ids: m.w["tok_embeddings.weight"][ids] * math.sqrt(m.c.dim)),
    "ids one too high": methods(embed=lambda m, ids: m.w["tok_embeddings.weight"][(ids + 1) % m.c.vocab]),
    "layers sorted as text": lambda m: m.order.sort(key=str),
    "log-probabilities": logits(lambda x: x.log_softmax(-1)),
    "logits of the position before": logits(lambda x: torch.cat([x[:1] * torch.nan, x[:-1]])),
    "BOS put in front": lambda m: lambda ids: m([1, *ids]),
    "first token lost": lambda m: lambda ids: m(ids[1:]),
}  # fmt: skip
SQUARE: dict[str, Change] = {
    "o transposed": square("wo"), "q transposed, Meta's rows": square("wq"),
    "logits of the next position": logits(lambda x: torch.cat([x[1:], x[:1] * torch.nan])),
}  # fmt: skip
CASES = [("grouped", name) for name in GROUPED] + [("square", name) for name in SQUARE]


def broken(which: str, name: str, dtype: Any = torch.float32) -> Any:
    model = MODELS[which]
    theirs = TorchLlama(model.params, model.config, dtype)
    return (GROUPED | SQUARE)[name](theirs) or theirs


@pytest.mark.parametrize(("which", "name"), CASES)
def test_a_bug_in_torch_is_named(which: str, name: str) -> None:
    verdict = diff(MODELS[which], broken(which, name))
    assert verdict.bugs[:1] == [name] and verdict.verdict == "bug", verdict


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("which", MODELS)
def test_a_correct_llama_is_the_same(which: str, dtype: Any) -> None:
    model = MODELS[which]
    verdict = diff(model, TorchLlama(model.params, model.config, dtype))
    assert verdict.verdict == "same", verdict


@pytest.mark.parametrize(("which", "name"), CASES[9:21:2])
def test_nothing_is_named_wrongly_in_bfloat16(which: str, name: str) -> None:
    verdict = diff(MODELS[which], broken(which, name, torch.bfloat16))
    assert verdict.verdict in ("bug", "several") and name in verdict.bugs, verdict


def test_positions_that_bfloat16_does_not_count() -> None:
    """With more tokens than it counts, two bugs are told apart that look alike before."""
    model = MODELS["square"]
    theirs = TorchLlama(model.params, model.config)
    theirs.replaced(angles=lambda m, n: torch.outer(torch.arange(n).bfloat16().float(), m.frequencies()))
    ids = prompt(PROBES["square"])
    verdict = diff(model, theirs, ids)
    assert verdict.bugs == ["positions in bfloat16"] and verdict.first and verdict.first >= 257, verdict
    short = diff(model, theirs, ids[:40])
    assert short.verdict == "same"
