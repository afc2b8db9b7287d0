"""Generation: against the model without a cache and, with SmolLM2, against transformers."""

import importlib
import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple, cast

import jax
import numpy as np
import pytest
from asserts import assert_close
from builders import counting_model, letter_tokenizer, random_params, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import monitoring
from jax import numpy as jnp

from lovely_llama import Config, LlamaError, Sampling, count, logits
from lovely_llama_tools.fast.layers import stack
from lovely_llama_tools.formats.files import default_model, load
from lovely_llama_tools.formats.model import Model
from lovely_llama_tools.inference.batch import generate_all
from lovely_llama_tools.inference.generate import Generation, Session, generate
from lovely_llama_tools.inference.scoring import perplexity

quick = settings(deadline=None, max_examples=60, derandomize=True, database=None)

# ---- Text -----------------------------------------------------------------------------------------------------------

GREEDY, HOT = Sampling(temperature=0.0), Sampling(temperature=2.0, top_p=1.0)
CONFIG = Config(61, 24, 2, 2, 3, 4, 40, 2048, 1e-5, 1e4, None, False)
# Control tokens, letters, whole characters, and bytes of é, 日 and 😀: many sequences of them are invalid UTF-8.
PIECES = [
    b"", b"", *(bytes([c]) for c in b"abcdefghij "), "ñandú".encode(), b"\xc3", b"\xa9", b"\xe6\x97", b"\xa5",
    b"\xf0", b"\x9f\x98", b"\x80", b"s\xc3", b"the ", b"\n", *(b"%d" % i for i in range(37)),
]  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(CONFIG, random_params(CONFIG), letter_tokenizer(PIECES))


def script(text: Sequence[bytes], stop: Sequence[str] = (), **options: Any) -> Generation:
    """A generation by a model that produces these pieces."""
    return generate(counting_model(text), [0], len(text), GREEDY, stop=stop, **options)


def tokens_of(generation: Generation) -> list[int]:
    """All its tokens, once it has ended."""
    list(generation)
    return generation.tokens


def test_a_stream_is_the_text_of_its_tokens(model: Model) -> None:
    for seed in range(12):
        generation = generate(model, "abc", 40, HOT, seed)
        parts = list(generation)
        assert len(generation.tokens) == 40
        assert "".join(parts) == tokenizer_of(model).decode(generation.tokens)
        assert all(parts)


@pytest.mark.parametrize(("prompt", "text"), [([0], "the very end"), ([0, 1], " very end"), ([1, 2], " end")])
def test_prompt_and_stream_make_up_the_decoded_text(prompt: list[int], text: str) -> None:
    """SentencePiece puts a space before every text: the stream drops it only if the prompt is empty or just BOS."""
    model = counting_model([b" the", b" very", b" end"])
    model = model._replace(tokenizer=tokenizer_of(model)._replace(prefix=b" "))
    generation = generate(model, prompt, 4 - len(prompt) - prompt[0], GREEDY)
    assert "".join(generation) == text
    assert tokenizer_of(model).decode(prompt) + text == tokenizer_of(model).decode([*prompt, *generation.tokens])


def test_characters_are_streamed_whole() -> None:
    said = list(script([b"a\xc3", b"\xa9\xe6", b"\x97", b"\xa5", b"\xf0", b"\x9f\x98", b"\x80z"]))
    assert said == ["a", "é", "日", "😀z"]


def test_invalid_utf8_is_replaced() -> None:
    for pieces in ([b"\xc3", b"a"], [b"a", b"\xf0\x9f"], [b"\xa9", b"\xff"], [b"\xe6\x97", b"\xc3", b"\xa9"]):
        assert "".join(script(pieces)) == b"".join(pieces).decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("pieces", "stop", "text"),
    [
        ("aaab", ["aab"], "a"),  # a matcher that restarts at a mismatch misses it
        ("aabaac", ["aac"], "aab"),
        ("hello world", ["world", "lo"], "hel"),
        ("hello world", ["planet", "word"], "hello world"),
        ("ab", ["abc"], "ab"),
        ("ab", ["a"], ""),
        (["x", "xyz", "z"], ["y"], "xx"),
        (["ab", "cd", "ef"], ["f", "bc", "d"], "a"),
        (["ab", "cd"], ["cd", "bcd"], "a"),
        (["a", b"\xc3", b"\xa9", "b"], ["é"], "a"),
        (["a", b"\xc3", b"\xa9", "b"], ["éb"], "a"),
    ],
)
def test_text_ends_before_a_stop(pieces: Sequence[str | bytes], stop: list[str], text: str) -> None:
    said = [piece if isinstance(piece, bytes) else piece.encode() for piece in pieces]
    generation = script(said, stop)
    assert "".join(generation) == text
    assert generation.reason == ("length" if text.encode() == b"".join(said) else "stop")


