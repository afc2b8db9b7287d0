"""Cases F: generation and numerics."""

import functools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from asserts import assert_close, jit
from builders import (
    SMALL,
    TINY,
    TOKENS,
    File,
    Tensor,
    random_params,
    tiny_arrays,
    tiny_fields,
    write_gguf,
    write_sentencepiece,
)
from faults import (
    WORDS,
    Accepted,
    Act,
    Case,
    Done,
    Unlike,
    Variant,
    World,
    ends,
    flags,
    guarded,
    refused,
    samplings,
    values,
)
from jax import numpy as jnp

import lovely_llama as ll
from lovely_llama_tools.files import load
from lovely_llama_tools.formats import Model
from lovely_llama_tools.generate import Session, generate
from lovely_llama_tools.layout import GGUF, all_tensors

GREEDY = ll.Sampling(temperature=0.0)
UNCACHED = jax.jit(ll.logits, static_argnums=2)
VOCAB = TINY.vocab
LETTER = TOKENS.index("a")  # which the talker says: its logit is large

# ---- F1, F2: prompts -------------------------------------------------------------------------------------------------


def ids_of_all_kinds(world: World) -> None:
    want = world.generate([3, 80, 81], sampling=GREEDY).tokens
    for kind in (np.int64, np.uint16, np.int8):
        assert world.generate(np.array([3, 80, 81], kind), sampling=GREEDY).tokens == want


