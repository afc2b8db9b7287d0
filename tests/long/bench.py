"""Benchmarks against transformers and llama2.c: `./dev bench`, about ten minutes on two cores.

A line compares our figures with a peer's, with others of our own, or with a bound. The two are measured in alternation
(A B A B …) after one warm-up turn. The ratio is the median of the turns' ratios; the spread is their interquartile
range over that median. The machine's own speed is measured before each row. All is float32, on two threads.

The exit status is 0 if every floor is met, and 1 if one is missed or the machine was busy: a spread above 20 %, or
other processes using more than 20 % of a core (which can slow a peer seventeenfold without adding to the spread).
"""

import argparse
import contextlib
import copy
import io
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
import transformers
from builders import write_llama2c
from jax import numpy as jnp
from machine import processor
from transformers.generation.streamers import BaseStreamer

import lovely_llama as ll
from lovely_llama_tools import fast
from lovely_llama_tools.data.prepare import ahead, prepare
from lovely_llama_tools.fast.layers import stacked_shapes
from lovely_llama_tools.formats.files import default_model, load
from lovely_llama_tools.formats.hugging_face import from_hf
from lovely_llama_tools.formats.llama2c import to_llama2c
from lovely_llama_tools.formats.model import Model
from lovely_llama_tools.inference.chat import chat_prompt
from lovely_llama_tools.inference.generate import Session, read, read_layer, read_tokens
from lovely_llama_tools.tokens import Tokenizer
from lovely_llama_tools.training import step as training_step
from lovely_llama_tools.training.settings import Settings, default_micro_batch

THREADS, BUSY, BUSY_IN = 2, 0.2, "The machine was busy, spread or others above 20 %, in"
ROOT = Path(__file__).resolve().parents[2]
README, PAGE = ROOT / "README.md", ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- bench -->", "<!-- /bench -->"
SHORT = "<!-- speed -->", "<!-- /speed -->"
LLAMA2_RUN = os.environ.get("LLAMA2_RUN")
ABSENT = {"torch.compile": "no --compile"} | ({} if LLAMA2_RUN else {"llama2.c": "no LLAMA2_RUN=/path/to/run"})
Work = Callable[[], Any]

# ---- Measuring -------------------------------------------------------------------------------------------------------


class Against(NamedTuple):
    """Our figures and those they are compared with, one of each per turn; only ours if the floor is a bound."""

    peer: str
    unit: str
    ours: Any
    theirs: Any = None


def take_turns(turns: int, *contenders: Work) -> "np.ndarray[Any, Any]":
    """What each contender returned in each turn, after a warm-up turn."""
    return np.array([[contender() for contender in contenders] for _ in range(1 + turns)][1:]).swapaxes(0, 1)


def race(turns: int, unit: str, ours: Work, peers: Mapping[str, Work]) -> Iterator[Against]:
    figures, *others = take_turns(turns, ours, *peers.values())
    return (Against(peer, unit, figures, other) for peer, other in zip(peers, others, strict=True))


def seconds(work: Work) -> float:
    begun = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - begun


def rate(n: int, work: Work) -> Work:
    """Items per second, for work that processes n items."""
    return lambda: n / seconds(work)


def same(ours: Any, theirs: torch.Tensor) -> None:
    """Fail unless both compute the same; otherwise their speeds are not comparable."""
    a, b = np.asarray(ours, np.float64), theirs.detach().double().numpy()
    assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(b), f"got {a}, expected {b}"


@cache
def operations() -> tuple[Work, ...]:
    """Three ways to read 512 MiB, and a matrix product in torch and in jax, 2048 × 2048 × 2048."""
    a, b = np.ones(2**27, np.float32), np.ones((2048, 2048), np.float32)
    sums = a.sum, torch.from_numpy(a).sum, partial(jax.jit(jnp.sum), jnp.asarray(a))
    return *sums, partial(torch.matmul, *[torch.from_numpy(b)] * 2), partial(jax.jit(jnp.matmul), *[jnp.asarray(b)] * 2)


def read_bandwidth() -> float:
    """GB/s, in the fastest of the three ways."""
    return 2**29 / min(seconds(read) for read in operations()[:3] for _ in range(2)) / 1e9


def machine() -> list[float]:
    """The machine's current speed: GB/s read, GFLOP/s of torch and of jax."""
    return [read_bandwidth(), *(2 * 2048**3 / min(seconds(op) for _ in range(4)) / 1e9 for op in operations()[3:])]


