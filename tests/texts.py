"""Texts that tokenizers tend to get wrong, drawn at random, the same every time; and conversations."""

import random
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lovely_llama_tools.tokens import Tokenizer
from lovely_llama_tools.tokens.pipelines import added_token, pipeline_tokenizer
from lovely_llama_tools.tokens.training import train_bpe

ROOT = Path(__file__).resolve().parents[1]

FRAGMENTS = (
    "a", "the", " the", "The", "sky", " blue", "s", "'s", "'LL", "don't", " ", "  ", "   ", "\n", "\n\n\n", "\r\n",
    "\t", "\u00a0", "\u3000", "\u200b", "\ufeff", "\u2028", "0", "12", "1234567", "½", "٣", "é", "e\u0301", "日本語",
    "Привет", "ไทย", "한국어", "हिन्दी", "😀", "👩\u200d👩\u200d👧", "🇫🇷", "<s>", "</s>", "<unk>", "<|im_end|>",
    "<0x0A>", "<|endoftext|>", "_", "__init__", "!?...", "==", "=>", "$x^2|y~", "\x00", "\x7f", "\ufffd", "\ufb01",
    "\u0130", "ß",
)  # fmt: skip


def character(rng: random.Random) -> str:
    """Any character of Unicode, from the first planes more often."""
    code = rng.choice((rng.randrange(0x80), rng.randrange(0x800), rng.randrange(0x10000), rng.randrange(0x110000)))
    return chr(code) if not 0xD800 <= code < 0xE000 else " "


@cache
def drawn(n: int = 2000, seed: int = 0) -> tuple[str, ...]:
    """`n` different texts of up to 12 fragments or characters each, the first of them empty."""
    rng = random.Random(seed)

    def part() -> str:
        return rng.choice(FRAGMENTS) if rng.random() < 0.7 else character(rng)

    texts = {"": None}
    while len(texts) < n:
        texts["".join(part() for _ in range(rng.randint(1, 12)))] = None
    return tuple(texts)


def corpus() -> list[str]:
    """Prose, code, and some of everything else."""
    return [(ROOT / "README.md").read_text(), (ROOT / "lovely_llama.py").read_text(), *drawn(400, seed=1)]


Ids = Callable[[str], Sequence[int]]


def differing(tokenizer: Tokenizer, ids: Ids, texts: Sequence[str] = drawn()) -> list[str]:
    assert len({*texts}) >= 2000
    return [text for text in texts if tokenizer.encode(text, False) != list(ids(text))]


NAMES = (
    "<s>", "</s>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|user|>",
    "<|im_start|>", "<|im_end|>",
)  # fmt: skip
MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "  Why is the\nsky “blue”? <b> & 'so'"},
    {"role": "assistant", "content": "é 日本 "},
    {"role": "user", "content": "\t😀"},
]


@cache
def tokenizer_with(bos: str, eos: str) -> Tokenizer:
    """A tokenizer that has all these special tokens."""
    encode: Any = train_bpe(corpus(), 600).encode
    description = encode.description()
    description["added_tokens"] += [added_token(name, 600 + i, True) for i, name in enumerate(NAMES)]
    description["post_processor"] = None
    tokenizer = pipeline_tokenizer(description, "file")
    return tokenizer._replace(bos=tokenizer.specials[bos], eos=tokenizer.specials[eos])
