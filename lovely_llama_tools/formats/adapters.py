"""Adapters in PEFT's format, low-rank changes of a model's matrices: merged into their base as it is read, and written.

Hu et al. 2021, arXiv:2106.09685, §4.1: W + (α / r) B A; with rsLoRA, Kalajdzievski 2023, arXiv:2312.03732, α / √r.
"""

import math
import os
import re
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jaxtyping import Float

from lovely_llama import Config, check, is_number, is_whole, shapes

from ..strict_json import to_json
from ..tokens import Tokenizer, folder_tokenizer
from .hub import is_name
from .hugging_face import ADAPTED, ADAPTER, EMBED, INDEX, WEIGHTS
from .hugging_face_config import is_same, read_fields
from .layout import HUGGING_FACE, all_tensors, tensor
from .model import Checkpoint, Tensor, open_file, widened
from .safetensors import Place, read_tensor, scan_safetensors, write_arrays

WHOLE = ("orbax", "params.json", WEIGHTS, INDEX)  # one of them is in a model
OLD = "adapter_model.bin"
PREFIX = "base_model.model."  # of every name in the file
TURNED = ("embedding_A", "embedding_B")  # of the transpose: what multiplies ids in one-hot form
PARTS = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.weight)?")

# Fields of which these values are honoured, and any other makes another kind of adapter.
FIXED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "use_dora": (False,), "bias": ("none",), "fan_in_fan_out": (False,), "lora_bias": (False,),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"), "use_qalora": (False,),
    "ensure_weight_tying": (False,), "target_parameters": ([],), "layer_replication": ([],), "megatron_config": ({},),
    "trainable_token_indices": ([], {}), "alora_invocation_tokens": ([],), "arrow_config": ({},),
    "use_bdlora": (False,), "velora_config": ({},), "monteclora_config": ({},), "kappa_tune_config": ({},),
}  # fmt: skip
HONOURED = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
# Fields that change nothing once an adapter is trained: its tensors tell which matrices it has.
NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules", "inference_mode",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core",
    "modules_to_save", "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip


class Change(NamedTuple):
    """What an adapter makes of one tensor of its base, by names in its file."""

    whole: str | None  # what takes its place
    product: tuple[str, ...]  # A and B, whose product is added
    scale: float
    turned: bool  # whether they are of the transpose


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter, and no whole model beside it."""
    return os.path.exists(path / ADAPTER) and not any(os.path.exists(path / name) for name in WHOLE)


def base_of(path: Path) -> str | None:
    """The model that an adapter says it is for."""
    base = read_fields(path / ADAPTER, path).get("base_model_name_or_path")
    check("base_model_name_or_path", f"{base!r:.99}", base is None or isinstance(base, str), "a text", path / ADAPTER)
    return base or None


def open_adapter(path: Path, base: Checkpoint, files: ExitStack, allow: Collection[str] = ()) -> Checkpoint:
    """A checkpoint with the tensors of its base, changed as an adapter says. Sums are formed in float32."""
    settings = read_settings(path, allow)
    old = (path / OLD).exists() and not (path / ADAPTED).exists()
    check("path", f"weights in {OLD} alone", not old, f"{ADAPTED}, which peft's save_pretrained makes of them", path)
    file = files.enter_context(open_file(path / ADAPTED, path))
    places = scan_safetensors(file, path / ADAPTED)
    changes = read_changes(places, settings, base, path / ADAPTED)
    paths = {
        tensor(base.layout, at, leaf.shape)[0]: (tensor(HUGGING_FACE, at, leaf.shape), at[-1].name, leaf.shape)
        for at, leaf in jax.tree.leaves_with_path(shapes(base.config))
    }

    def part(name: str) -> Float[np.ndarray, "..."]:
        return widened(read_tensor(file, path / ADAPTED, name, places[name]))

    def get(name: str) -> Float[np.ndarray, "..."]:
        array, ((theirs, _), field, shape) = base.get(name), paths[name]
        if (change := changes.get(theirs)) is None:
            return array

        def placed(new: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
            if field in ("q", "k") and not base.layout.half_split:
                *heads, width, dim = shape
                new = new.reshape(*heads, 2, width // 2, dim).swapaxes(-3, -2)
            return new.reshape(array.shape)

        new = widened(array) if change.whole is None else placed(part(change.whole))
        if change.product:
            a, b = map(part, change.product)
            new = new + np.float32(change.scale) * placed((b @ a).T if change.turned else b @ a)
        return new

    changed = {name for name, ((theirs, _), *_) in paths.items() if theirs in changes}
    tensors = {name: Tensor(t.shape, "F32") if name in changed else t for name, t in base.tensors.items()}
    told = {name: (value, "honoured" if name in (*FIXED, *HONOURED) else "ignored") for name, value in settings.items()}
    fields = {**base.fields, **{f"adapter.{name}": said for name, said in told.items()}}
    return base._replace(
        file=path, format=f"{base.format} with PEFT's adapter", fields=fields, tensors=tensors, get=get,
        tokenizer=own_tokenizer(path, base),
    )  # fmt: skip


def own_tokenizer(path: Path, base: Checkpoint) -> Tokenizer | None:
    """The tokenizer that lies beside an adapter, as it was trained with it; else that of its base."""
    own, other = folder_tokenizer(path, base.config.vocab), base.tokenizer
    if own is None or other is None:
        return own or other
    return own._replace(stops=own.stops | other.stops, sampling=other.sampling, unstated=other.unstated)


def read_settings(path: Path, allow: Collection[str]) -> dict[str, Any]:
    """adapter_config.json. A null counts as absent."""
    file = path / ADAPTER
    stated = {name: value for name, value in read_fields(file, path).items() if value is not None}
    for name, values in FIXED.items():
        value = stated.get(name, values[0])
        good = any(is_same(value, known) for known in values)
        check(name, f"{value!r:.60}", good, " or ".join(f"{known!r}" for known in values), file)
    check("peft_type", "nothing", "peft_type" in stated, "'LORA'", file)
    for name, value in stated.items():
        known = name in (*FIXED, *HONOURED) or name in NEUTRAL or name in allow
        check(name, f"{value!r:.60}", known, f"no field that is unknown here (--allow {name} reads on)", file)
    rank, rooted = cast(Any, stated.get("r")), stated.get("use_rslora", False)
    check("r", f"{rank!r:.60}", is_whole(rank) and rank > 0, "a whole number above 0", file)
    check("use_rslora", f"{rooted!r:.60}", isinstance(rooted, bool), "true or false", file)
    alpha = stated.get("lora_alpha", 8)  # peft's default
    check("lora_alpha", f"{alpha!r:.60}", is_number(alpha), "a finite number", file)
    for name, kind in (("rank_pattern", is_whole), ("alpha_pattern", is_number)):
        values: Any = stated.get(name, {})
        good = isinstance(values, dict) and all(kind(v) and v > 0 for v in cast(dict[str, Any], values).values())
        check(name, f"{values!r:.60}", good, "numbers above 0 by the names of modules", file)
    return {"lora_alpha": alpha, "use_rslora": rooted, "rank_pattern": {}, "alpha_pattern": {}, **stated}


def read_changes(
    places: Mapping[str, Place], settings: Mapping[str, Any], base: Checkpoint, file: Path
) -> dict[str, Change]:
    """What an adapter makes of tensors, by their names in transformers. Each in the file must belong to one of them."""
    wanted, found = all_tensors(HUGGING_FACE, base.config), dict[str, dict[str, str]]()
    for name in places:
        own = name.removeprefix(PREFIX)
        parts = PARTS.fullmatch(own)
        target = (parts[1] if parts else own.removesuffix(".weight")).replace(".base_layer", "") + ".weight"
        known = name.startswith(PREFIX) and target in wanted
        check(name, "a tensor of this name", known, "one for a matrix of the base", file)
        shared = base.config.tied and target == EMBED  # for tokens alone, of what are two matrices then
        check(name, "a change of an embedding that is tied", not shared, "an untied base", file)
        found.setdefault(target, {})[f"{parts[2] or ''}{parts[3]}" if parts else "whole"] = name
    check("tensors", "none", bool(found), "some", file)
    changes = dict[str, Change]()
    for target, names in found.items():
        shape, module = wanted[target], target.removesuffix(".weight")
        rank = int(pattern(settings["rank_pattern"], module, settings["r"]))
        alpha = pattern(settings["alpha_pattern"], module, settings["lora_alpha"])
        sizes = {"whole": shape, "A": (rank, shape[-1]), "B": (shape[0], rank)}
        sizes |= dict(zip(TURNED, ((rank, shape[0]), (shape[-1], rank)), strict=True))
        pair = next((pair for pair in (("A", "B"), TURNED) if {*pair} <= {*names} and len(shape) == 2), ())
        good = {*names} - {"whole"} == {*pair}
        check(target, ", ".join(sorted(names)), good, "A and B, a whole tensor, or all of them", file)
        for side, name in names.items():
            got, size = places[name].shape, sizes[side]
            check(name, f"the shape {got}", got == size, f"{size}, of rank {rank}", file)
        scale = alpha / (math.sqrt(rank) if settings["use_rslora"] else rank)
        changes[target] = Change(names.get("whole"), tuple(names[side] for side in pair), scale, pair == TURNED)
    return changes


def pattern(values: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value for a module: that of the first pattern which its name, or an end of it, matches."""
    for key, value in values.items():
        try:
            if re.fullmatch(rf"(.*\.)?({key})", module):
                return value
        except re.error:
            check("rank_pattern", f"{key!r:.60}", False, "names of modules, or regular expressions", ADAPTER)
    return default


# ---- Writing ---------------------------------------------------------------------------------------------------------


def save_adapter(path: Path, adapters: Any, config: Config, base: str, rank: int, alpha: float | int) -> None:
    """Write adapters of stacked layers as a folder that peft reads; `base` is the model that they are for."""
    base = base if is_name(base) else os.path.abspath(base)
    arrays, modules = dict[str, Float[np.ndarray, "..."]](), set[str]()
    for at, leaf in jax.tree.leaves_with_path(shapes(config)):
        adapter: Any = getattr(getattr(adapters, at[-2].name), at[-1].name) if len(at) == 4 else None
        if adapter is None:
            continue
        name, (layer, field) = tensor(HUGGING_FACE, at, leaf.shape)[0].removesuffix(".weight"), (at[1].idx, at[-1].name)
        a, b = (np.asarray(side[layer], np.float32) for side in adapter)
        if field in ("q", "k"):
            *heads, width, _ = b.shape
            b = b.reshape(*heads, width // 2, 2, rank).swapaxes(-3, -2)
        arrays[f"{PREFIX}{name}.lora_A.weight"] = a.reshape(rank, -1)
        arrays[f"{PREFIX}{name}.lora_B.weight"] = b.reshape(-1, rank)
        modules.add(name.rpartition(".")[2])
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank, "lora_alpha": alpha,
        "target_modules": sorted(modules), "bias": "none", "fan_in_fan_out": False, "lora_dropout": 0.0,
        "use_rslora": False, "use_dora": False, "modules_to_save": None, "inference_mode": True,
    }  # fmt: skip
    path.mkdir()
    write_arrays(path / ADAPTED, arrays)
    (path / ADAPTER).write_text(to_json(settings, indent=2) + "\n")