def others() -> float:
    """CPU seconds of all cores since boot, except those of this process and its finished children."""
    ticks = [int(field) for field in Path("/proc/stat").read_text().split()[1:9]]  # the fourth and fifth are idle
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


CHILD = """
import os, subprocess, sys, time
begun = time.perf_counter()
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE)
os.read(child.stdout.fileno(), 1)
first = time.perf_counter() - begun
child.stdout.read()
_, status, usage = os.wait4(child.pid, 0)
print(first, time.perf_counter() - begun, usage.ru_maxrss * 1024 / 1e6)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def child(*command: str, **environment: str) -> list[float]:
    """Run a process: seconds to its first byte on stdout, seconds to its end, and peak memory in MB."""
    # Linux counts a parent's memory at the fork as its child's, so the process is forked from a small one.
    command = sys.executable, "-c", CHILD, *command
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [float(figure) for figure in done.stdout.split()]


IMPORT_JAX = partial(child, sys.executable, "-c", "import jax")


# ---- The models ------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """One model twice, ours and transformers', each with greedy decoding from token 1."""

    session: Session
    oracle: Any

    def ours(self, n: int) -> list[int]:
        """Decode as `generate` does, with a cache of 1024 positions, but with argmax in place of sampling."""
        tokens = [1]
        for _ in range(n):
            tokens.append(int(np.asarray(self.session.logits(tokens)).argmax()))
        return tokens

    @torch.inference_mode()
    def theirs(self, n: int) -> list[int]:
        tokens, past = [1], transformers.DynamicCache()
        for _ in range(n):
            out = self.oracle(torch.tensor([tokens[-1:]]), past_key_values=past, use_cache=True)
            tokens.append(int(out.logits[0, -1].argmax()))
        return tokens


@cache
def pair(name: str) -> Pair:
    """SmolLM2 with its own weights, or one of llama2.c's shapes with random weights."""
    if name == "SmolLM2":
        path, auto = default_model(), transformers.AutoModelForCausalLM
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            oracle = auto.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
        return Pair(roomy(load(path)), oracle)
    torch.manual_seed(0)
    config = replace(ll.CONFIGS[f"stories{name.lower()}"], ctx=4096)  # room for 2048 tokens and padding
    oracle = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=config.vocab, hidden_size=config.dim, num_hidden_layers=config.layers, head_dim=config.head_dim,
        num_attention_heads=config.kv_heads * config.q_per_kv, num_key_value_heads=config.kv_heads,
        intermediate_size=config.hidden_dim, max_position_embeddings=config.ctx, rms_norm_eps=config.eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.theta}, tie_word_embeddings=config.tied,
    )).eval()  # fmt: skip
    oracle.set_attn_implementation("sdpa")
    with torch.no_grad():  # run.c stops at token 1, so token 2 must be likelier wherever 1 is likely
        oracle.model.embed_tokens.weight[1] = oracle.model.embed_tokens.weight[2] / 2
    params = from_hf({name: p.detach().numpy() for name, p in oracle.named_parameters()}, config)
    silent = Tokenizer(lambda text, special: [], [b""] * config.vocab, {}, frozenset(), None, False, b"", None)
    return Pair(roomy(Model(config, params, silent)), oracle)


def roomy(model: Model) -> Session:
    """A session whose cache has grown to 1024 positions."""
    session = Session(model)
    session.logits([2] * 900)
    return session


def llama2c(model: Model, n: int, folder: Path) -> Work:
    """llama2.c's tokens per second, by its own clock, which starts after the first of n + 1 tokens."""
    config = replace(model.config, ctx=1024)
    write_llama2c(folder / "model.bin", config, to_llama2c(model.params, config))
    (folder / "tokenizer.bin").write_bytes(struct.pack("<i", 1) + config.vocab * struct.pack("<fi1s", 0, 1, b"."))
    command = [str(LLAMA2_RUN), str(folder / "model.bin"), "-z", str(folder / "tokenizer.bin"), "-t", "0"]

    def run() -> float:
        environment = os.environ | {"OMP_NUM_THREADS": str(THREADS)}
        done = subprocess.run([*command, "-n", str(n + 1)], env=environment, capture_output=True, check=True)
        assert done.stdout.count(b".") == n + 1, done
        return float(re.findall(rb"achieved tok/s: ([\d.]+)", done.stderr)[0])

    return run


