"""Checkpoints that orbax writes: on eight devices and on fewer, while a run goes on, and when it ends in the middle."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from builders import SMALL, layers_of, random_params
from safetensors.numpy import load_file
from small_runs import hasten, rows, words, write_sums

from lovely_llama import LlamaError
from lovely_llama_tools.commands import main
from lovely_llama_tools.extras import extra
from lovely_llama_tools.formats.files import load
from lovely_llama_tools.formats.hugging_face import to_hf
from lovely_llama_tools.formats.orbax import ORBAX, is_orbax
from lovely_llama_tools.tokens.characters import characters_tokenizer
from lovely_llama_tools.training import checkpoints as keeping
from lovely_llama_tools.training import run_folder
from lovely_llama_tools.training.checkpoints import STAGED, Checkpointer
from lovely_llama_tools.training.run_folder import Progress, read_checkpoint, steps
from lovely_llama_tools.training.step import TrainState, initial_state, stacked

ROOT = Path(__file__).parents[3]
MODEL = "--layers 2 --dim 16 --heads 8 --kv-heads 4 --hidden-dim 24 --ctx 8 --batch 8 --sample 0 --val-fraction 0.2"
SCHEDULE = "--steps 12 --save-every 3 --eval-every 6 --lr 1e-2 --warmup 2 --keep 9"
MESH = "--mesh data=2,fsdp=2,tensor=2"

# Run in a process with eight devices; prints what the tests below look at.
PROGRAM = """
import contextlib, io, json, os, resource, shutil, sys
from pathlib import Path
import jax
import numpy as np
from pytest import MonkeyPatch
from small_runs import assert_same, rows_without_speed, hasten, rows, words
from lovely_llama_tools import commands
from lovely_llama_tools.devices import mesh
from lovely_llama_tools.training import settings
from lovely_llama_tools.formats.files import load

os.chdir(sys.argv[1])
folder, text, out = Path(), sys.argv[2], {}  # relative, as the default of --out is
whole = folder / "whole"
hasten(MonkeyPatch())


def train(*arguments, devices=8, want=0):
    settings.make_mesh = lambda sizes: mesh.make_mesh(sizes, jax.devices()[:devices])
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = commands.main(words(*arguments))
    assert status == want, said.getvalue()
    return said.getvalue()


def copied(name):
    return shutil.copytree(whole, folder / name, symlinks=True)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


train(text, "MODEL SCHEDULE --steps 2 --out", folder / "one")
train(text, "MODEL SCHEDULE MESH --out", whole)
same(load(folder / "one" / "step-0").params, load(whole / "step-0").params)
out["losses"] = {}
for devices, sizes in ((8, "data=2,fsdp=2,tensor=2"), (4, "fsdp=2,tensor=2"), (2, "tensor=2"), (1, "data=1")):
    run = copied(f"on{devices}")
    train("--resume step-6 --mesh", sizes, "--out", run, devices=devices)
    out["losses"][devices] = [row["train_loss"] for row in rows(run)]
assert_same(folder / "on8", whole)

run = copied("hf")
train("--resume step-6 --checkpoints hf --out", run)
same(load(run / "step-12").params, load(whole / "step-12").params)
out["schedule"] = rows_without_speed(run) == rows_without_speed(whole)
train("--resume step-9 --checkpoints orbax --out", run)
assert_same(run, whole)

on = mesh.make_mesh(mesh.parse_mesh("data=2,fsdp=2,tensor=2"))
model = load(whole / "step-12", mesh=on)
placed = mesh.place(load(whole / "step-12").params, model.config, on)
same(model.params, placed)
out["placed"] = jax.tree.map(lambda a: a.sharding, model.params) == jax.tree.map(lambda a: a.sharding, placed)

lora = [text, "--init-from", whole / "best", "--lora 2 --ctx 8 --batch 8 --sample 0 --steps 6 --lr 1e-2 --warmup 0"]
for form in ("orbax", "hf"):
    train(*lora, "MESH --save-every 3 --keep 9 --checkpoints", form, "--out", folder / form / "lora")
