"""Hugging Face's folders against transformers: theirs loaded here, ours loaded there; configs, sampling."""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from asserts import assert_close, jit
from builders import CHATML, SMALL, layers_of, random_arrays, random_params, tokenizer_of, write_sentencepiece
from safetensors.numpy import save_file
from test_3_transformers import DRAWN, VALUES, our_config, random_oracle

from lovely_llama import CONFIGS, Config, LlamaError, Params, RopeScaling, Sampling, logits
from lovely_llama_tools import Model, config_from_hf, config_to_hf, from_hf, load, save, to_hf
from lovely_llama_tools.fast.layers import stack
from lovely_llama_tools.formats import hugging_face
from lovely_llama_tools.formats.files import checkpoint
from lovely_llama_tools.formats.layout import HUGGING_FACE
from lovely_llama_tools.tokens import folder_tokenizer

AutoTokenizer: Any = transformers.AutoTokenizer
GenerationConfig: Any = transformers.GenerationConfig
LlamaConfig: Any = transformers.LlamaConfig
LlamaForCausalLM: Any = transformers.LlamaForCausalLM
TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOKENS = 80  # positions at which rotary layouts that are mixed up show


def theirs(path: Path) -> Any:
    """The model that transformers loads, in float32, from a folder that lacks nothing and has nothing else."""
    model, about = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(about.values()), about
    return model.eval()


def compare(params: Params, config: Config, oracle: Any) -> None:
    """The same parameters exactly, and the same logits."""
    named = {name: p.detach().numpy() for name, p in oracle.named_parameters()}
    assert_close(params, from_hf(named, config), 0, "params")
    tokens = np.random.default_rng(0).integers(config.vocab, size=TOKENS)
    want = oracle(torch.tensor(tokens)[None]).logits[0].detach().numpy()
    assert_close(jit(logits, static_argnums=2)(params, tokens.astype(np.int32), config), want, VALUES, "logits")


# ---- Reading ---------------------------------------------------------------------------------------------------------

CASES = [[*DRAWN][i] for i in (0, 13, 18, 23, 29)]


@pytest.mark.parametrize(("i", "name"), [*enumerate(CASES)])
def test_a_folder_of_transformers(i: int, name: str, tmp_path: Path) -> None:
    """All scalings and kinds of heads, tied and not, in each dtype, in one file and in several."""
    dtype = [*TORCH][i % 3]
    model: Any = random_oracle(DRAWN[name].hf, seed=i)
    model.to(TORCH[dtype])
    model.save_pretrained(tmp_path, max_shard_size="9KB" if i % 2 else "5GB")
    assert len([*tmp_path.glob("*.safetensors")]) > 5 * (i % 2)
    found = load(tmp_path)
    assert found.config == our_config(DRAWN[name].hf)
    assert {leaf.dtype for leaf in jax.tree.leaves(found.params)} == {np.dtype("float32")}
    compare(found.params, found.config, theirs(tmp_path))
    with checkpoint(tmp_path) as opened:
        assert opened.dtype() == dtype
    narrow = load(tmp_path, dtype)
    assert_close(narrow.params, jax.tree.map(lambda leaf: leaf.astype(dtype), found.params), 0, "narrow")


def test_cases_cover_everything() -> None:
    parts = {part for name in CASES for part in name.split("-")[1:]}
    assert parts == {"default", "linear", "llama3", "yarn", "mha", "gqa", "mqa", "tied", "untied"}


# Prints the peak of the process's memory in MB, beyond what imports and a tiny model take: of a load, and of a save.
MEASURED = """
import re, sys
from lovely_llama_tools import load, save

def peak():
    return int(re.search("VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

tiny, large, to = sys.argv[1:]
save(load(tiny), to + "0", dtype="bfloat16")
before = peak()
model = load(large)
print(peak() - before)
save(model, to, dtype="bfloat16")
print(peak() - before)
"""


def test_no_more_than_some_tensors_are_in_memory_besides_the_parameters(tmp_path: Path) -> None:
    """Parameters of 328 MiB in tensors of up to 8, by the peak that the system counts. Twice as many would be 656."""
    for name, config in (("tiny", SMALL), ("large", Config(1000, 1024, 9, 4, 2, 128, 2048, 16, 1e-5, 1e4, None, True))):
        (tmp_path / name).mkdir()
        save_file(random_arrays(HUGGING_FACE, config, 0), tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps(config_to_hf(config)))
    size = (tmp_path / "large" / "model.safetensors").stat().st_size / 2**20
    command = [sys.executable, "-c", MEASURED, *(str(tmp_path / name) for name in ("tiny", "large", "to"))]
    loading, saving = map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert 250 < size < 400
    assert size < loading < size + 64 and saving < size + 64, (size, loading, saving)


