"""Cases B: safetensors, config.json, and the index of a model in several files."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import faults_links
import numpy as np
import torch
from asserts import assert_close
from builders import Arrays, random_arrays
from faults import Accepted, Act, Case, Unlike, Variant, World, guarded, refused, unchecked
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from lovely_llama import Config
from lovely_llama_tools.formats.files import checkpoint, load
from lovely_llama_tools.formats.hugging_face import from_hf
from lovely_llama_tools.formats.layout import HUGGING_FACE

LITTLE = Config(11, 12, 2, 2, 3, 4, 10, 16, 1e-5, 1e4, None, False)
FIELDS = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 11, "hidden_size": 12,
    "intermediate_size": 10, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4,
    "max_position_embeddings": 16, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "rope_scaling": None,
    "tie_word_embeddings": False, "hidden_act": "silu", "attention_bias": False, "torch_dtype": "float32",
}  # fmt: skip
ARRAYS = random_arrays(HUGGING_FACE, LITTLE, 0)
EMBED, Q, K, UP, DOWN, NORM, UNEMBED = (
    "model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight",
    "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight",
)  # fmt: skip
PARSED_PLAINLY = {
    f"lovely_llama_tools.formats.{module}:read_json": "lambda data, file: __import__('json').loads(data)"
    for module in ("safetensors", "hugging_face_config")
}

# ---- Folders ---------------------------------------------------------------------------------------------------------


def folder(world: World, name: str = "model", fields: Mapping[str, Any] = FIELDS) -> Path:
    """A folder with a config.json and nothing else."""
    path = world.folder / name
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(fields))
    return path


def saved(world: World, arrays: Arrays, fields: Mapping[str, Any] = FIELDS) -> Any:
    """Load a folder with these arrays, written by the safetensors package."""
    path = folder(world, fields=fields)
    save_file(arrays, path / "model.safetensors")
    return load(path)


def configured(**changes: Any) -> Act:
    """Load the model with other fields in its config.json; `...` leaves one out."""
    fields = {name: value for name, value in (FIELDS | changes).items() if value is not ...}
    return lambda world: saved(world, ARRAYS, fields)


def texted(text: str | bytes) -> Act:
    """Load the model with this for a config.json."""

    def act(world: World) -> Any:
        path = folder(world)
        save_file(ARRAYS, path / "model.safetensors")
        (path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        return load(path)

    return act


def replaced(old: str, new: str) -> Act:
    """Load the model with this text in its config.json in place of another."""
    text = json.dumps(FIELDS)
    assert text.count(old) == 1
    return texted(text.replace(old, new))


def header_of(arrays: Arrays) -> dict[str, Any]:
    header, at = dict[str, Any](), 0
    for name, array in arrays.items():
        header[name] = {"dtype": "F32", "shape": [*array.shape], "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    return header


WIDTHS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
HEADER = header_of(ARRAYS)
FIRST, LAST, PARTS = next(iter(ARRAYS)), [*ARRAYS][-1], [*ARRAYS][::2]
GAIN = "model.layers.0.input_layernorm.weight"
DATA = b"".join(array.tobytes() for array in ARRAYS.values())


def packed(header: bytes | str | Mapping[str, Any], data: bytes = DATA, length: int | None = None) -> Act:
    """Load the model from a file of these parts."""
    text = header if isinstance(header, bytes) else header.encode() if isinstance(header, str) else None
    text = json.dumps(header).encode() if text is None else text

    def act(world: World) -> Any:
        path = folder(world)
        count = (len(text) if length is None else length).to_bytes(8, "little")
        (path / "model.safetensors").write_bytes(count + text + data)
        return load(path)

    return act


def entry(name: str, **changes: Any) -> Act:
    """Load the model with another entry for a tensor in the header."""
    return packed(HEADER | {name: HEADER[name] | changes})


def gives(want: Arrays, config: Config = LITTLE) -> Callable[[Any], None]:
    """Check that a loaded model has exactly these parameters."""

    def check(model: Any) -> None:
        assert model.config == config
        assert_close(model.params, from_hf(want, config), 0, "params")

    return check


def loads(act: Act = configured(), want: Arrays = ARRAYS, config: Config = LITTLE) -> Act:  # noqa: B008
    """A twin: the model loads, with the right parameters."""
    return lambda world: gives(want, config)(act(world))


INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def sharded(
    change: Callable[[dict[str, Any], dict[str, Arrays]], object] | None = None,
    after: Callable[[World, Path], object] | None = None,
) -> Act:
    """Load the model from two files and an index, after changes to the map, the shards or the folder."""

    def act(world: World) -> Any:
        path, names = folder(world), [*ARRAYS]
        parts = {shard: {name: ARRAYS[name] for name in names[i::2]} for i, shard in enumerate(SHARDS)}
        where: dict[str, Any] = {name: shard for shard, part in parts.items() for name in part}
        if change:
            change(where, parts)
        for shard, part in parts.items():
            save_file(part, path / shard)
        (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
        if after:
            after(world, path)
        return load(path)

    return act


# ---- Cases -----------------------------------------------------------------------------------------------------------


def without_parser(act: Act, end: type[BaseException] = Accepted, says: str = "") -> Variant:
    """Refused as no JSON; Python's own parser would accept it, or raise something else."""
    return refused(act, "JSON", says, PARSED_PLAINLY, end)


