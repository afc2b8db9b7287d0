"""New tokenizers, learned from a corpus: byte-level BPE, SentencePiece BPE with byte fallback, and characters."""

import io
import re
from collections.abc import Iterable, Iterator

from lovely_llama import check

from ..extras import extra
from .base import Tokenizer, check_text, contained, with_ends
from .characters import characters_tokenizer
from .pieces import sentencepiece_tokenizer
from .pipelines import byte_letters, json_tokenizer

SPECIALS = ("[UNK]", "[PAD]", "[BOS]", "[EOS]")
WORD = 2**16  # the longest run of characters of one kind: a trainer holds each run many times over
LINE = 4192  # bytes of a line that SentencePiece does not skip


def words(corpus: Iterable[str]) -> Iterator[str]:
    """The texts of a corpus. One with an overlong run of letters, digits, spaces or signs is refused."""
    for text in corpus:
        longest = max(map(len, re.findall(r"[^\W\d_]+|\d+|\s+|[^\w\s]+|_+", text)), default=0)
        expected = f"at most {WORD} in a word, or a token for each character"
        check("text", f"{longest} characters without a boundary", longest <= WORD, expected, "corpus")
        yield text


def lines(corpus: Iterable[str]) -> Iterator[str]:
    """The lines of a corpus. One that SentencePiece would skip is cut, between words where it can be."""
    for line in (line for text in words(corpus) for line in text.splitlines() if line.strip()):
        short = len(line.encode(errors="replace")) <= LINE
        yield from [line] if short else re.findall(rf".{{1,{LINE // 4}}}(?=\s|$)|.{{1,{LINE // 4}}}", line)


def train_bpe(corpus: Iterable[str], vocab: int) -> Tokenizer:
    """Byte-level BPE with GPT-2's split, all 256 bytes, and [UNK], [PAD], [BOS] and [EOS] as its first tokens."""
    least = 256 + len(SPECIALS)
    check("vocab", vocab, least <= vocab < 2**24, f"at least {least}, for bytes and special tokens")
    lib = extra("tokenizers", "chat")
    bpe = lib.Tokenizer(lib.models.BPE(unk_token=SPECIALS[0]))
    bpe.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = lib.decoders.ByteLevel()
    bos = SPECIALS[2]
    bpe.post_processor = lib.processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 2)])
    trainer = lib.trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[*SPECIALS], initial_alphabet=[*byte_letters()], show_progress=False
    )
    with contained("corpus", "text", "texts that cannot be trained on", "other texts, or another vocabulary"):
        bpe.train_from_iterator(words(corpus), trainer)
    tokenizer = json_tokenizer(bpe.to_str().encode(), "corpus")
    check("vocab", vocab, len(tokenizer.pieces) == vocab, f"at most {len(tokenizer.pieces)}, as the corpus is small")
    return with_ends(tokenizer, 2, 3, True, "corpus")


def train_sentencepiece(corpus: Iterable[str], vocab: int) -> Tokenizer:
    """SentencePiece BPE with byte fallback, as llama2.c's tinystories.py trains its own, a line at a time.

    But spaces are kept as they are, so that decoding gives the text back, and llama2.c's run.c the same ids.
    """
    from sentencepiece import SentencePieceTrainer

    least = 256 + 3
    check("vocab", vocab, least < vocab < 2**24, f"more than {least}, for bytes and special tokens")
    out = io.BytesIO()
    with contained("arguments", "vocab", f"{vocab}", "room for the characters of the corpus, and none left over"):
        SentencePieceTrainer.train(
            sentence_iterator=lines(corpus),
            max_sentence_length=LINE,
            model_writer=out,
            model_type="bpe",
            vocab_size=vocab,
            self_test_sample_size=0,
            character_coverage=1.0,
            num_threads=1,  # the same pieces every time
            split_digits=True,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            unk_surface=" \u2047 ",
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    return sentencepiece_tokenizer(out.getvalue(), "corpus")


def train_characters(corpus: Iterable[str], vocab: int | None = None) -> Tokenizer:
    """A token for each character that occurs, in the order of Unicode."""
    found = set[str]()
    for text in corpus:
        check_text("corpus", text)
        found |= {*text}
    check("vocab", vocab, vocab in (None, len(found)), f"{len(found)}, the characters of the corpus")
    return characters_tokenizer("".join(sorted(found)), "corpus")
