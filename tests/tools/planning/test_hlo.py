"""What a compiled program does is read off its text: collectives and products, as often as loops run them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lovely_llama_tools.planning.hlo import groups_of, read_program

# Each collective once, by hand, on 8 devices: a device has 8 × 32 numbers, 1024 bytes.
PROGRAM = """
import json, jax, jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from lovely_llama_tools.planning.hlo import read_program

def device(a, w):
    a = lax.fori_loop(0, 5, lambda i, a: lax.psum(jnp.tanh(a @ w), "x"), lax.psum(a, "y"))
    gathered = lax.all_gather(a, "y", tiled=True)
    scattered = lax.psum_scatter(jnp.sin(gathered), "y", tiled=True)
    swapped = lax.ppermute(scattered, "x", [(0, 1), (1, 0)])
    return lax.all_to_all(jnp.cos(swapped), "y", 0, 0, tiled=True)

mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
program = jax.jit(jax.shard_map(device, mesh=mesh, in_specs=(P("x", "y"), P()), out_specs=P("x", "y"), check_vma=False))
text = program.lower(jnp.ones((16, 128)), jnp.ones((32, 32))).compile().as_text()
found = read_program(text, 8)
print(json.dumps([found.flops, found.endless, found.collectives]))
"""


def test_a_program_with_known_collectives() -> None:
    """Kind, bytes of a device, devices of a group, one of the groups, and how often: as the program says."""
    paths = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    flops, endless, found = json.loads(done.stdout)
    assert (flops, endless) == (5 * 2 * 8 * 32 * 32, 0)
    assert sorted([kind, size, bytes, sorted(group), times] for kind, bytes, size, group, times, _ in found) == [
        ["all-gather", 4, 1024, [0, 1, 2, 3], 1],
        ["all-reduce", 2, 1024, [0, 4], 5],
        ["all-reduce", 4, 1024, [0, 1, 2, 3], 1],
        ["all-to-all", 4, 1024, [0, 1, 2, 3], 1],
        ["collective-permute", 2, 1024, [0, 4], 1],
        ["reduce-scatter", 4, 4096, [0, 1, 2, 3], 1],
    ]


# As a TPU's compiler writes it: a loop of three turns, from 0 to 6 in steps of 2, which are not noted as such; in it a
# gather that two fusions share, and a sum that is scattered by a slice of itself; products as convolutions.
TPU = """HloModule jit_step, is_scheduled=true

