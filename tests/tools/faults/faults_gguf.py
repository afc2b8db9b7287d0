"""Cases C: GGUF files."""

import math
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from asserts import assert_close
from builders import TINY, TOKENS, File, Tensor, layers_of, text, tiny_arrays, tiny_fields, tiny_file, write_gguf
from faults import Accepted, Case, Unlike, Variant, World, refused

from lovely_llama import RopeScaling
from lovely_llama_tools.formats.files import load

# ---- Changes to a valid file -----------------------------------------------------------------------------------------

Change = Callable[[File], File]
EMBED, DOWN, KV_HEADS = "token_embd.weight", "blk.1.ffn_down.weight", "llama.attention.head_count_kv"


def field(name: str | bytes, value: Any) -> Change:
    """Change a field, or add one."""
    return lambda f: f._replace(fields=(*(pair for pair in f.fields if pair[0] != name), (name, value)))


def no_field(name: str) -> Change:
    return lambda f: f._replace(fields=tuple(pair for pair in f.fields if pair[0] != name))


def part(**parts: Any) -> Change:
    return lambda f: f._replace(**parts)


def tensor(which: str, **parts: Any) -> Change:
    return lambda f: f._replace(tensors=tuple(t._replace(**parts) if t.name == which else t for t in f.tensors))


def shifted(by: int) -> Change:
    """Move all tensors by this many bytes, in the header and in the data."""
    return lambda f: f._replace(
        tensors=tuple(t._replace(offset=t.offset + by) for t in f.tensors), data=bytes(by) + f.data
    )


def number(array: str, value: float) -> Change:
    """Change the first number of a tensor."""

    def change(f: File) -> File:
        at = next(t.offset for t in f.tensors if t.name == array)
        return f._replace(data=f.data[:at] + struct.pack("<f", value) + f.data[at + 4 :])

    return change


def item(name: str, i: int, value: Any) -> Change:
    """Change an item of an array."""

    def change(f: File) -> File:
        items = list(dict(f.fields)[name])
        items[i] = value
        return field(name, items)(f)

    return change


def array_header(kind: int, count: int) -> bytes:
    return struct.pack("<IIQ", 9, kind, count)


def patched(array: str, kind: int, bits: bytes, at: int = 0) -> Change:
    """Store a tensor as zeros of another type, but for these bytes."""

    def change(f: File) -> File:
        raw = bytearray(100_000)
        raw[at : at + len(bits)] = bits
        data = f.data + bytes(-len(f.data) % 32)
        return tensor(array, kind=kind, offset=len(data))(f._replace(data=data + bytes(raw)))

    return change


def cut(at: Callable[[File], int]) -> Callable[[World], Path]:
    """Truncate the file."""

    def make(world: World) -> Path:
        path, file = world.folder / "a.gguf", tiny_file()
        path.write_bytes(file.pack()[: at(file)])
        return path

    return make


def header(file: File) -> int:
    return len(file.pack()) - len(file.data)


def changed(change: Change) -> Callable[[World], Path]:
    def make(world: World) -> Path:
        path = world.folder / "a.gguf"
        path.write_bytes(change(tiny_file()).pack())
        return path

    return make


def bad(
    make: Change | Callable[[World], Path], name: str, says: str = "", removed: Mapping[str, str] | None = None,
    end: type[BaseException] = Accepted, made: bool = False,
) -> Variant:  # fmt: skip
    """A changed file is refused for this field."""
    make_path: Any = make if made else changed(make)  # pyright: ignore[reportArgumentType]
    return refused(lambda world: load(make_path(world)), name, says, removed=removed, end=end)


# ---- Split files -----------------------------------------------------------------------------------------------------


