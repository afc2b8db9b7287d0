"""Adapters in PEFT's format, held against peft itself: its adapters on our models, and ours on its."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import pytest
import torch
from asserts import assert_close
from builders import random_params
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lovely_llama import Adapter, Config, LlamaError, logits
from lovely_llama_tools import load, save
from lovely_llama_tools.commands import main
from lovely_llama_tools.fast.layers import in_tuple
from lovely_llama_tools.formats.adapters import save_adapter
from lovely_llama_tools.formats.files import checkpoint
from lovely_llama_tools.formats.model import Model
from lovely_llama_tools.inference import harness
from lovely_llama_tools.training.step import MATRICES, merged, new_adapters, stacked

CONFIG = Config(29, 12, 2, 3, 2, 6, 20, 64, 3e-4, 700.0, None, False)
IDS = np.random.RandomState(0).randint(1, 29, 24)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save(Model(CONFIG, random_params(CONFIG), None), folder / "model")
    save(Model(CONFIG, random_params(CONFIG), None), folder / "model.gguf")
    return folder / "model"


def ours(path: Path, **how: Any) -> Any:
    model = load(path, **how)
    return logits(model.params, IDS, model.config)


@torch.no_grad()
def theirs(model: Any) -> Any:
    return model(torch.tensor(IDS)[None]).logits[0].numpy()


def trained(base: Path, out: Path, **settings: Any) -> Any:
    """What peft makes of a model and random adapters, which it has also saved."""
    torch.manual_seed(0)
    wanted: Any = {"task_type": "CAUSAL_LM", "target_modules": ALL, "r": 3, "lora_alpha": 5, **settings}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**wanted)).eval()
    with torch.no_grad():
        for name, w in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                w += torch.randn_like(w) / 4
    model.save_pretrained(str(out))
    return model


SETTINGS: dict[str, dict[str, Any]] = {
    "all matrices": {},
    "rank 1 of q": {"r": 1, "target_modules": ["q_proj"]},
    "rank 8 of k and down": {"r": 8, "lora_alpha": 1, "target_modules": ["k_proj", "down_proj"]},
    "rank above the width": {"r": 16, "target_modules": ["v_proj", "o_proj"]},
    "rsLoRA": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"layers.1.self_attn.q_proj": 5, "up_proj": 2}, "alpha_pattern": {"o_proj": 9, ".*mlp.*": 4},
    },
    "the embedding, and lm_head": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "whole modules": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "one layer": {"layers_to_transform": [1]},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SETTINGS)
def test_an_adapter_of_peft_has_its_logits(name: str, base: Path, tmp_path: Path) -> None:
    model = trained(base, tmp_path / "adapter", **SETTINGS[name])
    want = theirs(model)
    assert np.linalg.norm(want - ours(base)) > 0.05 * np.linalg.norm(want)
    assert_close(ours(tmp_path / "adapter"), want, 1e-5, name)
    assert_close(ours(tmp_path / "adapter", base=base.with_suffix(".gguf")), want, 1e-5, f"{name}, on a GGUF")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("names", [MATRICES, ("k",), ("q", "down")])
def test_adapters_of_ours_have_the_same_logits_in_peft(
    names: tuple[str, ...], rank: int, base: Path, tmp_path: Path
) -> None:
    blocks: Any = stacked(load(base).params).blocks
    adapters = new_adapters(jax.random.key(0), blocks, rank, names)
    drawn = iter(jax.random.split(jax.random.key(1), 99))

    def changed_b(adapter: Any) -> Any:
        return adapter._replace(b=jax.random.normal(next(drawn), adapter.b.shape) / 4)

    adapters = jax.tree.map(changed_b, adapters, is_leaf=lambda node: isinstance(node, Adapter))
    save_adapter(tmp_path / "adapter", adapters, CONFIG, str(base), rank, 3.0)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    want, whole = theirs(model), merged(stacked(load(base).params), adapters, 3.0 / rank)
    assert np.linalg.norm(want - ours(base)) > 0.05 * np.linalg.norm(want)
    assert_close(logits(in_tuple(whole), IDS, CONFIG), want, 1e-5, "merged here")
    assert_close(ours(tmp_path / "adapter"), want, 1e-5, "read again")


# ---- What is refused -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of ours, of rank 2, for q alone."""
    folder, blocks = tmp_path_factory.mktemp("adapters") / "q", cast(Any, stacked(load(base).params).blocks)
    save_adapter(folder, new_adapters(jax.random.key(0), blocks, 2, ["q"]), CONFIG, str(base), 2, 4.0)
    return folder


