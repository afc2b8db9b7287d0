"""Part 8: a model sharded over eight devices computes the same as on one."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from builders import layers_of
from jax.sharding import PartitionSpec

from lovely_llama import Config, shapes, specs

PROGRAM = """
from dataclasses import replace
from functools import partial
from math import prod
import jax
from asserts import assert_close
from builders import SMALL, random_params
from jax.sharding import AxisType, NamedSharding
from lovely_llama import loss, specs

fsdp, tensor, tied = {mesh}
config = replace(SMALL, vocab=32, dim=16, kv_heads=4, hidden_dim=24, tied=tied)
params, tokens = random_params(config), jax.numpy.arange(4 * 12).reshape(4, 12) % config.vocab
gradients = jax.jit(jax.value_and_grad(partial(loss, config=config)))
want = gradients(params, tokens, tokens[:, ::-1])
mesh = jax.make_mesh((fsdp, tensor), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
for leaf, spec in zip(jax.tree.leaves(params), jax.tree.leaves(specs(config)), strict=True):
    placed = jax.device_put(leaf, NamedSharding(mesh, spec))
    assert placed.addressable_shards[0].data.size * prod(mesh.shape[axis] for axis in spec if axis) == leaf.size
placed = jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), params, specs(config))
assert_close(gradients(placed, tokens, tokens[:, ::-1]), want, 1e-5)
print(len(jax.devices()))
"""


@pytest.mark.parametrize("mesh", [(8, 1, False), (2, 4, True), (4, 2, False)], ids=str)
def test_sharded_parameters_give_the_same_loss_and_gradients(mesh: tuple[int, int, bool]) -> None:
    paths = os.pathsep.join(str(Path(__file__).parents[n]) for n in (0, 1))
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM.format(mesh=mesh)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "8\n"), done.stderr


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_has_a_partition(tied: bool) -> None:
    config = Config(32, 16, 2, 4, 2, 10, 24, 8, 1e-5, 1e4, None, tied)
    found, block = specs(config), layers_of(specs(config))[1]
    assert jax.tree.structure(found) == jax.tree.structure(shapes(config))
    assert found.embed == PartitionSpec("tensor", "fsdp") and found.norm == PartitionSpec("fsdp")
    assert block.attn.q == PartitionSpec("tensor", None, None, "fsdp")
    assert block.attn.o == PartitionSpec("fsdp", "tensor", None, None)
    assert block.ffn.down == PartitionSpec("fsdp", "tensor")
