"""Faults: what goes wrong, what must happen then, and the guard without which it would not.

A case is a family of wrong inputs (its variants). Each variant must end as the contract says: through the API in a
LlamaError with its `.file` and `.field`; through the command line in status 2 (bad input), 1 (a fault while running) or
130 (Ctrl-C), with one line on stderr and no traceback; or in what is defined. A twin, the input with nothing wrong in
it, must work. And with its guard deleted the case must fail, or it proves nothing.

Severity: S a wrong result in silence, C a crash, a hang or no memory left, M a poor message. conftest.py prints the
score at the end.
"""

import builtins
import contextlib
import functools
import importlib.util
import io
import math
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from conftest import SMALL, assert_close, random_params
from jax import numpy as jnp
from test_9_checkpoints import (
    TINY,
    TOKENS,
    File,
    Tensor,
    tiny_arrays,
    tiny_fields,
    write_gguf,
    write_sentencepiece,
    write_talker,
)

import lovely_llama


def as_users_have_it() -> ModuleType:
    """The library once more, without the tests' type checks: what they would refuse, it must refuse itself."""
    spec = importlib.util.spec_from_file_location("lovely_llama_unchecked", lovely_llama.__file__)
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ll: Any = as_users_have_it()
PATIENCE = 60  # seconds: a machine may be busy

# ---- What a case is made of ------------------------------------------------------------------------------------------


class Done(NamedTuple):
    status: int
    out: str
    err: str


@dataclass
class World:
    """Where variants happen."""

    folder: Path
    patch: pytest.MonkeyPatch
    talker: Path  # says letters, 64 positions
    endless: Path  # says them for longer
    french: Path  # says é
    deleted: dict[str, str] = field(default_factory=dict[str, str])
    processes: list["subprocess.Popen[bytes]"] = field(default_factory=list["subprocess.Popen[bytes]"])

    @functools.cached_property
    def model(self) -> Any:
        return ll.load(self.talker)

    def generate(self, prompt: Any = "abc", **options: Any) -> Any:
        """A generation, run to its end."""
        generation = ll.generate(self.model, prompt, **({"max_new": 3} | options))
        generation.text = "".join(generation)
        return generation

    def main(self, *arguments: object, stdin: bytes = b"", errors: str = "strict") -> Done:
        """The command line in this process."""
        out, err = io.StringIO(), io.StringIO()
        self.patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), "utf-8", errors))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = ll.main([str(argument) for argument in arguments])
        return Done(status, out.getvalue(), err.getvalue())

    def run(self, command: str, *options: object, model: Path | None = None, **more: Any) -> Done:
        """A command with the tiny model."""
        return self.main(command, "abc", "--model", model or self.talker, *options, **more)

    def start(
        self, *arguments: object, stdout: Any = subprocess.PIPE, before: str = "", **environment: str
    ) -> "subprocess.Popen[bytes]":
        """The command line as a process of its own, guards deleted there too."""
        delete = "".join(f"delete({name!r}, {code!r}); " for name, code in self.deleted.items())
        here = str(Path(lovely_llama.__file__).parent)
        code = f"import sys, lovely_llama as ll; {CHILD}{delete}sys.exit(ll.run())"
        command = [
            *shlex.split(before),
            sys.executable,
            "-P",
            "-c",
            code,
            *(a if isinstance(a, bytes) else str(a) for a in arguments),
        ]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": here} | environment,
        )  # fmt: skip
        self.processes.append(process)
        return process

    def end(self) -> None:
        """Leave none behind."""
        for process in self.processes:
            process.kill()
            process.wait()
            for pipe in filter(None, (process.stdout, process.stderr)):
                pipe.close()


# How a guard is deleted, here and in a process: another value, as an expression, in the place of a dotted name.
CHILD = "exec(\"def delete(n, c): *o, a = n.split('.'); setattr(ll if not o else getattr(ll, *o), a, eval(c, vars(ll)))\"); "


def delete(world: World, guards: dict[str, str]) -> None:
    for name, code in guards.items():
        *owner, attribute = name.split(".")
        owner = getattr(ll, *owner) if owner else ll
        world.patch.setattr(owner, attribute, eval(code, vars(ll)), raising=False)
    world.deleted = guards


Act = Callable[[World], None]
NOTHING = "lambda *_, **__: None"
NO_CHECKS = {"check": NOTHING}


class Case(NamedTuple):
    severity: str
    what: str
    variants: dict[str, Act]
    twin: Act
    guards: Sequence[dict[str, str]] = (NO_CHECKS,)  # each deleted in its turn