def changed(adapter: Path, folder: Path, **fields: Any) -> Path:
    """Another adapter, with these fields."""
    folder.mkdir()
    stated = json.loads((adapter / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(stated | fields))
    (folder / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    return folder


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"peft_type": "LOHA"}, "peft_type: got 'LOHA', expected 'LORA'"),
        ({"peft_type": None}, "peft_type: got nothing"),
        ({"use_dora": True}, "use_dora: got True, expected False"),
        ({"bias": "all"}, "bias: got 'all', expected 'none'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out: got True, expected False"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: got 'pissa', expected True or "),
        ({"trainable_token_indices": [3]}, "trainable_token_indices: got "),
        ({"layer_replication": [[0, 2]]}, "layer_replication: got "),
        ({"quux": 1}, "quux: got 1, expected no field that is unknown here .--allow quux reads on"),
        ({"r": 0}, "r: got 0, expected a whole number above 0"),
        ({"r": 3}, r"lora_A.weight: got the shape \(2, 12\), expected \(3, 12\), of rank 3"),
        ({"lora_alpha": "4"}, "lora_alpha: got '4', expected a finite number"),
        ({"use_rslora": "yes"}, "use_rslora: got 'yes', expected true or false"),
        ({"rank_pattern": {"q_proj": 1.5}}, "rank_pattern: got "),
        ({"rank_pattern": {"q_proj(": 2}}, r"rank_pattern: got 'q_proj\('"),
        ({"base_model_name_or_path": "/nowhere"}, "path: got an adapter, whose base /nowhere is not there, expected "
         "the model that it is for: --base MODEL"),
        ({"base_model_name_or_path": None}, "path: got an adapter that names no base, expected the model"),
    ],
)  # fmt: skip
def test_other_kinds_are_refused_by_name(fields: dict[str, Any], says: str, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(LlamaError, match=says):
        load(changed(adapter, tmp_path / "adapter", **fields))


def test_tensors_that_have_no_place_are_refused(adapter: Path, base: Path, tmp_path: Path) -> None:
    path = changed(adapter, tmp_path / "adapter") / "adapter_model.safetensors"
    tensors = load_file(path)
    q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    for name, says in (
        (f"{q}A.weight", "q_proj.weight: got B, expected A and B"),
        (f"{q}magnitude_vector", "magnitude_vector: got a tensor of this name, expected one for a matrix of the base"),
        ("base_model.model.score.weight", "score.weight: got a tensor of this name"),
    ):
        others = (
            tensors | {name: torch.ones(1)} if name not in tensors else {k: tensors[k] for k in {*tensors} - {name}}
        )
        save_file(others, path)
        with pytest.raises(LlamaError, match=says):
            load(path.parent)
    with pytest.raises(LlamaError, match=r"base: got .*, expected none: MODEL is no adapter"):
        load(base, base=adapter)
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(LlamaError, match=r"got weights in adapter_model\.bin alone, expected adapter_model"):
        load(path.parent)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", [{"target_modules": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}])
def test_a_tied_embedding_is_not_changed(how: dict[str, Any], tmp_path: Path) -> None:
    """In peft the unembedding stays as it was, so that the two are no longer the same."""
    config = replace(CONFIG, tied=True)
    save(Model(config, random_params(config), None), tmp_path / "base")
    trained(tmp_path / "base", tmp_path / "adapter", **({"target_modules": ["q_proj"]} | how))
    with pytest.raises(LlamaError, match="got a change of an embedding that is tied, expected an untied base"):
        load(tmp_path / "adapter")


# ---- Commands --------------------------------------------------------------------------------------------------------


def test_commands_take_an_adapter_with_its_base(
    adapter: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = changed(adapter, tmp_path / "lost", base_model_name_or_path="nowhere/at/all", quux=1)
    how = ["--base", str(base), "--allow", "quux"]
    assert main(["convert", str(lost), str(tmp_path / "merged"), *how]) == 0
    assert main(["inspect", str(lost), "--json", *how]) == 0
    report = json.loads(capsys.readouterr().out.partition("\n")[2])
    assert report["format"] == "Hugging Face with PEFT's adapter"
    assert {"name": "adapter.r", "value": 2, "status": "honoured"} in report["fields"]
    assert main(["generate", "1 2 3", "--model", str(lost), "--max-new", "2", "--temperature", "0", *how]) == 0
    (tmp_path / "text").write_text("1 2 3 4 5")
    assert main(["evaluate", str(lost), str(tmp_path / "text"), *how]) == 0
    np.testing.assert_array_equal(ours(tmp_path / "merged"), ours(adapter))
    with checkpoint(adapter) as found, checkpoint(base) as before:
        assert found.digest() == before.digest()  # B is zero before training


def test_a_tokenizer_beside_an_adapter_is_its_own(adapter: Path, tmp_path: Path) -> None:
    path = changed(adapter, tmp_path / "adapter")
    (path / "characters.json").write_text(json.dumps({"characters": "ab"}))
    tokenizer = load(path).tokenizer
    assert tokenizer is not None and tokenizer.encode("ab", False) == [0, 1] and load(adapter).tokenizer is None


def test_lm_eval_takes_an_adapter_with_its_base(adapter: Path, base: Path, tmp_path: Path) -> None:
    """As far as a tokenizer, which this one does not have."""
    lost = changed(adapter, tmp_path / "lost", base_model_name_or_path=None, quux=1)
    made = harness.adapter()
    with pytest.raises(LlamaError, match="an adapter that names no base"):
        made(pretrained=str(lost), allow="quux")
    with pytest.raises(LlamaError, match="quux: got 1"):
        made(pretrained=str(lost), base=str(base))
    with pytest.raises(LlamaError, match="model: tokenizer: got none"):
        made(pretrained=str(lost), base=str(base), allow="zot+quux")
