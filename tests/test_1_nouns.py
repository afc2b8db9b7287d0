"""Parts 1, 4 and 8: the published configurations, and the shapes of parameters and caches."""

from dataclasses import FrozenInstanceError, replace
from functools import partial
from typing import Any

import jax
import pytest
from builders import SMALL
from jax import numpy as jnp

from lovely_llama import (
    CONFIGS,
    Attention,
    Block,
    Cache,
    Config,
    FeedForward,
    Params,
    RopeScaling,
    count,
    empty_cache,
    init,
    shapes,
)
from lovely_llama_tools.fast.layers import stack

LLAMA_3_1, LLAMA_3_2 = RopeScaling("llama3", 8, 8192, 1, 4), RopeScaling("llama3", 32, 8192, 1, 4)

# layers, dim, hidden_dim, query heads, kv_heads, head_dim, vocab, theta, scaling, tied, eps, ctx, parameters
PUBLISHED: dict[str, tuple[Any, ...]] = {
    "llama-1-7b": (32, 4096, 11008, 32, 32, 128, 32000, 1e4, None, False, 1e-6, 2048, 6_738_415_616),
    "llama-1-13b": (40, 5120, 13824, 40, 40, 128, 32000, 1e4, None, False, 1e-6, 2048, 13_015_864_320),
    "llama-1-33b": (60, 6656, 17920, 52, 52, 128, 32000, 1e4, None, False, 1e-6, 2048, 32_528_943_616),
    "llama-1-65b": (80, 8192, 22016, 64, 64, 128, 32000, 1e4, None, False, 1e-5, 2048, 65_285_660_672),
    "llama-2-7b": (32, 4096, 11008, 32, 32, 128, 32000, 1e4, None, False, 1e-5, 4096, 6_738_415_616),
    "llama-2-13b": (40, 5120, 13824, 40, 40, 128, 32000, 1e4, None, False, 1e-5, 4096, 13_015_864_320),
    "llama-2-70b": (80, 8192, 28672, 64, 8, 128, 32000, 1e4, None, False, 1e-5, 4096, 68_976_648_192),
    "code-llama-7b": (32, 4096, 11008, 32, 32, 128, 32016, 1e6, None, False, 1e-5, 16384, 6_738_546_688),
    "llama-3-8b": (32, 4096, 14336, 32, 8, 128, 128256, 5e5, None, False, 1e-5, 8192, 8_030_261_248),
    "llama-3-70b": (80, 8192, 28672, 64, 8, 128, 128256, 5e5, None, False, 1e-5, 8192, 70_553_706_496),
    "llama-3.1-8b": (32, 4096, 14336, 32, 8, 128, 128256, 5e5, LLAMA_3_1, False, 1e-5, 131072, 8_030_261_248),
    "llama-3.1-70b": (80, 8192, 28672, 64, 8, 128, 128256, 5e5, LLAMA_3_1, False, 1e-5, 131072, 70_553_706_496),
    "llama-3.3-70b": (80, 8192, 28672, 64, 8, 128, 128256, 5e5, LLAMA_3_1, False, 1e-5, 131072, 70_553_706_496),
    "llama-3.1-405b": (126, 16384, 53248, 128, 8, 128, 128256, 5e5, LLAMA_3_1, False, 1e-5, 131072, 405_853_388_800),
    "llama-3.2-1b": (16, 2048, 8192, 32, 8, 64, 128256, 5e5, LLAMA_3_2, True, 1e-5, 131072, 1_235_814_400),
    "llama-3.2-3b": (28, 3072, 8192, 24, 8, 128, 128256, 5e5, LLAMA_3_2, True, 1e-5, 131072, 3_212_749_824),
    "tinyllama-1.1b": (22, 2048, 5632, 32, 4, 64, 32000, 1e4, None, False, 1e-5, 2048, 1_100_048_384),
    "smollm2-135m": (30, 576, 1536, 9, 3, 64, 49152, 1e5, None, True, 1e-5, 8192, 134_515_008),
    "smollm2-360m": (32, 960, 2560, 15, 5, 64, 49152, 1e5, None, True, 1e-5, 8192, 361_821_120),
    "smollm2-1.7b": (24, 2048, 8192, 32, 32, 64, 49152, 1.3e5, None, True, 1e-5, 8192, 1_711_376_384),
    "stories260k": (5, 64, 172, 8, 4, 8, 512, 1e4, None, True, 1e-5, 512, 260_032),
    "stories15m": (6, 288, 768, 6, 6, 48, 32000, 1e4, None, True, 1e-5, 256, 15_191_712),
    "stories42m": (8, 512, 1376, 8, 8, 64, 32000, 1e4, None, True, 1e-5, 1024, 41_689_600),
    "stories110m": (12, 768, 2048, 12, 12, 64, 32000, 1e4, None, True, 1e-5, 1024, 109_529_856),
}