def refused(act: Callable[[World], Any], field: str, says: str = "", seconds: float = 5) -> Act:
    """The API raises its one exception, in one line that names the field: in seconds of the processor, and no memory."""

    def variant(world: World) -> None:
        tracemalloc.start()
        began = time.process_time()
        try:
            with pytest.raises(ll.LlamaError, match=r"^[^\n]+: [^\n]+: got [^\n]*, expected [^\n]+\Z") as caught:
                act(world)
            took, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        error: Any = caught.value
        assert issubclass(caught.type, ValueError)
        assert error.field == field
        assert str(error).startswith(f"{error.file}: {field}: got ")
        assert re.search(says, str(error))
        assert took < seconds
        assert peak < 2**26

    return variant


def ends(act: Callable[[World], Done], status: int, says: str = "", seconds: float = 5) -> Act:
    """The command line says what is wrong in one line, and nothing else."""

    def variant(world: World) -> None:
        began = time.process_time()
        done = act(world)
        assert time.process_time() - began < seconds
        assert done.status == status, done.err
        assert re.fullmatch(r"error: [^\n]+: [^\n]+: got [^\n]*, expected [^\n]+\n", done.err), done.err
        assert re.search(says, done.err), done.err
        assert "Traceback" not in done.err
        if status == 2:
            assert done.out == ""

    return variant


def prompts(name: str, *values: Any, **options: Any) -> dict[str, Act]:
    """Each of the values as the prompt is refused, in that field."""
    return {
        f"{value!r:.40}": refused(lambda world, value=value: world.generate(value, **options), name) for value in values
    }


def options(name: str, *values: Any) -> dict[str, Act]:
    """Each of the values for an argument of `generate` is refused."""
    return {
        f"{name}={value!r}": refused(lambda world, value=value: world.generate(**{name: value}), name)
        for value in values
    }


def samplings(name: str, *values: Any) -> dict[str, Act]:
    """Each of the values for a field of Sampling is refused."""

    def act(world: World, value: Any) -> None:
        world.generate(sampling=ll.Sampling(**{name: value}))

    return {f"{name}={value!r}": refused(lambda world, value=value: act(world, value), name) for value in values}


def flags(name: str, *values: str) -> dict[str, Act]:
    """Each of the values for an option of the command line is refused."""
    return {
        f"--{name} {value}": ends(lambda world, value=value: world.run("generate", f"--{name}", value), 2)
        for value in values
    }


GREEDY = ll.Sampling(temperature=0.0)
UNCACHED = jax.jit(ll.logits, static_argnums=2)

# ---- F. Generation and numerics --------------------------------------------------------------------------------------


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


def to_the_limit(prompt: int, before: int = 0) -> Act:
    """The likeliest tokens without a cache, all the way to the end of the context, and it says so."""

    def variant(world: World) -> None:
        tokens = np.random.default_rng(prompt).integers(3, TINY.vocab, prompt).tolist()
        session = ll.Session(world.model)
        if before:
            list(ll.generate(world.model, [*tokens[:2], *[99] * before], 9, GREEDY, session=session))
        generation = world.generate(tokens, max_new=TINY.ctx, sampling=GREEDY, session=session)
        assert generation.reason == "context"
        every = [*tokens, *generation.tokens]
        assert len(every) == TINY.ctx
        logits = np.asarray(UNCACHED(world.model.params, jnp.array(every), world.model.config))
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


def coldest(t: float) -> Act:
    def variant(world: World) -> None:
        logits, seen = jnp.array([0.5, -3.0, 2.0, 1.999, -1e3]), jnp.zeros(5, bool)
        for seed in range(20):
            rng = jax.random.key(seed)
            assert ll.choose(rng, jnp.array(seed), logits, seen, ll.Sampling(temperature=t))[0] == 2

    return variant


def warm(world: World) -> None:
    assert len({tuple(world.generate(sampling=ll.Sampling(), seed=seed, max_new=9).tokens) for seed in range(9)}) > 3


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
    """Nothing to begin with, and no text: there is no token to ask about."""
    model = world.model._replace(tokenizer=world.model.tokenizer._replace(bos=None))
    list(ll.generate(model, "", 3))


def broken(prompt: Sequence[int], position: int, change: Callable[[Any], Any], sampling: Any = None) -> Act:
    """Logits that are no numbers are an error that says where."""

    def variant(world: World) -> None:
        model = world.model._replace(params=change(world.model.params))
        with pytest.raises((ll.LlamaError, ArithmeticError), match=rf"logits.* position {position}\b"):
            list(ll.generate(model, prompt, 9, sampling or ll.Sampling()))

    return variant


def one_row(value: float) -> Callable[[Any], Any]:
    return lambda params: params._replace(unembed=params.unembed.at[50].set(value))


