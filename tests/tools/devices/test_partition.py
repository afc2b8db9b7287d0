"""A model sharded over devices computes the same as on one, and no device gathers more than it should."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from builders import layers_of
from jax.sharding import PartitionSpec

from lovely_llama import Config, LlamaError, shapes
from lovely_llama_tools.devices.partition import specs

# Sizes differ from one another, and each is a multiple of 8 where a mesh may split it so.
COMMON = """
import re
from dataclasses import replace
from functools import partial
from math import prod
import jax
import numpy as np
from asserts import assert_close
from builders import SMALL, random_params
from jax.sharding import Mesh, NamedSharding, PartitionSpec, set_mesh
import lovely_llama
from lovely_llama import adamw, clip, moments
from lovely_llama_tools.devices.partition import specs
from lovely_llama_tools.fast import accumulate, logits, loss

AXES = ("data", "fsdp", "tensor", "seq")
config = replace(SMALL, vocab=40, dim=16, layers=2, kv_heads=4, q_per_kv=2, hidden_dim=24)
tokens = np.random.default_rng(0).integers(0, config.vocab, (8, 24), np.int32)
targets = tokens[:, ::-1]
same_loss = partial(jax.jit, static_argnames="config")(loss)
gradients = partial(jax.jit, static_argnames="config")(jax.value_and_grad(loss))
plain_gradients = partial(jax.jit, static_argnames="config")(jax.value_and_grad(lovely_llama.loss))

def placed(config, sizes, explicit=False):
    mesh = jax.make_mesh(sizes, AXES, devices=jax.devices()[: prod(sizes)])  # its axes are explicit by default
    mesh = mesh if explicit else Mesh(mesh.devices, AXES)
    put = lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec))
    params, parts = random_params(config), specs(config, mesh.shape)
    params = jax.tree.map(put, params, parts)
    for leaf, spec in zip(jax.tree.leaves(params), jax.tree.leaves(parts), strict=True):
        names = [name for part in spec if part for name in ((part,) if isinstance(part, str) else part)]
        assert leaf.addressable_shards[0].data.size * prod(mesh.shape[name] for name in names) == leaf.size
    return mesh, params, (put(ids, PartitionSpec(("data", "fsdp"), "seq")) for ids in (tokens, targets))
