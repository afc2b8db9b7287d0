"""Inference on a mesh of devices: what is generated and evaluated is that of one device, and the cache is split."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from builders import write_talker

from lovely_llama_tools import commands

ROOT = Path(__file__).parents[3]
MESHES = ("tensor=2", "tensor=4", "data=2,tensor=2")

# Run in a process with eight devices; prints what the tests below look at.
PROGRAM = """
import contextlib, io, json, math, re, sys
from dataclasses import replace
from pathlib import Path
import jax
import numpy as np
from builders import TINY, TOKENS, random_params, tiny_arrays, tiny_fields, write_gguf
from jax.sharding import AxisType, Mesh
from lovely_llama import Config, Sampling
from lovely_llama_tools import commands
from lovely_llama_tools.inference.batch import Batch, generate_all, rows_begin, rows_layer
from lovely_llama_tools.inference.caches import everywhere, new_cache, running
from lovely_llama_tools.formats.files import load, save
from lovely_llama_tools.formats.model import Model
from lovely_llama_tools.inference.generate import Session, generate
from lovely_llama_tools.devices.mesh import make_mesh, parse_mesh, place
from lovely_llama_tools.inference.scoring import perplexity, scores

folder, shards = Path(sys.argv[1]), {}
config = Config(64, 32, 2, 4, 2, 4, 48, 300, 1e-5, 1e4, None, False)
few = replace(config, kv_heads=2, q_per_kv=4)  # too few key/value heads for tensor=4
rng, greedy = np.random.default_rng(0), Sampling(temperature=0.0)
prompts = [rng.integers(0, 64, n).tolist() for n in (3, 50, 20)]
text = rng.integers(0, 64, 60).tolist()


def shown(array):
    return [list(array.shape), list(array.addressable_shards[0].data.shape)]


def results(model, grows):
    session, found = Session(model), {}
    found["generate"] = list(generate(model, prompts[1], 200 if grows else 30, greedy, session=session))
    found["session"] = shown(session.cache[1].keys)
    found["logits"] = np.asarray(session.logits(prompts[1]), np.float64).tolist()
    step, sizes = Batch.step, []

    def noted(batch):
        step(batch)
        sizes.append(shown(batch.cache[1].values))

    Batch.step = noted
    found["all"] = [one.tokens for one in generate_all(model, prompts, 30, greedy, batch=3)]
    Batch.step = step
    found["batch"] = [list(size) for size in sorted({tuple(map(tuple, size)) for size in sizes})]
    found["scores"] = scores(model, text[:-1], text[1:]).nats.astype(float).tolist()
    found["nats"] = perplexity(model, text, 40).nats
    return found


def on(text):
    sizes = parse_mesh(text)
    return make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])


out = {}
for name, config in (("many", config), ("few", few)):
    model = Model(config, random_params(config), None)
    meshes = MESHES if name == "many" else MESHES[1:2]
    out[name] = {"one": results(model, True)}
    for text_ in meshes:
        params = place(model.params, config, on(text_))
        out[name][text_] = results(Model(config, params, None), text_ == "tensor=2")

# What the devices say to each other for a token of four rows.
mesh = on("data=2,tensor=2")
params = place(random_params(few), few, mesh)
cache, ends = new_cache(params, few, 256, 4)[0], params._replace(blocks=())
with running(params):
    at = everywhere(params, np.arange(4, dtype=np.int32))
    x = rows_begin(ends, everywhere(params, np.zeros((4, 1), np.int32)))
    compiled = rows_layer.lower(params.blocks[0], x, cache, at, few).compile().as_text()
out["collectives"] = re.findall(r"= \\w+\\[([\\d,]*)\\]\\S* (all-\\w+|collective-\\w+|reduce-scatter)\\(", compiled)

# From a file, straight to the devices.
model = Model(few, random_params(few), None)
save(model, folder / "model.gguf")
explicit = Mesh(mesh.devices, mesh.axis_names, (AxisType.Explicit,) * 4)  # as `jax.make_mesh` makes them
loaded = load(folder / "model.gguf", mesh=explicit)
pairs = list(zip(jax.tree.leaves(loaded.params), jax.tree.leaves(params), strict=True))
out["loaded"] = all(bool((np.asarray(a) == np.asarray(b)).all()) and a.sharding == b.sharding for a, b in pairs)

# The command line.
tiny = replace(TINY, vocab=264)
kinds = tiny_fields()["tokenizer.ggml.token_type"]
fields = tiny_fields(tiny) | {"tokenizer.ggml.tokens": [*TOKENS, "ab"], "tokenizer.ggml.token_type": [*kinds, 1]}
path = str(write_gguf(folder / "tiny.gguf", fields, tiny_arrays(tiny)))
(folder / "lines").write_text("the\\nabc\\nabcdefgh\\n")
(folder / "text").write_text("the sky is blue")


def run(*arguments):
    written, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(written), contextlib.redirect_stderr(said):
        status = commands.main([*arguments])
    return [status, written.getvalue(), said.getvalue()]


cold = ["--model", path, "--temperature", "0", "--max-new", "8", "--quiet"]
out["commands"] = {
    text_: [
        run("chat", "the", *cold, *more),
        run("generate", "--prompts", str(folder / "lines"), *cold, *more),
        run("evaluate", path, str(folder / "text"), "--json", *more),
    ]
    for text_, more in (("one", []), ("data=4,tensor=2", ["--mesh", "data=4,tensor=2"]))
}
out["refused"] = [run("generate", "the", *cold, "--mesh", text_) for text_ in ("tensor=8", "tensor=2")]
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    flags = "--xla_force_host_platform_device_count=8"
    environment = {"XLA_FLAGS": flags, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM.replace("MESHES", repr(MESHES)), str(tmp_path_factory.mktemp("mesh"))]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


