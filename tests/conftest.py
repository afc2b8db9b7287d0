"""What the tests share: checked shapes, strict promotion, the recorded numbers, and one way to compare.

Recordings are files beside llama2_c/record.py. With a checkout of llama2.c in llama2_c/upstream, or `--upstream PATH`,
the tests that read them also run on what that program says, there and then, of configs drawn at random.
"""

import functools
import importlib.util
import json
import math
import platform
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jaxtyping import install_import_hook
from safetensors import safe_open

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
with install_import_hook("lovely_llama", "beartype.beartype"):
    from lovely_llama import Block, Config, Params, RopeScaling, shapes

# What a test compiles it runs a few times, so the compiler may spare itself the last touches: it takes a third as long.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False})

LLAMA2_C = Path(__file__).resolve().parent.parent / "llama2_c"
RECORDED = [f"{name}_{embedding}" for name in ("mha", "gqa", "mqa", "deep") for embedding in ("tied", "untied")]
LIVE = [f"live_{i}" for i in range(4)]

# No two sizes are equal, the heads' width is not dim, and eps, theta and scaling are nobody's default. At this theta
# and original context a head's five pairs lie in all three of llama3's bands.
SMALL = Config(
    vocab=29, dim=14, layers=2, kv_heads=3, q_per_kv=4, head_dim=10, hidden_dim=19, ctx=131, eps=3e-4, theta=700.0,
    rope_scaling=RopeScaling("llama3", 3.0, 40, low=1.0, high=4.0), tied=False,
)  # fmt: skip


class Recording(NamedTuple):
    """What llama2.c computes with one config: see the names in llama2_c/record.py."""

    config: Config
    arrays: dict[str, Any]
    train: dict[str, Any]  # its optimiser's settings

    def under(self, prefix: str) -> dict[str, Any]:
        """The arrays whose names begin so, by the rest of their names."""
        return {name.removeprefix(prefix): a for name, a in self.arrays.items() if name.startswith(prefix)}

    def check(self, name: str, function: Callable[..., dict[str, Any]], what: str) -> None:
        """Compare one function's "value" or "gradient": it takes and returns what was recorded, by name."""
        args, outs, cotangents, grads = (self.under(f"{name}.{kind}") for kind in ("in.", "out", "cotangent", "grad."))
        config = replace(self.config, layers=1, tied=True)  # all one to a function, which is then compiled once
        value, gradient = value_and_gradient(function, config, args, cotangents)
        if what == "value":
            assert_close(value, outs, 1e-5, name)
        else:
            assert_close(gradient, grads, 5e-5, name)


