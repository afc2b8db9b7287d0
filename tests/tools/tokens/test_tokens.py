"""Tokenizers: SmolLM2's against llama.cpp's and transformers', Llama 2's against SentencePiece itself."""

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax import numpy as jnp
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import GPT2Tokenizer

from lovely_llama import Config, LlamaError, Sampling, shapes
from lovely_llama_tools.formats.files import default_model
from lovely_llama_tools.formats.gguf_header import scan_gguf
from lovely_llama_tools.formats.model import Model
from lovely_llama_tools.inference.generate import Session, generate
from lovely_llama_tools.tokens import Tokenizer, gguf_tokenizer, sentencepiece_tokenizer

LLAMA2 = Path(__file__).parents[4] / "shared/data/llama2-tokenizer.model"

# Tokens from llama.cpp v0.5.0 (npm packages node-llama-cpp and @node-llama-cpp/linux-x64, 3.22.1) for the vocabulary in
# SmolLM2's GGUF, by its own pre-tokenizer "smollm"; the names of special tokens are treated as plain text.
GOLDEN: dict[str, list[int]] = {
    "Hello, world!": [19556, 28, 905, 17],
    "Why is the sky blue?": [4898, 314, 260, 6376, 4461, 47],
    " leading and trailing ": [2899, 284, 35079, 216],
    "two  three   spaces": [11355, 216, 1296, 256, 5600],
    "tab\tand\nnewline\n\n\nend": [15999, 197, 397, 198, 28160, 1116, 198, 486],
    "\r\n\r\n  indented\r\n": [18682, 216, 641, 6574, 2738],
    "007 and 3.14159, 1,000,000": [
        32, 32, 39, 284, 216, 35, 30, 33, 36, 33, 37, 41, 28, 216, 33, 28, 32, 32, 32, 28, 32, 32, 32,
    ],
    "x2y34z  56": [104, 34, 105, 35, 36, 106, 256, 37, 38],
    "   7 8  9": [333, 39, 216, 40, 256, 41],
    "½ Ⅷ ² ٣ १२": [16738, 216, 173, 223, 117, 216, 19133, 216, 164, 113, 216, 9310, 117, 9310, 118],
    "don't I'll we've they're I'm he'd it's DON'T ’s": [
        12420, 982, 339, 3060, 392, 3543, 502, 2316, 339, 5248, 384, 6737, 357, 506, 422, 2154, 23, 68, 16107, 99,
    ],
    "naïve café e\u0301 ÅÄÖ": [3546, 46494, 37366, 297, 151, 219, 5549, 223, 142, 222, 142, 240],
    "Привет, мир": [155, 249, 46879, 16464, 32547, 28, 41337, 7872, 9175],
    "日本語のテキスト": [23274, 115, 40993, 179, 120, 248, 26453, 11100, 224, 10391, 251, 10391, 134, 11100, 226],
    "한국어 ไทย हिन्दी": [
        33085, 246, 181, 130, 251, 183, 240, 129, 216, 31933, 222, 10283, 241, 10283, 112, 12335, 134, 27011, 30658,
        16525, 44757, 37189,
    ],
    "😀👩\u200d👩\u200d👧 🇫🇷": [
        10813, 242, 218, 10813, 235, 119, 321, 231, 10813, 235, 119, 321, 231, 10813, 235, 117, 15107, 225, 121, 10813,
        225, 132,
    ],
    "def f(x):\n    return x ** 2  # square\n": [
        1604, 275, 24, 104, 727, 472, 1003, 1792, 1903, 216, 34, 216, 907, 5222, 198,
    ],
    "for (int i = 0; i < n; ++i) { a[i] *= -1; }": [
        1710, 365, 591, 2056, 446, 216, 32, 43, 2056, 2067, 304, 43, 1232, 27, 89, 25, 1662, 253, 75, 89, 77, 32652,
        731, 33, 43, 4029,
    ],
    "{\"key\": [1, 2.5e-3, null]}": [39428, 2393, 1799, 933, 33, 28, 216, 34, 30, 37, 85, 29, 35, 28, 10034, 28852],
    "https://example.org/a?b=c&d=%20": [4687, 1742, 7434, 30, 2295, 31, 81, 47, 82, 45, 83, 22, 84, 23446, 34, 32],
    "\xa0\u3000\u2003wide spaces\u200b": [15442, 12109, 218, 321, 221, 3641, 5600, 321, 229],
    "__init__ snake_case CamelCase": [890, 2563, 890, 14321, 79, 7544, 5784, 299, 10802],
    "<|im_start|>user\nHi<|im_end|>\n": [
        44, 108, 306, 79, 3738, 108, 46, 4093, 198, 26843, 44, 108, 306, 79, 486, 108, 46, 198,
    ],
    "a <|endoftext|> b <|not_special|>": [
        81, 2067, 108, 486, 1714, 2692, 108, 46, 278, 2067, 108, 1766, 79, 19159, 108, 46,
    ],
    "<repo_name>x<file_sep>": [44, 22139, 79, 1245, 46, 104, 44, 2153, 79, 29070, 46],
    "\x00\x01\x07\x1b[0m\x7f\x85": [190, 191, 195, 212, 75, 32, 93, 217, 141, 223],
    "!!!???...---": [29646, 16693, 47, 2026, 5583],
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa": [46880, 46880, 46880, 46880, 46880, 46880, 46880, 46880],
}  # fmt: skip
SPECIAL: dict[str, list[int]] = {
    "<|im_start|>user\nHi<|im_end|>\n": [1, 4093, 198, 26843, 2, 198],
    "a <|endoftext|> b <|not_special|>": [81, 216, 0, 278, 2067, 108, 1766, 79, 19159, 108, 46],
    "<repo_name>x<file_sep>": [3, 104, 5],
}