@quick
@given(
    st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=9),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=2),
)
def test_a_stop_is_found_across_tokens(pieces: list[str], stop: list[str]) -> None:
    sofar = ["".join(pieces[: n + 1]) for n in range(len(pieces))]
    stopped = next((text for text in sofar if any(end in text for end in stop)), None)
    want = sofar[-1] if stopped is None else stopped[: min(stopped.index(end) for end in stop if end in stopped)]
    generation = script([piece.encode() for piece in pieces], stop)
    assert "".join(generation) == want
    assert generation.reason == ("length" if stopped is None else "stop")


def test_one_stop_may_be_given_by_itself(no_type_checks: None) -> None:
    """Not as a list of its letters."""
    generation = script([b"aE", b"bN", b"END", b"c"], cast(Any, "END"))
    assert "".join(generation) == "aEbN"
    assert generation.reason == "stop"


def test_numbers_of_numpy_are_accepted(model: Model, no_type_checks: None) -> None:
    options: dict[str, Any] = {
        "max_new": np.int64(5),
        "seed": np.uint32(7),
        "sampling": Sampling(top_k=cast(Any, np.int32(3))),
    }
    assert len(tokens_of(generate(model, "abc", **options))) == 5


def test_a_stop_token_ends_the_text_and_is_not_part_of_it() -> None:
    for stops, stop in (([3], []), ([], ["</s>"])):
        model = counting_model([b"a", b"b", b"c", b"d"], stops)
        specials = {"</s>": 3}
        model = model._replace(tokenizer=tokenizer_of(model)._replace(specials=specials))
        generation = generate(model, [0], 4, GREEDY, stop=stop)
        assert ("".join(generation), generation.tokens, generation.reason) == ("ab", [1, 2], "stop")


@pytest.mark.parametrize(
    ("prompt", "max_new", "said", "reason"),
    [
        (1, 0, 0, "length"),
        (1, 3, 3, "length"),
        (1, None, 15, "context"),
        (15, None, 1, "context"),
        (16, 9, 0, "context"),
    ],
)
def test_reason(prompt: int, max_new: int | None, said: int, reason: str) -> None:
    generation = generate(counting_model([], ctx=16), [0] * prompt, max_new, GREEDY)
    assert len(list(generation)) == said == len(generation.tokens)
    assert generation.reason == reason


def test_bad_arguments_are_refused_before_the_first_token(model: Model) -> None:
    """Examples; the others are in faults_generation.py. None waits until text is requested."""
    for options in ({"prompt": [CONFIG.vocab]}, {"prompt": "abc", "seed": -1}, {"prompt": "abc", "stop": [""]}):
        with pytest.raises(LlamaError):
            generate(model, **options)  # pyright: ignore


@pytest.mark.parametrize("function", [generate, generate_all])
def test_a_sampler_by_itself_is_told_where_it_belongs(model: Model, no_type_checks: None, function: Any) -> None:
    with pytest.raises(LlamaError, match=r"temperature: got 0.5, expected sampling=Sampling\(temperature=0.5\)"):
        function(model, ["a"], temperature=0.5)
    with pytest.raises(LlamaError, match="max_new_tokens: got 5, expected max_new=5"):
        function(model, ["a"], max_new_tokens=5)
    with pytest.raises(TypeError, match="unexpected keyword argument 'warmth'"):
        function(model, ["a"], warmth=0.5)


def test_a_generation_shows_its_text(model: Model) -> None:
    """As a notebook shows what its last line gives; what has been read by then is not lost."""
    want = "".join(generate(model, "abc", 20, HOT))
    assert str(generate(model, "abc", 20, HOT)) == want
    begun = generate(model, "abc", 20, HOT)
    next(begun)
    assert repr(begun) == repr(begun) == f"Generation({want!r}, 'length')"
    assert str(generate(model._replace(tokenizer=None), [1, 2], 3, HOT)).count(",") == 2