# ---- The rows --------------------------------------------------------------------------------------------------------


def decode(turns: int, name: str, n: int) -> Iterator[Against]:
    """Tokens per second: ours, theirs, and the limit set by reading all weights once per token."""
    both, model = pair(name), pair(name).session.model
    gigabytes = 4 * ll.count(model.config) / 1e9
    assert both.ours(8) == both.theirs(8)
    peers = {"transformers": rate(n, partial(both.theirs, n)), "read bandwidth": lambda: read_bandwidth() / gigabytes}
    with tempfile.TemporaryDirectory() as folder:
        if LLAMA2_RUN and name != "SmolLM2":  # whose theta run.c does not support
            peers["llama2.c"] = llama2c(model, n, Path(folder))
        yield from race(turns, "tokens/s", rate(n, partial(both.ours, n)), peers)


def decode_rows(turns: int, batch: int, n: int) -> Iterator[Against]:
    """`fast.llama` under `vmap` over tokens, caches and positions."""
    both = pair("110M")
    config, params, _ = both.session.model

    @partial(jax.jit, donate_argnums=2)
    def step(params: ll.Params, tokens: Any, cache: Any, start: Any) -> Any:
        def row(tokens: Any, cache: Any, start: Any) -> Any:
            return fast.llama(params, tokens, cache, start, config)

        return jax.vmap(row)(tokens, cache, start)

    room = jax.tree.map(lambda leaf: jnp.stack([leaf] * batch), ll.empty_cache(config, 1024, jnp.float32))

    def together() -> list[int]:
        nonlocal room
        tokens, last = [1], np.ones((batch, 1), np.int32)
        for position in range(n):
            logits, room = step(params, last, room, np.full(batch, position, np.int32))
            last = np.asarray(logits).argmax(-1).astype(np.int32)
            tokens.append(int(last[0, 0]))
        return tokens

    assert together() == both.ours(n)
    return race(turns, "tokens/s", rate(batch * n, together), {"one row": rate(n, partial(both.ours, n))})


def decode_far(turns: int, name: str) -> Iterator[Against]:
    """One token at position 64, repeated twenty times, with a mostly empty cache and with a small one."""
    config, params, _ = pair(name).session.model

    def at(ctx: int) -> Work:
        cache: Any = ll.empty_cache(config, ctx, jnp.float32)
        tokens, start, last = jnp.ones(1, jnp.int32), jnp.array(64), jnp.array(0)

        def work() -> None:
            nonlocal cache
            for _ in range(20):
                logits, cache = read(params, tokens, cache, start, last, config)
                np.asarray(logits).argmax()

        return lambda: 1000 * seconds(work) / 20

    return race(turns, "ms", at(8192), {"ctx 256": at(256)})


def prefill(turns: int, name: str, n: int) -> Iterator[Against]:
    """Read a prompt up to the logits after its last token, as either `generate` does first."""
    oracle, tokens = pair(name).oracle, [3, *np.random.default_rng(0).integers(3, 32000, n - 1).tolist()]
    session, turn = Session(pair(name).session.model), count()  # a new one, since its cache may grow

    def ours() -> Any:
        """Another first token each time, so that nothing of it is in the cache."""
        return session.logits([3 + next(turn) % 2, *tokens[1:]])

    @torch.inference_mode()
    def theirs() -> torch.Tensor:
        return oracle(torch.tensor([tokens]), use_cache=True, logits_to_keep=1).logits[0, -1]

    same(ours(), theirs())
    return race(turns, "tokens/s", rate(n, ours), {"transformers": rate(n, theirs)})


def gradients(config: ll.Config) -> Any:
    return jax.jit(jax.value_and_grad(partial(fast.loss, config=config)))


