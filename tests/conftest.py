"""Settings for all tests: shape checks and strict promotion; and recordings of llama2.c as a fixture."""

import ctypes
import fcntl
import gc
import importlib.util
import os
import platform
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jaxtyping
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
install_import_hook(["lovely_llama", "lovely_llama_tools"], "checker.check_types")  # checks every call in this process

pytest.register_assert_rewrite("small_runs")  # so that a failure there says what differs

from asserts import QUICK  # noqa: E402 -- after the hook
from builders import LLAMA2_C, RECORDED, Recording, load_recording  # noqa: E402 -- after the hook
from machine import processor  # noqa: E402

LIVE = [f"live_{i}" for i in range(4)]
GROWTH = 0.3 * 2**30  # bytes
floor = [2**30]  # bytes that a worker held when it was last cleared

gc.set_threshold(50_000)  # from 700: the packages hold millions of objects, which every full collection would visit


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session", autouse=True)
def own_cache(shared_folder: Path) -> Iterator[None]:
    """Keep compiled programs out of the user's cache, in one that all workers share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(shared_folder / "cache"))
        yield


@pytest.fixture(scope="session")
def probe(shared_folder: Path, own_cache: None) -> Path:
    """The folder that `lovely-llama golden` makes, by whichever worker comes first."""
    folder = shared_folder / "probe"
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            subprocess.run([sys.executable, "-m", "lovely_llama_tools", "golden", folder], check=True)
    return folder


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    """Drop compiled programs, and return their memory to the system, once a worker has grown by `GROWTH`."""
    yield
    if resident() > floor[0] + GROWTH:
        jax.clear_caches()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what is freed in small pieces
        floor[0] = resident()


def resident() -> int:
    """Bytes of this process in memory; 0 where the system has no /proc."""
    status = Path("/proc/self/status")
    found = re.search(r"VmRSS:\s+(\d+)", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else 0


@pytest.fixture
def x64() -> Iterator[None]:
    """Enable float64, which jax otherwise truncates to float32."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def no_type_checks() -> Iterator[None]:
    """Run as users do, without the import hook's checks: what these would refuse must be refused without them.

    Functions within functions would be decorated at every call of the outer one.
    """
    decorator = jaxtyping.jaxtyped

    def outermost(**more: Any) -> Any:
        decorate = decorator(**more)
        return lambda function: function if "<locals>" in function.__qualname__ else decorate(function)

    jaxtyping.config.update("jaxtyping_disable", True)
    jaxtyping.jaxtyped = outermost
    yield
    jaxtyping.jaxtyped = decorator
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def fewer_optimisations() -> Iterator[None]:
    """Compile in less time, also single operations, where it is not their numbers that are tested."""
    compiler: Any = importlib.import_module("jax._src.compiler")
    options = compiler.get_compile_options

    def quick(*arguments: Any, env_options_overrides: Any = None, **more: Any) -> Any:
        return options(*arguments, env_options_overrides={**QUICK, **(env_options_overrides or {})}, **more)

    jax.config.update("jax_disable_most_optimizations", True)
    compiler.get_compile_options = quick
    yield
    compiler.get_compile_options = options
    jax.config.update("jax_disable_most_optimizations", False)


# ---- Recordings of llama2.c ------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    default = LLAMA2_C / "upstream"
    parser.addoption(
        "--upstream", type=Path, metavar="PATH", default=default if default.exists() else None,
        help="a checkout of karpathy/llama2.c; parity tests then run on recordings made from it on the spot, too",
    )  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "recording" in metafunc.fixturenames:
        live = LIVE if metafunc.config.getoption("--upstream") else []
        metafunc.parametrize("recording", RECORDED + live, indirect=True)


@pytest.fixture
def recording(request: pytest.FixtureRequest) -> Recording:
    if request.param not in LIVE:
        return load_recording(request.param)
    return live_recording(LIVE.index(request.param), request.config.getoption("--upstream"))


def live_recording(seed: int, upstream: Any) -> Recording:
    """A recording of a random config, made on the spot."""
    spec = importlib.util.spec_from_file_location("record", LLAMA2_C / "record.py")
    assert spec and spec.loader
    record = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(record)
    rng = random.Random(seed)
    # With a smaller dim the mean square can be close to 0, and gradients, in both, are then mostly rounding error.
    kv_heads, q_per_kv, head_dim = rng.randint(1, 3), rng.randint(2, 4), rng.choice((4, 6, 8))
    heads = kv_heads * q_per_kv
    args = dict(
        dim=heads * head_dim, n_layers=rng.randint(2, 4), n_heads=heads, n_kv_heads=kv_heads,
        vocab_size=rng.randint(20, 50), hidden_dim=rng.randint(10, 60), max_seq_len=rng.randint(8, 90),
        norm_eps=rng.choice((1e-6, 1e-5, 1e-3)),
    )  # fmt: skip
    return Recording.of(*record.record(record.load_upstream(upstream)[0], args, bool(seed % 2), seed))


# ---- Summary of the faults -------------------------------------------------------------------------------------------


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """A case holds if its twin and all its variants pass, and every variant fails as stated without its guard."""
    passed = dict[tuple[str, str, int], list[bool]]()
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        for name, case in getattr(report, "user_properties", ()):
            if name == "fault" and (report.when == "call" or report.failed):
                passed.setdefault(tuple(case), []).append(report.passed)
    if not passed:
        return
    held = [case for case, tests in passed.items() if all(tests) and len(tests) == 2 * case[2] + 1]
    silent, silent_held = ([case for case in cases if case[1] == "S"] for cases in (passed, held))
    where = f"{processor()}, Python {platform.python_version()}, jax {jax.__version__}"
    terminalreporter.write_line(
        f"faults: {len(held)} of {len(passed)} cases hold, {len(silent_held)} of {len(silent)} of those that would be "
        f"silent; {sum(case[2] for case in passed)} variants, each with its guard and without; on {where}"
    )
