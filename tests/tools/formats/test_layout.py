"""Names and layouts of other formats: reshapes, permutations and refusals."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
import torch
from asserts import assert_close
from builders import SMALL, Arrays, layers_of, random_arrays, random_params

from lovely_llama import LlamaError, Params, RopeScaling
from lovely_llama_tools.fast.layers import stack
from lovely_llama_tools.formats.hugging_face import from_hf, to_hf
from lovely_llama_tools.formats.layout import HUGGING_FACE, LLAMA2C, Layout, rope_scaling
from lovely_llama_tools.formats.llama2c import from_llama2c, to_llama2c

CONVERSIONS: dict[str, tuple[Callable[..., Params], Callable[..., Any], Layout]] = {
    "llama2c": (from_llama2c, to_llama2c, LLAMA2C),
    "hf": (from_hf, to_hf, HUGGING_FACE),
}


@pytest.mark.parametrize("name", CONVERSIONS)
@pytest.mark.parametrize("tied", [False, True])
def test_from_and_to_are_inverse(name: str, tied: bool) -> None:
    config = replace(SMALL, tied=tied)
    read, write, layout = CONVERSIONS[name]
    params, arrays = random_params(config), random_arrays(layout, config, 1)
    assert_close(read(write(params, config), config), params, 0, "params")
    assert_close(write(read(arrays, config), config), arrays, 0, "arrays")
    assert len(arrays) == 9 * config.layers + (2 if tied else 3)
    assert any("output" in tensor or "lm_head" in tensor for tensor in arrays) != tied


@pytest.mark.parametrize("name", CONVERSIONS)
def test_from_is_linear(name: str) -> None:
    """So gradients can be converted the same way as parameters."""
    read, _, layout = CONVERSIONS[name]
    a, b = (random_arrays(layout, SMALL, seed) for seed in (1, 2))
    both = {tensor: 2 * a[tensor] - b[tensor] for tensor in a}
    want = jax.tree.map(lambda x, y: 2 * x - y, read(a, SMALL), read(b, SMALL))
    assert_close(read(both, SMALL), want, 0, "2a − b")


@pytest.mark.parametrize("name", CONVERSIONS)
def test_parameters_do_not_alias_the_arrays(name: str) -> None:
    """Otherwise jax would alias numpy memory that is aligned to 64 bytes."""
    read, _, layout = CONVERSIONS[name]
    arrays: Arrays = {}
    for tensor, array in random_arrays(layout, SMALL, 1).items():
        memory = np.empty(array.nbytes + 64, np.uint8)
        memory = memory[-memory.ctypes.data % 64 :][: array.nbytes]
        arrays[tensor] = memory.view(array.dtype).reshape(array.shape)
        arrays[tensor][:] = array
    params = read(arrays, SMALL)
    before = jax.tree.map(np.array, params)
    for array in arrays.values():
        array[:] = 7
    assert_close(params, before, 0, "parameters")


def test_llama2c_is_a_reshape() -> None:
    arrays = random_arrays(LLAMA2C, SMALL, 1)
    for layer, block in enumerate(layers_of(from_llama2c(arrays, SMALL))):
        named = {"wq": block.attn.q, "wk": block.attn.k, "wv": block.attn.v, "wo": block.attn.o}
        for name, leaf in named.items():
            want = arrays[f"layers.{layer}.attention.{name}.weight"]
            np.testing.assert_array_equal(np.asarray(leaf).ravel(), want.ravel())
        named = {"w1": block.ffn.gate, "w2": block.ffn.down, "w3": block.ffn.up}
        for name, leaf in named.items():
            np.testing.assert_array_equal(leaf, arrays[f"layers.{layer}.feed_forward.{name}.weight"])


def test_hugging_face_splits_pairs_into_halves() -> None:
    """Row i of a head's first half is row 2i here, and row i of its second half is row 2i + 1, in queries and keys."""
    arrays, half = random_arrays(HUGGING_FACE, SMALL, 1), SMALL.head_dim // 2
    block = layers_of(from_hf(arrays, SMALL))[1]
    q = arrays["model.layers.1.self_attn.q_proj.weight"].reshape(-1, SMALL.head_dim, SMALL.dim)
    k = arrays["model.layers.1.self_attn.k_proj.weight"].reshape(-1, SMALL.head_dim, SMALL.dim)
    for i in range(half):
        for head in range(SMALL.kv_heads):
            np.testing.assert_array_equal(block.attn.k[head, 2 * i : 2 * i + 2], k[head, [i, i + half]])
            for query in range(SMALL.q_per_kv):
                want = q[head * SMALL.q_per_kv + query, [i, i + half]]
                np.testing.assert_array_equal(block.attn.q[head, query, 2 * i : 2 * i + 2], want)
    v = arrays["model.layers.1.self_attn.v_proj.weight"]
    np.testing.assert_array_equal(block.attn.v, v.reshape(block.attn.v.shape))


# ---- What is refused -------------------------------------------------------------------------------------------------