def slopes(turns: int, name: str, batch: int, seq: int) -> Iterator[Against]:
    """The loss and the gradients of all parameters, without an optimiser step."""
    (session, oracle), tokens = pair(name), np.random.default_rng(0).integers(3, 32000, (batch, seq), np.int32)
    targets = np.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=-1)  # transformers shifts them itself
    ours = partial(gradients(session.model.config), session.model.params, tokens, targets)
    labels, n = torch.tensor(tokens, dtype=torch.long), batch * seq

    def theirs(model: Any) -> torch.Tensor:
        oracle.zero_grad(set_to_none=True)
        loss = model(labels, labels=labels, use_cache=False).loss
        loss.backward()
        return loss

    loss, found = ours()
    same(loss, theirs(oracle))
    same(found.embed, oracle.model.embed_tokens.weight.grad)
    peers = {"torch eager": rate(n, partial(theirs, oracle))}
    if "torch.compile" not in ABSENT:
        try:
            same(loss, theirs(compiled := torch.compile(oracle)))
            peers["torch.compile"] = rate(n, partial(theirs, compiled))
        except Exception as error:  # of any type, from its compiler
            ABSENT["torch.compile"] = " ".join(str(error).split())[:100]
    return race(turns, "tokens/s", rate(n, ours), peers)


def options(config: ll.Config, batch: int, seq: int) -> training_step.StepOptions:
    """What `lovely-llama train` compiles into a step by default."""
    settings = Settings(batch=batch, ctx=seq)
    return training_step.StepOptions(
        config, default_micro_batch(settings, config), 1.0, 0.1, (0.9, 0.95), "float32", "dots", 1.0
    )


def whole_step(turns: int, name: str, batch: int, seq: int) -> Iterator[Against]:
    """A step of training: gradients, clipped, into AdamW, with the same rate and decay in both."""
    model, tokens = pair(name).session.model, np.random.default_rng(0).integers(3, 32000, (batch, seq + 1), np.int32)
    oracle, rate_of, n = copy.deepcopy(pair(name).oracle), jnp.float32(1e-4), batch * seq
    base, trained, moments = training_step.initial_state(None, training_step.stacked(model.params))
    rows: Any = (tokens[:, :-1], tokens[:, 1:])
    how = options(model.config, batch, seq)

    def ours() -> Any:
        nonlocal trained, moments
        trained, moments, report = training_step.step(base, trained, moments, rate_of, rows, how)
        return report.loss

    decaying = [w for name, w in oracle.named_parameters() if "norm" not in name]
    others = [w for name, w in oracle.named_parameters() if "norm" in name]
    groups: Any = [{"params": decaying, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    ids, labels = (torch.tensor(part, dtype=torch.long) for part in rows)

    def stepping(model: Any) -> Callable[[], torch.Tensor]:
        optimiser = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95))

        def work() -> torch.Tensor:
            loss = torch.nn.functional.cross_entropy(model(ids, use_cache=False).logits.flatten(0, 1), labels.flatten())
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(oracle.parameters(), 1.0)
            optimiser.step()
            return loss.detach()

        return work

    theirs = stepping(oracle)
    for _ in range(2):  # the second loss shows the first update
        same(ours(), theirs())
    peers = {"torch eager": rate(n, theirs)}
    if "torch.compile" not in ABSENT:
        try:
            compiled = stepping(torch.compile(oracle))
            compiled()
            peers["torch.compile"] = rate(n, compiled)
        except Exception as error:  # of any type, from its compiler
            ABSENT["torch.compile"] = " ".join(str(error).split())[:100]
    return race(turns, "tokens/s", rate(n, ours), peers)


def step_memory(_: int, name: str, batch: int, seq: int) -> Iterator[Against]:
    """The temporary memory of such a step, as reported by the compiler. Nothing is run."""
    config = ll.CONFIGS[name]
    learner = jax.eval_shape(partial(training_step.initial_state, None), stacked_shapes(config))
    rows = (jax.ShapeDtypeStruct((batch, seq), jnp.int32),) * 2
    lowered = training_step.step.lower(
        *learner, jax.ShapeDtypeStruct((), jnp.float32), rows, options(config, batch, seq)
    )
    analysis = lowered.compile().memory_analysis()
    assert analysis
    yield Against("a bound", "MB", [analysis.temp_size_in_bytes / 1e6])


def reading(turns: int, batch: int, seq: int) -> Iterator[Against]:
    """Batches from files of tokens, as they are read ahead, against a step with them at 15M."""
    (training,) = whole_step(turns, "15M", batch, seq)
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/tokens.npy", np.random.default_rng(0).integers(0, 32000, 10**7).astype(np.uint16))
        options: Any = {"tokenizer": None, "vocab": 32000, "seq": seq, "fraction": 0.1, "pack": False}
        corpus = prepare([f"{folder}/tokens.npy"], Path(folder) / "data", **options)

        def read() -> None:
            for _ in ahead(lambda step: corpus.train.batch(0, step, batch), range(100)):
                pass

        ours = take_turns(turns, rate(100 * batch * seq, read))[0]
    yield Against("a step", "tokens/s", ours, training.ours)


