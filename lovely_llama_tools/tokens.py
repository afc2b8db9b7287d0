"""Tokenizers: text to ids and back, by whichever library."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from lovely_llama import LlamaError, check

from .extras import extra


def check_text(field: str, text: str) -> None:
    """Refuse lone surrogates, which is how Python decodes command-line arguments that are not UTF-8."""
    check(field, "bytes that are not UTF-8", not re.search("[\ud800-\udfff]", text), "text")


def template_environment() -> Any:
    """Where chat templates are rendered: jinja2's sandbox with loop controls, as in transformers."""
    jinja2 = extra("jinja2.sandbox", "chat")
    extensions = ["jinja2.ext.loopcontrols"]
    return jinja2.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)


class Tokenizer(NamedTuple):
    """Text to ids and back."""

    encode: Callable[[str, bool], list[int]]  # (text, whether the names of special tokens in it mean those tokens)
    pieces: Sequence[bytes]  # what each id adds to a text; nothing for a control token
    specials: Mapping[str, int]
    stops: frozenset[int]
    bos: int | None
    adds_bos: bool
    prefix: bytes  # put before every text by the library, and removed again in decoding
    template: str | None  # the chat template, in jinja2
    eos: int | None = None

    def __repr__(self) -> str:
        template = "with" if self.template else "without"
        return f"Tokenizer({len(self.pieces):,} pieces, {len(self.specials)} special, {template} a chat template)"

    def begin(self, text: str) -> list[int]:
        """The tokens of a plain prompt. BOS comes first where the model expects it, or where the text is empty."""
        bos = [self.bos] if self.bos is not None and (self.adds_bos or not text) else []
        return bos + self.encode(text, False)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; invalid UTF-8 becomes U+FFFD."""
        return b"".join(self.pieces[token] for token in tokens).removeprefix(self.prefix).decode("utf-8", "replace")


def sentencepiece_tokenizer(proto: bytes, file: object) -> Tokenizer:
    """A tokenizer from a serialised SentencePiece model, as Llama 1 and 2 have it."""
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_proto=proto)
    except RuntimeError as error:
        raise LlamaError(file, "contents", "other data", "a SentencePiece model") from error

    def piece(i: int) -> bytes:
        if model.is_control(i):
            return b""
        if model.is_unknown(i):
            return model.decode([i]).encode()
        text: str = model.id_to_piece(i)
        return bytes([int(text[3:5], 16)]) if model.is_byte(i) else text.replace("▁", " ").encode()

    pieces = [piece(i) for i in range(model.get_piece_size())]
    check("pieces", len(pieces), len(pieces) > 0, "at least one", file)
    bos, eos = model.bos_id(), model.eos_id()
    specials = {model.id_to_piece(i): i for i in (bos, eos) if i >= 0}
    stops, begin = frozenset({eos} - {-1}), bos if bos >= 0 else None

    def encode(text: str, special: bool) -> list[int]:
        check_text("text", text)
        return model.encode(text)

    # Whether a space is put before every text, the library tells by doing it.
    (first, *_) = model.encode("a", out_type=str)
    prefix = b" " if first.startswith("▁") else b""
    return Tokenizer(encode, pieces, specials, stops, begin, True, prefix, None, eos if eos >= 0 else None)


def byte_letters() -> dict[str, int]:
    """GPT-2's letter for each byte: the character itself where it is visible, else the next unused from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


def byte_level_bpe(
    names: Sequence[str], merges: Sequence[str], specials: Mapping[str, int], controls: Collection[int],
    must: Callable[[str, object, bool, object], None],
) -> Tokenizer:  # fmt: skip
    """A tokenizer from the names of its tokens and its merges, each two names with a space between them.

    Byte pair encoding, Sennrich et al. 2016, arXiv:1508.07909, over UTF-8 bytes, Radford et al. 2019, §2.2, after
    every digit is split off and then GPT-2's pattern. Names in `specials` are taken literally, `controls` add nothing
    to a text, and `must(field, got, ok, expected)` refuses tables that fit no such tokenizer.
    """
    lib, byte_of = extra("tokenizers", "chat"), byte_letters()
    ids = {name: i for i, name in enumerate(names)}
    must("tokens", f"{len(ids)} different names", len(ids) == len(names), len(names))
    pairs = [tuple(merge.split(" ")) for merge in merges]
    wrong = [pair for pair in pairs if len(pair) != 2 or not {*pair, "".join(pair)} <= ids.keys()]
    must("merges", wrong[:1], not wrong, "pairs of tokens that make a token")
    foreign = [name for name in names if name not in specials and not {*name} <= byte_of.keys()]
    must("tokens", foreign[:1], not foreign, "letters that stand for bytes")

    def piece(name: str, i: int) -> bytes:
        if i in controls:
            return b""
        return name.encode() if name in specials else bytes(map(byte_of.__getitem__, name))

    bpe = lib.Tokenizer(lib.models.BPE(ids, pairs))
    digits = lib.pre_tokenizers.Digits(individual_digits=True)
    bpe.pre_tokenizer = lib.pre_tokenizers.Sequence([digits, lib.pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.add_special_tokens(list(specials))
    known = {byte_of[name] for name in names if name in byte_of}

    def encode(text: str, special: bool) -> list[int]:
        check_text("text", text)
        unknown = sorted({*text.encode()} - known)
        check("text", f"bytes {unknown}", not unknown, "bytes that are in the vocabulary")
        bpe.encode_special_tokens = not special
        return bpe.encode(text).ids

    pieces = [piece(name, i) for i, name in enumerate(names)]
    return Tokenizer(encode, pieces, specials, frozenset(), None, False, b"", None)