def overflowing(world: World) -> Done:
    """Weights that are numbers, logits that are none."""
    arrays = tiny_arrays(config := replace(TINY, tied=False))
    arrays["output.weight"][7] = np.float32(3e38)
    arrays["output_norm.weight"][:] = 5
    path = write_gguf(world.folder / "overflow.gguf", tiny_fields(config), arrays)
    return world.run("generate", "--seed", 1, model=path)


RAGGED = [np.random.default_rng(n).integers(0, SMALL.vocab, n) for n in (1, 17, 30)]


@functools.cache
def ragged_programs(attend: object) -> tuple[Callable[[Any], Any], list[Any]]:
    """Logits and slopes of a batch, and the logits of its rows alone, as they are computed with this `attend`."""
    config = replace(SMALL, layers=1)
    params, longest = adopted(random_params(config)), max(map(len, RAGGED))
    here = jnp.arange(1, longest)[None] < jnp.array([len(row) for row in RAGGED])[:, None]

    def loss(params: Any, tokens: Any) -> tuple[Any, Any]:
        scores = jax.vmap(lambda row: ll.logits(params, row, config))(tokens)
        return ll.loss(params, tokens[:, :-1], jnp.where(here, tokens[:, 1:], -1), config), scores

    batch, alone = jax.jit(jax.grad(loss, has_aux=True)), jax.jit(lambda row: ll.logits(params, row, config))
    return lambda tokens: batch(params, tokens), [alone(jnp.array(row)) for row in RAGGED]


def ragged(pad: Callable[[int], int]) -> Act:
    """Rows of unequal lengths in one batch have the logits that they have alone, and slopes."""

    def variant(world: World) -> None:
        batch, alone = ragged_programs(ll.attend)
        longest = max(map(len, RAGGED))
        slopes, scores = batch(jnp.array([[*row.tolist(), *map(pad, range(longest - len(row)))] for row in RAGGED]))
        for row, got, want in zip(RAGGED, scores, alone, strict=True):
            assert_close(got[: len(row)], want, 1e-5, f"row of {len(row)}")
        assert all(np.isfinite(np.asarray(slope)).all() for slope in jax.tree.leaves(slopes))

    return variant


def adopted(params: Any) -> Any:
    """Parameters in the tuples of the library as users have it."""
    blocks = tuple(
        ll.Block(b.attn_norm, ll.Attention(*b.attn), b.ffn_norm, ll.FeedForward(*b.ffn)) for b in params.blocks
    )
    return ll.Params(params.embed, blocks, params.norm, params.unembed)


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
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), adopted(random_params(TINY, seed=3)))
    tokens = jnp.array(np.random.default_rng(0).integers(0, TINY.vocab, 60))
    got = jax.jit(lambda: ll.logits(params, tokens, TINY))()
    want = UNCACHED(jax.tree.map(lambda w: w.astype(jnp.float32), params), tokens, TINY)
    assert_close(got.astype(jnp.float32), want, 0.02, "logits")
    scores, at = exact(got), np.arange(59)
    surprise = np.log(np.exp(scores).sum(-1))[:-1] - scores[at, tokens[1:]]
    targets = jnp.array([*tokens[1:].tolist(), -1])
    world.patch.setattr(ll, "logits", lambda *_: got)  # another program might round them differently
    np.testing.assert_allclose(ll.loss(params, tokens, targets, TINY), surprise.mean(), rtol=1e-6)


def unread(world: World) -> None:
    """Whoever gets as far as the weights has failed, and need not take all memory to show it."""

    def read(*_: object) -> Any:
        pytest.fail("the weights were read")

    world.patch.setattr(ll, "from_named", read)


def huge_llama2c(world: World) -> None:
    """Llama 2 70B, as far as the header and the file's size can tell."""
    path, config = world.folder / "huge.bin", ll.CONFIGS["llama-2-70b"]
    heads = config.kv_heads * config.q_per_kv
    sizes = (config.dim, config.hidden_dim, config.layers, heads, config.kv_heads, -config.vocab, config.ctx)
    path.write_bytes(np.array(sizes, "<i4").tobytes())
    os.truncate(path, 28 + 4 * (ll.count(config) + config.ctx * config.head_dim))
    unread(world)
    ll.load(path)