def memory(_: int, work: str) -> Iterator[Against]:
    """A program's temporary memory, as reported by the compiler. Nothing is run."""

    def temporary(seq: int) -> list[float]:
        config, scalar = replace(ll.CONFIGS["stories15m"], ctx=seq), jax.ShapeDtypeStruct((), jnp.int32)
        params, tokens = ll.shapes(config), jax.ShapeDtypeStruct((seq,), jnp.int32)
        room = jax.eval_shape(partial(ll.empty_cache, config, seq, jnp.float32))
        x = jax.eval_shape(read_tokens, params, tokens)
        prefill = partial(read_layer.lower, params.blocks[0], x, room[0], scalar, config)
        lowered = prefill() if work == "prefill" else gradients(config).lower(params, tokens, tokens)
        analysis = lowered.compile().memory_analysis()
        assert analysis
        return [analysis.temp_size_in_bytes / 1e6]

    yield Against("seq 2048", "MB", temporary(4096), temporary(2048))


def compiling(turns: int) -> Iterator[Against]:
    """The time to trace, lower and compile, with empty caches."""

    def deep(layers: int) -> float:
        config = ll.Config(300, 64, layers, 2, 2, 16, 176, 128, 1e-5, 1e4, None, False)
        params, tokens = stacked_shapes(config), jax.ShapeDtypeStruct((4, 128), jnp.int32)
        jax.clear_caches()
        return seconds(lambda: gradients(config).lower(params, tokens, tokens).compile())

    return race(turns, "s", partial(deep, 32), {"4 layers": partial(deep, 4)})


def chat(turns: int) -> Iterator[Against]:
    """With an empty compilation cache, then with the one that this filled. Memory excludes that of importing jax."""
    command = [str(Path(sys.executable).with_name("lovely-llama")), "chat", "Why is the sky blue?"]
    with tempfile.TemporaryDirectory() as folder:
        caches = np.repeat(np.arange(1 + turns), 2).tolist()  # each is used twice, and empty the first time

        def answer() -> list[float]:
            return child(*command, "--temperature", "0", "--max-new", "8", XDG_CACHE_HOME=f"{folder}/{caches.pop()}")

        *runs, jaxes = take_turns(turns, answer, answer, IMPORT_JAX)
    weights = np.full(turns, 4 * ll.count(ll.CONFIGS["smollm2-135m"]) / 1e6)
    for state, run in zip(("empty", "filled"), runs, strict=True):
        yield Against(f"first token, cache {state}", "s", run[:, 0])
        yield Against(f"memory, cache {state}; the weights", "MB", run[:, 2] - jaxes[:, 2], weights)


STORY = "Tell me a long story about a lighthouse checkpointer and the sea."
WAITS = """
import os, subprocess, sys, time
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
times = []
while os.read(child.stdout.fileno(), 65536):
    times.append(time.perf_counter())
print(*(b - a for a, b in zip(times[2:], times[3:])), file=sys.stdout)
print(child.stderr.read().decode(), file=sys.stderr)
sys.exit(child.wait())
"""


def waits(n: int, *options: str, cache: str) -> "np.ndarray[Any, Any]":
    """The seconds between the texts of a chat of n tokens as they arrive, after the third."""
    door = str(Path(sys.executable).with_name("lovely-llama"))
    command = [sys.executable, "-c", WAITS, door, "chat", STORY, "--seed", "1", "--max-new", str(n), *options]
    environment = os.environ | {"XDG_CACHE_HOME": cache}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and f"new {n}," in done.stderr, done.stderr
    return np.array(done.stdout.split(), float)