def wrong(act: Act, field: str, end: type[BaseException] = Accepted, says: str = "", *also: str) -> Variant:
    """Refused for this field, by a check that is removed together with those of `also`."""
    return refused(act, field, says, unchecked(field, *also), end)


def placed(name: str, by: int, more: int = 0) -> Act:
    """Load the model with a tensor a few bytes from where it should be."""
    begin, end = HEADER[name]["data_offsets"]
    return packed(HEADER | {name: HEADER[name] | {"data_offsets": [begin + by, end + by]}}, DATA + bytes(more))


def twice(world: World) -> Any:
    text = json.dumps(HEADER)
    return packed(text[:-1] + f', "{NORM}": ' + json.dumps(HEADER[NORM]) + "}")(world)


def short(world: World) -> Any:
    path = folder(world)
    (path / "model.safetensors").write_bytes(bytes(7))
    return load(path)


def cut_short(world: World) -> Any:
    """The file is truncated once its header has been read."""
    path = folder(world)
    save_file(ARRAYS, path / "model.safetensors")
    with checkpoint(path) as found:
        os.truncate(path / "model.safetensors", 2000)
        return found.load()


def index_twice(world: World, path: Path) -> None:
    text = (path / INDEX).read_text()
    (path / INDEX).write_text(text.replace(f'"{NORM}"', f'"{NORM}": "x.safetensors", "{NORM}"'))


def list_index(world: World, path: Path) -> None:
    (path / INDEX).write_text('{"weight_map": []}')


def long_header(world: World) -> Any:
    path = folder(world)
    with (path / "model.safetensors").open("wb") as file:
        file.write((2**21 + 1).to_bytes(8, "little"))
        file.truncate(2**22)
    return load(path)


def narrow(dtype: torch.dtype, kept: str) -> Act:
    """Every number of a narrow dtype, loaded from a file, is what torch widens it to."""

    def act(world: World) -> None:
        path, config = folder(world, fields=FIELDS | {"vocab_size": 2**13}), replace(LITTLE, vocab=2**13)
        bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
        bits = torch.where(torch.isfinite(bits), bits, torch.zeros((), dtype=dtype))
        arrays = random_arrays(HUGGING_FACE, config, 0)
        tensors = {name: torch.tensor(array).to(dtype) for name, array in arrays.items()}
        tensors[EMBED].view(-1)[: 2**16] = bits
        save_torch(tensors, path / "model.safetensors")
        model = load(path)
        want = {name: tensor.float().numpy() for name, tensor in tensors.items()}
        gives(want, config)(model)
        assert np.array_equal(np.signbit(np.asarray(model.params.embed)), np.signbit(want[EMBED]))
        assert load(path, kept).params.embed.dtype == kept

    return act


def without(name: str) -> Act:
    return lambda world: saved(world, {n: a for n, a in ARRAYS.items() if n != name})


def another(name: str, array: Any) -> Act:
    return lambda world: saved(world, ARRAYS | {name: array})


def tensor_of(name: str, dtype: torch.dtype) -> Act:
    """Load the model with one tensor in another dtype."""

    def act(world: World) -> Any:
        path = folder(world)
        tensors = {n: torch.tensor(array) for n, array in ARRAYS.items()}
        tensors[name] = tensors[name].to(dtype)
        save_torch(tensors, path / "model.safetensors")
        return load(path)

    return act