@partial(jit, static_argnums=(0, 1))
def value_and_gradient(function: Callable[..., Any], config: Config, args: Any, cotangents: Any) -> tuple[Any, Any]:
    value, pull = jax.vjp(partial(function, config=config), args)
    return value, pull(cotangents)[0]


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What programs started here compile and keep is kept out of the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def read_recording(name: str) -> tuple[dict[str, Any], dict[str, str]]:
    with safe_open(LLAMA2_C / f"{name}.safetensors", "np") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def make_recording(seed: int, upstream: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """A recording made now, of a config drawn at random."""
    spec = importlib.util.spec_from_file_location("record", LLAMA2_C / "record.py")
    assert spec and spec.loader
    record = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(record)
    rng = random.Random(seed)
    # Of a narrower dim the mean square may be next to nothing, and a gradient then is mostly rounding, theirs as ours.
    kv_heads, q_per_kv, head_dim = rng.randint(1, 3), rng.randint(2, 4), rng.choice((4, 6, 8))
    heads = kv_heads * q_per_kv
    args = dict(
        dim=heads * head_dim, n_layers=rng.randint(2, 4), n_heads=heads, n_kv_heads=kv_heads,
        vocab_size=rng.randint(20, 50), hidden_dim=rng.randint(10, 60), max_seq_len=rng.randint(8, 90),
        norm_eps=rng.choice((1e-6, 1e-5, 1e-3)),
    )  # fmt: skip
    return record.record(record.load_upstream(upstream)[0], args, bool(seed % 2), seed)


@functools.cache
def load_recording(name: str, upstream: Path | None = None) -> Recording:
    arrays, metadata = make_recording(LIVE.index(name), upstream) if upstream else read_recording(name)
    args = json.loads(metadata["config"])
    heads, kv_heads = args["n_heads"], args["n_kv_heads"]
    config = Config(
        vocab=args["vocab_size"], dim=args["dim"], layers=args["n_layers"], kv_heads=kv_heads,
        q_per_kv=heads // kv_heads, head_dim=args["dim"] // heads, hidden_dim=args["hidden_dim"],
        ctx=args["max_seq_len"], eps=args["norm_eps"], theta=1e4, rope_scaling=None, tied=args["tied"],
    )  # fmt: skip
    return Recording(config, arrays, json.loads(metadata["train"]))


def pytest_addoption(parser: pytest.Parser) -> None:
    default = LLAMA2_C / "upstream"
    parser.addoption(
        "--upstream", type=Path, metavar="PATH", default=default if default.exists() else None,
        help="a checkout of karpathy/llama2.c to compare with besides what was recorded from it",
    )  # fmt: skip


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The score of test_faults.py. A case holds if all its variants do, and its twin, and none without its guard."""
    parts = dict[tuple[str, str, int, int], list[bool]]()
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        for name, case in getattr(report, "user_properties", ()):
            if name == "fault" and (report.when == "call" or report.failed):
                parts.setdefault(tuple(case), []).append(report.passed)
    if not parts:
        return
    silent = [case for case in parts if case[1] == "S"]
    held = [case for case, passed in parts.items() if all(passed) and len(passed) == case[2] + 1 + case[3]]
    cpus = Path("/proc/cpuinfo")
    processor = re.search(r"model name\s*: (.+)", cpus.read_text() if cpus.exists() else "")
    terminalreporter.write_line(
        f"faults: R1 {len({*held} & {*silent})} of {len(silent)} cases of silence, R2 {len(held)} of 88, "
        f"{sum(case[2] for case in parts)} variants, on {processor[1] if processor else platform.machine()}, "
        f"Python {platform.python_version()}, jax {jax.__version__}; not found by any: square weights transposed, "
        "weights altered in place, rotary pairs in another layout"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "recording" in metafunc.fixturenames:
        live = LIVE if metafunc.config.getoption("--upstream") else []
        metafunc.parametrize("recording", RECORDED + live, indirect=True)


@pytest.fixture
def recording(request: pytest.FixtureRequest) -> Recording:
    upstream = request.config.getoption("--upstream") if request.param in LIVE else None
    return load_recording(request.param, upstream)


@pytest.fixture
def x64() -> Iterator[None]:
    """float64, where jax would make it float32."""
    with jax.enable_x64(True):
        yield


def random_params(config: Config, seed: int = 0, dtype: Any = jnp.float32) -> Params:
    """Parameters at which nothing is zero, one or small: gains 1 ± ½, matrices that keep a vector's size."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        drawn = rng.standard_normal(leaf.shape)
        if "norm" in path[-1].name:
            return jnp.array(1 + drawn / 2, dtype)
        fan_in = math.prod(leaf.shape[1:]) if path[-1].name == "o" else leaf.shape[-1]
        return jnp.array(drawn / math.sqrt(fan_in), dtype)

    return jax.tree.map_with_path(draw, shapes(config))


def layers_of(params: Params) -> tuple[Block, ...]:
    """The blocks, where they stand in a tuple."""
    assert not isinstance(params.blocks, Block)
    return params.blocks


def assert_close(got: Any, want: Any, bound: float, what: str = "") -> None:
    """‖got − want‖ ≤ bound ‖want‖ for each leaf of two trees, in float64. The failure names every leaf that is off."""
    leaves, tree = jax.tree.flatten_with_path(got)
    wanted, wanted_tree = jax.tree.flatten(want)
    assert tree == wanted_tree, f"{what}: got {tree}, expected {wanted_tree}"
    wrong = list[str]()
    for (path, leaf), other in zip(leaves, wanted, strict=True):
        name = f"{what}{jax.tree_util.keystr(path)}"
        a, b = np.asarray(leaf, np.float64), np.asarray(other, np.float64)
        if a.shape != b.shape:
            wrong.append(f"{name}: got shape {a.shape}, expected {b.shape}")
            continue
        error, size = np.linalg.norm(a - b), np.linalg.norm(b)
        if not error <= bound * size:  # so that NaN is wrong too
            wrong.append(f"{name}: got error {error / size if size else error:.2e}, expected at most {bound:.0e}")
    assert not wrong, "\n".join(wrong)


def assert_finite(tree: Any) -> None:
    for path, leaf in jax.tree.leaves_with_path(tree):
        assert np.isfinite(np.asarray(leaf, np.float64)).all(), f"{jax.tree_util.keystr(path)}: not finite"
