"""Cases A: llama2.c's files."""

import functools
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from asserts import assert_close, jit
from builders import LLAMA2_C, read_recording
from faults import Accepted, Case, Unlike, Variant, World, refused, unchecked
from jax import numpy as jnp

from lovely_llama import logits
from lovely_llama_tools.formats.files import checkpoint, load

FIELDS = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
MOST = 2**31 - 1
Change = Callable[[bytes], bytes]


@functools.cache
def recorded(name: str) -> bytes:
    """What upstream wrote."""
    return (LLAMA2_C / f"{name}.bin").read_bytes()


def place(world: World, data: bytes) -> Path:
    """A file with this content."""
    (world.folder / "model.bin").write_bytes(data)
    return world.folder / "model.bin"


def file(
    name: str, change: Change, field: str, says: str = "", removed: Mapping[str, str] | None = None,
    end: type[BaseException] = Accepted,
) -> Variant:  # fmt: skip
    """One of upstream's files, changed, is refused for this field."""
    return refused(lambda world: load(place(world, change(recorded(name)))), field, says, removed, end)


def files(
    names: str, changes: Mapping[str, tuple[Change, type[BaseException]]], field: str, says: str = ""
) -> dict[str, Variant]:  # fmt: skip
    """Each of these files with each of these changes is refused for the field."""
    return {
        f"{name}, {what}": file(name, change, field, says, None, end)
        for name in names.split()
        for what, (change, end) in changes.items()
    }


def cut(end: int) -> Change:
    return lambda data: data[:end]


def ends_with(more: bytes) -> Change:
    return lambda data: data + more


def put(offset: int, kind: str, value: float) -> Change:
    """Another number at this place."""
    return lambda data: data[:offset] + struct.pack(kind, value) + data[offset + struct.calcsize(kind) :]


def sizes(**values: int) -> Change:
    """Other numbers in the header."""

    def change(data: bytes) -> bytes:
        start = 8 if data.startswith(b"24ka") else 0
        for field, value in values.items():
            data = put(start + 4 * FIELDS.index(field), "<i", value)(data)
        return data

    return change


forward = jit(logits, static_argnums=2)


def logits_as_recorded(*names: str) -> Callable[[World], None]:
    """Files of upstream's give its logits; those in int8 nearly."""

    def twin(world: World) -> None:
        for name in names:
            model, answer = load(place(world, recorded(name))), read_recording(f"{name[:-3]}.bin")[0]
            got = forward(model.params, jnp.array(answer["tokens"][0], jnp.int32), model.config)
            assert_close(got, answer["logits"][0], 0.03 if name.endswith("2") else 1e-5, name)

    return twin


ALL = ("tied.v0", "tied.v1", "tied.v2", "untied.v0", "untied.v1", "untied.v2")

# ---- A1 to A3: the size ----------------------------------------------------------------------------------------------

# Where the first int8 are, in the tied file: after the header and five gains; then there are 80 × 64, and 80 scales.
INT8 = 256 + 4 * 5 * 64


def cut_later(world: World) -> object:
    """It is truncated once it has been opened and checked."""
    path = place(world, recorded("tied.v0"))
    with checkpoint(path) as found:
        os.truncate(path, 1000)
        return found.load()


A1 = {
    **files("tied.v0", {"4 bytes less": (cut(-4), Accepted), "1 byte less": (cut(-1), Accepted)}, "size", "317724"),
    **files("untied.v0 tied.v1 tied.v2", {"4 bytes less": (cut(-4), Unlike), "1 byte less": (cut(-1), Unlike)}, "size"),
    **files("tied.v0 untied.v0", {"half": (cut(150_000), Unlike), "header": (cut(28), Unlike)}, "size"),
    **files("tied.v1 untied.v1", {"half": (cut(150_000), Unlike), "header": (cut(256), Unlike)}, "size"),
    **files("tied.v2", {"int8": (cut(INT8 + 999), Unlike), "scales": (cut(INT8 + 80 * 64 + 50), Unlike)}, "size"),
    "after it was opened": refused(cut_later, "tok_embeddings.weight", "972 bytes", end=Unlike),
}
A2 = {
    **files("tied.v0", {f"{n} bytes": (cut(n), struct.error) for n in (0, 1, 4, 27)}, "size", "at least 28"),
    **files("tied.v1", {f"{n} bytes": (cut(n), struct.error) for n in (4, 7, 35)}, "size", "at least 256"),
    **files("tied.v1 tied.v2", {f"{n} bytes": (cut(n), Unlike) for n in (41, 255)}, "size", "at least 256"),
}
MORE = {"a zero": b"\0", "a number": bytes(4), "a thousand": bytes(1000), "another file": recorded("tied.v0")}
A3 = files(" ".join(ALL), {what: (ends_with(more), Accepted) for what, more in MORE.items()}, "size")