quick = settings(deadline=None, max_examples=300, derandomize=True, database=None)


@cache
def fields() -> dict[str, Any]:
    """The metadata fields of SmolLM2's GGUF."""
    with open(default_model(), "rb") as file:
        return scan_gguf(file, default_model())[0]


# Tests take functions that return a tokenizer, since hypothesis prints a test's arguments.
@cache
def bpe() -> Tokenizer:
    return gguf_tokenizer(fields(), len(fields()["tokenizer.ggml.tokens"]), default_model())


@cache
def gpt2() -> GPT2Tokenizer:
    """transformers' GPT-2, with SmolLM2's vocabulary and merges."""
    vocab = {token: i for i, token in enumerate(fields()["tokenizer.ggml.tokens"])}
    merges: Any = [tuple(merge.split(" ")) for merge in fields()["tokenizer.ggml.merges"]]
    return GPT2Tokenizer(vocab=vocab, merges=merges)


@cache
def llama2() -> Tokenizer:
    if not LLAMA2.exists():
        pytest.skip(f"needs {LLAMA2}")
    return sentencepiece_tokenizer(LLAMA2.read_bytes(), LLAMA2)


@cache
def sentencepiece() -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(LLAMA2))


both = pytest.mark.parametrize("get", [bpe, llama2], ids=["bpe", "llama2"])

# Any characters, and fragments that tokenizers tend to get wrong, in any order.
FRAGMENTS = (
    "a", "the", " the", "The", "s", "'s", "'LL", " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "0", "12", "½", "٣",
    "é", "e\u0301", "日本", "Привет", "😀", "🇫🇷", "<s>", "</s>", "<unk>", "<|im_end|>", "<|endoftext|>", "<0x0A>", "_",
)  # fmt: skip
TEXTS = st.text() | st.lists(st.sampled_from(FRAGMENTS)).map("".join)


@cache
def alphabet(get: Callable[[], Tokenizer]) -> set[int]:
    """The bytes that have tokens: SmolLM2's vocabulary lacks 21, among them 4 and the lead bytes of planes 4 to 11."""
    return {piece[0] for piece in get().pieces if len(piece) == 1}


# ---- Byte-level BPE --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", GOLDEN)
def test_bpe_matches_llama_cpp(text: str) -> None:
    assert bpe().encode(text, False) == GOLDEN[text]
    assert bpe().encode(text, True) == SPECIAL.get(text, GOLDEN[text])


@given(text=TEXTS)
@quick
def test_bpe_matches_transformers(text: str) -> None:
    """The tokens of its GPT-2 for each numeral by itself, and for the text between numerals."""
    assume("<|endoftext|>" not in text)  # a special token there
    assume(alphabet(bpe).issuperset(text.encode()))
    numerals = groupby(enumerate(text), lambda at: at[0] if unicodedata.category(at[1])[0] == "N" else -1)
    parts = ["".join(character for _, character in part) for _, part in numerals]
    assert bpe().encode(text, False) == [i for part in parts for i in gpt2()(part)["input_ids"]]


def test_special_tokens() -> None:
    """The name of a special token stands for it only on request; decoded, the token adds nothing to the text."""
    tokenizer = bpe()
    assert tokenizer.stops == {tokenizer.specials["<|im_end|>"], tokenizer.specials["<|endoftext|>"]}
    for name, token in tokenizer.specials.items():
        meant, plain = (tokenizer.encode(f"x{name}y", special) for special in (True, False))
        assert meant[1:-1] == [token] and tokenizer.decode(meant) == "xy"
        assert not {*plain} & {*tokenizer.specials.values()} and tokenizer.decode(plain) == f"x{name}y"


@pytest.mark.parametrize("text", ["a\x04b", "a\U00050000b"])
@pytest.mark.parametrize("special", [False, True])
def test_bytes_outside_the_vocabulary_are_refused(text: str, special: bool) -> None:
    """llama.cpp and transformers drop such bytes silently."""
    assert not alphabet(bpe).issuperset(text.encode())
    with pytest.raises(LlamaError):
        bpe().encode(text, special)


# ---- SentencePiece ---------------------------------------------------------------------------------------------------