EMBED = {"llama2c": "tok_embeddings.weight", "hf": "model.embed_tokens.weight"}
UNEMBED = {"llama2c": "output.weight", "hf": "lm_head.weight"}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_wrong_arrays_are_refused(name: str) -> None:
    """Each would otherwise be reshaped, ignored, or fail far away."""
    read, _, layout = CONVERSIONS[name]
    arrays = random_arrays(layout, SMALL, 1)
    gate = next(tensor for tensor in arrays if "gate_proj" in tensor or "w1" in tensor)
    bias, surplus = gate.replace("weight", "bias"), gate.replace(".0.", ".2.")
    for wrong, field in (
        ({**arrays, gate: arrays[gate].T}, gate),
        ({**arrays, bias: np.zeros(3)}, "tensors"),
        ({**arrays, surplus: arrays[gate]}, "tensors"),
        ({tensor: array for tensor, array in arrays.items() if tensor != gate}, "tensors"),
    ):
        with pytest.raises(LlamaError) as caught:
            read(wrong, SMALL)
        assert (caught.value.file, caught.value.field) == ("arrays", field)


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_tied_model_may_come_with_the_same_unembedding_only(name: str) -> None:
    """As a state_dict has it; another one would be ignored in silence."""
    read, _, layout = CONVERSIONS[name]
    config = replace(SMALL, tied=True)
    arrays = random_arrays(layout, config, 1)
    embedding = arrays[EMBED[name]]
    for same in (embedding, embedding.copy()):
        assert_close(read({**arrays, UNEMBED[name]: same}, config), read(arrays, config), 0, "tied")
    with pytest.raises(LlamaError, match="tied") as caught:
        read({**arrays, UNEMBED[name]: 2 * embedding}, config)
    assert caught.value.field == UNEMBED[name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_state_dict_of_torch_is_read(dtype: torch.dtype) -> None:
    arrays = random_arrays(HUGGING_FACE, SMALL, 1)
    state = {tensor: torch.nn.Parameter(torch.tensor(array).to(dtype)) for tensor, array in arrays.items()}
    got, want = from_hf(state, SMALL), from_hf(arrays, SMALL)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(got)} == {str(dtype).removeprefix("torch.")}
    assert_close(got, want, 0.004 if dtype == torch.bfloat16 else 0, "params")


@pytest.mark.parametrize("name", CONVERSIONS)
def test_stacked_layers_are_written_as_those_in_a_tuple(name: str) -> None:
    _, write, _ = CONVERSIONS[name]
    params = random_params(SMALL)
    stacked = params._replace(blocks=stack(layers_of(params)))
    assert_close(write(stacked, SMALL), write(params, SMALL), 0, "arrays")
    with pytest.raises(LlamaError):
        write(params, replace(SMALL, dim=SMALL.dim + 1))


# ---- Rotary scalings -------------------------------------------------------------------------------------------------

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"factor": 4.0, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize("key", ["rope_type", "type"])
@pytest.mark.parametrize(
    ("kind", "fields", "want"),
    [
        ("default", {}, None),
        ("default", {"rope_theta": 1e4}, None),
        ("linear", {"factor": 2.0}, RopeScaling("linear", 2.0)),
        ("linear", {"factor": 3, "rope_theta": 1e4}, RopeScaling("linear", 3.0)),
        ("llama3", LLAMA3, RopeScaling("llama3", 8.0, 8192, 1.0, 4.0)),
        ("yarn", YARN, RopeScaling("yarn", 4.0, 4096, 1.0, 32.0, 0.1 * math.log(4) + 1)),
        (
            "yarn",
            YARN | {"attention_factor": None, "beta_fast": None},
            RopeScaling("yarn", 4.0, 4096, 1.0, 32.0, 0.1 * math.log(4) + 1),
        ),
        (
            "yarn",
            YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.5},
            RopeScaling("yarn", 4.0, 4096, 2.0, 16.0, 1.5),
        ),
    ],
)
def test_known_scalings_are_read(key: str, kind: str, fields: dict[str, Any], want: RopeScaling | None) -> None:
    assert rope_scaling({key: kind} | fields, "config.json") == want


def test_no_scaling_is_none() -> None:
    assert rope_scaling({}, "config.json") is None


def without(field: str) -> dict[str, Any]:
    return {"rope_type": "llama3"} | {name: value for name, value in LLAMA3.items() if name != field}


@pytest.mark.parametrize(
    ("fields", "field", "says"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_scaling.rope_type", "dynamic"),
        ({"type": "longrope", "factor": 2.0}, "rope_scaling.rope_type", "longrope"),
        ({"rope_type": 5}, "rope_scaling.rope_type", "5"),
        ({"rope_type": ["linear"], "factor": 2.0}, "rope_scaling.rope_type", "linear"),
        ({"type": "linear", "factor": 2.0, "mscale": 1.0}, "rope_scaling", "mscale"),
        ({"type": "linear", "factor": 2.0, "low_freq_factor": 1.0}, "rope_scaling", "low_freq_factor"),
        ({"rope_type": "default", "beta_fast": 32}, "rope_scaling", "beta_fast"),
        ({"rope_type": "linear"}, "rope_scaling.factor", "None"),
        ({"rope_type": "linear", "factor": "2"}, "rope_scaling.factor", "2"),
        ({"rope_type": "linear", "factor": True}, "rope_scaling.factor", "True"),
        ({"rope_type": "linear", "factor": math.nan}, "rope_scaling.factor", "nan"),
        ({"rope_type": "yarn"} | YARN | {"factor": -4.0}, "rope_scaling.factor", "-4.0"),
        ({"rope_type": "yarn", "factor": 4.0}, "rope_scaling.original_max_position_embeddings", "None"),
        (
            {"rope_type": "yarn"} | YARN | {"original_max_position_embeddings": 40.5},
            "rope_scaling.original_max_position_embeddings", "40.5",
        ),
        *((without(name), f"rope_scaling.{name}", "None") for name in LLAMA3),
    ],
)  # fmt: skip
def test_invalid_scalings_are_refused_by_name(fields: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(LlamaError, match=rf"^config.json: {field}: got .*{says}") as caught:
        rope_scaling(fields, "config.json")
    assert caught.value.field == field