run = shutil.copytree(folder / "orbax" / "lora", folder / "lora", symlinks=True)
train("--resume step-3 --out", run)
assert_same(run, folder / "orbax" / "lora")

resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
out["full"] = train(text, "MODEL SCHEDULE --checkpoints orbax --mesh fsdp=8 --out", folder / "full", want=1)
print(json.dumps(out))
"""
# A process that is killed as soon as it goes on while its second checkpoint is written.
KILLED = """
import os, sys
from lovely_llama_tools.training import checkpoints as keeping
from lovely_llama_tools.commands import main

begin, begun = keeping.start_writing, []


def struck(*arguments):
    begun.append(begin(*arguments))
    return begun[-1] if len(begun) == 1 else os.kill(os.getpid(), 9)


keeping.start_writing = struck
main(sys.argv[1:])
"""


def python(program: str, *arguments: object, devices: int = 1) -> "subprocess.CompletedProcess[str]":
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-c", program, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of sixteen different characters."""
    path = write_sums(tmp_path_factory.mktemp("text") / "sums.txt")
    path.write_text(path.read_text() + "abc\n")
    return path


@pytest.fixture(scope="module")
def found(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, str]:
    folder, program = tmp_path_factory.mktemp("eight"), PROGRAM
    for name in ("MODEL", "SCHEDULE", "MESH"):
        program = program.replace(name, globals()[name])
    done = python(program, folder, text, devices=8)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout), done.stderr


# ---- On several devices ----------------------------------------------------------------------------------------------


def test_resumed_on_as_many_devices_and_on_fewer(found: Any) -> None:
    """On as many the same bits, as was seen in the process; on fewer the losses of the unbroken run, but for rounding.

    So it is with a run that changes the format in between. A new model has the bits that it has on one device.
    """
    folder, out, _ = found
    want = [row["train_loss"] for row in rows(folder / "whole")]
    assert out["losses"]["8"] == want and out["schedule"]
    for devices in "421":
        np.testing.assert_allclose(out["losses"][devices], want, rtol=1e-5)


