"""Texts drawn at random that tokenizers tend to get wrong, the same every time."""

import random
from functools import cache

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