AXES = {
    "embed": "vocab dim", "unembed": "vocab dim", "norm": "dim", "attn_norm": "dim", "ffn_norm": "dim",
    "q": "kv_heads q_per_kv head_dim dim", "k": "kv_heads head_dim dim", "v": "kv_heads head_dim dim",
    "o": "dim kv_heads q_per_kv head_dim",
    "gate": "hidden_dim dim", "up": "hidden_dim dim", "down": "dim hidden_dim",
    "keys": "kv_heads ctx head_dim", "values": "kv_heads ctx head_dim",
}  # fmt: skip
SIZES = {
    "small": SMALL,
    "tied": replace(SMALL, tied=True),
    "deep": Config(31, 6, 5, 7, 2, 4, 3, 11, 1e-5, 1e4, None, False),
    "wide": Config(5, 23, 3, 2, 7, 8, 37, 13, 1e-5, 1e4, None, True),
}


def test_no_published_config_is_missing() -> None:
    assert set(CONFIGS) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config(name: str) -> None:
    layers, dim, hidden_dim, heads, kv_heads, head_dim, vocab, theta, scaling, tied, eps, ctx, parameters = PUBLISHED[
        name
    ]
    expected = Config(
        vocab=vocab, dim=dim, layers=layers, kv_heads=kv_heads, q_per_kv=heads // kv_heads, head_dim=head_dim,
        hidden_dim=hidden_dim, ctx=ctx, eps=eps, theta=theta, rope_scaling=scaling, tied=tied,
    )  # fmt: skip
    assert CONFIGS[name] == expected
    assert count(expected) == parameters
    check_axes(shapes(expected), expected)


def test_config_is_frozen_and_hashable() -> None:
    assert hash(SMALL) == hash(replace(SMALL)) and len({SMALL, replace(SMALL), replace(SMALL, eps=1.0)}) == 2
    with pytest.raises(FrozenInstanceError):
        SMALL.dim = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("record", [Attention, FeedForward, Block, Params, Cache])
def test_annotations_name_the_axes(record: Any) -> None:
    for field, annotation in record.__annotations__.items():
        for array in getattr(annotation, "__args__", (annotation,)):
            if hasattr(array, "dim_str"):
                layered = "" if record is Params else "*layers "
                assert array.dim_str.strip() == layered + AXES[field], field


def check_axes(tree: Any, config: Config, layers: tuple[int, ...] = ()) -> None:
    for path, leaf in jax.tree.leaves_with_path(tree):
        stacked = () if path[-1].name in ("embed", "norm", "unembed") else layers
        axes = tuple(getattr(config, axis) for axis in AXES[path[-1].name].split())
        assert leaf.shape == stacked + axes, jax.tree_util.keystr(path)


@pytest.mark.parametrize("config", SIZES.values(), ids=SIZES)
def test_shapes(config: Config) -> None:
    params = jax.eval_shape(partial(init, config=config), jax.random.key(0))
    check_axes(params, config)
    check_axes(params._replace(blocks=jax.eval_shape(stack, params.blocks)), config, (config.layers,))
    assert len(params.blocks) == config.layers and (params.unembed is None) == config.tied
    assert jax.tree.map(lambda leaf: leaf.shape, shapes(config)) == jax.tree.map(lambda leaf: leaf.shape, params)
    assert count(config) == sum(leaf.size for leaf in jax.tree.leaves(params))
    cache = empty_cache(config, config.ctx, jnp.float32)
    assert len(cache) == config.layers
    check_axes(cache, config)
    check_axes(stack(cache), config, (config.layers,))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_empty_cache(dtype: Any) -> None:
    cache = empty_cache(SMALL, 17, dtype)
    assert len(cache) == SMALL.layers
    for rows in jax.tree.leaves(cache):
        assert rows.shape == (SMALL.kv_heads, 17, SMALL.head_dim) and rows.dtype == dtype and not rows.any()
    assert stack(cache).keys.shape == (SMALL.layers, SMALL.kv_heads, 17, SMALL.head_dim)