def chat_at_length(turns: int, n: int) -> Iterator[Against]:
    """Median tokens per second of a chat with default sampling, and its longest wait for one of them.

    Beside it, our own with the likeliest token each time, and `generate` of transformers with the same sampling. The
    wait is the longer of two: with no program compiled before, and with all of them.
    """
    turns = min(turns, 2)  # each takes n tokens
    oracle, sampling = pair("SmolLM2").oracle, ll.Sampling()
    tokenizer = pair("SmolLM2").session.model.tokenizer
    prompt = torch.tensor([chat_prompt(tokenizer, [{"role": "user", "content": STORY}])])
    longest, medians = list[float](), list[float]()

    def speed(*options: str, cache: str) -> float:
        found = waits(n, *options, cache=cache)
        if not options:
            longest.append(1000 * float(found.max()))
            medians.append(1000 * float(np.median(found)))
        return 1 / float(np.median(found))

    def theirs() -> float:
        times = list[float]()

        class Clock(BaseStreamer):
            def put(self, value: Any) -> None:
                times.append(time.perf_counter())

            def end(self) -> None: ...

        settings = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0, "do_sample": True}
        with torch.inference_mode():
            oracle.generate(prompt, max_new_tokens=n, min_new_tokens=n, streamer=Clock(), **settings)
        assert len(times) == n + 1, times
        return 1 / float(np.median(np.diff(times[3:])))

    with tempfile.TemporaryDirectory() as folder:
        fresh = (f"{folder}/{turn}" for turn in count())
        kept = f"{folder}/kept"
        contenders = [
            partial(speed, cache=kept), partial(speed, "--temperature", "0", cache=kept), theirs,
            lambda: speed(cache=next(fresh)),
        ]  # fmt: skip
        ours, greedy, peer, _ = take_turns(turns, *contenders)
    yield Against("temperature 0", "tokens/s", ours, greedy)
    yield Against("transformers", "tokens/s", ours, peer)
    for state, first in (("filled", 2), ("empty", 3)):  # after those of the warm-up turn
        yield Against(f"longest wait, cache {state}; the median", "ms", longest[first::2], medians[first::2])


def imports(turns: int) -> Iterator[Against]:
    ours = partial(child, sys.executable, "-c", "import lovely_llama")
    yield Against("import jax", "s", *take_turns(turns, ours, IMPORT_JAX)[:, :, 1])


# Each row: how it is measured, and the floor against each peer. Peers without a floor are for information.
ROWS: dict[str, tuple[Callable[[int], Iterable[Against]], dict[str, str]]] = {
    "decode 110M (120 tokens)": (
        partial(decode, name="110M", n=120), {"transformers": "≥ 1.25 ×", "read bandwidth": "≥ 0.75 ×"}),
    "decode 15M (200 tokens)": (
        partial(decode, name="15M", n=200), {"transformers": "≥ 2.0 ×", "read bandwidth": "≥ 0.60 ×"}),
    "decode SmolLM2 (100 tokens)": (partial(decode, name="SmolLM2", n=100), {"transformers": "≥ 1.5 ×"}),
    "decode 110M (8 rows at once)": (partial(decode_rows, batch=8, n=40), {"one row": "≥ 3 ×"}),
    "decode 15M (position 64 of ctx 8192)": (partial(decode_far, name="15M"), {"ctx 256": "≤ 1.1 ×"}),
    "decode 110M (position 64 of ctx 8192)": (partial(decode_far, name="110M"), {"ctx 256": "≤ 1.1 ×"}),
    "prefill 15M (256 tokens)": (partial(prefill, name="15M", n=256), {"transformers": "≥ 1.2 ×"}),
    "prefill 15M (2048 tokens)": (partial(prefill, name="15M", n=2048), {"transformers": "≥ 1.2 ×"}),
    "prefill 110M (256 tokens)": (partial(prefill, name="110M", n=256), {"transformers": "≥ 1.2 ×"}),
    "prefill 110M (2048 tokens)": (partial(prefill, name="110M", n=2048), {"transformers": "≥ 1.2 ×"}),
    "gradients 15M (8×256)": (partial(slopes, name="15M", batch=8, seq=256), {"torch eager": "≥ 1.0 ×"}),
    "gradients 110M (2×256)": (partial(slopes, name="110M", batch=2, seq=256), {"torch eager": "≥ 1.0 ×"}),
    "training step 15M (8×256)": (partial(whole_step, name="15M", batch=8, seq=256), {"torch eager": "≥ 1.0 ×"}),
    "training step 110M (2×256)": (partial(whole_step, name="110M", batch=2, seq=256), {"torch eager": "≥ 1.0 ×"}),
    "memory of a training step 15M (8×256)": (
        partial(step_memory, name="stories15m", batch=8, seq=256), {"a bound": "≤ 250 MB"}),
    "data reader (8×256)": (partial(reading, batch=8, seq=256), {"a step": "≥ 100 ×"}),
    "memory of prefill 15M (seq 4096)": (partial(memory, work="prefill"), {"seq 2048": "≤ 2.1 ×"}),
    "memory of gradients 15M (seq 4096)": (partial(memory, work="gradients"), {"seq 2048": "≤ 2.1 ×"}),
    "chat with SmolLM2": (chat, {
        "first token, cache empty": "≤ 20 s", "memory, cache empty; the weights": "≤ 1.4 ×",
        "first token, cache filled": "≤ 5 s", "memory, cache filled; the weights": "≤ 1.4 ×"}),
    "chat with SmolLM2 (400 tokens)": (partial(chat_at_length, n=400), {
        "temperature 0": "≥ 0.9 ×", "transformers": "≥ 1.5 ×", "longest wait, cache filled; the median": "≤ 5 ×",
        "longest wait, cache empty; the median": "≤ 5 ×"}),
    "import lovely_llama": (imports, {"import jax": "≤ 0.3 s more"}),
    "compile gradients (32 layers stacked)": (compiling, {"4 layers": "≤ 1.5 ×"}),
}  # fmt: skip