def huge_gguf(world: World) -> None:
    """The same in four bits: the file would fit, the parameters would not."""
    path, config, offset = world.folder / "huge.gguf", ll.CONFIGS["llama-2-70b"], 0
    tensors = list[Tensor]()
    for name, shape in ll.all_tensors(ll.GGUF, config).items():
        kind, size = (0, 4 * shape[0]) if len(shape) == 1 else (2, math.prod(shape) // 32 * 18)
        tensors.append(Tensor(name, shape[::-1], kind, offset))
        offset += -(-size // 32) * 32
    path.write_bytes(
        File((("general.architecture", "llama"), *tiny_fields(config).items()), tuple(tensors), b"").pack()
    )
    os.truncate(path, path.stat().st_size + offset)
    unread(world)
    ll.load(path)


def loads(world: World) -> None:
    assert ll.load(world.talker).config.ctx == TINY.ctx


# Nothing but what numpy knows, save that everything is finite to it; or save that files are mapped, and not copied.
BLIND = (
    "type('Blind', (), {'__getattr__': lambda _, name: (lambda x: __import__('jax').numpy.full(x.shape, name[2] == 'f'))"
    " if name in ('isfinite', 'isnan') else getattr(__import__('jax').numpy, name)})()"
)
MAPPED = (
    "type('Mapped', (), {'__getattr__': lambda _, name: (lambda file, kind, n: __import__('numpy').memmap("
    "file.name, kind, 'r', file.tell(), (n,))) if name == 'fromfile' else getattr(__import__('numpy'), name)})()"
)
NOT_COPIED = (
    "type('Bare', (), {'__getattr__': lambda _, name: __import__('jax').device_put"
    " if name == 'array' else getattr(__import__('jax').numpy, name)})()"
)

VOCAB = TINY.vocab
LETTER = TOKENS.index("a")  # which the talker says: its logit is large
WORDS = ["hot", "nan", "inf", "-inf", "1_0", "0x1", "١", "", " 1", "1 ", "1e", "--", "1,5"]
GENERATION: dict[str, Case] = {
    "F1": Case(
        "S", "token ids outside the vocabulary, or no ids",
        prompts(
            "tokens", [-1], [VOCAB], [80, -VOCAB, 80], np.array([2**32 + 3]), np.array([2**63 + 3], np.uint64),
            np.array([65535], np.uint16), [2**70], [-(2**63), 2**63], [], [[80, 81]], [[80], [80, 81]], [80.0],
            np.array([80.0]), [True], ["a"], [None], np.array(80), jnp.array([VOCAB]),
        ),
        ids_of_all_kinds,
        (NO_CHECKS, {"check_tokens": "lambda tokens, *_: np.asarray(tokens).astype(np.int32)"}),
    ),
    "F2": Case(
        "S", "a prompt longer than the context",
        {
            "ids": refused(lambda w: w.generate([80] * (TINY.ctx + 1)), "tokens", "65.*64"),
            "many ids": refused(lambda w: w.generate([80] * 10**6), "tokens", "1000000.*64"),
            "text": refused(lambda w: long_text(w, TINY.ctx + 1), "tokens", "65.*64"),
            "long text": refused(lambda w: long_text(w, 10**6), "prompt", "1000000.*64", 1),
            "command": ends(lambda w: w.main("generate", "ab" * 40, "--model", w.talker), 2, "80.*64"),
            "question": ends(lambda w: w.main("chat", "ab" * 40, "--model", w.talker), 2, "64"),
        },
        fits_exactly,
    ),
    "F3": Case(
        "S", "a prompt and new tokens beyond the context",
        {
            **{f"after {n}": to_the_limit(n) for n in (1, 2, 30, 63)},
            "after another": to_the_limit(30, before=20),
            "command": said_at_the_limit,
        },
        fits_exactly,
        (
            {"range": "lambda first, last=None: __import__('itertools').count(first)"},
            {"Session.reserve": "lambda self, length: self.room or vars(self).update("
             "room=1, cache=empty_cache(self.model.config, 48, 'float32'))"},
        ),
    ),
    "F4": Case(
        "S", "how many new tokens",
        options("max_new", -1, TINY.ctx + 1, 10**9, math.nan, math.inf, 2.5, -0.5)
        | flags("max-new", "-1", "65", "1000000000", "2.5", "1e1", *WORDS),
        no_new,
    ),
    "F5": Case(
        "S", "temperatures",
        samplings("temperature", -1.0, -1e-9, math.nan, math.inf, -math.inf)
        | {"1e-40": coldest(1e-40), "0": coldest(0.0), "-0": coldest(-0.0)}
        | flags("temperature", "-1", "1e999", *WORDS),
        warm,
        (NO_CHECKS, {"temperature": "lambda logits, t: logits / t"}),
    ),
    "F6": Case(
        "S", "what the other samplers are not defined for",
        samplings("top_p", 0.0, -0.5, 1.0001, math.nan, math.inf)
        | samplings("top_k", 0, -1, VOCAB + 1, 2.5, math.nan)
        | samplings("min_p", -0.1, 1.1, math.nan)
        | samplings("repetition_penalty", 0.0, -1.0, math.nan, math.inf)
        | flags("top-p", "0", "1.01", *WORDS) | flags("top-k", "0", "-1", "100000", "1.5", *WORDS)
        | flags("min-p", "-1", "2") | flags("repetition-penalty", "0", "-1")
        | {"top_p=1 is plain": plain_sampling},
        loosest_and_tightest,
    ),
    "F7": Case(
        "S", "nothing to continue",
        {
            "no text": begins("", 1),
            "a space": begins(" ", " "),
            "spaces": begins("   ", " ", " ", " "),
            "a line": begins("\n", "\n"),
            "command": no_text("generate"),
            "question": no_text("chat"),
            "no BOS": refused(no_bos, "tokens", "0 of them"),
        },
        begins("a", "a"),
        ({"Tokenizer.begin": "lambda self, text: self.encode(text, False)"}, NO_CHECKS),
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
            "later": broken([*[80] * 70][:60], 59, one_row(math.nan)),
            "after one token": broken([80, 90], 1, lambda params: params._replace(embed=params.embed.at[90].set(math.nan))),
            "a penalty's quotient": broken([LETTER], 0, lambda params: params, ll.Sampling(1e-38)),
            "command": ends(overflowing, 1, "logits.*position"),
        },
        lambda w: None if len(w.generate(max_new=9).tokens) == 9 else pytest.fail("no text"),
        ({"jnp": BLIND},),
    ),
    "F9": Case(
        "S", "a batch of unequal lengths",
        {
            "zeros behind": ragged(lambda i: 0),
            "random ids behind": ragged(lambda i: (7 * i + 3) % SMALL.vocab),
            "the last id behind": ragged(lambda i: SMALL.vocab - 1),
        },
        lambda w: None,
        ({"attend": "lambda q, keys, values, position, filled=None: softmax(keys @ q / len(q) ** 0.5) @ values"},),
    ),
    "F10": Case(
        "S", "seeds",
        options("seed", -1, 2**32, 2**64, 2**64 + 1, 1.5, math.nan) | flags("seed", "-1", str(2**32), str(2**64), *WORDS),
        lambda w: None if w.generate(seed=0, max_new=40).text != w.generate(seed=2**32 - 1, max_new=40).text
        else pytest.fail("one text"),
    ),
    "F11": Case(
        "S", "bfloat16",
        {
            "softmax": softmax_in_bfloat16,
            "norm": norm_in_bfloat16,
            "rotation": rotation_in_bfloat16,
            "model and loss": loss_in_bfloat16,
        },
        lambda w: np.testing.assert_allclose(ll.softmax(jnp.arange(3.0)), np.exp(range(3)) / np.exp(range(3)).sum(), 1e-6),
        ({"wide": "lambda x: x"},),
    ),
    "F12": Case(
        "C", "a model larger than memory",
        {
            "llama2.c": refused(huge_llama2c, "memory", r"got [\d.]+ GiB, expected 257.0 GiB", 2),
            "GGUF": refused(huge_gguf, "memory", r"got [\d.]+ GiB, expected 257.0 GiB", 2),
        },
        loads,
        ({"check_memory": NOTHING},),
    ),
}  # fmt: skip

# ---- G. The command line and its surroundings ------------------------------------------------------------------------


def told(status: int, *arguments: object, **more: Any) -> Act:
    return ends(lambda world: world.main(*arguments, "--model", world.talker, **more), status)


def typed(line: bytes, errors: str = "strict") -> Act:
    """What is typed and is no text is an error, or is replaced; in neither case is there a traceback."""

    def variant(world: World) -> None:
        done = world.main("chat", "--model", world.talker, "--max-new", 2, stdin=line, errors=errors)
        assert done.status in (0, 2)
        assert len(done.err.splitlines()) == 1
        assert done.err.startswith("prompt " if done.status == 0 else "error: ")

    return variant


def megabyte(command: str, text: str) -> Act:
    """Refused, as it is longer than any context here: in five seconds."""
    long = (text * 2**20)[: 2**20]
    return ends(lambda world: world.main(command, long, "--model", world.endless), 2, "8192")


def raw_argument(world: World) -> None:
    process = world.start("generate", b"caf\xe9", "--model", world.talker)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert re.fullmatch(r"error: arguments: prompt: got .*, expected .*\n", err.decode())


def finish(process: "subprocess.Popen[bytes]") -> tuple[int, str]:
    _, err = process.communicate(timeout=PATIENCE)
    assert b"Traceback" not in err
    assert b"Exception ignored" not in err, err
    return process.returncode, err.decode()


def had_enough(world: World) -> None:
    """As under `| head -c 5`: whoever reads goes away."""
    process = world.start("generate", "abc", "--model", world.endless)
    assert process.stdout
    assert process.stdout.read(5)
    process.stdout.close()
    process.stdout = None
    status, err = finish(process)
    assert (status, err) == (0, "")


def full_disk(world: World) -> None:
    with open("/dev/full", "wb") as full:
        status, err = finish(world.start("chat", "abc", "--model", world.talker, "--max-new", 3, stdout=full))
    assert status == 1
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert "No space left" in err


def help_on_a_full_disk(world: World) -> None:
    with open("/dev/full", "wb") as full:
        status, _ = finish(world.start("--help", stdout=full))
    assert status in (0, 1)


def no_stdout(world: World) -> None:
    """As under `>&-`: there is no stdout at all."""
    arguments = ("generate", "abc", "--model", world.talker, "--max-new", 3)
    status, err = finish(world.start(*arguments, before="/bin/sh -c 'exec \"$@\" >&-' sh"))
    assert status in (0, 1)
    assert len(err.splitlines()) == 1


def only_ascii(world: World) -> None:
    process = world.start("generate", "é", "--model", world.french, "--max-new", 3, PYTHONIOENCODING="ascii")
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert out == b"\\xe9" * 3 + b"\n"


def speaks(world: World) -> None:
    done = world.run("generate", "--max-new", 5)
    assert done.status == 0
    assert re.fullmatch("[a-h]{5}\n", done.out)
    assert world.main("generate", "é", "--model", world.french, "--max-new", 3).out == "ééé\n"


def interrupt(process: "subprocess.Popen[bytes]") -> None:
    """Ctrl-C: 130 within two seconds, whatever it is doing, and the terminal on a new line."""
    assert process.poll() is None, "it ended by itself"
    process.send_signal(signal.SIGINT)
    began = time.perf_counter()
    _, err = process.communicate(timeout=PATIENCE)
    assert time.perf_counter() - began < 2
    assert process.returncode == 130
    assert err == b"\n", err


def generating(world: World) -> None:
    process = world.start("generate", "abc", "--model", world.endless)
    assert process.stdout
    assert process.stdout.read(20)
    interrupt(process)


def has_open(process: "subprocess.Popen[bytes]", path: Path) -> bool:
    with contextlib.suppress(OSError):
        return any(link.readlink() == path for link in Path(f"/proc/{process.pid}/fd").iterdir())
    return False


def at_work(stage: str) -> Act:
    """While the real model is read, or after that, while it is compiled: into a cache that is empty."""

    def variant(world: World) -> None:
        weights = ll.default_model().resolve()
        process = world.start("generate", "abc", XDG_CACHE_HOME=str(world.folder / stage))
        limit = time.perf_counter() + PATIENCE
        for reading in (True, False)[: 1 + (stage == "compiling")]:
            while has_open(process, weights) != reading:
                assert time.perf_counter() < limit
                assert process.poll() is None
                time.sleep(0.02)
        time.sleep(0.1 if stage == "loading" else 0.5)
        assert process.stdout
        assert not select.select([process.stdout], [], [], 0)[0], "it speaks already"
        assert has_open(process, weights) == (stage == "loading")
        interrupt(process)

    return variant


def place(make: Callable[[Path], object], name: str = "model.gguf") -> Act:
    """What stands at a path and is no file is refused at once, by the API and by the command line."""

    def variant(world: World) -> None:
        path = world.folder / name
        made = make(path)
        path = made if isinstance(made, Path) else path
        refused(lambda _: ll.load(path), "path", seconds=1)(world)
        refused(lambda _: ll.load(str(path)), "path", seconds=1)(world)
        ends(lambda world: world.run("generate", model=path), 2, "path", seconds=1)(world)

    return variant


def no_permission(world: World) -> None:
    """Root may read everything, and so the system's answer is played."""

    def denied(path: Path, *mode: str) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    world.patch.setattr(ll, "open", denied, raising=False)
    refused(lambda world: ll.load(world.talker), "path", "Permission denied", 1)(world)
    ends(lambda world: world.run("generate"), 2, "Permission denied", 1)(world)


def beside(make: Callable[[Path], object]) -> Act:
    """The same for the tokenizer that a llama2.c file needs."""

    def variant(world: World) -> None:
        model = tiny_llama2c(world.folder)
        (world.folder / "tokenizer.model").unlink()
        make(world.folder / "tokenizer.model")
        refused(lambda _: ll.load(model), "path", "tokenizer.model", 1)(world)

    return variant


def tiny_llama2c(folder: Path) -> Path:
    """A llama2.c file and its tokenizer."""
    config = replace(TINY, tied=True)
    sizes = (config.dim, config.hidden_dim, config.layers, 4, config.kv_heads, config.vocab, config.ctx)
    data = np.array(sizes, "<i4").tobytes()
    arrays = {
        name: np.random.default_rng(0).normal(size=s) / 4 for name, s in ll.all_tensors(ll.LLAMA2C, config).items()
    }
    for name in ll.LLAMA2C.values():
        data += b"".join(array.astype("<f4").tobytes() for key, array in arrays.items() if pattern(key) == name)
    write_sentencepiece(folder / "tokenizer.model", 44)
    (folder / "model.bin").write_bytes(data + bytes(4 * config.ctx * config.head_dim))
    return folder / "model.bin"


def pattern(name: str) -> str:
    return re.sub(r"\.\d+\.", ".{}.", name)


def changed_later(make: Callable[[World], Path], change: Callable[[Path], object]) -> Act:
    """A file that is changed after it was read changes nothing."""

    def variant(world: World) -> None:
        path = make(world)
        want = "".join(ll.generate(ll.load(path), [80 % 44, 7], 20, GREEDY))
        model = ll.load(path)
        change(path)
        assert "".join(ll.generate(model, [80 % 44, 7], 20, GREEDY)) == want
        assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(model.params))

    return variant