def lose(*shards: str) -> Callable[[World, Path], None]:
    """Remove these files."""

    def after(world: World, path: Path) -> None:
        for shard in shards:
            (path / shard).unlink()

    return after


def linked(name: str) -> Act:
    """Load the model with one of its files replaced by a link to one outside of its folder."""

    def after(world: World, path: Path) -> None:
        outside = world.folder / "elsewhere"
        (path / name).rename(outside)
        (path / name).symlink_to(outside)

    return sharded(after=after)


def named(make: Callable[[Path], str]) -> Act:
    """Load the model with a shard outside of its folder, which the index names in full or relatively."""

    def act(world: World) -> Any:
        def change(where: dict[str, Any], parts: dict[str, Arrays]) -> None:
            for tensor in parts[SHARDS[0]]:
                where[tensor] = make(world.folder)

        def after(world: World, path: Path) -> None:
            (path / SHARDS[0]).rename(world.folder / "outside.safetensors")

        return sharded(change, after)(world)

    return act


def cached(world: World) -> None:
    """In a cache of the hub, links lead from the folder of a snapshot to one of blobs."""
    snapshot, blobs = world.folder / "hub" / "snapshots" / "abc", world.folder / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    sharded()(world)
    for i, file in enumerate(sorted((world.folder / "model").iterdir())):
        file.rename(blobs / str(i))
        (snapshot / file.name).symlink_to(os.path.join("..", "..", "blobs", str(i)))
    gives(ARRAYS)(load(snapshot))
    faults_links.named(world)


def nothing(world: World) -> Any:
    path = folder(world)
    save_file(ARRAYS, path / "model.safetensors")
    (path / "config.json").unlink()
    return load(path)


OURS = {  # the field of `Config` whose check stands behind that of the file's
    "num_hidden_layers": "layers", "vocab_size": "vocab", "hidden_size": "dim", "intermediate_size": "hidden_dim",
    "rms_norm_eps": "eps", "rope_theta": "theta", "max_position_embeddings": "ctx", "num_key_value_heads": "kv_heads",
    "num_attention_heads": "q_per_kv", "tie_word_embeddings": "tied",
}  # fmt: skip


def changed(*changes: tuple[str, Any, type[BaseException]]) -> dict[str, Variant]:
    """These values in config.json are refused by name; without the checks of it, here and in `Config`, it ends so."""
    return {
        f"{name} {'left out' if value is ... else value!r}": wrong(
            configured(**{name: value}), name, end, "", OURS.get(name, name)
        )
        for name, value, end in changes
    }


TIED = FIELDS | {"tie_word_embeddings": True}


def tied_with(change: float) -> Act:
    return lambda world: saved(world, ARRAYS | {UNEMBED: ARRAYS[EMBED] + np.float32(change)}, TIED)


def tied_at_the_end(world: World) -> Any:
    """The last number differs, in the third piece that is compared."""
    with world.patch.context() as patch:
        patch.setattr("lovely_llama_tools.formats.hugging_face.PIECE", 200)
        array = ARRAYS[EMBED].copy()
        array[-1, -1] += 1
        return saved(world, ARRAYS | {UNEMBED: array}, TIED)


def tied_twin(world: World) -> None:
    want = {name: array for name, array in ARRAYS.items() if name != UNEMBED}
    config = replace(LITTLE, tied=True)
    gives(want, config)(tied_with(0)(world))
    gives(want, config)(saved(world, want, TIED))


def moving(name: str, shard: Any) -> Callable[[dict[str, Any], dict[str, Arrays]], None]:
    """Say in the map that a tensor is in this shard."""
    return lambda where, parts: where.update({name: shard})


def swap(where: dict[str, Any], parts: dict[str, Arrays]) -> None:
    for name, shard in where.items():
        where[name] = SHARDS[1 - SHARDS.index(shard)]


def double(where: dict[str, Any], parts: dict[str, Arrays]) -> None:
    for part in parts.values():
        part[NORM] = ARRAYS[NORM]


def forget(where: dict[str, Any], parts: dict[str, Arrays]) -> None:
    del where[NORM]