"""

GRADIENTS = """
for heads, tied, meshes in {cases}:
    config = replace(config, kv_heads=heads, q_per_kv=8 // heads, tied=tied)
    want = plain_gradients(random_params(config), tokens, targets, config)
    for sizes in meshes:
        mesh, params, rows = placed(config, sizes)
        with set_mesh(mesh):
            assert_close(gradients(params, *rows, config), want, 1e-5)
        print(heads, *sizes)
"""

# Two micro-batches, clipped, into AdamW; and logits, by jax's own way to leave axes to XLA.
EXPLICIT = """
def step(params, tokens, targets, config, split):
    loss_and_gradients = accumulate(partial(loss, config=config), params, split(tokens), split(targets))
    gradients, norm = clip(loss_and_gradients[1], 0.1)
    return loss_and_gradients[0], norm, *adamw(params, gradients, moments(params), 1e-3, 0.1)

def packed(params, tokens, targets, config):
    return loss(params, tokens, targets, config, first=jax.numpy.zeros_like(tokens))

for heads, tied, sizes in {cases}:
    config = replace(config, kv_heads=heads, q_per_kv=8 // heads, tied=tied)
    split = lambda ids: ids.reshape(2, 4, -1)
    parts = PartitionSpec(None, ("data", "fsdp"), "seq")
    split_over = lambda ids: ids.reshape(2, 4, 24, out_sharding=parts)
    compiled = jax.jit(step, static_argnames=("config", "split"))
    single = random_params(config)
    want = compiled(single, tokens, targets, config, split)
    scores = logits(single, tokens[0], config)
    mesh, params, rows = placed(config, sizes, True)
    with set_mesh(mesh):
        rows = [*rows]
        got = compiled(params, *rows, config, split_over)
        assert_close(got, want, 1e-5)
        for new, old in zip(jax.tree.leaves(got[2]), jax.tree.leaves(params), strict=True):
            assert new.sharding.is_equivalent_to(old.sharding, new.ndim)
        assert_close(jax.jit(packed, static_argnames="config")(params, *rows, config), want[0], 1e-5)
        model = jax.sharding.auto_axes(partial(logits, config=config), out_sharding=PartitionSpec("seq", "tensor"))
        assert_close(jax.jit(model)(params, jax.device_put(tokens[0], PartitionSpec("seq"))), scores, 1e-5)
    print(heads, *sizes)
"""

EVERY = """
config = replace(config, kv_heads=8, q_per_kv=1, layers=1)
want = same_loss(random_params(config), tokens, targets, config)
for sizes in {meshes}:
    mesh, params, rows = placed(config, sizes)
    with set_mesh(mesh):
        assert_close(same_loss(params, *rows, config), want, 1e-6)
    print(*sizes)
"""

# The arrays of each kind of collective, by their shapes in the compiled program.
COMPILED = """
mesh, params, rows = placed(config, {mesh})
with set_mesh(mesh):
    text = gradients.lower(params, *rows, config).compile().as_text()
print("gathered", *re.findall(r"= \\w+\\[([\\d,]+)\\]\\S* all-gather", text))
print("all", *set(re.findall(r"\\w+\\[([\\d,]+)\\]", text)))
"""


def run(program: str, **values: object) -> list[str]:
    """What a program with eight devices prints."""
    paths = os.pathsep.join(str(Path(__file__).parents[n]) for n in (2, 3))
    flags = "--xla_force_host_platform_device_count=8"
    environment = {"XLA_FLAGS": flags, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    for name, value in values.items():
        program = program.replace(f"{{{name}}}", repr(value))
    command = [sys.executable, "-c", COMMON + program]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.splitlines()


SINGLE = [(4, 1, 1, 1), (1, 8, 1, 1), (1, 1, 8, 1), (1, 1, 1, 4)]
PRODUCTS = [(2, 2, 2, 1), (1, 2, 2, 2), (2, 1, 2, 2)]
CASES = {
    "as many key/value heads as query heads, untied": [(8, False, [*SINGLE, PRODUCTS[0]])],
    "fewer, tied": [(4, True, [(1, 1, 4, 1), *PRODUCTS])],
    "too few to be split": [(2, False, [(1, 1, 4, 1), (2, 1, 4, 1)])],
}


@pytest.mark.parametrize("case", CASES)
def test_sharded_parameters_give_the_same_loss_and_gradients(case: str) -> None:
    done = run(GRADIENTS, cases=CASES[case])
    assert len(done) == sum(len(meshes) for *_, meshes in CASES[case])


def test_meshes_with_explicit_axes_do_as_well() -> None:
    """`jax.make_mesh` makes them so by default. The loss and what follows it take them as they are."""
    cases = [(8, False, (2, 2, 2, 1)), (4, True, (1, 2, 2, 2))]
    assert len(run(EXPLICIT, cases=cases)) == len(cases)


def test_every_mesh_of_eight_gives_the_same_loss() -> None:
    sizes = (1, 2, 4, 8)
    meshes = [(a, b, c, 8 // (a * b * c)) for a in sizes for b in sizes for c in sizes if 8 % (a * b * c) == 0]
    assert len(run(EVERY, meshes=meshes)) == len(meshes) == 20


def shapes_of(line: str) -> list[tuple[int, ...]]:
    return [tuple(map(int, shape.split(","))) for shape in line.split()[1:]]


def test_weights_are_never_gathered_whole_over_tensor_devices() -> None:
    gathered, every = run(COMPILED, mesh=(1, 1, 4, 1))
    whole = {(2, 8, 16), (4, 2, 8, 16), (24, 16), (16, 24), (40, 16)}
    assert not whole & {*shapes_of(gathered)}
    assert not {(24, 16), (16, 24), (40, 16)} & {*shapes_of(every)}


def test_a_batch_stays_sharded() -> None:
    """Each device has its row of the tokens; no device sees the logits, or the hidden states, of all rows."""
    _, every = run(COMPILED, mesh=(4, 2, 1, 1))
    assert (1, 24, 40) in shapes_of(every)
    assert not [shape for shape in shapes_of(every) if shape[:2] == (8, 24) and len(shape) > 2]


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_has_a_partition(tied: bool) -> None:
    config = Config(32, 16, 2, 4, 2, 10, 24, 8, 1e-5, 1e4, None, tied)
    found, block = specs(config), layers_of(specs(config))[1]
    assert jax.tree.structure(found) == jax.tree.structure(shapes(config))
    assert found.embed == PartitionSpec("tensor", "fsdp") and found.norm == PartitionSpec("fsdp")
    assert block.attn.q == PartitionSpec("tensor", None, None, "fsdp")
    assert block.attn.o == PartitionSpec("fsdp", "tensor", None, None)
    assert block.ffn.down == PartitionSpec("fsdp", "tensor")


def test_query_heads_are_split_where_there_are_too_few_of_keys() -> None:
    attn = layers_of(specs(Config(32, 16, 2, 2, 4, 10, 24, 8, 1e-5, 1e4, None, True), {"tensor": 4}))[1].attn
    assert attn.q == PartitionSpec(None, "tensor", None, None) and attn.k == PartitionSpec(None, None, None)
    assert attn.o == PartitionSpec(None, None, "tensor", None)


@pytest.mark.parametrize(
    ("mesh", "field"), [({"tensor": 3}, "vocab"), ({"fsdp": 5}, "dim"), ({"tensor": 16, "fsdp": 2}, "q_per_kv")]
)
def test_what_does_not_divide_is_refused_by_name(mesh: dict[str, int], field: str) -> None:
    config = Config(32, 16, 2, 4, 2, 10, 48, 8, 1e-5, 1e4, None, True)
    with pytest.raises(LlamaError, match=f"^mesh: {field}: got .*, expected a multiple of ") as error:
        specs(config, mesh)
    assert (error.value.file, error.value.field) == ("mesh", field)
