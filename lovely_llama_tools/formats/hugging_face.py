"""Hugging Face's folders: config.json and safetensors, named and arranged as in transformers' LlamaForCausalLM."""

import math
import os
import re
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
from jaxtyping import Float

from lovely_llama import Config, LlamaError, Params, Sampling, check, check_sampling, check_tensors, is_number, is_whole

from ..strict_json import to_json
from ..tokens import Tokenizer, folder_tokenizer, tokenizer_files
from ..tokens.base import note
from .hugging_face_config import config_to_hf, read_config, read_fields
from .layout import HUGGING_FACE, NAMES, all_tensors, from_arrays, to_arrays, to_named
from .model import Checkpoint, Model, Tensor, narrowed, open_file
from .safetensors import KINDS, Place, read_tensor, scan_safetensors, write_safetensors

CONFIG, GENERATION, WEIGHTS, INDEX = (
    "config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json",
)  # fmt: skip
ADAPTER, ADAPTED = "adapter_config.json", "adapter_model.safetensors"  # PEFT's, in the place of a model
BUFFERS = r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"  # tables of frequencies in older files; not read
WRAPPERS = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile put before all names
EMBED, UNEMBED = (f"{NAMES[field][HUGGING_FACE.column]}.weight" for field in ("embed", "unembed"))
SHARD = 5 * 10**9  # bytes of a file above which another is begun
PIECE = 2**24  # bytes that are compared at a time
NONE = Sampling(None, None, None, None, None)
USUAL = 50  # of the likeliest tokens, among which transformers draws unless told otherwise
# The number at which each sampler does nothing.
OFF: dict[str, Any] = {"repetition_penalty": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def from_hf(arrays: Mapping[str, Any], config: Config) -> Params:
    """Parameters from arrays named as in transformers' LlamaForCausalLM: copies, rotary pairs made neighbours.

    The arrays may be numpy's, jax's or torch's: `from_hf(model.state_dict(), config)`.
    """
    return from_arrays(HUGGING_FACE, arrays, config)


def to_hf(params: Params, config: Config) -> dict[str, Float[np.ndarray, "..."]]:
    """Arrays named as in transformers' LlamaForCausalLM, rotary pairs split into halves."""
    return to_arrays(HUGGING_FACE, params, config)


# ---- Reading ---------------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """A tensor and the open file that it is in."""

    file: BinaryIO
    path: Path
    place: Place


def open_folder(path: Path, files: ExitStack, allow: Collection[str] = ()) -> Checkpoint:
    """A folder as transformers saves it, its tensors in one file or in several."""
    config, fields = read_config(read_fields(path / CONFIG, path), path / CONFIG, allow)
    kind = fields["model_type"][0]
    if kind != "llama":
        note(f"{path}: a model of type {kind}, whose mathematics is a Llama's")
    found = open_tensors(path, files)
    layers, most = config.layers, len(found)
    check("num_hidden_layers", layers, layers <= most, f"at most {most}, the number of tensors", path / CONFIG)
    wrapped = [name for name in found if name.startswith(WRAPPERS)]
    plain = f"{', '.join(wrapped)[:60]} …" if len(wrapped) > 1 else ", ".join(wrapped)
    how = "names without it, as save_pretrained of the model itself writes"
    check("tensors", f"names with {' or '.join(WRAPPERS)} before them: {plain}", not wrapped, how, path)
    if config.tied and EMBED not in found and UNEMBED in found:
        found[EMBED] = found.pop(UNEMBED)
    if config.tied and EMBED in found and UNEMBED in found:
        differs = f"true, with {UNEMBED} other than the embedding"
        check("tie_word_embeddings", differs, are_equal(found[EMBED], found[UNEMBED]), "both the same", path / CONFIG)
        del found[UNEMBED]
    check_tensors(all_tensors(HUGGING_FACE, config), {name: s.place.shape for name, s in found.items()}, path)

    def get(name: str) -> Float[np.ndarray, "..."]:
        return read_tensor(found[name].file, found[name].path, name, found[name].place)

    tensors = {name: Tensor(s.place.shape, s.place.dtype) for name, s in found.items()}
    tokenizer = read_tokenizer(path, config.vocab)
    return Checkpoint(path, "Hugging Face", HUGGING_FACE, config, fields, tensors, get, tokenizer)


def read_tokenizer(path: Path, vocab: int) -> Tokenizer | None:
    """The tokenizer in a folder, with the tokens that end a text, and how tokens are to be chosen."""
    given = read_fields(path / CONFIG, path)
    tokenizer, generation = folder_tokenizer(path, vocab), read_advice(path, vocab)
    stops = read_stops(given, vocab, path / CONFIG) | read_stops(generation, vocab, path / GENERATION)
    sampling = read_sampling(generation, vocab)
    if tokenizer is None:
        return None
    unstated = frozenset(name for name in ("do_sample", *Sampling._fields) if generation.get(name) is None)
    settings, pad = tokenizer.settings, cast(Any, given.get("pad_token_id", generation.get("pad_token_id")))
    if is_whole(pad) and 0 <= pad < vocab and pad != tokenizer.pad:  # −1 stands for none
        settings = {**settings, "pad_token_id": pad}
    return tokenizer._replace(
        stops=tokenizer.stops | stops, sampling=sampling, unstated=unstated, settings=settings
    )  # fmt: skip


def open_tensors(path: Path, files: ExitStack) -> dict[str, Stored]:
    """The tensors of model.safetensors, or of the files in the index, which must agree with it."""
    index, single = path / INDEX, path / WEIGHTS
    where: dict[str, Any] | None = None
    if not single.exists() and index.exists():
        where = read_fields(index, path).get("weight_map")
        check("weight_map", f"{where!r:.60}", isinstance(where, dict), "an object", index)
    old = "weights in pytorch_model.bin alone"
    how = f"{WEIGHTS}, which transformers' save_pretrained makes of them"
    check("path", old, bool(where) or single.exists() or not [*path.glob("pytorch_model*.bin")], how, path)
    for name, shard in (where or {}).items():
        plain = isinstance(shard, str) and re.fullmatch(r"\w[\w.-]*\.safetensors", shard)
        check(name, f"{shard!r:.60}", bool(plain), "the name of a .safetensors file in the folder", index)
    stored = dict[str, Stored]()
    for shard in [WEIGHTS] if where is None else sorted(set(where.values())):
        file = files.enter_context(open_file(path / shard, path))
        for name, place in scan_safetensors(file, path / shard).items():
            said = shard if where is None else where.get(name)
            check(name, f"a tensor in {shard}", said == shard, f"one in {said}" if said else "none", index)
            stored[name] = Stored(file, path / shard, place)
    missing = [name for name in where or {} if name not in stored]
    check("weight_map", f"{len(missing)} that no file has ({', '.join(missing[:3])})", not missing, "none", index)
    return {name: tensor for name, tensor in stored.items() if not re.fullmatch(BUFFERS, name)}


def are_equal(a: Stored, b: Stored) -> bool:
    """Whether two tensors are stored as the same bytes, compared piece by piece."""
    size = KINDS[a.place.dtype].itemsize * math.prod(a.place.shape)

    def piece(tensor: Stored, at: int) -> bytes:
        return os.pread(tensor.file.fileno(), min(PIECE, size - at), tensor.place.begin + at)

    same_kind = a.place[:2] == b.place[:2]
    return same_kind and all(piece(a, at) == piece(b, at) for at in range(0, size, PIECE))


def read_stops(fields: Mapping[str, Any], vocab: int, file: object) -> frozenset[int]:
    """The ids that end a text."""
    eos = fields.get("eos_token_id")
    ids = cast(list[Any], eos if isinstance(eos, list) else [] if eos is None else [eos])
    for i in ids:
        check("eos_token_id", f"{i!r:.60}", is_whole(i) and 0 <= i < vocab, f"ids from 0 to {vocab - 1}", file)
    return frozenset(ids)


def read_advice(path: Path, vocab: int) -> dict[str, Any]:
    """What generation_config.json says. It is advice: what cannot be read in it is told, and left out."""
    file, advice = path / GENERATION, dict[str, Any]()
    try:
        given = read_fields(file, path) if os.path.lexists(file) else {}
    except LlamaError as error:
        if error.field == "path":
            raise
        note(f"{error}: read over")
        return advice
    for name, value in given.items():
        if name == "eos_token_id" and isinstance(value, list):
            ids = [i for i in cast(list[Any], value) if is_whole(i) and 0 <= i < vocab]
            given[name] = ids or None
            if ids != value:
                note(f"{file}: {name}: got {value!r:.60}, expected ids from 0 to {vocab - 1}: others are read over")
        try:
            advice[name] = advised(name, given[name], vocab, file)
        except LlamaError as error:
            note(f"{error}: read over")
    return advice


def advised(name: str, value: Any, vocab: int, file: object) -> Any:
    """A field of generation_config.json that can be followed; of samplers that are off the number that says so."""
    if value is None:
        return None
    if name == "do_sample":
        check(name, f"{value!r:.60}", isinstance(value, bool), "true or false", file)
    if name == "top_k" and is_number(value) and value == int(value):
        value = min(max(int(value), 0), vocab)
    if name in OFF and not (is_number(value) and value == OFF[name]):
        check_sampling(NONE._replace(**{name: value}), vocab, file)
    if name == "eos_token_id":
        read_stops({name: value}, vocab, file)
    return value


def unsaid(vocab: int) -> Sampling:
    """How transformers draws where nothing is said."""
    return NONE._replace(top_k=min(USUAL, vocab))


def read_sampling(advice: Mapping[str, Any], vocab: int) -> Sampling | None:
    """How tokens are to be chosen, if anything is said about it; what is not said is as transformers has it. There the
    likeliest is taken unless `do_sample` is true."""
    draws = advice.get("do_sample")
    stated: dict[str, Any] = {name: advice[name] for name in Sampling._fields if advice.get(name) is not None}
    if draws is None and not stated:
        return None
    stated = {name: None if value == OFF[name] else value for name, value in stated.items()}
    sampling = unsaid(vocab)._replace(**stated)
    return sampling if draws else NONE._replace(repetition_penalty=sampling.repetition_penalty, temperature=0)


# ---- Writing ---------------------------------------------------------------------------------------------------------


def save_folder(model: Model, path: Path, dtype: str) -> None:
    """Write a folder that transformers 4 and 5 read, tensor by tensor."""
    kind, shapes = (
        {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype],
        all_tensors(HUGGING_FACE, model.config),
    )
    sizes = {name: KINDS[kind].itemsize * math.prod(shape) for name, shape in shapes.items()}
    tensor = to_named(HUGGING_FACE, model.params, model.config)

    def get(name: str) -> Float[np.ndarray, "..."]:
        return narrowed(tensor(name), dtype, name)

    save_description(model.config, model.tokenizer, path, dtype)
    shards, room = list[list[str]](), 0
    for name, size in sizes.items():
        if size > room:
            shards, room = [*shards, []], SHARD
        shards[-1].append(name)
        room -= size
    count = len(shards)
    names = [WEIGHTS] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(path / name, {tensor: shapes[tensor] for tensor in shard}, kind, get)
    if count > 1:
        where = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        write_fields(path / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where})


