"""The file as a whole: it reads from top to bottom, works on its own, and states every shape in a checked signature."""

import ast
import inspect
import re
import shutil
import subprocess
import sys
import typing
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from builders import SMALL, layers_of, random_params
from jax import numpy as jnp
from jaxtyping import AbstractArray, Array, TypeCheckError

import lovely_llama as ll

FILE = Path(ll.__file__)
SOURCE = FILE.read_text()
TREE = ast.parse(SOURCE)
RULERS = {line.split()[2].rstrip("."): n for n, line in enumerate(SOURCE.splitlines(), 1) if line.startswith("# ---- ")}

# ---- The file --------------------------------------------------------------------------------------------------------


def part_of(line: int) -> int:
    return max((int(part) for part, ruler in RULERS.items() if ruler < line), default=0)


def bound_by(node: ast.AST) -> list[str]:
    """The names that a module-level statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", ast.Pass())]
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def test_the_file_has_eight_parts_and_is_short() -> None:
    lines = SOURCE.splitlines()
    assert [*RULERS] == list("12345678")
    assert len(lines) <= 740
    assert lines.index(next(line for line in lines if line.startswith("def rms_norm("))) < 135
    assert RULERS["4"] - RULERS["2"] <= 190
    assert max(map(len, lines)) <= 120
    assert bound_by(TREE.body[-1]) == ["__all__"]


def test_references_point_upwards_only() -> None:
    """A definition refers only to names defined above it, or to checks, which stand below the maths."""
    defined, everything = set[str](), {name for node in TREE.body for name in bound_by(node)}
    checks = {name for node in TREE.body if part_of(node.lineno) == 7 for name in bound_by(node)}
    for node in TREE.body:
        for name in ast.walk(node):
            if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Load) and name.id in everything:
                known = {*defined, *bound_by(node), *checks}
                assert name.id in known, f"line {name.lineno}: {name.id} is defined below"
        defined.update(bound_by(node))


def test_the_maths_is_neither_compiled_nor_differentiated() -> None:
    """The batch axis appears in part 5 alone. Compiling, differentiating and devices are for who uses the library."""
    for node in ast.walk(TREE):
        names = [node.attr] if isinstance(node, ast.Attribute) else [node.name] if isinstance(node, ast.alias) else []
        assert not {*names} & {"jit", "grad", "value_and_grad", "checkpoint", "sharding", "scan"}, names
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "*batch" in node.value:
            assert part_of(node.lineno) == 5, f"line {node.lineno}: {node.value}"


TABLE = {*re.findall(r"(?:^ {4}| {3})(\w+) {2,}[a-z]", (ll.__doc__ or "").split("Others")[0], re.MULTILINE)}
AXES = TABLE | {"ctx", "seq", "pairs", "n", "batch", "rank", "inputs", "outputs"}


def test_every_vmap_says_which_axis_it_adds() -> None:
    mapped = [line for line in SOURCE.splitlines() if re.search(r"\bvmap\(", line)]
    assert len(mapped) > 8
    for line in mapped:
        added = re.search(r"# adds (\w+)", line)
        assert added and added[1] in AXES, line


def test_the_table_of_axes_is_complete() -> None:
    """Every axis in an annotation is described at the top; the table is of those that are fields of `Config`."""
    annotated = re.findall(r'\b(?:Float|Int|Integer|Bool)\[[^"\]]+, "([^"]*)"\]', SOURCE)
    assert len(annotated) > 50
    assert {axis.lstrip("*") for text in annotated for axis in text.split()} - {"..."} <= AXES
    of_parameters = {axis for names in jax.tree.leaves(ll.axes(SMALL)) for axis in names.split()}
    assert of_parameters | {"layers"} == TABLE and {*ll.Config.__dataclass_fields__} >= TABLE
    assert {f"`{axis}`" for axis in AXES - TABLE} <= {*re.findall(r"`\w+`", ll.__doc__ or "")}


SEAMS = {"attend", "attention", "samplers", "draw"}


def test_functions_have_few_arguments() -> None:
    """At most six, but for the seams and the constants of AdamW."""
    for node in ast.walk(TREE):
        if isinstance(node, ast.FunctionDef):
            assert {argument.arg for argument in node.args.kwonlyargs} <= SEAMS, node.name
            constants = {"betas", "eps"} if node.name == "adamw" else set[str]()
            arguments = {argument.arg for argument in node.args.args} - {"self"} - constants
            assert len(arguments) <= 6, node.name


def test_no_line_assigns_inside_an_argument() -> None:
    assert not [node.lineno for node in ast.walk(TREE) if isinstance(node, ast.NamedExpr)]


def test_imports_are_limited() -> None:
    allowed = {"jax", "jaxtyping", "numpy", "dataclasses", "functools", "math", "typing", "collections"}
    imported = set[str]()
    for node in ast.walk(TREE):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert imported <= allowed
    assert not re.search(r"__import__|import_module|\bopen\(|\bprint\(|\binput\(", SOURCE)


def test_public_names_exist_and_are_documented() -> None:
    for name in ll.__all__:
        public = getattr(ll, name)
        if callable(public):
            assert (inspect.unwrap(public).__doc__ or "").strip(), name
    starred = dict[str, Any]()
    exec("from lovely_llama import *", starred)
    assert starred.keys() - {"__builtins__"} == {*ll.__all__}


ALONE = """
import sys, jax, lovely_llama as ll
config = ll.CONFIGS["stories260k"]
params = ll.init(jax.random.key(0), config)
model = jax.jit(lambda tokens: ll.logits(params, tokens, config))
assert model(jax.numpy.arange(7)).shape == (7, config.vocab)
assert not [name for name in sys.modules if "lovely_llama_tools" in name]
print(ll.__file__)
"""


def test_a_copy_works_on_its_own(tmp_path: Path) -> None:
    shutil.copy(FILE, tmp_path)
    command = [sys.executable, "-c", ALONE]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == tmp_path / FILE.name


# ---- Signatures ------------------------------------------------------------------------------------------------------

FUNCTIONS = {
    name: function
    for name, function in inspect.getmembers(ll, inspect.isfunction)
    if function.__module__ == ll.__name__ and 2 <= part_of(inspect.unwrap(function).__code__.co_firstlineno) <= 6
}
# Arguments that are numbers, of Python or in an array.
NUMBERS = {"return", "start", "last", "first", "penalty", "t", "k", "p", "rate", "eps", "decay", "limit", "scale"}
PLAIN = NUMBERS - {"first", "rate"}
WITHOUT_ARRAYS = {  # some have trees of them
    "rope_frequencies", "empty_cache", "axes", "shapes", "count", "clip", "moments", "adapt", "learning_rate",
}  # fmt: skip


def parts(annotation: Any) -> Iterator[Any]:
    """An annotation and, recursively, its type arguments."""
    yield annotation
    for part in typing.get_args(annotation):
        yield from parts(part)


def axes(annotation: Any) -> list[str] | None:
    """The axis names in an array annotation; None for any other annotation."""
    found = [part for part in parts(annotation) if isinstance(part, type) and issubclass(part, AbstractArray)]
    return found[0].dim_str.split() if found else None


def hints(function: Any) -> dict[str, Any]:
    return inspect.unwrap(function).__annotations__


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_array_has_its_axes_in_the_signature(name: str) -> None:
    annotations = hints(FUNCTIONS[name])
    assert set(annotations) == {*inspect.signature(FUNCTIONS[name]).parameters, "return"}
    for parameter, annotation in annotations.items():
        assert Array not in [p for p in parts(annotation) if "Callable" not in repr(annotation)], parameter
    arrays = [parameter for parameter, annotation in annotations.items() if axes(annotation) is not None]
    assert (name in WITHOUT_ARRAYS) == (not {*arrays} - PLAIN)


def arguments(name: str) -> dict[str, Any]:
    """Valid arguments, chosen by parameter name or made from the axes in the annotation."""
    params, sizes = (
        random_params(SMALL),
        {**vars(SMALL), "batch": 2, "seq": 5, "pairs": SMALL.head_dim // 2, "n": 7},
    )
    blocks, caches = layers_of(params), ll.empty_cache(SMALL, SMALL.ctx, jnp.float32)
    w = blocks[0].attn if name == "attention" else blocks[0]
    cache = caches[0] if name in ("attention", "block") else caches
    known = {
        "first": 0 if name == "attend" else jnp.zeros(sizes["seq"], jnp.int32), "last": 3,
        "seq": sizes["seq"], "where": ll.positions(0, sizes["seq"], SMALL),
        "w": w, "params": params, "config": SMALL, "cache": cache, "start": jnp.array(0), "eps": 1e-5,
        "position": jnp.array(3), "rng": jax.random.key(0), "penalty": 1.5, "t": 0.5, "k": 3, "p": 0.5,
        "sampling": ll.Sampling(), "samplers": ll.SAMPLERS, "draw": ll.categorical,
        "attend": ll.attend, "attention": ll.attention,
        "gradients": params, "moments": ll.moments(params), "rate": 0.1, "decay": 0.1, "betas": (0.9, 0.99),
    }  # fmt: skip

    def value(parameter: str, annotation: Any) -> Any:
        if parameter in known and not (name == "attend" and parameter == "keys"):
            return known[parameter]
        names = axes(annotation)
        assert names is not None, parameter
        kind = jnp.int32 if "Int" in repr(annotation) else bool if "Bool[" in repr(annotation) else jnp.float32
        return jnp.ones([sizes[axis] for axis in names if axis[0] not in "*."] or [2, 3], kind)

    return {p: value(p, a) for p, a in hints(FUNCTIONS[name]).items() if p != "return"}


def wrong_axes() -> Iterator[tuple[str, str, int | None]]:
    """For every array argument: one extra axis, and each axis it shares with another argument, made too long."""
    for name in sorted(set(FUNCTIONS) - WITHOUT_ARRAYS - {"float32_or_wider"}):
        found = {p: a for p, annotation in hints(FUNCTIONS[name]).items() if (a := axes(annotation)) is not None}
        for parameter, names in found.items():
            if parameter in NUMBERS or names[:1] == ["*batch"]:
                continue
            yield name, parameter, None
            for i, axis in enumerate(names):
                if any(axis in others for p, others in found.items() if p not in (parameter, "return")):
                    yield name, parameter, i


@pytest.mark.parametrize(("name", "parameter", "axis"), list(wrong_axes()))
def test_a_wrong_axis_is_refused(name: str, parameter: str, axis: int | None) -> None:
    values = arguments(name)
    if axis is None:
        array = values[parameter]
        values[parameter] = jax.random.split(array, 2) if parameter == "rng" else array[None]
    else:
        array = values[parameter]
        values[parameter] = jnp.array(np.pad(array, [(0, int(i == axis)) for i in range(array.ndim)]))
    with pytest.raises((TypeCheckError, TypeError)):  # TypeError: inside, if a matrix in a tuple does not fit
        jax.eval_shape(partial(FUNCTIONS[name], **values))


def test_axes_of_batches_that_do_not_match_are_refused() -> None:
    """In every argument, wherever the batch has one axis too many, or a token too few."""
    params, ids = random_params(SMALL), jnp.ones((3, 5), jnp.int32)
    for other in (ids[None], ids[:, :4], ids[:2]):
        for wrong in (
            lambda other=other: ll.loss(params, ids, other, SMALL),
            lambda other=other: ll.loss(params, ids, ids, SMALL, other),
            lambda other=other: ll.cross_entropy(jnp.ones((3, 5, 7)), other),
        ):
            with pytest.raises(TypeCheckError):
                wrong()


@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - WITHOUT_ARRAYS))
def test_matching_axes_are_accepted(name: str) -> None:
    """The control for the test above: without the wrong axis, the same arguments pass."""
    jax.eval_shape(partial(FUNCTIONS[name], **arguments(name)))