# The rows shown in the README, each against one peer.
IN_README = {
    "chat with SmolLM2, 400 tokens": ("chat with SmolLM2 (400 tokens)", "transformers"),
    "read a prompt of 2048, 110M": ("prefill 110M (2048 tokens)", "transformers"),
    "gradients of 2 × 256 tokens, 110M": ("gradients 110M (2×256)", "torch eager"),
}  # fmt: skip

# ---- The report ------------------------------------------------------------------------------------------------------


def judge(against: Against, floor: str | None) -> dict[str, Any]:
    """A complete line. Its value is of the same kind as its floor: a ratio, seconds, or a difference of medians."""
    peer, unit, ours, theirs = against
    ratios, medians = np.array(ours), [float(np.median(ours))]
    if theirs is not None:
        ratios, medians = ratios / np.array(theirs), [*medians, float(np.median(theirs))]
    low, middle, high = np.percentile(ratios, [25, 50, 75]).tolist()
    value = medians[0] - medians[1] if floor and floor.endswith("more") else middle
    sign, limit = floor.split()[:2] if floor else ("≥", "0")
    met = value >= float(limit) if sign == "≥" else value <= float(limit)
    line = {"peer": peer, "unit": unit, "medians": medians, "value": value, "spread": (high - low) / middle}
    return line | {"floor": floor, "met": met, "ours": [*ours], "theirs": theirs if theirs is None else [*theirs]}


def markdown(line: Mapping[str, Any]) -> str:
    def short(x: float) -> str:
        return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"

    ours, *theirs = map(short, line["medians"])
    cells = [line["work"], f"{ours} {line['unit']}", ": ".join([line["peer"], *theirs]), f"{line['value']:.3g}"]
    cells += [f"{line['spread']:.0%}", (line["floor"] or "–") + " **missed**" * (not line["met"])]
    return f"| {' | '.join(cells)} | {' / '.join(map(short, line['machine']))} |"


def for_readme(lines: list[dict[str, Any]]) -> str:
    """The README's table in Markdown, and the machine it was measured on."""
    head = "| work | here | transformers | ratio |"
    rows = [head, "|---" * (head.count("|") - 1) + "|"]
    for name, (work, peer) in IN_README.items():
        line = next(line for line in lines if (line["work"], line["peer"]) == (work, peer))
        ours, theirs = (f"{median:,.0f} {line['unit']}" for median in line["medians"])
        rows.append(f"| {name} | {ours} | {theirs} | {line['value']:.2f} |")
    return "\n".join([*rows, "", f"float32 on {THREADS} cores of {machine_of(lines)}."])


SECTION = re.compile(r"^### (.+), matrix products of (\d+) GFLOP/s in torch and (\d+) in jax$", re.MULTILINE)


def machine_of(lines: list[dict[str, Any]]) -> str:
    """The processor and its two matrix-product figures, without which a ratio says little."""
    products = [float(np.median([line["machine"][i] for line in lines])) for i in (1, 2)]
    return "{}, matrix products of {:.0f} GFLOP/s in torch and {:.0f} in jax".format(processor(), *products)