def long_text(world: World, length: int) -> None:
    world.generate("ab" * (length // 2) + "a" * (length % 2))


def fits_exactly(world: World) -> None:
    full = world.generate([80] * TINY.ctx)
    assert (full.tokens, full.reason) == ([], "context")
    almost = world.generate([80] * (TINY.ctx - 1))
    assert (len(almost.tokens), almost.reason) == (1, "context")


# ---- F3, F4: lengths -------------------------------------------------------------------------------------------------

BEYOND = {"lovely_llama_tools.generate:range": "lambda first, last: __import__('builtins').range(first, last + 8)"}
# No room for padding behind the context: it is written further up, over what is there.
NO_PADDING = {
    "lovely_llama_tools.generate:Session.reserve": "lambda self, length: self.room or vars(self).update(room=1, "
    "cache=empty_cache(self.model.config, self.model.config.ctx, self.model.params.embed.dtype))"
}


def to_the_limit(prompt: int, before: int = 0) -> Act:
    """The likeliest tokens without a cache, all the way to the end of the context, and it says so."""

    def variant(world: World) -> None:
        tokens = np.random.default_rng(prompt).integers(3, TINY.vocab, prompt).tolist()
        model = Model(TINY, random_params(TINY), world.model.tokenizer._replace(stops=frozenset[int]()))
        session = Session(model)
        if before:
            list(generate(model, [*tokens[:2], *[99] * before], 9, GREEDY, session=session))
        generation = generate(model, tokens, TINY.ctx, GREEDY, session=session)
        list(generation)
        assert generation.reason == "context"
        every = [*tokens, *generation.tokens]
        assert len(every) == TINY.ctx
        logits = np.asarray(UNCACHED(model.params, jnp.array(every), TINY))
        for n in range(prompt, TINY.ctx):
            assert logits[n - 1, every[n]] >= logits[n - 1].max() - 1e-4

    return variant


def said_at_the_limit(world: World) -> None:
    done = world.run("generate", "--temperature", 0, "--max-new", TINY.ctx)
    assert done.status == 0
    assert len(done.out.strip()) == TINY.ctx - 3
    assert "context" in done.err


def no_new(world: World) -> None:
    generation = world.generate(max_new=0)
    assert (generation.text, generation.tokens, generation.reason) == ("", [], "length")
    assert world.run("generate", "--max-new", 0).out == "\n"
    assert len(world.generate(max_new=TINY.ctx).text) == TINY.ctx - 3


# ---- F5, F6: samplers ------------------------------------------------------------------------------------------------


def coldest(t: float) -> Act:
    def variant(world: World) -> None:
        logits, seen = jnp.array([0.5, -3.0, 2.0, 1.999, -1e3]), jnp.zeros(5, bool)
        for seed in range(20):
            rng = jax.random.key(seed)
            assert ll.choose(rng, jnp.array(seed), logits, seen, ll.Sampling(temperature=t))[0] == 2

    return variant


def warm(world: World) -> None:
    tokens = {tuple(world.generate(sampling=ll.Sampling(), seed=seed, max_new=9).tokens) for seed in range(9)}
    assert len(tokens) > 3


def plain_sampling(world: World) -> None:
    logits = jnp.array(np.random.default_rng(0).normal(size=50), jnp.float32)
    for seed in range(20):
        rng, at = jax.random.key(seed), jnp.array(seed)
        want = jax.random.categorical(jax.random.fold_in(rng, at), logits)
        got = ll.choose(rng, at, logits, jnp.zeros(50, bool), ll.Sampling(temperature=1.0, top_p=1.0))[0]
        assert got == want


def loosest_and_tightest(world: World) -> None:
    loose = ll.Sampling(top_k=TINY.vocab, top_p=1.0, min_p=0.0)
    assert len(world.generate(sampling=loose).tokens) == 3
    best = world.generate(sampling=GREEDY).tokens
    assert world.generate(sampling=ll.Sampling(top_k=1, top_p=1e-30, min_p=1.0)).tokens == best


# ---- F7, F8: nothing to continue, and logits that are no numbers -----------------------------------------------------

NO_BOS = {"lovely_llama_tools.tokens:Tokenizer.begin": "lambda self, text: self.encode(text, False)"}
STRIPPED = {"lovely_llama_tools.tokens:Tokenizer.begin": "lambda self, text: [self.bos] + self.encode(text.strip(), 0)"}


def begins(text: str, *wanted: int | str) -> Act:
    def variant(world: World) -> None:
        model = world.model
        want = [t if isinstance(t, int) else model.tokenizer.encode(t, False)[0] for t in wanted]
        generation = world.generate(text)
        assert generation.prompt == want
        assert len(generation.tokens) == 3

    return variant


def no_text(command: str) -> Act:
    def variant(world: World) -> None:
        done = world.main(command, "", "--model", world.talker, "--max-new", 3)
        assert done.status == 0
        assert len(done.out) == 4

    return variant


def no_bos(world: World) -> None:
    """No BOS and no text: there is no token to continue."""
    model = world.model._replace(tokenizer=world.model.tokenizer._replace(bos=None))
    list(generate(model, "", 3))


BLIND = {"lovely_llama:choose": "lambda rng, at, logits, seen, s: (jax.random.categorical(rng, s(logits, seen)), seen)"}


def broken(prompt: Sequence[int], position: int, change: Callable[[Any], Any], sampling: Any = None) -> Variant:
    """Logits that are no numbers are an error that says where."""

    def variant(world: World) -> None:
        model = world.model._replace(params=change(world.model.params))
        try:
            list(generate(model, prompt, 9, sampling or ll.Sampling()))
        except ArithmeticError as error:
            if f"logits at position {position}:" not in str(error):
                raise Unlike(str(error)) from error
        else:
            raise Accepted

    return guarded(variant, BLIND, end=Accepted)


def one_row(value: float) -> Callable[[Any], Any]:
    return lambda params: params._replace(unembed=params.unembed.at[50].set(value))


def one_embedding(params: Any) -> Any:
    return params._replace(embed=params.embed.at[90].set(math.nan))


def overflowing(world: World) -> Done:
    """Weights that are numbers, logits that are none."""
    arrays = tiny_arrays(config := replace(TINY, tied=False))
    arrays["output.weight"][7] = np.float32(3e38)
    arrays["output_norm.weight"][:] = 5
    path = write_gguf(world.folder / "overflow.gguf", tiny_fields(config), arrays)
    return world.run("generate", "--seed", 1, model=path)


# ---- F9, F11: batches and bfloat16 -----------------------------------------------------------------------------------

RAGGED = [np.random.default_rng(n).integers(0, SMALL.vocab, n) for n in (1, 17, 30)]
UNMASKED = {"lovely_llama:attend": "lambda q, keys, values, *_: softmax(keys @ q / len(q) ** 0.5) @ values"}
NARROW = {"lovely_llama:wide": "lambda x: x"}


@functools.cache
def ragged_programs(attend: object) -> tuple[Callable[[Any], Any], list[Any]]:
    """Logits and gradients of a batch, and the logits of its rows alone, as they are computed with this `attend`."""
    config = replace(SMALL, layers=1)
    params, longest = random_params(config), max(map(len, RAGGED))
    here = jnp.arange(1, longest)[None] < jnp.array([len(row) for row in RAGGED])[:, None]

    def loss(params: Any, tokens: Any) -> tuple[Any, Any]:
        scores = jax.vmap(lambda row: ll.logits(params, row, config))(tokens)
        return ll.loss(params, tokens[:, :-1], jnp.where(here, tokens[:, 1:], -1), config), scores

    batch, alone = jit(jax.grad(loss, has_aux=True)), jit(lambda row: ll.logits(params, row, config))
    return lambda tokens: batch(params, tokens), [alone(jnp.array(row)) for row in RAGGED]


def ragged(pad: Callable[[int], int]) -> Act:
    """Rows of unequal lengths in one batch have the logits that they have alone, and finite gradients."""

    def variant(world: World) -> None:
        batch, alone = ragged_programs(ll.attend)
        longest = max(map(len, RAGGED))
        slopes, scores = batch(jnp.array([[*row.tolist(), *map(pad, range(longest - len(row)))] for row in RAGGED]))
        for row, got, want in zip(RAGGED, scores, alone, strict=True):
            assert_close(got[: len(row)], want, 1e-5, f"row of {len(row)}")
        assert all(np.isfinite(np.asarray(slope)).all() for slope in jax.tree.leaves(slopes))

    return variant


def halves(*shape: int, seed: int = 0, scale: float = 1) -> Any:
    return jnp.array(scale * np.random.default_rng(seed).normal(size=shape), jnp.bfloat16)


def exact(x: Any) -> Any:
    return np.asarray(x.astype(jnp.float32), np.float64)


ROUNDING = 1.01 * 2**-8  # of a result to bfloat16, and nothing more than that


def softmax_in_bfloat16(world: World) -> None:
    scores = halves(4096, scale=3)
    want = np.exp(exact(scores)) / np.exp(exact(scores)).sum()
    np.testing.assert_allclose(exact(ll.softmax(scores)), want, rtol=ROUNDING)


def norm_in_bfloat16(world: World) -> None:
    for scale in (1, 1e-3):
        x, gain = halves(4096, scale=scale), 1 + halves(4096, seed=1, scale=0.1)
        want = exact(gain) * exact(x) / np.sqrt(1e-5 + (exact(x) ** 2).mean())
        np.testing.assert_allclose(exact(ll.rms_norm(x, gain, 1e-5)), want, rtol=ROUNDING)


def rotation_in_bfloat16(world: World) -> None:
    config = replace(TINY, head_dim=128, theta=5e5)
    turned = 131071 / 5e5 ** (np.arange(64) / 64)
    angles = ll.rope_angles(jnp.array(131071), config)
    np.testing.assert_allclose(angles, turned, rtol=0, atol=2e-2)
    x, angles = halves(128), exact(angles)
    a, b = exact(x).reshape(-1, 2).T
    want = np.stack([a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)], -1).ravel()
    assert_close(ll.rope(x, jnp.array(angles, jnp.float32)).astype(jnp.float32), want, 0.002, "rotated")


def loss_in_bfloat16(world: World) -> None:
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), random_params(TINY, seed=3))
    tokens = jnp.array(np.random.default_rng(0).integers(0, TINY.vocab, 60))
    got = jax.jit(lambda: ll.logits(params, tokens, TINY))()
    want = UNCACHED(jax.tree.map(lambda w: w.astype(jnp.float32), params), tokens, TINY)
    assert_close(got.astype(jnp.float32), want, 0.02, "logits")
    scores, at = exact(got), np.arange(59)
    surprise = np.log(np.exp(scores).sum(-1))[:-1] - scores[at, tokens[1:]]
    targets = jnp.array([*tokens[1:].tolist(), -1])
    world.patch.setattr(ll, "logits", lambda *_: got)  # another program might round them differently
    np.testing.assert_allclose(ll.loss(params, tokens, targets, TINY), surprise.mean(), rtol=1e-6)