%first (p.1: bf16[128,64]) -> bf16[128,256] {
  %p.1 = bf16[128,64]{0,1:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[128,256]{0,1:T(8,128)(2,1)} all-gather(%p.1), channel_id=7, replica_groups=[4,4]<=[4,4]T(1,0), dimensions={1}, use_global_device_ids=true
}

%second (p.2: bf16[128,64]) -> bf16[128,256] {
  %p.2 = bf16[128,64]{0,1:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[128,256]{0,1:T(8,128)(2,1)S(1)} all-gather(%p.2), channel_id=7, replica_groups=[4,4]<=[4,4]T(1,0), dimensions={1}, use_global_device_ids=true
}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter.3 (input: f32[16,128]) -> f32[4,128] {
  %input = f32[16,128]{1,0:T(8,128)} parameter(0)
  %all-reduce.3 = f32[16,128]{1,0:T(8,128)} all-reduce(%input), channel_id=8, replica_groups={{0,4,8,12},{1,5,9,13}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %slice = f32[4,128]{1,0:T(8,128)} dynamic-slice(%all-reduce.3, %zero, %zero), dynamic_slice_sizes={4,128}
}

%body (state: (s32[], bf16[128,64], f32[16,128], bf16[64,16,256], bf16[256,16,1024])) -> (s32[], bf16[128,64]) {
  %state = (s32[]{:T(128)}, bf16[128,64]{0,1:T(8,128)(2,1)}, f32[16,128]{1,0}) parameter(0)
  %w = bf16[128,64]{0,1:T(8,128)(2,1)} get-tuple-element(%state), index=1
  %g = f32[16,128]{1,0:T(8,128)} get-tuple-element(%state), index=2
  %fusion.1 = bf16[128,256]{0,1:T(8,128)(2,1)} fusion(%w), kind=kCustom, calls=%first
  %fusion.2 = bf16[128,256]{0,1:T(8,128)(2,1)} fusion(%w), kind=kCustom, calls=%second
  %fusion.3 = f32[4,128]{1,0:T(8,128)} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.3
  %left = bf16[64,256,2]{2,0,1} get-tuple-element(%state), index=3
  %right = bf16[16,256,1024]{2,0,1} get-tuple-element(%state), index=4
  %convolution.1 = bf16[64,1024,17]{2,0,1:T(8,128)(2,1)} convolution(%left, %right), window={size=16 pad=15_15 rhs_reversal=1}, dim_labels=bf0_0io->bf0
  %i.1 = s32[]{:T(128)} get-tuple-element(%state), index=0
  %two = s32[]{:T(128)} constant(2)
  %add.1 = s32[]{:T(128)} add(%i.1, %two)
  ROOT %next = (s32[], bf16[128,64]) tuple(%add.1, %w)
}

%condition (state.1: (s32[], bf16[128,64])) -> pred[] {
  %six = s32[]{:T(128)} constant(6)
  %state.1 = (s32[]{:T(128)}, bf16[128,64]{0,1:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %six), direction=LT
}

%forever (state.2: (s32[], bf16[128,64])) -> pred[] {
  %state.2 = (s32[]{:T(128)}, bf16[128,64]{0,1:T(8,128)(2,1)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%state.2), index=0
  %n = s32[]{:T(128)} get-tuple-element(%state.2), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%j, %n), direction=LT
}

ENTRY %main.1_spmd (p: (s32[], bf16[128,64])) -> (s32[], bf16[128,64]) {
  %p = (s32[]{:T(128)}, bf16[128,64]{0,1:T(8,128)(2,1)}) parameter(0)
  %zero.1 = s32[]{:T(128)} constant(0)
  %copy.1 = s32[]{:T(128)} copy(%zero.1)
  %w.1 = bf16[128,64]{0,1:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %begin = (s32[]{:T(128)}, bf16[128,64]{0,1:T(8,128)(2,1)}) tuple(%copy.1, %w.1)
  %while.1 = (s32[]{:T(128)}, bf16[128,64]{0,1:T(8,128)(2,1)}) while(%begin), condition=%condition, body=%body
  %a = bf16[16,8,32]{2,1,0} get-tuple-element(%p), index=1
  %b = bf16[16,64,32]{2,1,0} get-tuple-element(%p), index=1
  %convolution.2 = f32[16,8,64]{2,1,0} convolution(%a, %b), window={size=16 stride=15 lhs_dilate=16}, dim_labels=0bf_0oi->0bf
  ROOT %while.2 = (s32[]{:T(128)}, bf16[128,64]{0,1:T(8,128)(2,1)}) while(%while.1), condition=%forever, body=%nothing
}

%nothing (state.3: (s32[], bf16[128,64])) -> (s32[], bf16[128,64]) {
  ROOT %state.3 = (s32[]{:T(128)}, bf16[128,64]{0,1:T(8,128)(2,1)}) parameter(0)
}
"""  # noqa: E501


def test_a_program_for_a_tpu() -> None:
    found = read_program(TPU, 16)
    gather, scatter = found.collectives
    assert gather[:5] == ("all-gather", 128 * 64 * 2, 4, (0, 4, 8, 12), 3)
    assert scatter[:5] == ("reduce-scatter", 16 * 128 * 4, 4, (0, 4, 8, 12), 3)
    assert gather.sent == 3 * 3 * gather.bytes and scatter.sent == 3 * 3 / 4 * scatter.bytes
    assert found.endless == 1
    outer = 2 * (64 * 1024 * 256) * (2 * 16)  # each of 2 columns meets each of 16: the other turns see padding
    batched = 2 * 16 * (8 * 64 * 32)
    assert found.flops == 3 * outer + batched


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=[4,2]<=[8]", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b':(1)2}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'b'}", [[3, 1], [2, 0]]),
        ("source_target_pairs={{0,0},{0,1},{1,0}}", [[0, 1], [1, 0]]),
        ("replica_groups={}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ],
)
def test_every_form_of_groups(written: str, groups: list[list[int]]) -> None:
    assert groups_of(f"%x), channel_id=1, {written}, use_global_device_ids=true", 8).tolist() == groups