@pytest.mark.parametrize("kind", ["of numpy", "of numpy, in float64", "stacked"])
def test_parameters_as_others_hold_them(kind: str, model: Model, no_type_checks: None) -> None:
    """What comes out is the same, to the bit."""
    dtype = np.float64 if "float64" in kind else np.float32
    params = jax.tree.map(lambda w: np.asarray(w).astype(dtype), model.params)
    other = Model(CONFIG, params, model.tokenizer)
    if kind == "stacked":
        other = model._replace(params=model.params._replace(blocks=stack(model.params.blocks)))
    session = Session(other)
    assert str(generate(other, "abc", 20, HOT, session=session)) == str(generate(model, "abc", 20, HOT))
    assert list(generate_all(other, ["a", "bc"], 5, HOT)) == list(generate_all(model, ["a", "bc"], 5, HOT))
    assert perplexity(other, "abcabc") == perplexity(model, "abcabc")
    wrong = other._replace(config=replace(CONFIG, dim=25))
    for refuse in (lambda: generate(wrong, "a"), lambda: generate_all(wrong, ["a"]), lambda: perplexity(wrong, "abc")):
        with pytest.raises(LlamaError, match=r"params: .*: got "):
            refuse()


def test_non_finite_logits_end_a_generation(model: Model) -> None:
    broken = model._replace(params=model.params._replace(norm=model.params.norm * math.nan))
    with pytest.raises(FloatingPointError, match="position 3"):
        next(generate(broken, "abc", 1))


def test_the_start_and_each_token_are_timed() -> None:
    begun, generation = time.perf_counter(), script([b"a"] * 5)
    assert "".join(generation) == "aaaaa"
    assert len(generation.times) == 6
    assert [begun, *generation.times] == sorted([*generation.times, begun])


def test_a_seed_determines_the_text(model: Model) -> None:
    def text(seed: int, **options: Any) -> str:
        return "".join(generate(model, "abc", 30, HOT, seed, **options))

    assert text(5) == text(5) == text(5, session=Session(model))
    assert len({text(seed) for seed in (0, 1, 2, 2**32 - 1)}) == 4


# ---- With a cache and without ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return np.random.default_rng(1).integers(0, CONFIG.vocab, 1300).tolist()


@pytest.fixture(scope="module")
def uncached(model: Model, tokens: list[int]) -> np.ndarray[Any, Any]:
    """The logits after every token, from one call with no cache."""
    return np.asarray(jax.jit(logits, static_argnums=2)(model.params, jnp.array(tokens), CONFIG))


def test_greedy_tokens_match_the_model_without_a_cache(tokens: list[int]) -> None:
    config = replace(CONFIG, ctx=90, layers=1)
    model = Model(config, random_params(config), letter_tokenizer(PIECES))
    for n in (1, 30, 64, 89):
        generation = generate(model, tokens[:n], None, GREEDY)
        text = "".join(generation)
        assert generation.reason == "context"
        assert text == tokenizer_of(model).decode(generation.tokens)
        every = [*tokens[:n], *generation.tokens]
        assert len(every) == config.ctx
        scores = np.asarray(jax.jit(logits, static_argnums=2)(model.params, jnp.array(every), config))
        for position in range(n - 1, config.ctx - 1):
            assert scores[position, every[position + 1]] >= scores[position].max() - 1e-4, position


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 255, 256, 257, 600, 1100])
def test_a_prompt_is_read_in_pieces(model: Model, tokens: list[int], uncached: Any, length: int) -> None:
    session = Session(model)
    assert_close(session.logits(tokens[:length]), uncached[length - 1], 1e-5, f"logits after {length}")
    assert_close(session.logits(tokens[: length + 1]), uncached[length], 1e-5, f"logits after {length + 1}")
    assert session.tokens == tokens[: length + 1]


def test_a_growing_cache_keeps_its_contents(model: Model, tokens: list[int], uncached: Any) -> None:
    session = Session(model)
    for last in (600, 900, 901, 1030, 1300):
        assert_close(session.logits(tokens[:last]), uncached[last - 1], 1e-5, f"logits after {last}")


@pytest.mark.parametrize("ctx", [1101, 1088, 70])
def test_padding_overwrites_nothing_at_the_end_of_the_context(
    model: Model, tokens: list[int], uncached: Any, ctx: int
) -> None:
    """Padding is written after the last token; past the end of the cache, the start of that write would be clamped."""
    session = Session(model._replace(config=replace(CONFIG, ctx=ctx)))
    assert_close(session.logits(tokens[:ctx]), uncached[ctx - 1], 1e-5, "logits after the last")


def test_a_session_reuses_the_common_prefix(model: Model, tokens: list[int], uncached: Any) -> None:
    session, other = Session(model), [*tokens[:200], *tokens[500:650]]

    def cached(prompt: list[int]) -> int:
        generation = generate(model, prompt, 1, HOT, session=session)
        list(generation)
        return generation.cached

    assert cached(tokens[:300]) == 0
    assert cached(other) == 200
    assert cached(other) == len(other) - 1  # logits come with the last token, which is read again
    assert_close(session.logits(other), Session(model).logits(other), 1e-5, "a prompt that continues differently")
    assert cached(tokens[:100]) == 99
    assert_close(session.logits(tokens[:100]), uncached[99], 1e-5, "the prefix alone")