def softmax_in_float32(world: World) -> None:
    want = np.exp(range(3)) / np.exp(range(3)).sum()
    np.testing.assert_allclose(ll.softmax(jnp.arange(3.0)), want, 1e-6)


# ---- F12: memory -----------------------------------------------------------------------------------------------------

UNBOUNDED = {"lovely_llama_tools.formats:check_memory": "lambda *_: None"}


def unread(world: World) -> None:
    """Whoever gets as far as the weights has failed, and need not take all memory to show it."""

    def read(*_: object) -> Any:
        raise Accepted

    for module in ("gguf", "llama2c"):
        world.patch.setattr(f"lovely_llama_tools.formats.{module}.from_named", read)


def huge_llama2c(world: World) -> None:
    """Llama 2 70B, as far as the header and the file's size can tell."""
    path, config = world.folder / "huge.bin", ll.CONFIGS["llama-2-70b"]
    heads = config.kv_heads * config.q_per_kv
    sizes = (config.dim, config.hidden_dim, config.layers, heads, config.kv_heads, -config.vocab, config.ctx)
    path.write_bytes(np.array(sizes, "<i4").tobytes())
    os.truncate(path, 28 + 4 * (ll.count(config) + config.ctx * config.head_dim))
    tokenizer_for(path)
    unread(world)
    load(path)