def test_other_commands_read_it(found: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the parameters that orbax itself reads; on a mesh, each device has its part."""
    folder, out, _ = found
    path, model = folder / "whole" / "step-12", load(folder / "whole" / "step-12")
    assert out["placed"]
    whole = stacked(model.params)
    like = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=w.sharding), whole)
    like = dict.fromkeys(("params", "first", "second"), like)
    read = extra("orbax.checkpoint", "scale").StandardCheckpointer().restore(path / ORBAX, like)
    jax.tree.map(np.testing.assert_array_equal, read["params"], whole)
    assert main(["convert", str(path), str(tmp_path / "hf"), "--to", "hf"]) == 0
    arrays = load_file(tmp_path / "hf" / "model.safetensors")
    for name, array in to_hf(model.params, model.config).items():
        np.testing.assert_array_equal(arrays[name], array)
    assert str(load(tmp_path / "hf").tokenizer) == str(model.tokenizer) != "None"
    assert main(["inspect", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out.partition("\n")[2])
    assert (report["format"], report["not_finite"]) == ("Orbax", 0)
    assert report["numbers_by_dtype"] == {"F32": report["parameters"]}
    assert main(["generate", "1+", "--model", str(folder / "whole" / "best"), "--max-new", "3", "--quiet"]) == 0
    assert capsys.readouterr().out.strip()


def test_adapters(found: Any) -> None:
    """What is stored beside them is the model with them."""
    folder, _, _ = found
    model, want, base = (load(folder / at) for at in ("orbax/lora/step-6", "hf/lora/step-6", "whole/best"))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), model.params, want.params)
    alone = load(folder / "orbax/lora/step-6/adapter", base=folder / "whole" / "best")
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), alone.params, want.params)
    q, before = (layers_of(params)[1].attn.q for params in (model.params, base.params))
    assert np.abs(q - before).max() > 1e-3


def test_a_full_disk_is_one_line(found: Any) -> None:
    folder, out, err = found
    assert out["full"].splitlines()[-1].startswith("error: full/step-0: path: got ")
    assert "Traceback" not in out["full"] and not err
    assert not steps(folder / "full")


# ---- While it is written ---------------------------------------------------------------------------------------------


@pytest.fixture
def state() -> TrainState:
    return initial_state(None, stacked(random_params(SMALL)))


def checkpointer(run: Path, last: int = 9) -> Checkpointer:
    return Checkpointer(run, "orbax", SMALL, characters_tokenizer("abcdefghijklmnopqrstuvwxyz .\n"), 1.0, {}, last)


def hold(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing that has been begun is finished before this is set."""
    begin, ended = keeping.start_writing, threading.Event()

    def locked(*arguments: Any) -> Callable[[], None]:
        wait = begin(*arguments)
        return lambda: (ended.wait(20), wait())[1]

    monkeypatch.setattr(keeping, "start_writing", locked)
    return ended


def test_a_run_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, state: TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is saved is what there was, though the next step takes over its memory."""
    want = jax.tree.map(np.array, state.trained)
    ended = hold(monkeypatch)
    with checkpointer(tmp_path) as saved:
        saved.save(state, Progress(1, best=1.0, best_step=1))
        changed = jax.jit(lambda tree: jax.tree.map(lambda w: w + 1, tree), donate_argnums=0)(state.trained)
        assert not steps(tmp_path) and float(changed.norm[0]) == want.norm[0] + 1
        ended.set()
        saved.wait()
        assert steps(tmp_path) == [1] and (tmp_path / "best").readlink() == Path("step-1")
    jax.tree.map(np.testing.assert_array_equal, stacked(load(tmp_path / "best").params), want)
    assert not (tmp_path / STAGED / "step-1").exists()


def test_the_next_checkpoint_waits_for_the_last_and_says_what_failed(
    tmp_path: Path, state: TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    with checkpointer(tmp_path, 1) as saved:
        saved.save(state, Progress(1))
        saved.save(state, Progress(2))
        assert 1 in steps(tmp_path)
        saved.wait()
        assert steps(tmp_path) == [2]
        with monkeypatch.context() as patch:
            patch.setattr(
                run_folder, "publish", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
            )
            saved.save(state, Progress(3))
            with pytest.raises(OSError, match=r"step-3: path: got No space left on device, expected "):
                saved.save(state, Progress(4))
    assert steps(tmp_path) == [2]


def test_killed_while_it_is_written(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No half of it is taken for a whole one, nor is left for long."""
    run = tmp_path / "run"
    done = python(KILLED, *words(text, MODEL, SCHEDULE, "--checkpoints orbax --out", run))
    assert done.returncode == -signal.SIGKILL and "Traceback" not in done.stderr
    assert steps(run) == [0] and is_orbax(run / "step-0") and (run / STAGED).exists()
    hasten(monkeypatch)
    assert main(words("--resume --out", run)) == 0
    assert steps(run) == [0, 3, 6, 9, 12] and not (run / STAGED).exists()
    assert len(rows(run)) == 12


# ---- Damaged ---------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def edit(old: str, new: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(path.read_text().replace(old, new))


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a bit of an array": ("orbax/ocdbt.process_0/d/*", flip),
    "a shorter array": ("orbax/ocdbt.process_0/d/*", lambda path: os.truncate(path, path.stat().st_size - 1)),
    "no index": ("orbax/manifest.ocdbt", Path.unlink),
    "another config": ("config.json", edit('"rms_norm_eps": 1e-05', '"rms_norm_eps": 1e-06')),
    "another file": ("orbax/d", lambda path: (path / "more").write_text("")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_refused_and_the_last_good_one_named(found: Any, tmp_path: Path, damage: str) -> None:
    name, harm = DAMAGES[damage]
    run = shutil.copytree(found[0] / "whole", tmp_path / "run", symlinks=True)
    harm(max((run / "step-12").glob(name), key=lambda path: path.stat().st_size))
    with pytest.raises(LlamaError, match=r"--resume step-9 goes back to the last good one"):
        read_checkpoint(run, 12)
    assert read_checkpoint(run, 9).progress.step == 9


def tree(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change what is said of the tree."""

    def harm(path: Path) -> None:
        fields = json.loads(path.read_text())
        change(fields["tree_metadata"])
        path.write_text(json.dumps(fields))

    return harm


def renamed(leaves: dict[str, Any]) -> None:
    leaves["('params', 'norm')"]["key_metadata"][1]["key"] = "other"


def without_a_piece(path: Path) -> None:
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{path}/"}}
    extra("tensorstore", "scale").KvStore.open(store).result().write("params.norm/0", None).result()


def elsewhere(path: Path) -> None:
    """Move a file or a folder out of the model's, and leave a link."""
    model = next(parent for parent in path.parents if parent.name == "model")
    path.symlink_to(path.rename(model.with_name("elsewhere")))


FAULTS: dict[str, tuple[str, Callable[[Path], object], str, str]] = {
    "no description": ("orbax/_METADATA", Path.unlink, "path", "no such file"),
    "nonsense": ("orbax/_METADATA", lambda path: path.write_text("[1]"), "JSON", "a value of type list"),
    "another store": ("orbax/_METADATA", edit('"use_zarr3": false', '"use_zarr3": true'), "use_zarr3", "True"),
    "no tree": ("orbax/_METADATA", edit('"key_metadata"', '"keys"'), "tree_metadata", "another description"),
    "no index": ("orbax/manifest.ocdbt", Path.unlink, "params.embed", ""),
    "no data": ("orbax/ocdbt.process_0", shutil.rmtree, "params", ""),
    "a piece missing": ("orbax", without_a_piece, "params.norm", ""),
    "one missing": ("orbax/_METADATA", tree(lambda leaves: leaves.pop("('params', 'norm')")), "tensors", "1 missing"),
    "another tensor": ("orbax/_METADATA", tree(renamed), "params.other", ""),
    "one too many": ("config.json", edit('_embeddings": false', '_embeddings": true'), "tensors", "1 unexpected"),
    "another shape": ("config.json", edit('"hidden_size": 16', '"hidden_size": 32'), "params.embed", "(29, 16)"),
    "more layers": ("config.json", edit('_layers": 2', '_layers": 3'), "params.blocks.attn_norm", "(2, 16)"),
    "a link": ("orbax/d", lambda path: (path / "more").symlink_to("/etc/hosts"), "path", "a link to /etc/hosts"),
    "a linked folder": ("orbax/d", elsewhere, "path", "elsewhere"),
    "a linked store": ("orbax", elsewhere, "path", "elsewhere"),
    "a linked config": ("config.json", elsewhere, "path", "elsewhere"),
    "linked settings": ("generation_config.json", elsewhere, "path", "elsewhere"),
}  # fmt: skip


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of this process, with one device."""
    config = replace(SMALL, dim=16, tied=False)
    run = tmp_path_factory.mktemp("untied")
    with Checkpointer(run, "orbax", config, None, 1.0, {}, 1) as saved:
        saved.save(initial_state(None, stacked(random_params(config))), Progress(1))
    return run / "step-1"


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_model_is_refused_in_one_line(untied: Path, tmp_path: Path, fault: str) -> None:
    """By name, whoever has changed the folder."""
    name, harm, field, got = FAULTS[fault]
    path = shutil.copytree(untied, tmp_path / "model")
    harm(path / name)
    with pytest.raises(LlamaError) as caught:
        load(path)
    assert field in caught.value.field and got in caught.value.got, caught.value
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 999


def test_an_untouched_copy_is_read(untied: Path, tmp_path: Path) -> None:
    config = replace(SMALL, dim=16, tied=False)
    model = load(shutil.copytree(untied, tmp_path / "model"))
    assert model.config == config
    jax.tree.map(np.testing.assert_array_equal, model.params, random_params(config))


def test_a_missing_package_is_named_before_any_data_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    assert main(words(tmp_path / "nowhere.txt", "--checkpoints orbax --out", tmp_path / "run")) == 2
    line = "error: environment: orbax: got no such package, expected it: pip install orbax-checkpoint\n"
    assert capsys.readouterr() == ("", line) and not (tmp_path / "run").exists()