@given(text=TEXTS)
@quick
def test_llama2_matches_sentencepiece(text: str) -> None:
    tokenizer, reference = llama2(), sentencepiece()
    tokens = reference.encode(text)
    assert tokenizer.encode(text, False) == tokens
    assert tokenizer.encode(text, True) == tokens or {"<s>", "</s>", "<unk>"} & {*re.findall("<[^<>]*>", text)}
    assert tokenizer.begin(text) == [reference.bos_id(), *tokens]
    assert tokenizer.decode(tokens) == tokenizer.decode(tokenizer.begin(text)) == reference.decode(tokens)


def test_llama2_pieces() -> None:
    """What each piece adds to a text that has already begun."""
    tokenizer, reference = llama2(), sentencepiece()
    assert tokenizer.stops == {reference.eos_id()} and tokenizer.bos == reference.bos_id()
    assert len(tokenizer.pieces) == reference.get_piece_size()
    bytes_ = {reference.piece_to_id(f"<0x{byte:02X}>"): bytes([byte]) for byte in range(256)}
    (letter,) = reference.encode("x")
    for token, piece in enumerate(tokenizer.pieces):
        assert piece == bytes_.get(token, reference.decode([letter, token])[1:].encode()), token


def test_a_text_has_a_prefix_only_where_the_model_says_so(tmp_path: Path) -> None:
    """Without it, decoding would take a space from the beginning that is part of the text."""
    text, path = ["the sky is blue", "the sea is blue too"] * 3, tmp_path / "tokenizer.model"
    for prefix in (True, False):
        with path.open("wb") as file:
            SentencePieceTrainer.train(
                sentence_iterator=iter(text), model_writer=file, vocab_size=30, model_type="bpe", minloglevel=2,
                add_dummy_prefix=prefix, remove_extra_whitespaces=False,
            )  # fmt: skip
        tokenizer = sentencepiece_tokenizer(path.read_bytes(), path)
        reference = SentencePieceProcessor(model_file=str(path))
        for said in ("the sea", " the sea", "  the"):
            tokens = reference.encode(said)
            assert tokenizer.decode(tokens) == reference.decode(tokens) == said


# ---- Both ------------------------------------------------------------------------------------------------------------


@both
@given(text=TEXTS)
@quick
def test_round_trip(get: Callable[[], Tokenizer], text: str) -> None:
    assume("▁" not in text)  # SentencePiece's symbol for a space
    assume(alphabet(get).issuperset(text.encode()))
    assert get().decode(get().encode(text, False)) == text


@both
def test_names_of_special_tokens_are_letters_unless_asked_otherwise(get: Callable[[], Tokenizer]) -> None:
    tokenizer = get()
    text = f"Hi{next(iter(tokenizer.specials))}"
    assert tokenizer.encode(text) == tokenizer.encode(text, False) != tokenizer.encode(text, True)


@both
def test_begin(get: Callable[[], Tokenizer]) -> None:
    """One BOS if the model was trained with it or the text is empty; never two."""
    tokenizer, text = get(), "<s>Once upon a time"
    assert tokenizer.begin("") == [tokenizer.bos]
    assert tokenizer.begin(text) == [tokenizer.bos] * tokenizer.adds_bos + tokenizer.encode(text, False)
    assert tokenizer.begin(text).count(tokenizer.bos or 0) == tokenizer.adds_bos == (get is llama2)


@both
def test_lone_surrogates_are_refused(get: Callable[[], Tokenizer]) -> None:
    with pytest.raises(LlamaError):
        get().encode("a\ud800b", False)


class Parrot(Session):
    """A session whose model produces given tokens."""

    def __init__(self, tokenizer: Tokenizer, says: Sequence[int]) -> None:
        vocab = len(tokenizer.pieces)
        config = Config(vocab, 2, 1, 1, 1, 2, 2, 512, 1e-5, 1e4, None, True)
        super().__init__(Model(config, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes(config)), tokenizer))
        self.says = iter(says)

    def read_new(self, tokens: list[int]) -> tuple[jax.Array, int]:
        return jnp.array(np.arange(self.model.config.vocab) == next(self.says), jnp.float32), 1


@both
@pytest.mark.parametrize("prompt", ["", "Say after me:"], ids=["empty prompt", "prompt"])
@given(text=TEXTS, length=st.integers(0, 30), data=st.data())
@settings(quick, max_examples=60)
def test_stream_matches_decode(
    get: Callable[[], Tokenizer], prompt: str, text: str, length: int, data: st.DataObject
) -> None:
    """The streamed parts make up the decoded text, for the tokens of a truncated text followed by arbitrary ones."""
    tokenizer = get()
    others = data.draw(st.lists(st.integers(0, len(tokenizer.pieces) - 1), max_size=20))
    spelt = text if alphabet(get).issuperset(text.encode()) else ""
    said = [token for token in [*tokenizer.encode(spelt, False)[:length], *others] if token not in tokenizer.stops]
    session, before, greedy = Parrot(tokenizer, said), tokenizer.begin(prompt), Sampling(temperature=0.0)
    generation = generate(session.model, before, max_new=len(said), sampling=greedy, session=session)
    parts = list(generation)
    assert generation.tokens == said and all(parts)
    assert tokenizer.decode(before) + "".join(parts) == tokenizer.decode([*before, *said])
