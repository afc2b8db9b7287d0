"""Cases D: Meta's folders, and torch's files in them."""

import io
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faults import Accepted, Case, Unlike, Variant, World, refused, unchecked
from meta_files import META, meta_weights, write_meta

from lovely_llama_tools.formats.files import load
from lovely_llama_tools.formats.llama2c import to_llama2c

NORM, WQ, W1 = "norm.weight", "layers.0.attention.wq.weight", "layers.0.feed_forward.w1.weight"
MOST = 2**31 - 1
Spoil = Callable[[Path], object]  # a good folder
Entries = dict[str, bytes]


def folder(
    spoil: Spoil, field: str, says: str = "", end: type[BaseException] = Accepted,
    removed: dict[str, str] | None = None, parts: int = 1,
) -> Variant:  # fmt: skip
    """A folder, spoilt, is refused for this field."""

    def act(world: World) -> object:
        path = write_meta(world.folder / "meta", meta_weights(META), parts)
        spoil(path)
        return load(path)

    return refused(act, field, says, removed, end)


def saved(change: Callable[[dict[str, Any]], object], part: int = 0) -> Spoil:
    """Change what one part holds, which torch saves again."""

    def spoil(path: Path) -> None:
        file = path / f"consolidated.{part:02}.pth"
        tensors = torch.load(file, weights_only=True)
        other = change(tensors)
        torch.save(tensors if other is None else other, file)

    return spoil


def tensor(name: str, value: Any, part: int = 0) -> Spoil:
    return saved(lambda tensors: tensors.update({name: value}), part)


def less(name: str, part: int = 0) -> Spoil:
    def change(tensors: dict[str, Any]) -> None:
        del tensors[name]

    return saved(change, part)


def contents(data: bytes | Callable[[bytes], bytes]) -> Spoil:
    """Other bytes."""

    def spoil(path: Path) -> None:
        file = path / "consolidated.00.pth"
        file.write_bytes(data if isinstance(data, bytes) else data(file.read_bytes()))

    return spoil


def archive(change: Callable[[Entries], object], compressed: str = "") -> Spoil:
    """Change the entries of a part's zip file, and compress those whose names contain a text."""

    def other(data: bytes) -> bytes:
        with zipfile.ZipFile(io.BytesIO(data)) as before:
            entries = {name: before.read(name) for name in before.namelist()}
        change(entries)
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as after, warnings.catch_warnings(action="ignore"):
            for name, entry in entries.items():
                deflate = bool(compressed) and compressed in name
                after.writestr(name.removesuffix("#"), entry, zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED)
        return out.getvalue()

    return contents(other)


def good(world: World) -> None:
    """In one part and in several, in Llama 2's style and Llama 3's, the weights are those that were written."""
    weights = meta_weights(META)
    for parts, style in ((1, "llama 2"), (2, "llama 2"), (4, "llama 3")):
        path = write_meta(world.folder / f"good {parts}", weights, parts, style, vocab_size=META.vocab)
        model = load(path)
        arrays = to_llama2c(model.params, model.config)
        assert arrays.keys() == weights.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, weights[name].numpy(), name)


# ---- D1, D2: code ----------------------------------------------------------------------------------------------------


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.canary,)


def bare_pickle(found: object, file: Path) -> None:
    file.write_bytes(pickle.dumps(found))


def legacy(found: object, file: Path) -> None:
    torch.save(found, file, _use_new_zipfile_serialization=False)


def payload(says: str, save: Callable[[object, Path], object], alone: bool = False, forced: bool = False) -> Variant:
    """What runs when it is unpickled is refused, and does not run."""

    def act(world: World) -> None:
        canary, path = world.folder / "canary", write_meta(world.folder / "meta", meta_weights(META))
        hostile: Any = Payload(canary)
        save(hostile if alone else {**meta_weights(META), NORM: hostile}, path / "consolidated.00.pth")
        if forced:
            world.patch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
        try:
            load(path)
        finally:
            assert not canary.exists(), "it ran"

    return refused(act, "contents", says, TRUSTING, AssertionError)


# Without weights_only, or without the look into the zip file, which tells what else a file is.
TRUSTING = {"torch:load": "lambda *a, **k: original(*a, **{**k, 'weights_only': False})"}
UNSEEN = {".formats.pth:scan_zip": "lambda path: Counter()"}
D1 = {
    "in a zip file": payload("posix.mkdir, which is code", torch.save),
    "alone": payload("posix.mkdir, which is code", torch.save, alone=True),
    "forced": payload("posix.mkdir, which is code", torch.save, forced=True),
    "forced and alone": payload("posix.mkdir, which is code", torch.save, alone=True, forced=True),
    **{
        f"{save.__name__}{', forced' * forced}": payload("no zip file", save, False, forced)._replace(
            guard=folder(contents(b""), "contents", removed=UNSEEN, end=AssertionError).guard
        )
        for save in (bare_pickle, legacy)
        for forced in (False, True)
    },
    "a module": folder(
        saved(lambda _: torch.nn.Linear(2, 2)), "contents", "Linear, which is code", AssertionError, TRUSTING
    ),
    "TorchScript": folder(
        archive(lambda entries: entries.update({"archive/code/__torch__.py": b"", "archive/constants.pkl": b""})),
        "contents", "an entry archive/code/__torch__.py", AssertionError,
    ),
}  # fmt: skip