CASES = [("many", mesh) for mesh in MESHES] + [("few", "tensor=4")]


@pytest.mark.parametrize(("heads", "mesh"), CASES)
def test_a_mesh_generates_the_same_tokens(found: Any, heads: str, mesh: str) -> None:
    """By itself, and many at once; in a cache that grows; with fewer key/value heads than devices too."""
    got, want = found[heads][mesh], found[heads]["one"]
    count = len(got["generate"])
    assert (got["generate"], got["all"]) == (want["generate"][:count], want["all"])
    assert count >= 30 and [len(tokens) for tokens in got["all"]] == [30] * 3


@pytest.mark.parametrize(("heads", "mesh"), CASES)
def test_a_mesh_gives_the_same_scores(found: Any, heads: str, mesh: str) -> None:
    got, want = found[heads][mesh], found[heads]["one"]
    for name in ("logits", "scores"):
        assert got[name] == pytest.approx(want[name], rel=1e-5, abs=1e-5), name
    assert got["nats"] == pytest.approx(want["nats"], rel=1e-5)


@pytest.mark.parametrize(
    ("heads", "mesh", "session", "rows"),
    [
        ("many", "one", (4, 364), (3, 3, 4)),
        ("many", "tensor=2", (2, 364), (3, 3, 2)),
        ("many", "tensor=4", (1, 256), (3, 3, 1)),
        ("many", "data=2,tensor=2", (2, 256), (4, 2, 2)),
        ("few", "tensor=4", (2, 256), (3, 3, 2)),
    ],
)
def test_the_cache_is_split(
    found: Any, heads: str, mesh: str, session: tuple[int, int], rows: tuple[int, int, int]
) -> None:
    """A device has its share of the heads, and of the rows, of which there are as many as can be shared."""
    got, every, (share, room), (size, part, _) = found[heads][mesh], 4 if heads == "many" else 2, session, rows
    assert got["session"] == [[every, room, 4], [share, room, 4]]
    assert got["batch"] == [[[size, every, 256, 4], [part, rows[2], 256, 4]]]


def test_devices_exchange_activations_not_caches(found: Any) -> None:
    """Two sums over the tensor axis, of two rows each; and whether any row has more keys to read."""
    assert sorted(map(tuple, found["collectives"])) == [("", "all-reduce"), *[("32,2,1", "all-reduce")] * 2]


def test_a_file_is_loaded_onto_a_mesh(found: Any) -> None:
    assert found["loaded"]


def test_commands_run_on_a_mesh(found: Any) -> None:
    """chat, generate --prompts and evaluate: what they print is what one device prints."""
    got, want = found["commands"]["data=4,tensor=2"], found["commands"]["one"]
    assert [status for status, *_ in got] == [0] * 3, got
    assert got[:2] == want[:2] and all(out.strip() for _, out, _ in got)
    scored, one = (json.loads(out) for (*_, (_, out, _)) in (got, want))
    assert scored["perplexity"] == pytest.approx(one["perplexity"], rel=1e-5)


def test_a_real_model_runs_on_more_devices_than_there_are_cores(tmp_path: Path) -> None:
    """Its programs wait for several sums at once, on each of three devices, for which XLA's own threads do not do."""
    (tmp_path / "lines").write_text("The sky is\nOnce upon a time, in a small town\n")
    arguments = ["generate", "--prompts", str(tmp_path / "lines"), "--temperature", "0", "--max-new", "3", "--quiet"]
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=3", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    said = list[str]()
    for more in ([], ["--mesh", "tensor=3"]):
        command = [sys.executable, "-m", "lovely_llama_tools", *arguments, *more]
        done = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        said.append(done.stdout)
    assert said[0] == said[1] != ""


def test_what_a_mesh_does_not_divide_is_refused(found: Any) -> None:
    """By the name of the axis; and a mesh of fewer devices than there are."""
    (heads, devices), line = found["refused"], r"error: \S+: {}: got {}, expected [^\n]+\n"
    assert heads[:2] == [2, ""] and re.fullmatch(line.format("q_per_kv", "2"), heads[2]), heads
    assert devices[:2] == [2, ""] and re.fullmatch(line.format("mesh", "2 devices"), devices[2]), devices


@pytest.mark.parametrize("command", [["generate", "the"], ["chat", "the"], ["evaluate"]], ids=lambda words: words[0])
@pytest.mark.parametrize(
    ("mesh", "says"),
    [
        ("tensor=4", r"got 4 devices, expected 1, .*XLA_FLAGS=--xla_force_host_platform_device_count=4"),
        ("data=2,tensor=2", "got 4 devices, expected 1, "),
        ("", "got ''"),
        ("tensor", "got 'tensor'"),
        ("tensor=0", "got 'tensor=0'"),
        ("tensor=-1", "got 'tensor=-1'"),
        ("tensor=1.0", "got 'tensor=1.0'"),
        ("heads=1", "got 'heads=1'"),
        ("tensor=1,tensor=1", "got 'tensor=1,tensor=1'"),
        ("seq=2", "got seq=2, expected 1"),
    ],
)
def test_a_bad_mesh_is_refused(
    command: list[str], mesh: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line, before a model is read."""
    path = write_talker(tmp_path / "talker.gguf")
    words = [*command, *([path, str(tmp_path / "talker.gguf")] if command == ["evaluate"] else ["--model", path])]
    (tmp_path / "text").write_text("the")
    words = ["evaluate", path, tmp_path / "text"] if command == ["evaluate"] else words
    assert commands.main([*map(str, words), "--mesh", mesh]) == 2
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 1
    assert re.match(f"error: arguments: mesh: {says}", err), err
