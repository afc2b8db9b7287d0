"""Recordings in files of torch.save and in folders: SGLang's dumps, transformers' debug tree, or an array a file."""

import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from jax import numpy as jnp

from lovely_llama import LlamaError, check

from ...extras import counted
from ...formats import pth
from ...formats.model import blamed_on
from ...strict_json import read_json
from ...tokens.base import open_file

Arrays = dict[str, Any]
Read = Callable[[Path, Path | None], Arrays]  # a file of arrays, in a folder

FILES = 100_000  # in a folder
DEPTH, VALUES = 32, 100_000  # in a file
LARGEST = 2**28  # bytes of a tree in JSON
DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8")


# ---- torch.save ------------------------------------------------------------------------------------------------------


def read_torch(file: BinaryIO, path: Path) -> Arrays:
    """The tensors in a file of torch.save, as a zip file or as a pickle alone; of nested ones the names have dots.

    With weights_only, torch calls nothing that a pickle names. A single tensor has the name of the file.
    """
    torch = pth.torch()
    if zipfile.is_zipfile(file):
        with blamed_on(path):
            pth.scan_zip(Path(os.path.realpath(path)))
    file.seek(0)
    try:
        with warnings.catch_warnings(action="ignore"):
            found: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"{named[1]}, which is code" if named else f"what torch refuses with {type(error).__name__}"
        raise LlamaError(path, "contents", what, "tensors and nothing else") from error

    def is_leaf(value: Any) -> bool:
        listed = cast(list[Any], value) if isinstance(value, list) else []
        return isinstance(value, torch.Tensor) or (bool(listed) and all(type(i) is int for i in listed))

    tensors = walk(found, is_leaf, path)
    arrays = {name or path.stem: as_array(tensor, torch) for name, tensor in tensors}
    return {name: array for name, array in arrays.items() if array is not None}


