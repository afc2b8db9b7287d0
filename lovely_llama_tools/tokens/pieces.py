"""SentencePiece: its model files, llama2.c's tokenizer.bin, and the vocabulary that both hold."""

import math
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lovely_llama import LlamaError, check

from ..extras import counted
from .base import Tokenizer, check_text, contained, prefix_of, segments, with_ends

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # as SentencePiece and GGUF number kinds of pieces
BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}


class Piece(NamedTuple):
    """An entry of a vocabulary."""

    text: str  # with ▁ for a space
    score: float
    kind: int


class Vocabulary(NamedTuple):
    """A SentencePiece model: its pieces, and all else as it is serialised."""

    pieces: Sequence[Piece]
    settings: bytes


def sentencepiece_tokenizer(proto: bytes, file: object, once: bool = False) -> Tokenizer:
    """A tokenizer from a serialised SentencePiece model, as Llama 1 and 2 have it. `once`: see `SentencePiece`."""
    vocabulary = read_proto(proto, file)
    kinds = {piece.kind for piece in vocabulary.pieces}
    check("pieces", len(vocabulary.pieces), UNKNOWN in kinds, "at least one, and one for what is unknown", file)
    scores = [piece.score for piece in vocabulary.pieces if not math.isfinite(piece.score)]
    check("scores", scores[:1], not scores, "finite numbers", file)
    check("types", kinds, kinds <= {*range(NORMAL, BYTE + 1)}, "1 to 6", file)
    text, times = Counter(piece.text for piece in vocabulary.pieces).most_common(1)[0]
    check("pieces", f"{times} times {text!r}", times == 1, "each once", file)
    with contained(file, "contents", "other data", "a SentencePiece model"):
        encode = SentencePiece(proto, once)
        unknown: str = encode.library.decode([encode.library.unk_id()])

    pieces = [
        unknown.encode() if kind == UNKNOWN
        else b"" if kind in (CONTROL, UNUSED)
        else bytes([BYTES[text]]) if kind == BYTE
        else text.replace("▁", " ").encode()
        for text, _, kind in vocabulary.pieces
    ]  # fmt: skip
    bos, eos = (i if i >= 0 else None for i in (encode.library.bos_id(), encode.library.eos_id()))
    prefix = prefix_of(encode, pieces)
    settings = {"unk_token": next(piece.text for piece in vocabulary.pieces if piece.kind == UNKNOWN)}
    tokenizer = Tokenizer(encode, pieces, encode.specials, frozenset(), None, False, prefix, None, settings=settings)
    return with_ends(tokenizer, bos, eos, bos is not None, file)


class SentencePiece:
    """Encodes with a SentencePiece model, which it pickles as.

    User-defined pieces are found before a text is split. Each part between these and special tokens is a text of its
    own, with a prefix where the model has one: so Meta's code and llama.cpp encode the turns of a conversation. With
    `once` the first part alone has it, as in transformers without `legacy`.
    """

    def __init__(self, proto: bytes, once: bool = False) -> None:
        from sentencepiece import SentencePieceProcessor

        self.proto, self.once, self.library = proto, once, SentencePieceProcessor(model_proto=proto)
        vocabulary = read_proto(proto, "proto")
        by_kind = {kind: {p.text: i for i, p in enumerate(vocabulary.pieces) if p.kind == kind} for kind in range(7)}
        self.specials = by_kind[CONTROL] | by_kind[UNKNOWN]
        self.words = {name.replace("▁", " "): i for name, i in by_kind[USER_DEFINED].items()}
        later = write_proto(without_prefix(vocabulary)) if once else proto
        self.later = SentencePieceProcessor(model_proto=later) if once else self.library

    def __call__(self, text: str, special: bool = False) -> list[int]:
        check_text("text", text)
        tokens, library = list[int](), self.library
        for part, token in segments(text, self.words | (self.specials if special else {})):
            tokens += library.encode(part)
            tokens += [] if token is None else [token]
            library = self.later
        return tokens

    def __reduce__(self) -> tuple[Any, ...]:
        return SentencePiece, (self.proto, self.once)


