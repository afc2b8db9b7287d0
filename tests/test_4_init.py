"""Part 4: the parameters that training starts from."""

import math
from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import Any

import jax
import numpy as np
import pytest
from asserts import jit

from lovely_llama import Config, Params, init

# Large enough that every matrix has more than 10,000 entries.
LARGE = Config(150, 192, 3, 2, 4, 40, 130, 32, 1e-5, 1e4, None, False)
start = jit(init, static_argnames="config")


@pytest.fixture(scope="module")
def params() -> Params:
    return start(jax.random.key(0), LARGE)


def leaves(params: Params) -> list[tuple[str, str, Any]]:
    """Each parameter's path, field name and values."""
    found = jax.tree.leaves_with_path(params)
    return [(jax.tree_util.keystr(path), path[-1].name, np.asarray(leaf, np.float64)) for path, leaf in found]


def test_standard_deviations(params: Params) -> None:
    """σ = 0.02, and 0.02 / √(2 layers) for matrices that add to the residual stream, within sampling error."""
    for where, field, leaf in leaves(params):
        if "norm" in field:
            assert (leaf == 1).all(), where
            continue
        sigma = 0.02 / math.sqrt(2 * LARGE.layers) if field in ("o", "down") else 0.02
        assert leaf.size > 10_000
        assert abs(leaf.std() / sigma - 1) < 4 / math.sqrt(2 * leaf.size), where
        assert abs(leaf.mean() / sigma) < 4 / math.sqrt(leaf.size), where


def test_parameters_are_drawn_independently(params: Params) -> None:
    drawn = [
        (where, leaf.ravel()[:10_000] / leaf.std()) for where, field, leaf in leaves(params) if "norm" not in field
    ]
    for (where, a), (elsewhere, b) in combinations(drawn, 2):
        assert abs(np.mean(a * b)) < 0.06, f"{where} and {elsewhere} are correlated"


def test_the_key_determines_the_parameters(params: Params) -> None:
    again, other = start(jax.random.key(0), LARGE), start(jax.random.key(1), LARGE)
    for (where, field, a), (_, _, b), (_, _, c) in zip(*map(leaves, (params, again, other)), strict=True):
        assert (a == b).all(), where
        assert "norm" in field or (a != c).mean() > 0.99, where


def test_a_tied_model_has_one_embedding() -> None:
    tied = jax.eval_shape(partial(init, config=replace(LARGE, tied=True)), jax.random.key(0))
    assert tied.unembed is None
    assert len(jax.tree.leaves(tied)) == 2 + 9 * LARGE.layers
