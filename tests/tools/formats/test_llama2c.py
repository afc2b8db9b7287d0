"""llama2.c's checkpoints: upstream's files give its logits, and are written again byte by byte."""

import importlib.util
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from asserts import assert_close
from builders import (
    LLAMA2_C,
    LLAMA2C_ORDER,
    layers_of,
    random_params,
    read_recording,
    tokenizer_of,
    write_sentencepiece,
)
from jax import numpy as jnp

from lovely_llama import Config, LlamaError, RopeScaling, logits
from lovely_llama_tools.fast.layers import stack
from lovely_llama_tools.formats.files import checkpoint, load, save
from lovely_llama_tools.formats.llama2c import to_llama2c
from lovely_llama_tools.formats.model import Model
from lovely_llama_tools.tokens import folder_tokenizer

CONFIG = Config(80, 64, 2, 4, 2, 8, 128, 32, 1e-5, 1e4, None, True)
NAMES, VERSIONS = ("tied", "untied"), (0, 1, 2)


@pytest.fixture(scope="module")
def llama2c(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints that upstream's export.py wrote, and a matching tokenizer."""
    folder = tmp_path_factory.mktemp("llama2c")
    for name in NAMES:
        for version in VERSIONS:
            shutil.copy(LLAMA2_C / f"{name}.v{version}.bin", folder)
    write_sentencepiece(folder / "tokenizer.model", 44)
    return folder


def dequantised(data: bytes, names: list[str], shapes: dict[str, tuple[int, ...]], group: int) -> dict[str, np.ndarray]:
    """Matrices as they stand one after another: int8 values, then float32 scales."""
    found = dict[str, np.ndarray]()
    for name in names:
        n = int(np.prod(shapes[name]))
        scales = np.frombuffer(data, "<f4", n // group, n)
        found[name] = (np.frombuffer(data, "i1", n) * np.repeat(scales, group)).reshape(shapes[name])
        data = data[n + 4 * n // group :]
    assert not data
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("version", [0, 1])
def test_upstreams_files_give_its_logits(llama2c: Path, name: str, version: int) -> None:
    model, recorded = load(llama2c / f"{name}.v{version}.bin"), read_recording(f"{name}.bin")[0]
    assert model.config == replace(CONFIG, tied=name == "tied")
    assert tokenizer_of(model).pieces[44:] == [b""] * 36  # ids without a piece in the tokenizer
    assert all(tokenizer_of(model).pieces[3:44])
    tokens, want = jnp.array(recorded["tokens"][0], jnp.int32), recorded["logits"][0]
    assert_close(logits(model.params, tokens, model.config), want, 1e-5, "logits")


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_not_finite_is_read_where_that_is_allowed(llama2c: Path, tmp_path: Path, version: int) -> None:
    data = bytearray((llama2c / f"tied.v{version}.bin").read_bytes())
    struct.pack_into("<f", data, len(data) - 4 if version == 2 else 28 + 4 * 100 if version == 0 else 256, np.nan)
    (tmp_path / "model.bin").write_bytes(data)
    with pytest.raises(LlamaError, match="NaN or ∞"):
        load(tmp_path / "model.bin")
    params = load(tmp_path / "model.bin", allow_nonfinite=True).params
    assert 0 < sum(np.isnan(leaf).sum() for leaf in jax.tree.leaves(params)) <= 64


@pytest.mark.parametrize("name", NAMES)
def test_version_2_is_dequantised(llama2c: Path, name: str) -> None:
    """To the values of its file; they differ from version 1's by at most half a scale, and give similar logits."""
    path = llama2c / f"{name}.v2.bin"
    model, exact = load(path), load(llama2c / f"{name}.v1.bin")
    arrays, before = to_llama2c(model.params, model.config), to_llama2c(exact.params, exact.config)
    norms = [key for key in arrays if "norm" in key]
    order = [key.format(i) for key in LLAMA2C_ORDER for i in range(2) if "norm" not in key]
    order = [f"{key}.weight" for key in dict.fromkeys([*order, *(["output"] if name == "untied" else [])])]
    shapes = {key: array.shape for key, array in before.items()}
    want = dequantised(path.read_bytes()[256 + 4 * 64 * len(norms) :], order, shapes, 64)
    assert_close({key: arrays[key] for key in order}, want, 0, name)
    assert_close({key: arrays[key] for key in norms}, {key: before[key] for key in norms}, 0, name)
    for key in order:
        half = np.abs(before[key]).reshape(-1, 64).max(axis=1) / 254
        assert (np.abs(arrays[key] - before[key]).reshape(-1, 64).max(axis=1) <= half * 1.0001).all(), key
    recorded = read_recording(f"{name}.bin")[0]
    got = logits(model.params, jnp.array(recorded["tokens"][0], jnp.int32), model.config)
    assert_close(got, recorded["logits"][0], 0.03, "logits")


def assert_same_file(got: bytes, want: bytes, version: int) -> None:
    """Equal bytes; but the last bits of version 0's tables, which nothing reads, depend on how torch was built."""
    if version == 0:
        start = 28 + 4 * (80 * 64 + (2 * 2 + 1) * 64 + 2 * (3 * 64 * 64 + 3 * 64 * 128))
        end = start + 4 * 2 * 32 * 4
        a, b = (np.frombuffer(data[start:end], "<f4") for data in (got, want))
        np.testing.assert_array_max_ulp(a, b, 1)
        got, want = (data[:start] + data[end:] for data in (got, want))
    assert got == want


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_written_equals_upstreams_file(llama2c: Path, tmp_path: Path, name: str, version: int) -> None:
    """Layers stacked or not. Upstream wrote version 2 from the parameters of version 1."""
    model = load(llama2c / f"{name}.v{min(version, 1)}.bin")
    stacked = model._replace(params=model.params._replace(blocks=stack(layers_of(model.params))))
    for i, written in enumerate((model, stacked)):
        path = tmp_path / str(i) / "model.bin"
        save(written, path, f"llama2c-v{version}")
        assert_same_file(path.read_bytes(), (llama2c / f"{name}.v{version}.bin").read_bytes(), version)


def test_the_tables_of_version_0_do_not_need_torch(
    llama2c: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(llama2c / "tied.v0.bin")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    save(model, tmp_path / "model.bin")
    assert_same_file((tmp_path / "model.bin").read_bytes(), (llama2c / "tied.v0.bin").read_bytes(), 0)


@pytest.mark.parametrize("version", VERSIONS)
def test_other_shapes_come_back(tmp_path: Path, version: int) -> None:
    """6 heads over 2 kv_heads, a hidden width that 64 does not divide, and bfloat16."""
    config = Config(29, 48, 3, 2, 3, 8, 72, 17, 1e-5, 1e4, None, False)
    params = random_params(config, dtype=jnp.bfloat16)
    path = tmp_path / "model.bin"
    save(Model(config, params, None), path, f"llama2c-v{version}")
    write_sentencepiece(tmp_path / "tokenizer.model", 29)
    model = load(path)
    assert model.config == config
    assert_close(model.params, params, 0.01 if version == 2 else 0, "params")
    with checkpoint(path) as found:
        assert found.format == f"llama2.c {version}"
        assert version != 2 or found.fields["group_size"] == (8, "honoured")
        assert found.fields["n_heads"] == (6, "honoured")
        assert found.fields["norm_eps"] == (1e-5, "defaulted")
        assert found.tensors["layers.0.attention.wq.weight"] == ((48, 48), "INT8" if version == 2 else "F32")
        assert found.tensors["norm.weight"] == ((48,), "F32")
        assert len(found.tensors) == 3 * 9 + 3


def test_groups_of_zeros_are_written(tmp_path: Path) -> None:
    params = random_params(CONFIG)
    save(Model(CONFIG, params._replace(embed=params.embed.at[3].set(0)), None), tmp_path / "a.bin", "llama2c-v2")
    write_sentencepiece(tmp_path / "tokenizer.model", 44)
    assert not load(tmp_path / "a.bin").params.embed[3].any()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (dict(theta=5e5), "theta"),
        (dict(eps=1e-6), "eps"),
        (dict(rope_scaling=RopeScaling("linear", 2.0)), "rope_scaling"),
        (dict(head_dim=10), "head_dim"),
        (dict(q_per_kv=3), "head_dim"),
    ],
)
@pytest.mark.parametrize("version", VERSIONS)
def test_what_the_format_cannot_carry_is_refused(
    tmp_path: Path, change: dict[str, object], field: str, version: int
) -> None:
    config = replace(CONFIG, **change)
    with pytest.raises(LlamaError) as caught:
        save(Model(config, random_params(config), None), tmp_path / "a.bin", f"llama2c-v{version}")
    assert caught.value.field == field
    assert not any(tmp_path.iterdir())


def test_an_eps_that_went_through_float32_is_the_same(tmp_path: Path) -> None:
    config = replace(CONFIG, eps=float(np.float32(1e-5)))
    save(Model(config, random_params(config), None), tmp_path / "a.bin")
    assert struct.unpack("<7i", (tmp_path / "a.bin").read_bytes()[:28]) == (64, 128, 2, 8, 4, 80, 32)


def test_a_tokenizer_is_optional_and_must_fit(llama2c: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(llama2c / "tied.v0.bin", tmp_path))
    assert load(path).tokenizer is None
    beside = tmp_path / "tokenizer.model"
    for contents in (b"", b"<html>", b"\x08\x01" * 50):
        beside.write_bytes(contents)
        with pytest.raises(LlamaError) as caught:
            load(path)
        assert caught.value.file == str(beside)
    write_sentencepiece(beside, 44)
    assert len(tokenizer_of(load(path)).pieces) == 80
    small, params = replace(CONFIG, vocab=40), random_params(replace(CONFIG, vocab=40))
    save(Model(small, params, None), path, force=True)
    with pytest.raises(LlamaError, match="got 44, expected at most 40"):
        load(path)


@pytest.mark.parametrize("vocab", [44, 80])
def test_a_tokenizer_is_written_beside_its_model(llama2c: Path, tmp_path: Path, vocab: int) -> None:
    """As tokenizer.bin too, if it has as many pieces as the model, without which run.c fails."""
    config, text = replace(CONFIG, vocab=vocab), "the sea is so blue"
    tokenizer = folder_tokenizer(llama2c, vocab)
    assert tokenizer
    model = Model(config, random_params(config), tokenizer)
    save(model, tmp_path / "a.bin")
    assert (tmp_path / "tokenizer.bin").exists() == (vocab == 44)
    save(model, tmp_path / "b.bin", "llama2c-v2")  # the tokenizer is there already
    written = {path.name for path in tmp_path.iterdir()}
    assert tokenizer_of(load(tmp_path / "b.bin")).begin(text) == tokenizer.begin(text)
    for path in written - {"a.bin", "b.bin", "tokenizer.bin"}:
        (tmp_path / path).unlink()
    if vocab == 44:
        assert tokenizer_of(load(tmp_path / "a.bin")).begin(text) == tokenizer.begin(text)
        (tmp_path / "tokenizer.bin").write_bytes(b"another")
        with pytest.raises(LlamaError, match=r"tokenizer\.bin: path: got a path that exists"):
            save(model, tmp_path / "c.bin")
        assert not (tmp_path / "c.bin").exists()