def version(text: str) -> Variant:
    def act(world: World) -> object:
        world.patch.setattr(torch, "__version__", text)
        return load(write_meta(world.folder / "meta", meta_weights(META)))

    return refused(act, "torch", r"got .*, expected 2\.10 or newer")


def newer(world: World) -> None:
    for text in ("2.10.0", "2.13.0+cpu", "3.0.0a1"):
        world.patch.setattr(torch, "__version__", text)
        good(world)


D2 = {text: version(text) for text in ("2.9.1", "2.9.1+cu128", "2.5.0a0+git123", "1.13.1")}

# ---- D3: sizes -------------------------------------------------------------------------------------------------------


def shorter(entries: Entries) -> None:
    """A record is shorter than its tensor."""
    name = max((name for name in entries if "/data/" in name), key=lambda name: len(entries[name]))
    entries[name] = entries[name][:-4]


def larger_directory(data: bytes) -> bytes:
    """Its directory claims that an entry has two gigabytes."""
    at = data.rindex(b"PK\1\2")
    return data[: at + 20] + (2 * MOST.to_bytes(4, "little")) + data[at + 28 :]


BOMB = {"consolidated/data/999": bytes(2**24)}
D3 = {
    "expanded": folder(tensor(NORM, torch.ones(1).expand(32)), NORM, "got 128 bytes, expected at most 4"),
    "expanded to 2⁴⁰": folder(tensor("huge", torch.ones(1).expand(2**40)), "huge", "4398046511104 bytes", Unlike),
    "sparse": folder(tensor(WQ, torch.eye(32).to_sparse()), WQ, "sparse_coo", NotImplementedError),
    "meta": folder(tensor(NORM, torch.empty(32, device="meta")), NORM, "on meta", Unlike),
    **{
        str(kind): folder(tensor(NORM, torch.ones(32).to(kind)), NORM, str(kind), KeyError)
        for kind in (torch.float64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn)
    },
    "no tensor": folder(tensor("epoch", 3), "epoch", "a int", AttributeError),
    "no dict": folder(saved(lambda tensors: list(tensors.values())), "contents", "a list", AttributeError),
    "a short record": folder(archive(shorter), "contents", "other lengths"),
    "a bomb": folder(
        archive(lambda entries: entries.update(BOMB), "999"), "contents", "data/999, compressed", AssertionError
    ),
    "a record in int8": folder(archive(lambda _: None, "data/1"), "contents", "compressed", AssertionError, UNSEEN),
    "a large directory": folder(contents(larger_directory), "contents", "entries of", AssertionError, UNSEEN),
    "twice": folder(
        archive(lambda entries: entries.update({f"{name}#": entries[name] for name in [*entries][:1]})),
        "contents",
        "1 entries of the same name",
    ),
}

# ---- D4: damage ------------------------------------------------------------------------------------------------------


def broken_pickle(entries: Entries) -> None:
    name = next(name for name in entries if name.endswith("data.pkl"))
    entries[name] = entries[name][:-20]


def foreign(says: str, data: bytes | Callable[[bytes], bytes]) -> Variant:
    """It is called what it is, without torch's advice to read it without weights_only."""
    return folder(contents(data), "contents", rf"^(?!.*weights_only).*{says}", AssertionError, UNSEEN)