def test_a_session_generates_the_same_texts_as_a_fresh_one(model: Model) -> None:
    session, sampling = Session(model), HOT
    for prompt in ("abc", "abcabc", "b" * 100, "abc"):
        fresh = "".join(generate(model, prompt, 12, sampling, 1))
        assert "".join(generate(model, prompt, 12, sampling, 1, session=session)) == fresh


def test_a_session_is_of_one_model(model: Model) -> None:
    """Weights of another model would answer in silence."""
    other = model._replace(params=random_params(CONFIG, seed=1))
    with pytest.raises(LlamaError) as caught:
        generate(other, "abc", session=Session(model))
    assert caught.value.field == "session"


def test_generations_may_take_turns_on_one_session(model: Model) -> None:
    session = Session(model)
    alone = ["".join(generate(model, prompt, 12, HOT, 1)) for prompt in ("abc", "abd")]
    taken = [generate(model, prompt, 12, HOT, 1, session=session) for prompt in ("abc", "abd")]
    texts = ["", ""]
    for _ in range(20):
        for i, generation in enumerate(taken):
            texts[i] += next(generation, "")
    assert texts == alone


def test_threads_may_share_a_session(model: Model) -> None:
    session, prompts = Session(model), ["abc", "abd", "b" * 70, "a"]
    alone = ["".join(generate(model, prompt, 12, HOT, 1)) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = pool.map(lambda prompt: "".join(generate(model, prompt, 12, HOT, 1, session=session)), prompts)
        assert [*together] == alone


@pytest.mark.parametrize("wrong", [[], [CONFIG.vocab], [-1], [0] * (CONFIG.ctx + 1)])
def test_a_session_refuses_bad_tokens(model: Model, wrong: list[int]) -> None:
    with pytest.raises(LlamaError) as caught:
        Session(model).logits(wrong)
    assert caught.value.field == "tokens"


def test_a_session_refuses_parameters_of_another_config(model: Model) -> None:
    with pytest.raises(LlamaError) as caught:
        Session(model._replace(config=replace(CONFIG, layers=1)))
    assert caught.value.file == "params"


def test_an_interrupted_generation_ends_with_what_it_has(model: Model) -> None:
    session = Session(model)
    generation, fresh = (generate(model, "abc", 12, HOT, 1, session=s) for s in (session, None))
    begun = [next(generation) for _ in range(4)]
    generation.interrupt()
    assert "".join([*begun, *generation]) in "".join(fresh)
    assert generation.reason == "interrupted" and len(generation.tokens) < 12
    assert "".join(generate(model, "abc", 12, HOT, 1, session=session)) == "".join(generate(model, "abc", 12, HOT, 1))


# ---- Without a tokenizer ---------------------------------------------------------------------------------------------


def test_ids_go_in_and_come_out_without_a_tokenizer(model: Model) -> None:
    bare = Model(model.config, model.params, None)
    generation = generate(bare, [3, 4, 5], 12, HOT, 1)
    assert list(generation) == generation.tokens == tokens_of(generate(model, [3, 4, 5], 12, HOT, 1))
    assert generation.reason == "length"


@pytest.mark.parametrize("options", [{"prompt": "abc"}, {"prompt": [1], "stop": ["a"]}])
def test_texts_need_a_tokenizer(model: Model, options: dict[str, Any]) -> None:
    with pytest.raises(LlamaError) as caught:
        generate(Model(model.config, model.params, None), **options)
    assert (caught.value.file, caught.value.field) == ("model", "tokenizer")


def test_a_model_is_printed_in_a_line(model: Model) -> None:
    """Not with all its weights."""
    for shown in (repr(model), str(model), f"{tokenizer_of(model)!r}", repr(Model(model.config, model.params, None))):
        assert len(shown) < 500 and "\n" not in shown
    assert f"{count(CONFIG):,} parameters" in repr(model)


# ---- Interruptions, and programs -------------------------------------------------------------------------------------


def test_a_session_survives_an_interruption(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two layers is interrupted, after the cache of the first has been donated."""
    programs = importlib.import_module("lovely_llama_tools.inference.generate")
    session, layer, calls = Session(model), programs.read_layer, list[int]()

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return layer(*args)

    fresh = "".join(generate(model, "abc", 12, HOT, 1))
    monkeypatch.setattr(programs, "read_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        "".join(generate(model, "abc", 12, HOT, 1, session=session))
    assert session.tokens
    assert "".join(generate(model, "abc", 12, HOT, 1, session=session)) == fresh


def test_no_token_waits_for_a_program_of_a_larger_cache(model: Model) -> None:
    """Where the cache grows, at 193, 449 and 961 tokens, its programs have been compiled in another thread."""
    model = model._replace(config=replace(CONFIG, eps=3e-5))  # whose programs no other test has compiled
    generation, here = generate(model, [3], 1100, HOT), threading.get_ident()
    late = list[int]()

    def note(event: str, seconds: float, **about: Any) -> None:
        if event.endswith("backend_compile_duration") and threading.get_ident() == here:
            late.append(len(generation.tokens))

    monitoring.register_event_duration_secs_listener(note)
    try:
        assert len(tokens_of(generation)) == 1100
    finally:
        monitoring.unregister_event_duration_listener(note)
    assert late and max(late) <= 2


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """The programs compiled since the test began, as jax reports them."""
    seen = list[str]()

    def note(event: str, seconds: float, **about: Any) -> None:
        if event.endswith("backend_compile_duration"):
            seen.append(event)

    monitoring.register_event_duration_secs_listener(note)
    yield seen
    monitoring.unregister_event_duration_listener(note)


def test_a_new_length_compiles_nothing(model: Model, tokens: list[int], compilations: list[str]) -> None:
    model = model._replace(config=replace(CONFIG, eps=2e-5))  # whose programs no other test has compiled

    def read(*lengths: int) -> None:
        for length in lengths:
            assert len(list(generate(model, tokens[:length], 3, HOT))) <= 3

    read(100, 300, 900)  # pieces of every length, in caches of every size up to 1024
    assert compilations
    compilations.clear()
    read(2, 3, 17, 63, 65, 129, 255, 299, 511, 513, 700, 899)
    assert not compilations


# ---- Real weights ----------------------------------------------------------------------------------------------------

# Each continues for 64 tokens, and no token wins by less than 0.01, a thousand times the rounding error of float32.
PROMPTS = (
    "Once upon a time, in a small village by the sea, there lived",
    "The theory of general relativity says that",
    'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n',
    "In the beginning, the universe was",
    "The quick brown fox 🦊 jumps over 13 lazy dogs. Then",
)


@pytest.fixture(scope="module")
def smollm2() -> Model:
    return load(default_model())


# Reads sequences of tokens from stdin, and writes the logits of transformers' own loader to a file.
ORACLE = """
import json, sys
import numpy as np, torch
from pathlib import Path
from transformers import LlamaForCausalLM

path, to = map(Path, sys.argv[1:])
model = LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
with torch.no_grad():
    np.savez(to, *(model(torch.tensor([tokens])).logits[0].numpy() for tokens in json.load(sys.stdin)))
"""


class Continued(NamedTuple):
    tokens: list[int]
    prompt: int  # how many of them are the prompt's
    logits: Any  # transformers'


@pytest.fixture(scope="module")
def continued(smollm2: Model, tmp_path_factory: pytest.TempPathFactory) -> list[Continued]:
    """Greedy continuations of 64 tokens, and transformers' logits, from a process of its own: it takes 2 GB."""
    found = list[tuple[list[int], int]]()
    for prompt in PROMPTS:
        generation = generate(smollm2, prompt, max_new=64, sampling=Sampling(temperature=0.0))
        assert "".join(generation) and len(generation.tokens) == 64
        found.append(([*generation.prompt, *generation.tokens], len(generation.prompt)))
    to = tmp_path_factory.mktemp("oracle") / "logits.npz"
    command = [sys.executable, "-c", ORACLE, str(default_model()), str(to)]
    subprocess.run(command, input=json.dumps([tokens for tokens, _ in found]), text=True, check=True)
    with np.load(to) as logits:
        return [Continued(*one, logits[name]) for one, name in zip(found, logits.files, strict=True)]


@pytest.mark.parametrize("i", range(len(PROMPTS)))
def test_real_logits(i: int, smollm2: Model, continued: list[Continued]) -> None:
    """SmolLM2 from a GGUF gives the same logits with either loader."""
    tokens, _, want = continued[i]
    assert_close(Session(smollm2).logits(tokens), want[-1], 1e-4, "logits")


@pytest.mark.parametrize("i", range(len(PROMPTS)))
def test_real_greedy_continuation(i: int, continued: list[Continued]) -> None:
    """Each of 64 tokens is transformers' own greedy choice after those before it."""
    tokens, prompt, scores = continued[i]
    assert tokens[prompt:] == scores[prompt - 1 : -1].argmax(-1).tolist()