def a_gguf(world: World) -> Path:
    return write_talker(world.folder / "mine.gguf")


def a_bin(world: World) -> Path:
    return tiny_llama2c(world.folder)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)


SURROUNDINGS: dict[str, Case] = {
    "G1": Case(
        "C", "arguments that are no text, or a megabyte",
        {
            "prompt": told(2, "generate", "caf\udce9"),
            "question": told(2, "chat", "caf\udce9"),
            "half a pair": told(2, "generate", "\ud83d"),
            "system": told(2, "chat", "abc", "--system", "\udce9"),
            "stop": told(2, "generate", "abc", "--stop", "\udce9"),
            "model": ends(lambda w: w.main("generate", "abc", "--model", "\udce9"), 2),
            "as a process": raw_argument,
            "typed": typed(b"caf\xe9\n"),
            "typed, escaped": typed(b"caf\xe9\n", "surrogateescape"),
            "typed NUL": typed(b"a\0b\n"),
            "a megabyte typed": typed(b"a" * 2**20 + b"\n"),
            "a megabyte to continue": megabyte("generate", "a"),
            **{f"a megabyte of {text!r}": megabyte("chat", text) for text in ("a", "the ", "é", "1")},
        },
        lambda w: None if w.run("generate", "--stop", "é", "--max-new", 2).status == 0 else pytest.fail("refused"),
    ),
    "G2": Case(
        "C", "a stdout that is closed, full, or ASCII",
        {
            "ASCII": only_ascii,
            "| head": had_enough,
            "> /dev/full": full_disk,
            "--help > /dev/full": help_on_a_full_disk,
            ">&-": no_stdout,
        },
        speaks,
        ({"main": "lambda: talk(arguments().parse_args(sys.argv[1:])) or 0"}, {"run": "main"}),
    ),
    "G3": Case(
        "C", "Ctrl-C",
        {"generating": generating, "loading": at_work("loading"), "compiling": at_work("compiling")},
        speaks,
        ({"end_on_interrupt": NOTHING},),
    ),
    "G4": Case(
        "C", "a path to what is no file",
        {
            "a folder": place(Path.mkdir),
            "nothing": place(lambda path: None),
            "a pipe": place(os.mkfifo),
            "/dev/zero": place(lambda path: Path("/dev/zero")),
            "/dev/stdin": place(lambda path: Path("/dev/null")),
            "a link to itself": place(lambda path: path.symlink_to(path)),
            "a link to nothing": place(lambda path: path.symlink_to("nowhere")),
            "a link to a pipe": place(lambda path: (os.mkfifo(f"{path}2"), path.symlink_to(f"{path}2"))[1]),
            "below a file": place(lambda path: (path.write_text(""), path / "model.gguf")[1]),
            "NUL": place(lambda path: path / "a\0b"),
            "a long name": place(lambda path: path / ("a" * 9999)),
            "no permission": no_permission,
            "no tokenizer": beside(lambda path: None),
            "a folder for a tokenizer": beside(Path.mkdir),
            "a pipe for a tokenizer": beside(os.mkfifo),
        },
        loads,
        ({"open_file": "lambda path: open(path, 'rb')"}, NO_CHECKS),
    ),
    "G5": Case(
        "C", "a file that is changed once it is loaded",
        {
            "overwritten": changed_later(a_gguf, overwrite),
            "cut": changed_later(a_gguf, lambda path: os.truncate(path, 0)),
            "removed": changed_later(a_gguf, Path.unlink),
            "overwritten, llama2.c": changed_later(a_bin, overwrite),
            "cut, llama2.c": changed_later(a_bin, lambda path: os.truncate(path, 0)),
        },
        loads,
        ({"np": MAPPED, "jnp": NOT_COPIED},),
    ),
    "G6": Case(
        "M", "options that there are not, and numbers that are none",
        {
            "an unknown option": told(2, "generate", "abc", "--warmth", "2"),
            "an unknown short one": told(2, "generate", "abc", "-t", "2"),
            "a part of an option": told(2, "generate", "abc", "--temp", "0"),
            "an unknown command": told(2, "shout", "abc"),
            "no command": ends(lambda w: w.main(), 2),
            "no prompt": ends(lambda w: w.main("generate"), 2),
            "two prompts": told(2, "generate", "abc", "def"),
            "no value": told(2, "generate", "abc", "--seed"),
            "an empty stop": told(2, "generate", "abc", "--stop", ""),
            "a system, and nobody to tell": told(2, "generate", "abc", "--system", "be kind"),
            "a line in an option": told(2, "generate", "abc", "--a\nb"),
            **flags("min-p", *WORDS), **flags("repetition-penalty", *WORDS),
        },
        lambda w: None if w.run("generate", *["--min-p", ".5", "--top-k", "5", "--seed", "1", "--top-p", "1e-1", "--max-new", "2"]).status == 0
        else pytest.fail("refused"),
        ({"number": "float", "whole": "int"}, {"Arguments.error": "argparse.ArgumentParser.error"}),
    ),
}  # fmt: skip