# ---- A4 to A8: seven sizes -------------------------------------------------------------------------------------------


def wrong_sizes() -> Iterable[tuple[str, Variant]]:
    """Zero and below. A vocab_size below is version 0's way to say that the model is not tied."""
    for name in ("tied.v0", "untied.v1", "tied.v2"):
        for field in FIELDS:
            for value in (0, -1, -8, -(2**31)):
                if field == "vocab_size" and name == "tied.v0" and value in (-1, -8):
                    continue
                end = ZeroDivisionError if value == 0 and field in ("n_heads", "n_kv_heads") else Unlike
                yield f"{name}, {field}={value}", file(name, sizes(**{field: value}), field, end=end)


# Without the check of the size, the names of 2³¹ layers would be listed.
ENDLESS = unchecked("size") | {
    ".formats.layout:all_tensors": "lambda layout, config: original(layout, config) "
    "if config.layers < 9 and config.vocab < 999 else (_ for _ in ()).throw(MemoryError())"
}
LARGE = {
    "n_layers": dict(n_layers=MOST),
    "a million layers": dict(n_layers=2**20),
    "vocab_size": dict(vocab_size=MOST),
    "all": dict(dim=MOST - 1, n_heads=1, n_kv_heads=1, n_layers=MOST, vocab_size=MOST, hidden_dim=MOST),
}
WIDE = {
    "hidden_dim": (sizes(hidden_dim=MOST), Unlike),  # refused later, as the memory is too small
    "dim": (sizes(dim=MOST - 1, n_heads=1, n_kv_heads=1), Unlike),
}
A5 = {
    **files("tied.v0 tied.v1 untied.v1", WIDE, "size"),
    "tied.v2, hidden_dim": file("tied.v2", sizes(hidden_dim=MOST), "size", end=Unlike),
    "tied.v0, max_seq_len": file("tied.v0", sizes(max_seq_len=MOST), "size"),
    **{
        f"{name}, {what}": file(name, sizes(**values), "size", "", ENDLESS, MemoryError)
        for name in ("tied.v0", "tied.v1", "tied.v2")
        for what, values in LARGE.items()
        if name != "tied.v2" or "dim" not in values  # which its group of 64 does not divide
    },
}
A6 = {
    **files(
        "tied.v0 tied.v1 tied.v2", {"5 heads": (sizes(n_heads=5, n_kv_heads=5), Unlike)}, "n_heads", "divisor of dim"
    ),
    **files("tied.v1 tied.v2", {"heads of 1": (sizes(n_heads=64, n_kv_heads=32), Accepted)}, "head_dim", "even"),
    "tied.v0, heads of 1": file("tied.v0", sizes(n_heads=64, n_kv_heads=32), "head_dim", "even", end=Unlike),
}
KV = {f"{n} kv_heads": (sizes(n_kv_heads=n), Unlike) for n in (3, 5, 16, MOST)}
A7 = files("tied.v0 tied.v1 tied.v2", KV, "n_kv_heads", "divisor of n_heads, 8")
A8 = {
    "tied.v0": file("tied.v0", sizes(vocab_size=-80), "size", r"317724|338204 \(or the other sign", end=Unlike),
    "untied.v0": file("untied.v0", sizes(vocab_size=80), "size", r"\(or the other sign of vocab_size\)"),
    "tied.v1": file("tied.v1", put(36, "B", 0), "size", r"\(or the other shared_classifier\)", end=Unlike),
    "untied.v1": file("untied.v1", put(36, "B", 1), "size", r"\(or the other shared_classifier\)"),
    "untied.v2": file("untied.v2", put(36, "B", 1), "size", r"\(or the other shared_classifier\)"),
    "neither fits": file("untied.v0", sizes(vocab_size=79), "size", r"expected \d+$", end=Accepted),
}

# ---- A9: other files -------------------------------------------------------------------------------------------------

OTHERS: dict[str, bytes] = {
    "a safetensors file": struct.pack("<Q", 40) + b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}' * 2,
    "a zip file": b"PK\3\4" + bytes(99),
    "HTML": b"<!DOCTYPE html>" + bytes(99),
    "text": b"Once upon a time there was a file.\n" * 9,
    "a big-endian GGUF": b"FUGG" + bytes(99),
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:00",
}