# ---- Its serialisation -----------------------------------------------------------------------------------------------


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of up to 64 bits, seven in a byte, and where it ends."""
    value = shift = 0
    while shift < 64:
        value, shift, at = value | (data[at] & 127) << shift, shift + 7, at + 1
        if data[at - 1] < 128:
            return value, at
    raise ValueError("a number of more than 64 bits")


def varint(n: int) -> bytes:
    """A number of up to 64 bits, seven in a byte, the last of which is below 128."""
    n, out = n & 2**64 - 1, bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])


def proto_fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The (number, value) of each field of a protocol buffer. protobuf.dev/programming-guides/encoding."""
    at = 0
    while at < len(data):
        tag, at = (data[at], at + 1) if data[at] < 128 else read_varint(data, at)
        if tag & 7 == 0:
            value, at = read_varint(data, at)
            yield tag >> 3, value
            continue
        size = {1: 8, 5: 4}.get(tag & 7, -1)
        if tag & 7 == 2:
            size, at = (data[at], at + 1) if data[at] < 128 else read_varint(data, at)
        if not 0 <= size <= len(data) - at:
            raise ValueError("a field of unknown size, or one that is cut short")
        at += size
        yield tag >> 3, data[at - size : at]


def proto_field(number: int, value: int | bool | bytes | str) -> bytes:
    """One field: a number, or bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(int(value))
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def read_proto(data: bytes, file: object) -> Vocabulary:
    """A serialised SentencePiece model. github.com/google/sentencepiece, src/sentencepiece_model.proto."""
    pieces, settings = list[Piece](), b""
    try:
        for number, value in proto_fields(data):
            if number == 1:
                parts: dict[int, Any] = {1: b"", 2: bytes(4), 3: NORMAL, **dict(proto_fields(value))}
                (score,) = struct.unpack("<f", parts[2])
                pieces.append(Piece(parts[1].decode(), score, int(parts[3])))
            else:
                settings += proto_field(number, value)
    except (ValueError, IndexError, TypeError, AttributeError, struct.error) as error:
        raise LlamaError(file, "contents", "other data", "a SentencePiece model") from error
    return Vocabulary(pieces, settings)


def write_proto(vocabulary: Vocabulary) -> bytes:
    """A serialised SentencePiece model."""
    out = list[bytes]()
    for text, score, kind in vocabulary.pieces:
        data = text.encode()
        size = bytes([len(data)]) if len(data) < 128 else varint(len(data))
        entry = b"\x0a" + size + data + struct.pack("<Bf", 0x15, score) + bytes([0x18, kind])
        out += [b"\x0a", bytes([len(entry)]) if len(entry) < 128 else varint(len(entry)), entry]
    return b"".join(out) + vocabulary.settings


def new_settings(pieces: Sequence[Piece], bos: int | None, eos: int | None, prefix: bool) -> bytes:
    """The settings of Llama 2's model: BPE, and texts taken as they are but for a space put before them."""
    kinds = Counter(piece.kind for piece in pieces)
    unknown = next((i for i, piece in enumerate(pieces) if piece.kind == UNKNOWN), 0)
    spec = proto_field(3, 2) + proto_field(4, len(pieces)) + proto_field(35, kinds[BYTE] == 256)
    for number, i in ((40, unknown), (41, bos), (42, eos), (43, None)):
        spec += proto_field(number, -1 if i is None else i)
        spec += proto_field(number + 5, "<none>" if i is None else pieces[i].text)
    normalizer = proto_field(1, "identity") + proto_field(3, prefix) + proto_field(4, False) + proto_field(5, True)
    return proto_field(2, spec) + proto_field(3, normalizer)


def setting(vocabulary: Vocabulary, spec: int, number: int, default: Any) -> Any:
    """A field of the trainer's settings (2) or the normaliser's (3)."""
    inside = dict(proto_fields(vocabulary.settings)).get(spec, b"")
    return dict(proto_fields(inside)).get(number, default)