# ---- Writing ---------------------------------------------------------------------------------------------------------

# 6 heads over 2, and a head_dim other than dim / heads.
WIDE = replace(SMALL, dim=42, kv_heads=2, q_per_kv=3)
SCALINGS = {
    "none": None,
    "linear": RopeScaling("linear", 2.5),
    "llama3": SMALL.rope_scaling,
    "yarn": RopeScaling("yarn", 4.0, 40, low=0.5, high=8.0, attention_factor=1.25),
}


@pytest.mark.parametrize(
    ("dtype", "scaling"),
    [("float32", "none"), ("bfloat16", "linear"), ("float16", "llama3"), ("bfloat16", "yarn"), ("float32", "llama3")],
)
def test_our_folder_in_transformers(dtype: str, scaling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds our parameters, rounded as torch rounds them, and gives our logits; so does what it saves in turn."""
    tied, several = scaling in ("linear", "yarn"), dtype != "float16"
    config = replace(WIDE, rope_scaling=SCALINGS[scaling], tied=tied)
    params = random_params(config)
    monkeypatch.setattr(hugging_face, "SHARD", 9000 if several else 10**9)
    save(Model(config, params, None), tmp_path / "ours", dtype=dtype)
    assert ((tmp_path / "ours" / "model.safetensors.index.json").exists()) == several
    assert all(file.stat().st_size < 9000 + 3000 for file in (tmp_path / "ours").glob("model-*.safetensors"))
    oracle = theirs(tmp_path / "ours")
    named = dict(oracle.named_parameters())
    for name, array in to_hf(params, config).items():
        assert torch.equal(named.pop(name), torch.tensor(array).to(TORCH[dtype]).float()), name
    assert not named
    back = load(tmp_path / "ours")
    compare(back.params, config, oracle)
    assert back.config == config
    LlamaForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = load(tmp_path / "theirs")
    assert again.config == config
    assert_close(again.params, back.params, 0, "params")


def test_stacked_layers_are_saved_as_a_tuple_of_them_is(tmp_path: Path) -> None:
    params = random_params(WIDE)
    save(Model(WIDE, params, None), tmp_path / "tuple")
    save(Model(WIDE, params._replace(blocks=stack(layers_of(params))), None), tmp_path / "stacked")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "tuple" / name).read_bytes() == (tmp_path / "stacked" / name).read_bytes()


@pytest.mark.parametrize("value", [7e4, np.inf, np.nan])
def test_numbers_that_a_dtype_does_not_hold_are_refused(value: float, tmp_path: Path) -> None:
    params = random_params(WIDE)
    params = params._replace(norm=params.norm.at[3].set(value))
    with pytest.raises(LlamaError, match="too large a number for float16") as caught:
        save(Model(WIDE, params, None), tmp_path / "model", dtype="float16")
    assert caught.value.field == "model.norm.weight"
    assert not [*tmp_path.iterdir()]


# ---- config.json -----------------------------------------------------------------------------------------------------

# As they are published, by transformers 4.
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama-1-7b": {
        "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 11008, "initializer_range": 0.02, "max_sequence_length": 2048,
        "max_position_embeddings": 2048, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
        "pad_token_id": 0, "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "torch_dtype": "float16",
        "transformers_version": "4.28.0.dev0", "use_cache": True, "vocab_size": 32000,
    },
    "tinyllama-1.1b": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5632,
        "max_position_embeddings": 2048, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 22,
        "num_key_value_heads": 4, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.35.0", "use_cache": True, "vocab_size": 32000,
    },
    "smollm2-135m": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
        "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
        "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False,
        "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
        "transformers_version": "4.42.3", "use_cache": True, "vocab_size": 49152,
    },
    "llama-3.2-1b": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu",
        "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072,
        "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
        "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
        "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0", "use_cache": True, "vocab_size": 128256,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config(name: str, tmp_path: Path) -> None:
    """Each as it stands in configs.md; as transformers 5 reads and writes it, too."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    assert config_from_hf(tmp_path / "config.json") == config_from_hf(PUBLISHED[name]) == CONFIGS[name]
    rewritten = LlamaConfig.from_pretrained(tmp_path)
    rewritten.save_pretrained(tmp_path / "new")
    assert "rope_theta" not in json.loads((tmp_path / "new" / "config.json").read_text())
    assert config_from_hf(tmp_path / "new" / "config.json") == config_from_hf(rewritten.to_dict()) == CONFIGS[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_config_to_hf_is_its_inverse(name: str) -> None:
    """Whether transformers comes between or not."""
    fields = config_to_hf(CONFIGS[name])
    assert config_from_hf(json.loads(json.dumps(fields))) == CONFIGS[name]
    assert config_from_hf(LlamaConfig(**fields).to_dict()) == CONFIGS[name]


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_config_of_transformers_4_and_of_5_says_the_same(scaling: str) -> None:
    """Where both places are filled, either alone gives the same config."""
    config = replace(WIDE, rope_scaling=SCALINGS[scaling])
    fields = config_to_hf(config)
    new = {name: value for name, value in fields.items() if name not in ("rope_theta", "rope_scaling")}
    old = {name: value for name, value in fields.items() if name != "rope_parameters"}
    older = json.loads(json.dumps(old).replace("rope_type", "type"))
    assert config_from_hf(new) == config_from_hf(old) == config_from_hf(older) == config


def test_what_became_of_each_field_is_told(tmp_path: Path) -> None:
    given = PUBLISHED["smollm2-135m"] | {"vocab_size": 29, "num_hidden_layers": 1, "hidden_size": 18}
    given = {name: value for name, value in given.items() if name not in ("tie_word_embeddings", "rope_theta")}
    model = LlamaForCausalLM(LlamaConfig(**given | {"rope_theta": 1e4}))
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(given))
    with checkpoint(tmp_path) as found:
        told = found.fields
    assert {name for name, (_, how) in told.items() if how == "defaulted"} == {
        "head_dim", "rope_theta", "tie_word_embeddings",
    }  # fmt: skip
    assert told["head_dim"][0] == 2 and told["rope_theta"][0] == 1e4
    for name in ("rms_norm_eps", "num_key_value_heads", "hidden_act", "attention_bias", "vocab_size"):
        assert told[name] == (given[name], "honoured")
    for name in ("torch_dtype", "use_cache", "architectures", "initializer_range", "bos_token_id", "rope_scaling"):
        assert told[name] == (given[name], "ignored")


# ---- Sampling and stops ----------------------------------------------------------------------------------------------

STATED: list[tuple[dict[str, Any], Sampling | None]] = [
    ({}, None),
    ({"eos_token_id": [1, 2]}, None),
    ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, Sampling(None, 0.6, 42, 0.9, None)),
    ({"do_sample": True, "top_k": 7, "min_p": 0.125}, Sampling(None, None, 7, None, 0.125)),
    ({"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}, Sampling(None, None, None, None, None)),
    ({"do_sample": True, "top_k": 50, "repetition_penalty": 1.25}, Sampling(1.25, None, 42, None, None)),
    ({"temperature": 0.6, "top_p": 0.9}, Sampling(None, 0, None, None, None)),
    ({"do_sample": False}, Sampling(temperature=0, top_p=None)),
    ({"do_sample": False, "repetition_penalty": 1.5}, Sampling(1.5, temperature=0, top_p=None)),
]


def folder(path: Path, generation: Mapping[str, Any] | None = None, **changes: Any) -> Path:
    """A folder with a small model."""
    config = replace(WIDE, vocab=42, tied=True)
    save(Model(config, random_params(config), None), path)
    (path / "config.json").write_text(json.dumps(config_to_hf(config) | changes))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


@pytest.mark.parametrize(("stated", "want"), STATED)
def test_sampling_that_a_folder_states_is_the_models(
    stated: dict[str, Any], want: Sampling | None, tmp_path: Path
) -> None:
    path = folder(tmp_path / "model")
    write_sentencepiece(path / "tokenizer.model", 40)
    (path / "generation_config.json").write_text(json.dumps(stated))
    model = load(path)
    assert model.sampling == want
    save(model, tmp_path / "again")
    assert load(tmp_path / "again").sampling == want
    read = GenerationConfig.from_pretrained(tmp_path / "again")
    assert bool(read.do_sample) == bool(stated.get("do_sample"))
    if want is not None and want.temperature != 0:
        assert (read.temperature, read.top_p) == (stated.get("temperature"), stated.get("top_p"))
        assert (read.top_k, read.min_p) == (stated.get("top_k") and min(stated["top_k"], 42), stated.get("min_p"))


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", "hot"), ("temperature", -1), ("top_p", 2), ("top_p", 0), ("top_k", 1.5), ("do_sample", "yes"),
     ("eos_token_id", 42), ("eos_token_id", [1, "2"]), ("eos_token_id", -1), ("repetition_penalty", True),
     ("repetition_penalty", 0)],
)  # fmt: skip
def test_advice_that_cannot_be_followed_is_a_note(
    field: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What else is said counts."""
    path = folder(tmp_path / "model", {"do_sample": True, "temperature": 0.5, "top_k": 9} | {field: value})
    write_sentencepiece(path / "tokenizer.model", 40)
    model = load(path)
    err = capsys.readouterr().err
    assert err.startswith(f"note: {path / 'generation_config.json'}: {field}: got ") and err.count("\n") == 1
    want = {"temperature": None, "top_k": 42}.get(field, 0)
    usual = Sampling(None, 0.5, 9, None, None)
    assert model.sampling == (Sampling(None, 0, None, None, None) if field == "do_sample" else usual if want == 0
                              else usual._replace(**{field: want}))  # fmt: skip
    assert model.tokenizer and model.tokenizer.stops == ({1, 2} if value == [1, "2"] else {2})


@pytest.mark.parametrize("text", ["", '{"temperature": 0.7,}', "[]", "version https://git-lfs.github.com/spec/v1"])
def test_advice_that_is_none_is_a_note(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder(tmp_path / "model")
    write_sentencepiece(path / "tokenizer.model", 40)
    (path / "generation_config.json").write_text(text)
    assert load(path).sampling is None
    err = capsys.readouterr().err
    assert err.startswith(f"note: {path / 'generation_config.json'}: ") and err.count("\n") == 1


@pytest.mark.parametrize(("value", "want"), [(-1, None), (0, None), (50.0, 42), (7.0, 7)])
def test_a_top_k_that_can_be_understood_is(value: Any, want: int | None, tmp_path: Path) -> None:
    path = folder(tmp_path / "model", {"do_sample": True, "top_k": value})
    write_sentencepiece(path / "tokenizer.model", 40)
    assert load(path).sampling == Sampling(None, None, want, None, None)


# ---- Folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_of_pickles_alone_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = folder(tmp_path / "model")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(LlamaError, match=r"pytorch_model.bin alone, expected .*save_pretrained") as caught:
        load(path)
    assert caught.value.field == "path"


def test_config_from_hf_says_whose_field_it_is(tmp_path: Path) -> None:
    for given in (tmp_path / "config.json", str(tmp_path / "config.json")):
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        with pytest.raises(LlamaError, match=f"^{tmp_path}/config.json: vocab_size: got nothing"):
            config_from_hf(given)
    with pytest.raises(LlamaError, match=r"^config: model_type: got 'gpt2', expected llama or mistral or Yi"):
        config_from_hf({"model_type": "gpt2"})


# ---- With a tokenizer ------------------------------------------------------------------------------------------------


def test_a_tokenizer_is_written_with_its_template_and_stops(tmp_path: Path) -> None:
    """transformers and this library read the same."""
    write_sentencepiece(tmp_path / "tokenizer.model", 41)
    tokenizer = folder_tokenizer(tmp_path, WIDE.vocab + 13)
    assert tokenizer
    tokenizer = tokenizer._replace(template=CHATML, stops=frozenset({2, 7}))
    config = replace(WIDE, vocab=42)
    save(Model(config, random_params(config), tokenizer), tmp_path / "model")
    generation = GenerationConfig.from_pretrained(tmp_path / "model")
    assert (generation.bos_token_id, generation.eos_token_id) == (1, [2, 7])
    found, theirs = tokenizer_of(load(tmp_path / "model")), AutoTokenizer.from_pretrained(tmp_path / "model")
    assert (found.bos, found.eos, found.stops) == (theirs.bos_token_id, theirs.eos_token_id, {2, 7}) == (1, 2, {2, 7})
    assert found.template == theirs.chat_template == CHATML
    assert len(found.pieces) == 42
    for text in ("why is the sky blue", "the sea", "so  it"):
        assert found.begin(text) == tokenizer.begin(text) == theirs(text)["input_ids"]
