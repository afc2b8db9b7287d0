"""Ranks, tiktoken's vocabularies: each token has a rank, and the pair of lowest rank is joined first."""

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

from lovely_llama import LlamaError, check

from ..extras import counted, extra
from .base import Tokenizer, contained, with_ends
from .pipelines import byte_letters, byte_level, pipeline_tokenizer

# Llama 3.1's special tokens, which follow the ranks; the others of its 256 are reserved. github.com/meta-llama/
# llama-models, models/llama3/tokenizer.py, with the names that Hugging Face gives them.
RESERVED = "<|reserved_special_token_{}|>"
LLAMA3_SPECIALS = [
    "<|begin_of_text|>", "<|end_of_text|>", RESERVED.format(0), RESERVED.format(1), "<|finetune_right_pad_id|>",
    RESERVED.format(2), "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
    *(RESERVED.format(n) for n in range(3, 248)),
]  # fmt: skip


def is_ranks(data: bytes) -> bool:
    """Whether a file begins as a list of ranks does."""
    token, _, rank = data[:200].split(b"\n")[0].partition(b" ")
    return bool(token) and rank.strip().isdigit()


def rank_tokenizer(data: bytes, file: object, specials: Sequence[str] = LLAMA3_SPECIALS) -> Tokenizer:
    """A tokenizer from Llama 3's tokenizer.model: a line for each token, its bytes in base64 and its rank."""
    ranks, lines = dict[bytes, int](), data.splitlines()
    try:
        for line in lines:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error) as error:
        raise LlamaError(file, f"line {len(ranks) + 1}", "other data", "bytes in base64, and a rank") from error
    check("ranks", f"{len(ranks)} different tokens", len(ranks) == len(lines), f"{len(lines)}, one a line", file)
    named = {name: len(ranks) + i for i, name in enumerate(specials)}
    described = describe_ranks(ranks, "llama-bpe", named, file)
    tokenizer = pipeline_tokenizer(described, file)
    bos, eos = (tokenizer.specials.get(f"<|{name}_of_text|>") for name in ("begin", "end"))
    return with_ends(tokenizer, bos, eos, bos is not None, file)


def describe_ranks(
    ranks: Mapping[bytes, int], pre: str, specials: Mapping[str, int], file: object
) -> dict[str, Any]:  # fmt: skip
    """The tokenizer.json of ranks: every way of joining two tokens into a third is a merge, in the third's order."""
    whole = sorted(ranks.values()) == [*range(len(ranks))]
    check("ranks", counted(len(ranks), "rank"), whole, "each from 0 on once", file)
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    check("ranks", f"no token for the bytes {missing[:3]}", not missing, "one for each byte", file)
    letters = {byte: letter for letter, byte in byte_letters().items()}
    tokens = sorted(ranks, key=ranks.__getitem__)
    names = [token.decode("latin-1").translate(letters) for token in tokens]
    merges = list[str]()
    for token, name in zip(tokens, names, strict=True):
        cuts = [i for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        cuts.sort(key=lambda i: (ranks[token[:i]], ranks[token[i:]]))
        merges += [f"{name[:i]} {name[i:]}" for i in cuts]
    return byte_level(names, merges, pre, specials)


def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's vocabulary by tiktoken, which keeps it in a cache, or fetches it."""
    file = "tiktoken's gpt2"
    library = extra("tiktoken", "tiktoken")
    with contained(file, "vocabulary", "none in its cache, and no connection", "one"):
        encoding = library.get_encoding("gpt2")
    described = describe_ranks(encoding._mergeable_ranks, "gpt-2", dict(encoding._special_tokens), file)
    tokenizer = pipeline_tokenizer(described, file)
    end = tokenizer.specials.get("<|endoftext|>")
    return with_ends(tokenizer, end, end, False, file)