def without_prefix(vocabulary: Vocabulary) -> Vocabulary:
    """The same, but that no space is put before a text."""
    fields = [*proto_fields(vocabulary.settings)]
    fields += [] if any(number == 3 for number, _ in fields) else [(3, b"")]
    spec = proto_field(3, False)  # of two values the last counts
    settings = [proto_field(number, value + spec if number == 3 else value) for number, value in fields]
    return vocabulary._replace(settings=b"".join(settings))


def built_tokenizer(
    pieces: Sequence[Piece], bos: int | None, eos: int | None, prefix: bool, file: object
) -> Tokenizer:  # fmt: skip
    """A tokenizer from a vocabulary that another format holds."""
    proto = write_proto(Vocabulary(pieces, new_settings(pieces, bos, eos, prefix)))
    tokenizer = sentencepiece_tokenizer(proto, file)
    return with_ends(tokenizer, bos, eos, bos is not None, file)


# ---- llama2.c's tokenizer.bin ----------------------------------------------------------------------------------------

FIXED = ("<unk>", "\n<s>\n", "\n</s>\n")  # the first three pieces there


def bin_tokenizer(data: bytes, file: object, vocab: int | None = None) -> Tokenizer:
    """A tokenizer from llama2.c's tokenizer.bin, which holds exactly as many pieces as the model has.

    github.com/karpathy/llama2.c, tokenizer.py, export: the longest length, then (score, length, bytes) of each piece.
    """
    check("size", counted(len(data), "byte"), len(data) >= 4, "at least 4", file)
    (longest,), at, pieces = struct.unpack_from("<i", data), 4, list[Piece]()
    while at < len(data):
        where = f"pieces[{len(pieces)}]"
        check(where, counted(len(data) - at, "byte"), len(data) - at >= 8, "a score and a length, 8 bytes", file)
        score, length = struct.unpack_from("<fi", data, at)
        fits = 0 < length <= longest and length <= len(data) - at - 8
        check(where, f"a length of {length}", fits, f"1 to {longest}, and within the file", file)
        try:
            text = data[at + 8 : at + 8 + length].decode()
        except UnicodeDecodeError as error:
            raise LlamaError(file, where, "other bytes", "UTF-8") from error
        at, i = at + 8 + length, len(pieces)
        kind = (UNKNOWN, CONTROL, CONTROL)[i] if i < 3 else BYTE if text in BYTES and i < 259 else NORMAL
        pieces.append(Piece(text.strip("\n") if i < 3 else text.replace(" ", "▁"), score, kind))
    check("pieces", len(pieces), len(pieces) >= 3, "at least 3", file)
    check("pieces", len(pieces), vocab in (None, len(pieces)), f"{vocab}, the model's vocabulary", file)
    return built_tokenizer(pieces, 1, 2, True, file)


def write_bin(vocabulary: Vocabulary, file: object) -> bytes:
    """llama2.c's tokenizer.bin. run.c fixes the first three pieces, puts a space before a text, and changes no text."""
    first = [piece.kind for piece in vocabulary.pieces[:3]]
    starts = first == [UNKNOWN, CONTROL, CONTROL]
    check("tokenizer", f"first pieces of kinds {first}", starts, "one for what is unknown, BOS and EOS", file)
    prefix = bool(setting(vocabulary, 3, 3, True))
    check("tokenizer", "no space before a text", prefix, "a space, as run.c puts one there", file)
    texts = [*FIXED, *(piece.text.replace("▁", " ") for piece in vocabulary.pieces[3:])]
    entries = [(piece.score, text.encode()) for piece, text in zip(vocabulary.pieces, texts, strict=True)]
    out = struct.pack("<I", max(len(text) for _, text in entries))
    return out + b"".join(struct.pack("<fI", score, len(text)) + text for score, text in entries)