def another(data: bytes) -> Change:
    return lambda _: data


OTHER_BYTES = {"a picture": b"\x89PNG\r\n\x1a\n" + bytes(99), "gzip": b"\x1f\x8b\x08" + bytes(99), "zeros": bytes(999)}
A9 = {what: file("tied.v0", another(data), "contents", what, end=Unlike) for what, data in OTHERS.items()} | {
    what: file("tied.v0", another(data), field, "is this a llama2.c file", end=Unlike)
    for (what, data), field in zip(OTHER_BYTES.items(), ("n_layers", "hidden_dim", "dim"), strict=True)
}


def under_any_name(world: World) -> None:
    """A GGUF called .bin is still one."""
    path = world.folder / "model.bin"
    path.write_bytes(world.talker.read_bytes())
    assert load(path).config == world.model.config
    logits_as_recorded("tied.v0")(world)


# ---- A10: flags ------------------------------------------------------------------------------------------------------

GROUPS = {f"group of {n}": (put(37, "<i", n), end) for n, end in ((0, ZeroDivisionError), (-64, Unlike), (48, Unlike))}
A10 = {
    **files("tied.v1", {f"version {n}": (put(4, "<i", n), KeyError) for n in (3, -1, MOST)}, "version", "1 or 2"),
    "tied.v2, version 3": file("tied.v2", put(4, "<i", 3), "version", end=Unlike),
    "tied.v1, version 0": file("tied.v1", put(4, "<i", 0), "version", end=Unlike),
    **files("untied.v1 untied.v2", {f"flag {n}": (put(36, "B", n), Accepted) for n in (2, 255)}, "shared_classifier"),
    **files("tied.v1", {f"byte {at}": (put(at, "B", 1), Accepted) for at in (37, 41, 255)}, "padding"),
    **files("tied.v2", {f"byte {at}": (put(at, "B", 1), Accepted) for at in (41, 255)}, "padding"),
    **files(
        "tied.v2", {**GROUPS, f"group of {MOST}": (put(37, "<i", MOST), Unlike)}, "group_size", "divisor of dim, 64"
    ),
}

# ---- A11: values -----------------------------------------------------------------------------------------------------

SCALES = INT8 + 80 * 64
A11 = {
    f"{name}, {value} in {field}": file(name, put(offset, "<f", value), field, "NaN or ∞")
    for value in (math.nan, math.inf, -math.inf)
    for name, offset, field in (
        ("tied.v0", 28 + 4 * 100, "tok_embeddings.weight"),
        ("tied.v0", 28 + 4 * 80 * 64, "layers.0.attention_norm.weight"),
        ("untied.v0", len(recorded("untied.v0")) - 4, "output.weight"),
        ("tied.v1", 256, "layers.0.attention_norm.weight"),
        ("tied.v2", 256, "layers.0.attention_norm.weight"),
        ("tied.v2", SCALES, "tok_embeddings.weight"),
    )
} | {"tied.v2, a scale that overflows": file("tied.v2", put(SCALES, "<f", 3e38), "tok_embeddings.weight", "∞")}


CASES: dict[str, Case] = {
    "A1": Case("S", "truncated", A1, logits_as_recorded(*ALL)),
    "A2": Case("C", "less than a header", A2, logits_as_recorded("tied.v0", "tied.v1")),
    "A3": Case("S", "bytes after the end", A3, logits_as_recorded(*ALL)),
    "A4": Case("C", "sizes of zero and below", dict(wrong_sizes()), logits_as_recorded("tied.v0", "untied.v1")),
    "A5": Case("C", "huge sizes", A5, logits_as_recorded("tied.v0", "tied.v1", "tied.v2")),
    "A6": Case("S", "heads that do not divide the width", A6, logits_as_recorded("tied.v1")),
    "A7": Case("S", "kv_heads that do not divide the heads", A7, logits_as_recorded("tied.v1")),
    "A8": Case("S", "tied or not, against the size", A8, logits_as_recorded(*ALL)),
    "A9": Case("S", "files of other kinds", A9, under_any_name),
    "A10": Case("S", "version, flags and padding", A10, logits_as_recorded("tied.v1", "untied.v2")),
    "A11": Case("S", "NaN and infinities", A11, logits_as_recorded(*ALL)),
}