# What torch raises is passed on as it is.
BARE = {".formats.pth:LlamaError": "lambda file, field, got, expected: RuntimeError(got)"}
D4 = {
    "empty": foreign("no zip file, of 0 bytes", b""),
    "HTML": foreign("a web page", b"<!DOCTYPE html>" * 9),
    "a pointer of Git LFS": foreign("Git LFS", b"version https://git-lfs.github.com/spec/v1\n"),
    "half": foreign("damaged or truncated", lambda data: data[: len(data) // 2]),
    "100 bytes less": foreign("damaged or truncated", lambda data: data[:-100]),
    "10 bytes less": foreign("damaged or truncated", lambda data: data[:-10]),
    "4 bytes": foreign("damaged or truncated", lambda data: data[:4]),
    "a broken pickle": folder(archive(broken_pickle), "contents", r"^(?!.*weights_only).*refuses", RuntimeError, BARE),
    "no pickle": folder(
        archive(lambda entries: [entries.pop(name) for name in [*entries] if "data.pkl" in name]),
        "contents", r"^(?!.*weights_only).*refuses", RuntimeError, BARE,
    ),
}  # fmt: skip

# ---- D5: parts, and params.json --------------------------------------------------------------------------------------


def without_file(name: str) -> Spoil:
    return lambda path: (path / name).unlink()


def params(**changes: Any) -> Spoil:
    """Other fields; None takes one out."""

    def spoil(path: Path) -> None:
        write_meta(path, {}, 0, **changes)

    return spoil


def stated(*changes: tuple[str, Any, str, type[BaseException]]) -> Iterable[tuple[str, Variant]]:
    """A field with this value is refused."""
    for name, value, says, end in changes:
        yield f"{name}={value}", folder(params(**{name: value}), name, says, end)


def linked(path: Path) -> None:
    """A part is a link out of the folder."""
    (path / "consolidated.00.pth").rename(path.parent / "elsewhere.pth")
    (path / "consolidated.00.pth").symlink_to(path.parent / "elsewhere.pth")


# Without the check of their number, the names of 2³¹ layers would be listed.
ENDLESS = unchecked("n_layers") | {
    ".formats.layout:all_tensors": "lambda layout, config: original(layout, config) "
    "if config.layers < 9 else (_ for _ in ()).throw(MemoryError())"
}
UNREAD = {".formats.meta:read_fields": "lambda *_: {}"}
UNKNOWN = ("lora_args", "quantization_args", "vision_chunk_size", "moe_args")
D5 = {
    "part 01 of 2 is missing": folder(
        without_file("consolidated.01.pth"), "tok_embeddings.weight", r"\(40, 16\)", Unlike, parts=2
    ),
    "part 00 of 2 is missing": folder(without_file("consolidated.00.pth"), "path", "01.pth", Unlike, parts=2),
    "part 02 of 4 is missing": folder(without_file("consolidated.02.pth"), "path", "03.pth", Unlike, parts=4),
    "no part": folder(without_file("consolidated.00.pth"), "path", "no parts", IndexError),
    "another shape": folder(tensor(W1, torch.ones(32, 48), 1), W1, r"\(32, 48\)", ValueError, parts=2),
    "another dtype": folder(
        saved(lambda found: found.update({WQ: found[WQ].bfloat16()}), 1), WQ, "BF16.*F32 as in part 00", parts=2
    ),
    "a tensor less": folder(less(WQ, 1), "tensors", "1 missing", KeyError, parts=2),
    "a tensor more": folder(tensor("more", torch.ones(3), 1), "tensors", "1 unexpected", KeyError, parts=2),
    "other norms": folder(tensor(NORM, torch.ones(32), 1), NORM, "the same in all parts", parts=2),
    "a tensor less in all": folder(less(WQ), "tensors", "1 missing", KeyError),
    "a tensor more in all": folder(tensor("bias", torch.ones(3)), "tensors", "1 unexpected"),
    "NaN": folder(tensor(NORM, torch.full((32,), torch.nan)), NORM, "NaN"),
    "a link": folder(linked, "path", "a link to"),
    "no params.json": folder(without_file("params.json"), "path", "a folder without a model", IndexError),
    "params.json is empty": folder(lambda path: (path / "params.json").write_bytes(b""), "JSON", "", Unlike, UNREAD),
    **dict(stated(*((name, {"rank": 16}, "unknown here", Accepted) for name in UNKNOWN))),
    **dict(
        stated(
            ("dim", None, "nothing", TypeError), ("dim", "32", "'32'", TypeError), ("dim", 0, "above 0", Unlike),
            ("dim", -32, "above 0", Unlike), ("dim", 2**31, "below", Unlike), ("dim", 32.0, "whole", Unlike),
            ("n_layers", None, "nothing", TypeError), ("n_layers", True, "whole", Unlike),
            ("n_layers", 0, "above 0", Unlike), ("n_heads", 0, "above 0", ZeroDivisionError),
            ("n_heads", 5, "divisor of dim", Unlike), ("n_kv_heads", 3, "divisor of n_heads", Unlike),
            ("n_kv_heads", 16, "divisor of n_heads", Unlike), ("vocab_size", -2, "above 0", Unlike),
            ("vocab_size", 0, "above 0", Unlike), ("multiple_of", 0, "above 0", ZeroDivisionError),
            ("ffn_dim_multiplier", "1.3", "a number", TypeError), ("ffn_dim_multiplier", -1, "above 0", Unlike),
            ("norm_eps", 0, "above 0", Unlike), ("rope_theta", -1e4, "above 0", Unlike),
            ("use_scaled_rope", 1, "true or false", Accepted), ("rope_scaling_factor", 8.0, "none, without", Accepted),
            ("max_seq_len", 0, "above 0", Accepted), ("max_seq_len", "long", "whole", TypeError),
        )
    ),
    "another hidden_dim": folder(params(multiple_of=64), W1, r"expected \(128, 32\)", Unlike),
    "another vocab_size": folder(params(vocab_size=41), "tok_embeddings.weight", r"expected \(41, 32\)", Unlike),
    **{
        f"n_layers={n}": folder(params(n_layers=n), "n_layers", "at most", MemoryError, ENDLESS)
        for n in (2**20, MOST)
    },
    "n_layers=3": folder(params(n_layers=3), "tensors", "9 missing", KeyError),
}  # fmt: skip


CASES: dict[str, Case] = {
    "D1": Case("S", "code in a checkpoint", D1, good),
    "D2": Case("S", "an old torch", D2, newer),
    "D3": Case("C", "sizes that the file does not have", D3, good),
    "D4": Case("C", "damaged and other files", D4, good),
    "D5": Case("S", "parts that do not belong together", D5, good),
}