CASES = GENERATION | SURROUNDINGS

# ---- The tests -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talkers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("talkers")
    return (
        write_talker(folder / "talker.gguf"),
        write_talker(folder / "endless.gguf", ctx=8192),
        write_talker(folder / "french.gguf", "é"),
    )


@pytest.fixture
def world(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, talkers: tuple[Path, Path, Path], request: pytest.FixtureRequest,
    record_property: Callable[[str, object], None],
) -> Generator[World]:  # fmt: skip
    if name := request.node.callspec.params.get("case"):
        case = CASES[name]
        record_property("fault", (name, case.severity, len(case.variants), len(case.guards)))  # for the score
    world = World(tmp_path, monkeypatch, *talkers)
    yield world
    world.end()


class TooLong(BaseException):
    """What hangs without its guard is not waited for."""


@contextlib.contextmanager
def at_most(seconds: float) -> Generator[None]:
    def ring(*_: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def forget_programs(guards: dict[str, str]) -> None:
    """What was compiled with a guard, or without, is not run again."""
    if guards.keys() & {"attend", "jnp", "temperature", "wide"}:
        for compiled in (ll.choose, ll.read_tokens, ll.read_layer, ll.read_out):
            compiled.clear_cache()


@pytest.mark.parametrize(("case", "name"), [(case, name) for case in CASES for name in CASES[case].variants])
def test_variant(world: World, case: str, name: str) -> None:
    with at_most(PATIENCE + 30):
        CASES[case].variants[name](world)


@pytest.mark.parametrize("case", CASES)
def test_twin(world: World, case: str) -> None:
    CASES[case].twin(world)


@pytest.mark.parametrize(("case", "i"), [(case, i) for case in CASES for i in range(len(CASES[case].guards))])
def test_without_its_guard_the_case_fails(world: World, case: str, i: int) -> None:
    guards, _ = CASES[case].guards[i], world.model
    forget_programs(guards)
    with world.patch.context() as patch:
        world.patch = patch
        delete(world, guards)
        try:
            failed = any(map(functools.partial(fails, world), CASES[case].variants.values()))
        finally:
            forget_programs(guards)
    assert failed, f"every variant passes without {', '.join(guards)}"


def fails(world: World, variant: Act) -> bool:
    try:
        with at_most(PATIENCE + 30 if world.deleted.keys() & {"main", "run", "end_on_interrupt"} else 5):
            variant(world)
    except builtins.BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return True
    return False


@pytest.mark.parametrize(
    "fault", [RuntimeError("a\nb"), MemoryError(), TypeError("no"), jax.errors.JaxRuntimeError("x")]
)
def test_a_fault_that_nobody_thought_of_is_one_line(world: World, fault: Exception) -> None:
    def fail(path: Path) -> Any:
        raise fault

    world.patch.setattr(ll, "load", fail)
    done = world.run("generate")
    assert (done.status, done.out) == (1, "")
    assert re.fullmatch(r"error: [^\n]+\n", done.err)
    with pytest.raises(type(fault)):
        world.main("--debug", "generate", "abc")