CASES: dict[str, Case] = {
    "B1": Case("C", "the header of a safetensors file is no header", {
        "length over the file": wrong(packed(HEADER, length=10**6), "header", Unlike),
        "length 2⁶³": wrong(packed(HEADER, length=2**63), "header", OverflowError),
        "length over the limit": wrong(long_header, "header", Unlike, "2097152"),
        "seven bytes": wrong(short, "size", Unlike, "7 bytes"),
        "length 0": without_parser(packed(b"", length=0), ValueError),
        "no JSON": without_parser(packed(b"x" * 80), ValueError),
        "not UTF-8": without_parser(packed(b'{"\xff": 1}'), ValueError),
        "deep": without_parser(packed(b'{"a":' + b"[" * 10**6), RecursionError),
        "an array": without_parser(packed(b"[1, 2]"), TypeError),
        "an entry of another kind": wrong(packed(HEADER | {"x": [1]}), "x", KeyError),
        "an entry with more": wrong(entry(NORM, strides=[1]), NORM),
    }, loads()),
    "B2": Case("S", "a safetensors file is truncated, or goes on after its tensors", {
        "four bytes less": wrong(packed(HEADER, DATA[:-4]), "size", Unlike),
        "half": wrong(packed(HEADER, DATA[: len(DATA) // 2]), "size", Unlike),
        "no data": wrong(packed(HEADER, b""), "size", Unlike),
        "a byte more": wrong(packed(HEADER, DATA + b"x"), "size"),
        "truncated while it is read": wrong(cut_short, EMBED, Accepted, "has been changed", *ARRAYS),
    }, loads()),
    "B3": Case("S", "tensors in a file overlap, leave a gap, or have sizes other than their bytes", {
        "an overlap": wrong(placed(NORM, -4), "data_offsets"),
        "a gap": wrong(placed(LAST, 4, 4), "data_offsets"),
        "the same bytes": wrong(entry(NORM, data_offsets=HEADER[GAIN]["data_offsets"]), "data_offsets"),
        "end before begin": wrong(entry(NORM, data_offsets=[48, 0]), NORM, Unlike),
        "a negative offset": wrong(entry(NORM, data_offsets=[-48, 0]), NORM, Unlike),
        "three offsets": wrong(entry(NORM, data_offsets=[0, 48, 48]), NORM, ValueError),
        "an offset of another type": wrong(entry(NORM, data_offsets=["0", "48"]), NORM, TypeError),
        "a shape of fewer bytes": wrong(entry(NORM, shape=[11]), NORM, ValueError),
        "a negative axis": wrong(entry(NORM, shape=[-3, -4]), NORM, ValueError),
        "an axis of true": wrong(entry(NORM, shape=[True, 12]), NORM, TypeError),
        "a product of 2⁶⁴": wrong(entry(NORM, shape=[2**32, 2**32]), NORM, ValueError),
        "an empty axis beside 2⁶²": wrong(entry(NORM, shape=[0, 2**62]), NORM, ValueError),
        "many axes": wrong(entry(NORM, shape=[10**39] * 9), NORM, ValueError),
    }, loads()),
    "B4": Case("S", "a tensor is declared twice", {
        "in the header": refused(twice, NORM, "2 values", PARSED_PLAINLY),
        "in the index": refused(sharded(after=index_twice), NORM, "2 values", PARSED_PLAINLY),
    }, loads()),
    "B5": Case("S", "a tensor is missing", {
        name: wrong(without(name), "tensors", KeyError, rf"1 missing \({name}\)") for name in (EMBED, Q, NORM, UNEMBED)
    }, loads()),
    "B6": Case("S", "there is a tensor that the config does not have", {
        "a bias": wrong(another(Q.replace("weight", "bias"), ARRAYS[NORM]), "tensors", says="1 unexpected"),
        "an adapter": wrong(another(Q.replace("weight", "lora_A.weight"), ARRAYS[UP]), "tensors", says="1 unexpected"),
        "a norm of q": wrong(another("model.layers.0.self_attn.q_norm.weight", ARRAYS[NORM]), "tensors"),
    }, loads(another("model.layers.1.self_attn.rotary_emb.inv_freq", ARRAYS[NORM]))),
    "B7": Case("S", "the file has other layers than the config", {
        "one more in the file": wrong(configured(num_hidden_layers=1), "tensors", says="9 unexpected"),
        "one less in the file": wrong(configured(num_hidden_layers=3), "tensors", KeyError, "9 missing"),
        "far more in the config": wrong(configured(num_hidden_layers=1000), "num_hidden_layers", Unlike),
    }, loads()),
    "B8": Case("S", "a tensor has another shape than the config gives", {
        "a row less": wrong(another(UP, ARRAYS[UP][1:]), UP, ValueError, r"\(9, 12\), expected \(10, 12\)"),
        "transposed": wrong(another(DOWN, ARRAYS[DOWN].T.copy()), DOWN),
        "an axis more": wrong(another(NORM, ARRAYS[NORM][None]), NORM),
        "k as wide as q": wrong(another(K, np.tile(ARRAYS[K], (3, 1))), K, ValueError),
    }, loads()),
    "B9": Case("S", "weights in a dtype that no weights have", {
        str(dtype): wrong(tensor_of(Q, dtype), Q, KeyError, "F32, F16, BF16")
        for dtype in (torch.int8, torch.uint8, torch.bool, torch.int64, torch.float64, torch.complex64)
    }, loads()),
    "B10": Case("C", "weights in a dtype that is not supported", {
        name: wrong(entry(Q, dtype=name), Q, KeyError, f"{name}, expected weights in F32, F16, BF16")
        for name in ("F8_E4M3", "F8_E5M2", "F4", "f32", "7")
    } | {"a list": wrong(entry(Q, dtype=["F32"]), Q, TypeError)}, loads()),
    "B11": Case("S", "narrow weights are widened exactly", {
        "bfloat16": guarded(narrow(torch.bfloat16, "bfloat16"), {
            ".formats.safetensors:KINDS": "original | {'BF16': np.dtype(np.int16)}"}),
        "float16": guarded(narrow(torch.float16, "float16"), {
            ".formats.safetensors:KINDS": "original | {'F16': original['BF16']}"}),
    }, loads()),
    "B12": Case("S", "the index and the files do not agree", {
        "a missing file": wrong(sharded(after=lose(SHARDS[1])), "path", AssertionError, "no such file"),
        "no file": wrong(sharded(after=lose(*SHARDS)), "path", AssertionError, "no such file"),
        "a tensor that no file has": wrong(sharded(moving("model.x", SHARDS[0])), "weight_map", says="model.x"),
        "a tensor in two files": wrong(sharded(double), NORM),
        "a tensor that is not in the map": wrong(sharded(forget), NORM),
        "a tensor in the other file": wrong(sharded(moving(NORM, SHARDS[1 - ([*ARRAYS].index(NORM) % 2)])), NORM),
        "the files swapped": wrong(sharded(swap), UNEMBED, Unlike, SHARDS[0]),
        "no map": wrong(sharded(after=lambda world, path: (path / INDEX).write_text("{}")), "weight_map", Unlike),
        "a map of another type": wrong(sharded(after=list_index), "weight_map", AttributeError),
        "a name of another type": wrong(sharded(moving(NORM, 7)), NORM, TypeError),
    }, loads(sharded())),
    "B13": Case("S", "a file of the model lies outside its folder", {
        "the parent": wrong(named(lambda top: "../outside.safetensors"), FIRST, Accepted, "", *PARTS, "path"),
        "a full path": wrong(named(lambda top: f"{top}/outside.safetensors"), FIRST, Accepted, "", *PARTS, "path"),
        "a link of weights": wrong(linked(SHARDS[1]), "path", says="a link to .*elsewhere"),
        "a link of the config": wrong(linked("config.json"), "path", says="a link to .*elsewhere"),
        "a link of the index": wrong(linked(INDEX), "path", says="a link to .*elsewhere"),
        **faults_links.LINKS,
    }, cached),
    "B14": Case("S", "config.json is absent or not plain JSON", {
        "absent": wrong(nothing, "path", IndexError, "config.json"),
        "no JSON": without_parser(texted("{'vocab_size': 11}"), ValueError),
        "empty": without_parser(texted(""), ValueError),
        "NaN": without_parser(replaced("1e-05", "NaN"), Unlike),
        "1e400": without_parser(replaced("10000.0", "1e400"), Unlike),
        "a mark of byte order": without_parser(texted(b"\xef\xbb\xbf" + json.dumps(FIELDS).encode())),
        "UTF-16": without_parser(texted(json.dumps(FIELDS).encode("utf-16"))),
        "a key twice": refused(
            replaced('"vocab_size": 11', '"vocab_size": 11, "vocab_size": 11'), "vocab_size", "2 values", PARSED_PLAINLY
        ),
        "much too long": wrong(texted(json.dumps(FIELDS) + " " * 2**22), "size", Accepted, "2097152"),
        **changed(
            ("num_hidden_layers", True, Unlike), ("vocab_size", "11", Accepted), ("hidden_size", 12.5, Accepted),
            ("hidden_size", 12.0, Accepted), ("intermediate_size", [10], TypeError), ("rms_norm_eps", "1e-5", Accepted),
            ("tie_word_embeddings", 0, Accepted), ("rope_theta", "10000", Accepted), ("rope_theta", True, Accepted),
            ("rope_scaling", [], AttributeError), ("attention_bias", 0, Accepted), ("eos_token_id", "2", Accepted),
            ("vocab_size", ..., TypeError), ("rms_norm_eps", None, TypeError), ("hidden_size", ..., TypeError),
        ),
    }, loads()),
    "B15": Case("S", "sizes, eps or theta for which there is no Llama", changed(
        *((name, value, Unlike) for value in (0, -1) for name in WIDTHS),
        ("max_position_embeddings", 0, Accepted), ("max_position_embeddings", 2**31, Accepted),
        ("num_attention_heads", 0, ZeroDivisionError), ("num_attention_heads", -6, Unlike),
        ("num_key_value_heads", 0, ZeroDivisionError), ("num_key_value_heads", 4, Unlike),
        ("num_key_value_heads", 12, Unlike), ("num_key_value_heads", -2, Unlike),
        ("head_dim", 0, Unlike), ("head_dim", 5, Unlike), ("head_dim", -4, Unlike),
        ("rms_norm_eps", 0, Accepted), ("rms_norm_eps", -1e-5, Accepted),
        ("rope_theta", 0, Accepted), ("rope_theta", 1, Accepted), ("rope_theta", -1e4, Accepted),
    ), loads()),
    "B16": Case("S", "what this library's Llama does not have", {
        **changed(
            ("model_type", "qwen2", KeyError), ("model_type", ..., KeyError), ("hidden_act", "gelu", Accepted),
            ("attention_bias", True, Accepted), ("mlp_bias", True, Accepted), ("sliding_window", 2, Accepted),
            ("use_sliding_window", True, Accepted), ("quantization_config", {"bits": 4}, Accepted),
            ("partial_rotary_factor", 0.5, Accepted), ("rope_interleaved", True, Accepted), ("lora_r", 8, Accepted),
            ("layer_types", ["full_attention", "sliding_attention"], Accepted),
            ("attn_logit_softcapping", 50.0, Accepted), ("residual_multiplier", 0.22, Accepted),
            ("no_rope_layers", [1], Accepted),
        ),
        **{f"scaling {scaling}": wrong(configured(rope_scaling=scaling), field, end) for scaling, field, end in (
            ({"rope_type": "dynamic", "factor": 2.0}, "rope_scaling.rope_type", Unlike),
            ({"type": "longrope", "factor": 2.0}, "rope_scaling.rope_type", Unlike),
            ({"rope_type": "linear", "factor": "2"}, "rope_scaling.factor", TypeError),
            ({"rope_type": "linear"}, "rope_scaling.factor", TypeError),
            ({"rope_type": "linear", "factor": 0.5}, "rope_scaling.factor", Accepted),
            ({"rope_type": "linear", "factor": 2.0, "attention_factor": 2.0}, "rope_scaling", Accepted),
            ({"rope_type": "default", "mrope_section": [1, 1]}, "rope_scaling", Accepted),
        )},
        "two thetas": wrong(configured(rope_parameters={"rope_theta": 5e5}), "rope_parameters.rope_theta"),
        "two scalings": wrong(configured(
            rope_scaling={"type": "linear", "factor": 2}, rope_parameters={"rope_type": "default"}), "rope_scaling"),
    }, loads(configured(
        attention_dropout=0.1, use_cache=False, initializer_range=7, pretraining_tp=2, mlp_bias=False, dtype="float64",
        sliding_window=None, layer_types=["full_attention"] * 2, rope_scaling={"type": "default"}, unknown=None))),
    "B17": Case("S", "tie_word_embeddings is not what the tensors say", {
        "true, with another lm_head": wrong(tied_with(1e-6), "tie_word_embeddings"),
        "true, with another after many bytes": wrong(tied_at_the_end, "tie_word_embeddings"),
        "true, with a larger lm_head": wrong(
            lambda world: saved(world, ARRAYS | {UNEMBED: ARRAYS[Q]}, TIED), "tie_word_embeddings"),
        "false, without lm_head": wrong(without(UNEMBED), "tensors", KeyError, UNEMBED),
    }, tied_twin),
}  # fmt: skip