def write_fields(path: Path, fields: Mapping[str, Any]) -> None:
    """The inverse of `read_fields`."""
    path.write_text(to_json(fields, indent=2) + "\n")


def save_description(config: Config, tokenizer: Tokenizer | None, path: Path, dtype: str) -> None:
    """Begin a folder with all but its tensors."""
    path.mkdir()
    for name, data in (tokenizer_files(tokenizer) if tokenizer else {}).items():
        (path / name).write_bytes(data)
    ids, stops = token_ids(tokenizer), sorted(tokenizer.stops) if tokenizer else []
    write_fields(path / CONFIG, config_to_hf(config) | ids | {"dtype": dtype})
    sampling = write_sampling(tokenizer) if tokenizer and tokenizer.sampling else {}
    write_fields(path / GENERATION, ids | ({"eos_token_id": stops} if stops else {}) | sampling)


def token_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """The ids with which a text begins and ends; null where there is none, since transformers has defaults."""
    ends: dict[str, int | None] = {
        "bos_token_id": tokenizer and tokenizer.bos,
        "eos_token_id": tokenizer and tokenizer.eos,
    }
    if tokenizer and (pad := tokenizer.settings.get("pad_token_id", tokenizer.pad)) is not None:
        ends["pad_token_id"] = pad
    return ends


def write_sampling(tokenizer: Tokenizer) -> dict[str, Any]:
    """The inverse of `read_sampling`."""
    differing = tokenizer.differing(unsaid(len(tokenizer.pieces)))
    stated = {name: OFF[name] if value is None else value for name, value in differing.items()}
    if stated.get("temperature") == 0:
        del stated["temperature"]
        return {"do_sample": False, **stated}
    return {"do_sample": True, **stated}