def walk(found: Any, is_leaf: Callable[[Any], bool], file: Path, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves in nested dicts and lists, by their paths. What contains itself is not followed for ever."""
    waiting, count = [(name, found, DEPTH)], 0
    while waiting:
        name, value, depth = waiting.pop()
        count += 1
        check("contents", f"more than {VALUES:,} values", count <= VALUES, "a recording", file)
        if is_leaf(value):
            yield name, value
        elif isinstance(value, dict | list | tuple) and depth:
            named = isinstance(value, dict)
            parts = cast(dict[Any, Any], value).items() if named else enumerate(cast(list[Any], value))
            waiting += [(f"{name}.{key}" if name else str(key), part, depth - 1) for key, part in parts][::-1]


def as_array(tensor: Any, torch: Any) -> Any:
    """A tensor or a list as numpy's array; None if a tensor is not plain numbers, or more of them than are stored."""
    if isinstance(tensor, list):
        return np.array(cast(list[Any], tensor))
    kind = str(tensor.dtype).removeprefix("torch.")
    plain = str(tensor.layout) == "torch.strided" and str(tensor.device) == "cpu" and kind in DTYPES
    if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return None
    tensor = tensor.detach()
    return tensor.contiguous().view(torch.uint16).numpy().view(jnp.bfloat16) if kind == "bfloat16" else tensor.numpy()


# ---- Folders ---------------------------------------------------------------------------------------------------------


def read_folder(folder: Path, read: Read) -> Arrays:
    """The arrays in a folder, whose kind shows in the names of its files."""
    names = list[str]()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                names.append(entry.name + "/" * entry.is_dir())
                check("files", f"more than {FILES:,}", len(names) <= FILES, f"at most {FILES:,}", folder)
    except OSError as error:
        raise LlamaError(folder, "path", error.strerror, "a folder that can be read") from error
    for pattern, reader in READERS.items():
        if found := sorted(name for name in names if re.fullmatch(pattern, name)):
            return reader(folder, found, read)
    expected = "a dump of SGLang's, a debug tree of transformers', or files of arrays: npy, npz, safetensors, pt"
    raise LlamaError(folder, "contents", counted(len(names), "file") + " of other kinds", expected)


def only(names: Sequence[str], what: str, folder: Path) -> str:
    """The only one."""
    shown = ", ".join(name.rstrip("/") for name in names[:3]) + ", …" * (len(names) > 3)
    check(what, f"{len(names)} ({shown})", len(names) == 1, "one: name it in place of the folder that has them", folder)
    return names[0]


def inner(folder: Path, names: Sequence[str], read: Read) -> Arrays:
    """The recording in the only folder in a folder: SGLang writes one for each process, or for each run."""
    return read_folder(folder / only(names, "recordings", folder).rstrip("/"), read)


def loose(folder: Path, names: Sequence[str], read: Read) -> Arrays:
    """Files of one array, called by the files' names, and files of several, which keep their names."""
    arrays = Arrays()
    for file in names:
        found, stem = read(folder / file, folder), Path(file).stem
        for name, array in found.items() if len(found) != 1 else [(stem, *found.values())]:
            check(name, f"another array of this name in {file}", name not in arrays, "different names", folder)
            arrays[name] = array
    return arrays


def check_prompt(found: Mapping[str, Any], file: Path) -> None:
    """Refuse a pass over several prompts, or over a part of one: the server keeps what prompts have in common."""
    prompts, start = np.size(found.get("seq_lens", 0)), np.ravel(found.get("positions", 0))[:1].tolist()
    check("seq_lens", counted(prompts, "prompt"), prompts == 1, "one", file)
    check("positions", f"a pass that begins at {start}", start == [0], "[0], as with --disable-radix-cache", file)


# ---- SGLang ----------------------------------------------------------------------------------------------------------

IDS = ".forward_batch_info.input_ids"


def passes(folder: Path, names: Sequence[str], read: Read) -> Arrays:
    """The prompt's pass of --debug-tensor-dump-output-folder: what the innermost modules returned, by their paths.

    sglang/srt/debug_utils/tensor_dump_forward_hook.py: each file holds a pass, but what the model under the top
    returned, and the logits of the last token, are in the file of the pass after it. The prompt's is the pass with the
    most tokens, and of several the last: the server warms up with a prompt of its own.
    """
    sizes = list[int]()
    for name in names:
        arrays = read(folder / name, folder)
        ids = [key for key in arrays if key.endswith(IDS)]
        check("input_ids", f"{len(ids)} arrays", len(ids) == 1, "one in a pass", folder / name)
        sizes.append(arrays[ids[0]].size)
    best = max(range(len(names)), key=lambda i: (sizes[i], i))
    arrays, after = (
        {} if name is None else read(folder / name, folder) for name in (names[best], following(names, best))
    )
    top = next(key.removesuffix(IDS) for key in arrays if key.endswith(IDS))
    about = {key.rpartition(".")[2]: array for key, array in arrays.items() if ".forward_batch_info." in key}
    check_prompt(about, folder / names[best])
    within = re.compile(rf"{re.escape(top)}\.(?!\d+$|pp_proxy_tensors\.).*")
    own = {key: array for key, array in arrays.items() if within.fullmatch(key)}
    late = {key: array for key, array in after.items() if not within.fullmatch(key)}
    return without_copies(own) | late | {"input_ids": about["input_ids"]}


def number(name: str) -> int:
    """The number of a pass, in the name of its file."""
    return int(name[4:-3])


def following(names: Sequence[str], i: int) -> str | None:
    """The file of the pass after the i-th, if there is one."""
    return next((name for name in names[i + 1 : i + 2] if number(name) == number(names[i]) + 1), None)


def without_copies(arrays: Arrays) -> Arrays:
    """The arrays, with rotated queries and keys of the last layer alone where those of all layers are the same.

    The layers share the module, which has a hook for each of them: what it returned last is recorded for all.
    """
    layers = dict[str, list[str]]()
    for name in arrays:
        if found := re.fullmatch(r"(.*layers)\.(\d+)(\.self_attn\.rotary_emb.*)", name):
            layers.setdefault(found[1] + found[3], []).append(name)
    for names in layers.values():
        names.sort(key=lambda name: int(re.findall(r"layers\.(\d+)", name)[-1]))
        if len({arrays[name].tobytes() for name in names}) == 1:
            arrays = {name: array for name, array in arrays.items() if name not in names[:-1]}
    return arrays


def dumper(folder: Path, names: Sequence[str], read: Read) -> Arrays:
    """The prompt's step of SGLang's dumper: a value a file, with its name and more in the file's name.

    sglang/srt/debug_utils/dumper.py: files are called key=value___key=value.pt, with the keys step, rank, dump_index,
    name and, within a layer, layer_id. They hold the tensor as "value", beside "meta"; older ones the tensor alone.
    """
    steps, ranks = dict[int, dict[str, str]](), set[str]()
    for file in sorted(names, key=lambda file: whole(tags(file).get("dump_index", ""))):
        about = tags(file)
        ranks.add(about.get("rank", "0"))
        if not about.get("name", "").startswith(("param__", "grad__")):  # parameters and gradients
            step = whole(about.get("step", about.get("forward_pass_id", "")))
            steps.setdefault(step, {}).setdefault(dumped(about), file)
    check("name", "none", bool(steps), "values other than parameters and gradients", folder)
    check("rank", ", ".join(sorted(ranks)[:8]), len(ranks) == 1, "the files of one process", folder)

    def values(step: int, name: str) -> Arrays:
        file = steps[step].get(name)
        found = read(folder / file, folder) if file else {}
        kept = {key: re.match(rf"(?:value|{re.escape(str(file)[:-3])})(\..*|)$", key) for key in found}
        return {name + match[1]: found[key] for key, match in kept.items() if match}

    def size(step: int) -> int:
        return sum(array.size for array in values(step, "input_ids").values())

    best = max(sorted(steps), key=lambda step: (size(step), step))
    arrays = {key: array for name in steps[best] for key, array in values(best, name).items()}
    check_prompt(arrays, folder)
    return arrays


def tags(file: str) -> dict[str, str]:
    """What the name of a file says."""
    return dict(part.split("=", 1) for part in file.removesuffix(".pt").split("___") if "=" in part)


def whole(digits: str) -> int:
    """A number in a file's name; 0 if it is none."""
    return int(digits) if re.fullmatch(r"\d{1,18}", digits) else 0


def dumped(about: Mapping[str, str]) -> str:
    """The name of a value: that of the module which returned it, or with ".input" was given it; or a layer's own."""
    name, layer = about.get("name", ""), about.get("layer_id")
    if not name.startswith("non_intrusive__"):
        return f"layers.{layer}.{name}" if layer else name
    name = name.removeprefix("non_intrusive__")
    if layer:  # the path of a module that layers share is in the first of them
        name = re.sub(r"\blayers\.\d+\.", f"layers.{layer}.", name, count=1)
    return re.sub(r"\.output(?=\.|$)", "", re.sub(r"\.inputs\.0$", ".input", name))


# ---- transformers ----------------------------------------------------------------------------------------------------


def debug_tree(folder: Path, names: Sequence[str], read: Read) -> Arrays:
    """What transformers' modules were given (".input") and returned, by their paths, and the ids.

    transformers/model_debugging_utils.py: a tree of calls, each with module_path, inputs, outputs and children. A
    tensor is a dict with shape, dtype and value, which with use_repr=False is the path of a file. Only modules without
    others in them have outputs.
    """
    path = folder / only(names, "debug trees", folder)
    with open_file(path, folder) as file:
        size = os.fstat(file.fileno()).st_size
        check("size", counted(size, "byte"), size <= LARGEST, f"at most {LARGEST}", path)
        tree = read_json(file.read(LARGEST + 1), path)

    def array(leaf: Any) -> Any:
        how = "the name of a file: model_addition_debugger_context(…, use_repr=False)"
        check("value", "numbers as text", isinstance(leaf["value"], str), how, path)
        found = read(folder / leaf["value"], folder)
        check("tensors", len(found), len(found) == 1, 1, folder / leaf["value"])
        return next(iter(found.values()))

    arrays = Arrays()
    for call in calls_in(tree, path):
        module = str(call["module_path"]).partition(".")[2]  # behind the name of the outermost one's class
        given = [*walk(call.get("inputs"), is_tensor, path)]
        for name, leaf in given:
            ids = name.endswith(".input_ids") or (module.endswith("embed_tokens") and name == "args.0")
            if ids and "input_ids" not in arrays:
                arrays["input_ids"] = array(leaf)
        for leaf in [leaf for _, leaf in given if "float" in str(leaf["dtype"])][:1]:
            arrays[f"{module}.input"] = array(leaf)
        for name, leaf in walk(call.get("outputs"), is_tensor, path, module):
            arrays[name] = array(leaf)
    return arrays


def calls_in(tree: dict[str, Any], path: Path) -> Iterator[dict[str, Any]]:
    """The calls in a tree, in their order."""
    waiting: list[Any] = [tree]
    while waiting:
        call: Any = waiting.pop()
        good = isinstance(call, dict) and "module_path" in call
        check("module_path", "none", good, "one for each call", path)
        yield cast(dict[str, Any], call)
        children: Any = cast(dict[str, Any], call).get("children", [])
        check("children", f"a {type(children).__name__}", isinstance(children, list), "a list", path)
        waiting += cast(list[Any], children)[::-1]


def is_tensor(value: Any) -> bool:
    """Whether this is a tensor of a debug tree."""
    return isinstance(value, dict) and {"shape", "dtype", "value"} <= cast(dict[str, Any], value).keys()


# The first that fits any name in a folder reads it. Names of folders end in a slash.
READERS: Mapping[str, Callable[[Path, Sequence[str], Read], Arrays]] = {
    r".*_debug_tree_FULL_TENSORS\.json": debug_tree,
    r"Pass\d+\.pt": passes,
    r"(?:.*___)?name=.*\.pt": dumper,
    r".*\.(?:npy|npz|safetensors|pt|pth|bin)": loose,
    r"TP\d+_PP\d+_Rank\d+_pid\d+/|dump_.*/": inner,
}