def huge_gguf(world: World) -> None:
    """The same in four bits: the file would fit, the parameters would not."""
    path, config, offset = world.folder / "huge.gguf", replace(ll.CONFIGS["llama-2-70b"], vocab=TINY.vocab), 0
    tensors = list[Tensor]()
    for name, shape in all_tensors(GGUF, config).items():
        kind, size = (0, 4 * shape[0]) if len(shape) == 1 else (2, math.prod(shape) // 32 * 18)
        tensors.append(Tensor(name, shape[::-1], kind, offset))
        offset += -(-size // 32) * 32
    fields = (("general.architecture", "llama"), *tiny_fields(config).items())
    path.write_bytes(File(fields, tuple(tensors), b"").pack())
    os.truncate(path, path.stat().st_size + offset)
    unread(world)
    load(path)


def tokenizer_for(path: Path) -> None:
    write_sentencepiece(path.with_name("tokenizer.model"), 44)


def loads(world: World) -> None:
    assert load(world.talker).config.ctx == TINY.ctx


# ---- The cases -------------------------------------------------------------------------------------------------------

COLD = {"lovely_llama:greedy": "lambda logits: logits"}
HOT = {"lovely_llama:temperature": "lambda logits, t: logits / t"}

CASES: dict[str, Case] = {
    "F1": Case(
        "S", "token ids outside the vocabulary, or no ids",
        values(
            "prompt", "tokens", np.array([2**32 + 3]), np.array([2**63 + 3], np.uint64), [], [80.0], np.array([80.0]),
            [True],
        )
        # The rest comes to grief before long, at the tables of pieces and of what was seen.
        | values("prompt", "tokens", [-1], [80, -VOCAB, 80], end=ValueError)
        | values("prompt", "tokens", [VOCAB], np.array([65535], np.uint16), jnp.array([VOCAB]), end=IndexError)
        | values("prompt", "tokens", [2**70], end=OverflowError)
        | values("prompt", "tokens", [[80, 81]], [None], np.array(80), ["a"], end=TypeError)
        | {"ragged": refused(
            lambda w: w.generate([[80], [80, 81]]), "tokens", end=ValueError,
            removed={"lovely_llama:check_tokens": "lambda tokens, *_: np.asarray(tokens).astype(np.int32)"})},
        ids_of_all_kinds,
    ),
    "F2": Case(
        "S", "a prompt longer than the context",
        {
            "ids": refused(lambda w: w.generate([80] * (TINY.ctx + 1)), "tokens", "65.*64"),
            "many ids": refused(lambda w: w.generate([80] * 10**6), "tokens", "1000000.*64"),
            "text": refused(lambda w: long_text(w, TINY.ctx + 1), "tokens", "65.*64"),
            "long text": refused(lambda w: long_text(w, 10**6), "prompt", "1000000.*64", end=Unlike, seconds=1),
            "command": ends(lambda w: w.main("generate", "ab" * 40, "--model", w.talker), 2, "tokens", "80.*64"),
            "question": ends(lambda w: w.main("chat", "ab" * 40, "--model", w.talker), 2, "tokens", "64"),
        },
        fits_exactly,
    ),
    "F3": Case(
        "S", "a prompt and new tokens beyond the context",
        {f"after {n}": guarded(to_the_limit(n), BEYOND) for n in (1, 2, 30, 63)}
        | {"after another": guarded(to_the_limit(30, before=20), NO_PADDING, compiled=True),
           "command": guarded(said_at_the_limit, BEYOND)},
        fits_exactly,
    ),
    "F4": Case(
        "S", "how many new tokens",
        values("max_new", "max_new", -1, TINY.ctx + 1, 10**9, math.nan, math.inf, 2.5, -0.5)
        | flags("max-new", int, "-1", "65", "1000000000", "2.5", "1e1", *WORDS),
        no_new,
    ),
    "F5": Case(
        "S", "temperatures",
        samplings("temperature", -1.0, -1e-9, math.nan, math.inf, -math.inf)
        | {"1e-40": guarded(coldest(1e-40), HOT, compiled=True), "0": guarded(coldest(0.0), COLD, compiled=True),
           "-0": guarded(coldest(-0.0), COLD, compiled=True)}
        | flags("temperature", float, "-1", "1e999", *WORDS),
        warm,
    ),
    "F6": Case(
        "S", "what the other samplers are not defined for",
        samplings("top_p", 0.0, -0.5, 1.0001, math.nan, math.inf)
        | samplings("top_k", 0, -1, VOCAB + 1) | samplings("top_k", 2.5, math.nan, end=ValueError)
        | samplings("min_p", -0.1, 1.1, math.nan)
        | samplings("repetition_penalty", -1.0, math.inf)
        | samplings("repetition_penalty", 0.0, math.nan, end=FloatingPointError)
        | flags("top-p", float, "0", "1.01", *WORDS) | flags("top-k", int, "0", "-1", "100000", "1.5", *WORDS)
        | flags("min-p", float, "-1", "2") | flags("repetition-penalty", float, "-1")
        | flags("repetition-penalty", float, "0", end=Unlike)
        | {"top_p=1 is plain": guarded(
            plain_sampling, {"lovely_llama:Sampling.__call__": "lambda self, x, seen: top_p(x, 0.5)"}, compiled=True)},
        loosest_and_tightest,
    ),
    "F7": Case(
        "S", "nothing to continue",
        {
            "no text": guarded(begins("", 1), NO_BOS, end=ll.LlamaError),
            "a space": guarded(begins(" ", " "), STRIPPED),
            "spaces": guarded(begins("   ", " ", " ", " "), STRIPPED),
            "a line": guarded(begins("\n", "\n"), STRIPPED),
            "command": guarded(no_text("generate"), NO_BOS),
            "question": guarded(no_text("chat"), {"lovely_llama_tools.chat:chat_prompt": "lambda *_: []"}),
            "no BOS": refused(no_bos, "tokens", "0 tokens"),
        },
        begins("a", "a"),
    ),
    "F8": Case(
        "S", "logits that are no numbers",
        {
            "all NaN": broken([80, 81], 1, lambda params: params._replace(norm=params.norm * math.nan)),
            "one NaN": broken([80], 0, one_row(math.nan)),
            "one ∞": broken([80], 0, one_row(math.inf)),
            "one −∞": broken([80], 0, one_row(-math.inf)),
            "greedy": broken([80], 0, one_row(math.nan), GREEDY),
            "one sampled": broken([80], 0, one_row(math.nan), ll.Sampling(top_k=5)),
            "later": broken([80] * 60, 59, one_row(math.nan)),
            "after one token": broken([80, 90], 1, one_embedding),
            "a penalty's quotient": broken([LETTER], 0, lambda params: params, ll.Sampling(1e-38)),
            "command": ends(overflowing, 1, "logits at position 2", removed=BLIND),
        },
        lambda w: None if len(w.generate(max_new=9).tokens) == 9 else 1 / 0,
    ),
    "F9": Case(
        "S", "a batch of unequal lengths",
        {
            "zeros behind": guarded(ragged(lambda i: 0), UNMASKED),
            "random ids behind": guarded(ragged(lambda i: (7 * i + 3) % SMALL.vocab), UNMASKED),
            "the last id behind": guarded(ragged(lambda i: SMALL.vocab - 1), UNMASKED),
        },
        lambda w: None,
    ),
    "F10": Case(
        "S", "seeds",
        values("seed", "seed", -1, 2**32) | values("seed", "seed", 2**64, 2**64 + 1, end=OverflowError)
        | values("seed", "seed", 1.5, math.nan, end=TypeError)
        | flags("seed", int, "-1", str(2**32), *WORDS) | flags("seed", int, str(2**64), end=Unlike),
        lambda w: None if w.generate(seed=0, max_new=40).text != w.generate(seed=2**32 - 1, max_new=40).text else 1 / 0,
    ),
    "F11": Case(
        "S", "bfloat16",
        {
            "softmax": guarded(softmax_in_bfloat16, NARROW),
            "norm": guarded(norm_in_bfloat16, NARROW),
            "rotation": guarded(rotation_in_bfloat16, NARROW),
            "model and loss": guarded(loss_in_bfloat16, NARROW),
        },
        softmax_in_float32,
    ),
    "F12": Case(
        "C", "a model larger than memory",
        {
            "llama2.c": refused(huge_llama2c, "memory", r"got [\d.]+ GiB, expected 257.0 GiB", UNBOUNDED, seconds=2),
            "GGUF": refused(huge_gguf, "memory", r"got [\d.]+ GiB, expected 255.\d GiB", UNBOUNDED, seconds=2),
        },
        loads,
    ),
}  # fmt: skip