def with_section(page: str, made: str) -> str:
    """A page with a machine's section replaced by the one made, or added at the end; all others stay.

    Sections are of the same machine if they name the same processor, and both figures agree within a quarter.
    """
    begin, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    sections = [part.strip() for part in re.split(r"^(?=### )", page[begin:end], flags=re.MULTILINE) if part.strip()]

    def named(section: str) -> tuple[str, float, float]:
        found = SECTION.match(section)
        assert found, section
        return found[1], float(found[2]), float(found[3])

    def alike(section: str) -> bool:
        (name, *old), (other, *new) = named(section), named(made)
        return name == other and all(4 / 5 <= a / b <= 5 / 4 for a, b in zip(old, new, strict=True))

    place = next((i for i, section in enumerate(sections) if alike(section)), len(sections))
    sections[place : place + 1] = [made]
    return page[:begin] + "\n" + "\n\n".join(sections) + "\n" + page[end:]


def replaced(text: str, begin: str, end: str, what: str) -> str:
    """A text with the part between two marks replaced."""
    return text[: text.index(begin) + len(begin)] + f"\n{what}\n" + text[text.index(end) :]


def main() -> int:
    parser = argparse.ArgumentParser("./dev bench", description=__doc__, epilog=f"The rows: {'; '.join(ROWS)}.")
    parser.add_argument("--only", metavar="NAME,…", default="", help="the rows whose names have one of these in them")
    parser.add_argument("--runs", metavar="N", type=int, default=7, help="turns that count (default: 7)")
    parser.add_argument("--compile", action="store_true", help="hold the gradients against torch.compile too")
    parser.add_argument("--json", action="store_true", help="everything measured, in place of the table")
    parser.add_argument(
        "--write",
        action="store_true",
        help="update this machine's section of docs/performance.md",
    )
    args = parser.parse_args()
    chosen = [row for row in ROWS if any(part.lower() in row.lower() for part in args.only.split(","))]
    if not chosen or args.runs < 1:
        parser.error(f"--only, --runs: got {args.only}, {args.runs}, expected parts of names of rows, 1 or more")
    if args.write and (args.runs < 7 or args.only):
        parser.error("--write: expected all rows and at least 7 runs")
    if LLAMA2_RUN and not os.access(LLAMA2_RUN, os.X_OK):
        parser.error(f"LLAMA2_RUN: got {LLAMA2_RUN}, expected a program")
    if args.compile:
        del ABSENT["torch.compile"]
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])  # jax uses one thread per core
    torch.set_num_threads(THREADS)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    machine()  # a warm-up, not recorded
    lines = list[dict[str, Any]]()
    for row in chosen:
        measure, floors = ROWS[row]
        now, begun, used = machine(), time.perf_counter(), others()
        found = list(measure(args.runs))
        now.append((others() - used) / (time.perf_counter() - begun))
        for against in found:
            lines.append({"work": row, "machine": now, **judge(against, floors.get(against.peer))})
            print(markdown(lines[-1]), file=sys.stderr)
    versions = ", ".join(f"{lib.__name__} {lib.__version__}" for lib in (jax, torch, transformers))
    left_out = "".join(f" Left out: {peer} ({why})." for peer, why in ABSENT.items())
    busy = [f"{line['work']}, {line['peer']}" for line in lines if max(line["spread"], line["machine"][-1]) > BUSY]
    missed = [f"{line['work']}, {line['peer']}" for line in lines if not line["met"]]
    note = f"\nMedians of {args.runs} turns in float32 on {THREADS} threads; {versions}.{left_out}"
    note += f" {BUSY_IN} {'; '.join(busy)}." if busy else ""
    head = "| work | ours | against | value | spread | floor | GB/s / GFLOP/s torch / jax / others' cores |"
    table = "\n".join([head, "|---" * (head.count("|") - 1) + "|", *map(markdown, lines), note])
    print(json.dumps({"lines": lines, "busy": busy, "missed": missed, "absent": ABSENT}) if args.json else table)
    for what, where in ((BUSY_IN, busy), ("Floors missed:", missed)):
        if where:
            print(what, "; ".join(where), file=sys.stderr)
    if args.write:
        PAGE.write_text(with_section(PAGE.read_text(), f"### {machine_of(lines)}\n\n{table}"))
        README.write_text(replaced(README.read_text(), *SHORT, for_readme(lines)))
    return 1 if busy or missed else 0


if __name__ == "__main__":
    sys.exit(main())