def split_files(n: int = 3) -> list[File]:
    """A file in parts, as llama.cpp splits it: the first has the fields."""
    whole, parts = tiny_file(), list[File]()
    size = -(-len(whole.tensors) // n)
    for i in range(n):
        tensors, data = list[Tensor](), b""
        for t in whole.tensors[i * size : (i + 1) * size]:
            raw = whole.data[t.offset : t.offset + 4 * math.prod(t.shape)]
            tensors.append(t._replace(offset=len(data)))
            data += raw + bytes(-len(raw) % 32)
        fields = {"split.no": i, "split.count": n, "split.tensors.count": len(whole.tensors)}
        parts.append(File((*(whole.fields if i == 0 else ()), *fields.items()), tuple(tensors), data))
    return parts


def write_split(folder: Path, parts: Sequence[File | None]) -> list[Path]:
    paths = [folder / f"tiny-{i:05}-of-{len(parts):05}.gguf" for i in range(1, len(parts) + 1)]
    for path, file in zip(paths, parts, strict=True):
        if file:
            path.write_bytes(file.pack())
    return paths


def split(
    change: Callable[[list[File]], Sequence[File | None]], name: str, given: int = 0, says: str = "",
    removed: Mapping[str, str] | None = None, end: type[BaseException] = Accepted, called: str = "",
) -> Variant:  # fmt: skip
    """Changed parts are refused for this field, whichever of them is given."""

    def act(world: World) -> None:
        path = write_split(world.folder, change(split_files()))[given]
        load(shutil.copy(path, path.with_name(called)) if called else path)

    return refused(act, name, says, removed=removed, end=end)


def one(i: int, change: Change) -> Callable[[list[File]], list[File]]:
    return lambda parts: [change(part) if i == at else part for at, part in enumerate(parts)]


def each(change: Change) -> Callable[[list[File]], list[File]]:
    return lambda parts: [change(part) for part in parts]


# ---- Rotary scaling --------------------------------------------------------------------------------------------------


def factors(values: Sequence[float], **scaling: Any) -> Callable[[World], Path]:
    """A file with these factors of frequencies, and these keys."""

    def make(world: World) -> Path:
        fields = tiny_fields() | {f"llama.rope.scaling.{name}": value for name, value in scaling.items()}
        arrays = tiny_arrays() | {"rope_freqs.weight": np.array(values, np.float32)}
        return write_gguf(world.folder / "a.gguf", fields, arrays)

    return make


# ---- Twins -----------------------------------------------------------------------------------------------------------


def loads(*changes: Change) -> Callable[[World], None]:
    """These files load with the right numbers."""

    def twin(world: World) -> None:
        want = tiny_arrays()
        for change in (part(), *changes):
            model = load(changed(change)(world))
            assert model.config == TINY
            assert_close([model.params.embed, model.params.norm], [want[EMBED], want["output_norm.weight"]], 0)
            down = layers_of(model.params)[1].ffn.down
            assert_close(down, want[DOWN], 0)

    return twin


def parts_load(world: World) -> None:
    """By any of the parts; and a block of zeros is valid."""
    for path in write_split(world.folder, split_files()):
        model = load(path)
        assert model.config == TINY
        assert_close(layers_of(model.params)[1].ffn.down, tiny_arrays()[DOWN], 0)
    assert not np.asarray(load(changed(patched("output_norm.weight", 8, b""))(world)).params.norm).any()


def scalings_load(world: World) -> None:
    loads(field("llama.attention.key_length", 8), field("llama.rope.scaling.type", "none"))(world)
    assert load(factors([1, 1, 1, 1])(world)).config.rope_scaling is None
    assert load(factors([8, 8, 8, 8])(world)).config.rope_scaling == RopeScaling("linear", 8.0)
    linear = load(factors([1, 1, 1, 1], type="linear", factor=2.0)(world))
    assert linear.config.rope_scaling == RopeScaling("linear", 2.0)


# ---- The cases -------------------------------------------------------------------------------------------------------

HEADER = "lovely_llama_tools.formats.gguf_header"
READ_ON = {f"{HEADER}:Scan.beyond": "lambda self, n: self.file.read(n)"}
ANY_BYTES = {
    f"{HEADER}:Scan.strings": "lambda self, n: [self.take(int.from_bytes(self.take(8), 'little')).decode() "
    "for _ in range(n)]"
}
OPENED = {".formats.model:open_file": "lambda path, *_: open(path, 'rb')"}
UNPARSED = {".tokens:check_template": "lambda *_: None"}
LENGTHS = (2**30, 2**40, 2**63, 2**64 - 1)
WORD, EPS, HEADS = "tokenizer.ggml.", "llama.attention.layer_norm_rms_epsilon", "llama.attention.head_count"
KINDS = ("tokens", "token_type", "merges")
OPTIONAL = (
    KV_HEADS, "llama.rope.freq_base", "llama.rope.dimension_count", f"{WORD}bos_token_id", f"{WORD}eos_token_id",
    f"{WORD}add_bos_token", f"{WORD}pre", f"{WORD}token_type", "tokenizer.chat_template",
)  # fmt: skip

MISSING: dict[str, type[BaseException]] = {
    "general.architecture": Accepted, f"{WORD}model": Accepted,
    **dict.fromkeys(("llama.embedding_length", HEADS, *(f"{WORD}{name}" for name in KINDS)), TypeError),
}  # fmt: skip
CUTS: dict[str, Callable[[File], int]] = {
    "front of the version": lambda f: 4, "the version": lambda f: 7, "the counts": lambda f: 20,
    "the tokens": lambda f: header(f) // 2, "the tensors' places": lambda f: header(f) - 99,
}  # fmt: skip
OTHER_TYPES: dict[type, type[BaseException]] = {float: Unlike, str: TypeError, bool: Unlike, list: TypeError}

CASES: dict[str, Case] = {
    "C1": Case(
        "C", "not a GGUF, or one of another version",
        {
            "magic": bad(part(magic=b"GGUX"), "n_heads", end=Unlike),
            "big-endian": bad(part(magic=b"FUGG"), "contents", end=Unlike),
            **{f"version {n}": bad(part(version=n), "version") for n in (0, 1, 4, 99, 0x03000000)},
        },
        loads(part(version=2)),
    ),
    "C2": Case(
        "C", "counts and lengths beyond the file",
        {
            **{f"{n} tensors": bad(part(counts=(n, 5)), "counts", end=Unlike) for n in LENGTHS},
            **{f"{n} fields": bad(part(counts=(1, n)), "counts", end=Unlike) for n in LENGTHS},
            **{
                f"string of {n}": bad(field("x", struct.pack("<IQ", 8, n)), "size", removed=READ_ON, end=end)
                for n, end in zip(LENGTHS, (Unlike, MemoryError, OverflowError, OverflowError), strict=True)
            },
        },
        loads(field("x", 5), field("x", "text")),
    ),
    "C3": Case(
        "C", "arrays beyond the file, or of arrays",
        {
            **{
                f"array of {n} of type {k}": bad(field("x", array_header(k, n)), "x", end=Unlike)
                for n in LENGTHS for k in (0, 4, 7, 8, 12)
            },
            "more strings than the file holds": bad(
                field("x", array_header(8, 500)), "size", removed=READ_ON, end=MemoryError),
            "arrays, 5000 deep": bad(
                field("x", struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000), "x", end=KeyError),
            "array of arrays": bad(field("x", array_header(9, 1) + struct.pack("<IQ", 4, 0)), "x", end=KeyError),
            "array of 2^62 empty arrays": bad(field("x", array_header(9, 2**62)), "x", end=KeyError),
        },
        loads(field("x", ["a", "b"]), field("x", [1, 2])),
    ),
    "C4": Case(
        "C", "unknown types of fields and tensors",
        {
            **{
                f"field of type {n}": bad(field("x", struct.pack("<IQ", n, 0)), "x", end=KeyError)
                for n in (13, 99, 2**31)
            },
            # Types that nobody knows, and Q8_K, IQ2_XXS, I32 and F64.
            **{
                f"tensor of type {n}": bad(tensor(DOWN, kind=n), DOWN, f"unsupported type {n},", end=KeyError)
                for n in (4, 5, 99, 2**32 - 1, 15, 16, 26, 28)
            },
            "key not UTF-8": bad(field(b"\xff\xfe", 1), "string", removed=ANY_BYTES, end=UnicodeDecodeError),
            "value not UTF-8": bad(
                field("x", struct.pack("<I", 8) + text(b"\xff")), "string", removed=ANY_BYTES, end=UnicodeDecodeError),
        },
        loads(),
    ),
    "C5": Case(
        "S", "tensors outside the data, misaligned, or one over another",
        {
            **{
                f"offset {n}": bad(tensor(DOWN, offset=n), DOWN, end=OverflowError if n >= 2**63 else Accepted)
                for n in (2**64 - 32, 2**63, 2**40, 10**6)
            },
            **{f"all moved by {n}": bad(shifted(n), EMBED, end=Unlike) for n in (1, 4, 16)},
            "two at one offset": bad(tensor(DOWN, offset=0), "tensors"),
            "overlapping": bad(lambda f: tensor(DOWN, offset=f.tensors[3].offset - 32)(f), "tensors"),
        },
        loads(shifted(32)),
    ),
    "C6": Case(
        "C", "shapes that are impossible, or not the model's",
        {
            "no axes": bad(tensor(DOWN, shape=()), DOWN, end=IndexError),
            "five axes": bad(tensor(DOWN, shape=(24, 32, 1, 1, 1)), DOWN),
            "an empty axis": bad(tensor(DOWN, shape=(24, 0)), DOWN, end=ValueError),
            "axes swapped": bad(tensor(DOWN, shape=(32, 24)), DOWN),
            "a product beyond 64 bits": bad(tensor(DOWN, shape=(2**32, 2**32)), DOWN, end=Unlike),
            "a long vocabulary": bad(tensor(EMBED, shape=(32, 2**40)), EMBED, end=Unlike),
            "rows that are not a multiple of a block": bad(tensor(DOWN, kind=8), DOWN, end=ValueError),
            "a tensor missing": bad(lambda f: f._replace(tensors=f.tensors[:-1]), "tensors", end=KeyError),
            "no tensors": bad(part(tensors=()), EMBED, end=KeyError),
            "no embedding": bad(tensor(EMBED, name="embd.weight"), EMBED, end=KeyError),
            "an unexpected tensor": bad(
                tensor("output_norm.weight", name="blk.0.attn_q.bias"), "tensors", end=KeyError),
        },
        loads(),
    ),
    "C7": Case(
        "S", "a tensor or a key twice",
        {
            "key": bad(lambda f: f._replace(fields=(*f.fields, f.fields[3])), "llama.embedding_length"),
            "tensor": bad(lambda f: f._replace(tensors=(*f.tensors, f.tensors[2])), "blk.0.attn_q.weight"),
        },
        loads(),
    ),
    "C8": Case(
        "C", "impossible alignments",
        {
            "0": bad(field("general.alignment", 0), "general.alignment", end=ZeroDivisionError),
            **{
                f"{n!r}": bad(field("general.alignment", n), "general.alignment", end=TypeError)
                for n in (32.0, "32", [32])
            },
            **{f"{n}": bad(field("general.alignment", n), "general.alignment", end=Unlike) for n in (1, 3, 2**31)},
        },
        loads(field("general.alignment", 32)),
    ),
    "C9": Case(
        "S", "keys that are missing, unknown, or of the wrong type or value",
        {
            **{
                f"no {name}": bad(no_field(name), name, end=MISSING.get(name, Unlike))
                for name in ("general.architecture", *tiny_fields()) if name not in OPTIONAL
            },
            "another architecture": bad(field("general.architecture", "qwen2"), "general.architecture"),
            "an adapter": bad(field("general.type", "adapter"), "general.type"),
            **{
                f"{name} as {value!r}": bad(
                    field(f"llama.{name}", value), f"llama.{name}", end=OTHER_TYPES[type(value)])
                for name in ("embedding_length", "attention.head_count", "attention.head_count_kv")
                for value in (2.0, "2", True, [2, 2])
            },
            **{
                f"block_count as {value!r}": bad(
                    field("llama.block_count", value), "llama.block_count", end=Unlike)
                for value in (2.0, "2", True, [2, 2])
            },
            "eps as an integer": bad(field(EPS, 1), EPS),
            **{f"eps {x}": bad(field(EPS, x), "eps") for x in (0.0, -1.0, math.nan, math.inf)},
            **{f"theta {x}": bad(field("llama.rope.freq_base", x), "theta") for x in (0.0, -1.0, math.nan, math.inf)},
            **{f"{n} layers": bad(field("llama.block_count", n), "layers", end=Unlike) for n in (0, 2**32 - 1)},
            "1 layer": bad(field("llama.block_count", 1), "tensors"),
            "3 layers": bad(field("llama.block_count", 3), "tensors", end=KeyError),
            "more layers than tensors": bad(field("llama.block_count", 21), "llama.block_count", end=Unlike),
            "0 heads": bad(field(HEADS, 0), HEADS, end=ZeroDivisionError),
            **{f"{n} heads": bad(field(HEADS, n), HEADS, end=Unlike) for n in (5, 64)},
            **{f"{n} heads": bad(field(HEADS, n), "llama.rope.dimension_count", end=Unlike) for n in (2, 32)},
            "0 key/value heads": bad(field(KV_HEADS, 0), KV_HEADS, end=ZeroDivisionError),
            **{f"{n} key/value heads": bad(field(KV_HEADS, n), KV_HEADS, end=Unlike) for n in (3, 8)},
            **{
                f"{n} key/value heads": bad(field(KV_HEADS, n), "blk.0.attn_k.weight", end=Unlike) for n in (1, 4)
            },
            "a rotation of part of a head": bad(field("llama.rope.dimension_count", 4), "llama.rope.dimension_count"),
            "an unknown scaling": bad(
                field("llama.rope.scaling.type", "longrope"), "rope_scaling.rope_type", end=Unlike),
            "another vocabulary": bad(field("llama.vocab_size", TINY.vocab + 1), "llama.vocab_size"),
            "no context": bad(field("llama.context_length", 0), "ctx"),
            # Unknown fields could change what has to be computed: they are refused by name, not ignored.
            **{
                f"an unknown {name}": bad(field(f"llama.{name}", value), f"llama.{name}")
                for name, value in {
                    "rope.scale_linear": 4.0, "rope.scaling.attn_factor": 2.0, "rope.scaling.yarn_beta_fast": 8.0,
                    "attention.sliding_window": 16, "attention.value_length": 4, "logit_scale": 2.0, "expert_count": 8,
                }.items()
            },
            **{
                f"factors {values}": bad(factors(values), "rope_freqs.weight", end=IndexError, made=True)
                for values in ([1, 8, 1, 8], [1, 1, 1, 0.5], [0, 1, 1, 1])
            },
            "NaN as a factor": bad(factors([1, 1, 1, math.nan]), "rope_freqs.weight", made=True, end=RuntimeWarning),
            "factors beside a scaling": bad(
                factors([2, 2, 2, 2], type="linear", factor=2.0), "rope_freqs.weight", made=True),
            "a temperature below 0": bad(field("general.sampling.temp", -1.0), "temperature"),
        },
        scalings_load,
    ),
    "C10": Case(
        "S", "tokenizers whose arrays do not fit together",
        {
            "another tokenizer": bad(field(f"{WORD}model", "bert"), f"{WORD}model"),
            "another pre-tokenizer": bad(field(f"{WORD}pre", "qwen2"), f"{WORD}pre", end=KeyError),
            "too few pieces": bad(field(f"{WORD}tokens", TOKENS[:-1]), f"{WORD}tokens", end=Unlike),
            "a duplicate piece": bad(item(f"{WORD}tokens", 9, TOKENS[8]), f"{WORD}tokens", end=Unlike),
            "pieces as numbers": bad(field(f"{WORD}tokens", list(range(TINY.vocab))), f"{WORD}tokens", end=Unlike),
            "pieces as one string": bad(field(f"{WORD}tokens", "a" * TINY.vocab), f"{WORD}tokens", end=Unlike),
            "a piece of letters that stand for no bytes": bad(
                item(f"{WORD}tokens", 9, "日"), f"{WORD}tokens"),
            "too few token types": bad(field(f"{WORD}token_type", [1] * 9), f"{WORD}token_type", end=ValueError),
            "an unknown token type": bad(item(f"{WORD}token_type", 9, 77), f"{WORD}token_type"),
            "token types as strings": bad(field(f"{WORD}token_type", ["1"] * TINY.vocab), f"{WORD}token_type"),
            "merges as numbers": bad(field(f"{WORD}merges", [1, 2]), f"{WORD}merges", end=AttributeError),
            "a merge of one piece": bad(item(f"{WORD}merges", 0, "Ġt"), f"{WORD}merges", end=Unlike),
            "a merge of three pieces": bad(item(f"{WORD}merges", 0, "Ġ t h"), f"{WORD}merges", end=Unlike),
            "a merge of unknown pieces": bad(item(f"{WORD}merges", 0, "日 本"), f"{WORD}merges", end=Exception),
            "a merge into an unknown piece": bad(item(f"{WORD}merges", 0, "a b"), f"{WORD}merges", end=Exception),
            **{f"{name} as a number": bad(field(f"{WORD}{name}", 5), f"{WORD}{name}", end=TypeError) for name in KINDS},
            "bos −2": bad(field(f"{WORD}bos_token_id", struct.pack("<Ii", 5, -2)), f"{WORD}bos_token_id", end=Unlike),
            "eos −2": bad(field(f"{WORD}eos_token_id", struct.pack("<Ii", 5, -2)), f"{WORD}eos_token_id", end=Unlike),
            "bos out of range": bad(field(f"{WORD}bos_token_id", TINY.vocab), f"{WORD}bos_token_id", end=Unlike),
            "eos out of range": bad(field(f"{WORD}eos_token_id", 2**32 - 2), f"{WORD}eos_token_id", end=Unlike),
            "an end of turns out of range": bad(field(f"{WORD}eot_token_id", TINY.vocab), f"{WORD}eot_token_id"),
            "an invalid template": bad(
                field("tokenizer.chat_template", "{% for %}"), "tokenizer.chat_template", removed=UNPARSED),
            "eos as a string": bad(field(f"{WORD}eos_token_id", "2"), f"{WORD}eos_token_id", end=Unlike),
            "add_bos without a bos": bad(
                lambda f: no_field(f"{WORD}bos_token_id")(field(f"{WORD}add_bos_token", True)(f)),
                f"{WORD}bos_token_id", end=Unlike),
            "add_bos as a number": bad(field(f"{WORD}add_bos_token", 1), f"{WORD}add_bos_token"),
            "a template as a number": bad(
                field("tokenizer.chat_template", 5), "tokenizer.chat_template", end=TypeError),
        },
        loads(),
    ),
    "C11": Case(
        "S", "truncated files, missing parts of split ones, numbers that are not finite",
        {
            **{
                f"cut in {where}": bad(cut(at), "size", removed=READ_ON, end=struct.error, made=True)
                for where, at in CUTS.items()
            },
            "cut in the first fields": bad(cut(lambda f: 600), "counts", end=Unlike, made=True),
            "no data": bad(cut(header), EMBED, end=Unlike, made=True),
            "half of the data": bad(
                cut(lambda f: header(f) + len(f.data) // 2), "blk.0.attn_k.weight", end=Unlike, made=True),
            "a byte less": bad(cut(lambda f: len(f.pack()) - 1), "output_norm.weight", made=True),
            "NaN": bad(number(DOWN, math.nan), DOWN),
            "infinity": bad(number(EMBED, -math.inf), EMBED),
            **{
                f"a scale of {x} in type {kind}": bad(patched(EMBED, kind, np.float16(x).tobytes(), at), EMBED)
                for kind, at in ((2, 0), (3, 2), (6, 0), (7, 0), (8, 0)) for x in (math.nan, math.inf)
            },
            **{f"{x} in float16": bad(patched(EMBED, 1, np.float16(x).tobytes()), EMBED) for x in (math.nan, math.inf)},
            **{
                f"{x} in bfloat16": bad(patched(EMBED, 30, np.float32(x).tobytes()[2:]), EMBED)
                for x in (math.nan, -math.inf)
            },
            **{
                f"part {i + 1} missing": split(
                    lambda parts, i=i: [None if i == at else part for at, part in enumerate(parts)], "path",
                    given=(i + 1) % 3, removed=OPENED, end=FileNotFoundError, says=f"0000{i + 1}-of")
                for i in range(3)
            },
            "a part twice": split(lambda parts: [parts[0], parts[1], parts[1]], "split.no", end=Unlike),
            "parts in another order": split(lambda parts: [parts[0], parts[2], parts[1]], "split.no"),
            "the tensors of another part": split(
                lambda parts: [parts[0], parts[1], field("split.no", 2)(parts[1])], "tensors", end=Unlike),
            "another number of parts in one": split(one(1, field("split.count", 4)), "split.count", given=2),
            "another number of parts in all": split(each(field("split.count", 4)), "split.count"),
            "no number of parts": split(each(no_field("split.count")), "split.count"),
            "another number of tensors": split(each(field("split.tensors.count", 99)), "split.tensors.count"),
            "another number of tensors in one": split(one(2, field("split.tensors.count", 9)), "split.tensors.count"),
            "another value in a part": split(one(1, field("llama.context_length", 65)), "llama.context_length"),
            "part 4 of 3": split(lambda parts: parts, "path", called="tiny-00004-of-00003.gguf"),
            "part 0 of 3": split(lambda parts: parts, "path", called="tiny-00000-of-00003.gguf"),
            "a part under another name": split(lambda parts: parts, "split.count", called="tiny.gguf", end=Unlike),
            "another part under another name": split(
                lambda parts: parts, "split.no", given=1, called="tiny.gguf", end=Unlike),
        },
        parts_load,
    ),
}  # fmt: skip
