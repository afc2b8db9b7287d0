"""Checkpoints as others write them: configs, tensors and tokenizers with what no Llama needs, held against transformers
and SentencePiece."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from asserts import assert_close
from builders import SMALL, random_params, tiny_arrays, tiny_fields, tokenizer_of, write_gguf
from safetensors.numpy import load_file, save_file
from texts import corpus, drawn

from lovely_llama import Config, LlamaError, RopeScaling, logits
from lovely_llama_tools import config_from_hf, config_to_hf, folder_tokenizer, load, save
from lovely_llama_tools.commands import main
from lovely_llama_tools.formats.hugging_face_config import MODEL_TYPES, NEUTRAL
from lovely_llama_tools.formats.model import Model
from lovely_llama_tools.tokens import gguf_tokenizer, tokenizer_files
from lovely_llama_tools.tokens.converting import describe_proto
from lovely_llama_tools.tokens.pieces import SentencePiece, Vocabulary, read_proto, sentencepiece_tokenizer
from lovely_llama_tools.tokens.pipelines import pipeline_tokenizer
from lovely_llama_tools.tokens.training import train_bpe, train_sentencepiece

AutoTokenizer: Any = transformers.AutoTokenizer
LlamaForCausalLM: Any = transformers.LlamaForCausalLM
CONFIG = replace(SMALL, dim=24, kv_heads=2, q_per_kv=2, head_dim=6, ctx=96, rope_scaling=None)
IDS = np.random.RandomState(0).randint(1, 29, 60)


def folder(path: Path, config: Config = CONFIG, **fields: Any) -> Path:
    """A model's folder with other fields in config.json; None leaves one out."""
    save(Model(config, random_params(config), None), path)
    stated = {**config_to_hf(config), **fields}
    left_out = [name for name, value in fields.items() if value is None]
    (path / "config.json").write_text(json.dumps({name: x for name, x in stated.items() if name not in left_out}))
    return path


def ours(path: Path, **how: Any) -> Any:
    model = load(path, **how)
    return logits(model.params, IDS, model.config)


@torch.no_grad()
def theirs(path: Path, kind: Any = LlamaForCausalLM) -> Any:
    return kind.from_pretrained(path)(torch.tensor(IDS)[None]).logits[0].numpy()


# ---- Configs ---------------------------------------------------------------------------------------------------------


# As published Llamas state them.
PUBLISHED: dict[str, Any] = {
    "resid_pdrop": 0.1, "hidden_dropout_prob": 0.1, "attention_dropout_prob": 0.1, "pretraining_tp": 2,
    "use_flash_attention": False, "use_memorry_efficient_attention": True, "eos_token": "</s>", "pad_token": "</s>",
    "end_token_id": 2, "pad_token_id": -1, "max_sequence_length": 2048, "sliding_window": 4096, "quantization": None,
    "auto_map": {"AutoConfig": "configuration_llama.LlamaConfig"}, "model_max_length": 96, "is_decoder": True,
    "transformers_version": "4.31.0", "unsloth_version": "2024.9", "_name_or_path": "base", "layer_norm_eps": None,
}  # fmt: skip


def test_fields_that_change_nothing_have_a_reason_and_are_read_over(tmp_path: Path) -> None:
    """Those of published models are so in transformers too."""
    path = folder(tmp_path / "model", **PUBLISHED)
    assert_close(ours(path), theirs(path), 1e-5, "logits")
    for value in (1, "x", {"a": 1}):
        assert config_from_hf({**dict.fromkeys(NEUTRAL, value), **config_to_hf(CONFIG)}) == CONFIG
    assert all(len(reason) > 8 for reason in NEUTRAL.values())


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
def test_an_original_context_beside_the_scaling_is_the_scalings(kind: str, tmp_path: Path) -> None:
    rope = {"rope_type": kind, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {name: x for name, x in rope.items() if kind == "llama3" or "freq" not in name}
    fields: dict[str, Any] = {"rope_scaling": rope, "rope_parameters": None, "rope_theta": 700.0}
    path = folder(tmp_path / "outside", **fields, original_max_position_embeddings=32)
    assert_close(ours(path), theirs(path), 1e-5, "outside")
    if kind == "yarn":  # transformers has then the whole context for it
        path = folder(tmp_path / "nowhere", **fields)
        assert_close(ours(path), theirs(path), 1e-5, "nowhere")
    rope = rope | {"original_max_position_embeddings": 33}
    with pytest.raises(LlamaError, match="original_max_position_embeddings: got 32, expected 33, as rope_scaling has"):
        config_from_hf(config_to_hf(CONFIG) | fields | {"rope_scaling": rope, "original_max_position_embeddings": 32})


def test_types_that_disagree_are_refused() -> None:
    rope = {"type": "linear", "rope_type": "llama3", "factor": 8.0}
    with pytest.raises(LlamaError, match=r"rope_scaling\.type: got linear, expected llama3, as rope_type is"):
        config_from_hf(config_to_hf(CONFIG) | {"rope_scaling": rope, "rope_parameters": None})


def test_a_window_that_hides_nothing_is_read_over(tmp_path: Path) -> None:
    for fields in (
        {"sliding_window": 96},
        {"sliding_window": 4096},
        {"sliding_window": 4, "use_sliding_window": False},
    ):
        assert config_from_hf(config_to_hf(CONFIG) | fields) == CONFIG
    with pytest.raises(LlamaError, match="sliding_window: got 95, expected null, or at least 96, the context"):
        config_from_hf(config_to_hf(CONFIG) | {"sliding_window": 95})


def test_an_unknown_field_is_read_over_where_it_is_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """By every command that reads a model."""
    path = folder(tmp_path / "model", quux_scale=3.0, zot=1)
    with pytest.raises(LlamaError, match=r"quux_scale: got 3\.0, expected no field that is unknown here"):
        load(path)
    with pytest.raises(LlamaError, match=r"zot: got 1, .*--allow zot reads on"):
        load(path, allow=["quux_scale"])
    assert_close(ours(path, allow=["quux_scale", "zot"]), theirs(path), 1e-5, "logits")
    allow = ["--allow", "quux_scale", "--allow", "zot"]
    (tmp_path / "text").write_text("1 2 3 4")
    (tmp_path / "prose").write_text("the sky is blue, the sea is too. " * 20)
    for command in (
        ["inspect", path], ["generate", "1 2", "--model", path, "--max-new", "1"],
        ["evaluate", path, tmp_path / "text"], ["convert", path, tmp_path / "out"],
        ["trace", path, "--tokens", "1 2", "--out", tmp_path / "t.safetensors"],
        ["plot", "rope", path, "--out", tmp_path / "rope.png"],
        ["train", tmp_path / "prose", "--init-from", path, "--out", tmp_path / "run", "--steps", "1", "--ctx", "4",
         "--tokenizer", "chars", "--batch", "1", "--lora", "1", "--sample", "0"],
        ["plan", path, "--chips", "cpu:1", "--mesh", "data=1", "--batch", "1", "--seq", "8"],
    ):  # fmt: skip
        assert main([*map(str, command)]) == 2, command
        assert "quux_scale: got 3.0" in capsys.readouterr().err
        assert main([*map(str, command), *allow]) == 0, command
        capsys.readouterr()


def test_what_changes_the_mathematics_is_not_allowed(tmp_path: Path) -> None:
    with pytest.raises(LlamaError, match="attention_bias: got True, expected False"):
        load(folder(tmp_path / "model", attention_bias=True), allow=["attention_bias"])


@pytest.mark.parametrize("kind", [kind for kind in MODEL_TYPES if kind != "llama"])
def test_another_architecture_with_a_llamas_mathematics(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By transformers' own class for it, where it has one."""
    path = folder(tmp_path / "model", model_type=kind, sliding_window=None, hidden_act="silu")
    stated = json.loads((path / "config.json").read_text()) | {"sliding_window": None}
    stated = {name: x for name, x in stated.items() if name not in ("attention_bias", "mlp_bias")}
    (path / "config.json").write_text(json.dumps(stated))
    oracle: Any = {"mistral": transformers.MistralForCausalLM}.get(kind, LlamaForCausalLM)
    assert_close(ours(path), theirs(path, oracle), 1e-5, kind)
    assert f"note: {path}: a model of type {kind}, whose mathematics is a Llama's\n" in capsys.readouterr().err


def test_a_mistral_states_its_window() -> None:
    """Transformers has 4,096 where none is stated."""
    stated = config_to_hf(replace(CONFIG, ctx=8192)) | {"model_type": "mistral"}
    with pytest.raises(LlamaError, match="sliding_window: got 4096, expected null, or at least 8192, the context"):
        config_from_hf(stated)


def test_yarns_betas_are_written_as_floats() -> None:
    """Transformers warns of whole numbers."""
    rope = config_to_hf(replace(CONFIG, rope_scaling=RopeScaling("yarn", 4.0, 24, 1, 32)))["rope_scaling"]
    assert (type(rope["beta_fast"]), type(rope["beta_slow"])) == (float, float)


# ---- Tensors ---------------------------------------------------------------------------------------------------------


def renamed(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    file = path / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def test_a_tied_model_has_either_name(tmp_path: Path) -> None:
    """safetensors' save_model keeps the last one."""
    path = folder(tmp_path / "model", replace(CONFIG, tied=True))
    want = ours(path)
    renamed(path, lambda found: {name.replace("model.embed_tokens", "lm_head"): x for name, x in found.items()})
    np.testing.assert_array_equal(ours(path), want)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_a_wrappers_names_are_told(prefix: str, tmp_path: Path) -> None:
    path = folder(tmp_path / "model")
    renamed(path, lambda found: {prefix + name: x for name, x in found.items()})
    with pytest.raises(LlamaError, match=rf"tensors: got names with module\. or _orig_mod\. before them: {prefix}"):
        load(path)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
PAGE = "<!DOCTYPE html>\n<html><body>Sign in</body></html>"


@pytest.mark.parametrize(("text", "says"), [(POINTER, "a pointer of Git LFS"), (PAGE, "a web page")])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer.model", "a.gguf"])
def test_what_stands_in_a_files_place_is_called_that(name: str, text: str, says: str, tmp_path: Path) -> None:
    path = folder(tmp_path / "model")
    (path / name).write_text(text)
    with pytest.raises(LlamaError, match=f"{name}: contents: got {says}") as caught:
        load(path / name if name == "a.gguf" else path)
    assert caught.value.field == "contents"


# ---- Tokenizers ------------------------------------------------------------------------------------------------------

ROLES = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": False}
ADDED = {"700": {"content": "<|im_start|>", **ROLES}, "701": {"content": "<|im_end|>", **ROLES}}
TALK = ["<|im_start|>user\nhi<|im_end|>", "a<|im_end|>b", "<|im_start|><|im_end|>", "so <|im_start|> it"]


def pieced(path: Path, **config: Any) -> Path:
    """A folder with a SentencePiece model and a config of transformers'."""
    encode = train_sentencepiece(corpus()[:2], 700).encode
    assert isinstance(encode, SentencePiece)
    path.mkdir()
    (path / "tokenizer.model").write_bytes(encode.proto)
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **named, **config}))
    return path


@pytest.mark.parametrize("prefix", [True, False])
def test_added_tokens_of_a_sentencepiece_model_are_transformers(prefix: bool, tmp_path: Path) -> None:
    """Found before a text is split, no ▁ before or after them; and <|im_end|> ends an answer."""
    path = pieced(tmp_path / "a", legacy=False, added_tokens_decoder=ADDED, add_prefix_space=prefix)
    tokenizer, reference = folder_tokenizer(path), AutoTokenizer.from_pretrained(path)
    assert tokenizer
    texts = TALK + [text for text in drawn(600) if "<s>" not in text and "</s>" not in text and "<unk>" not in text]
    texts = [text for text in texts if not text.startswith((" ", "▁")) or not prefix]  # where theirs puts none before
    differing = [t for t in texts if tokenizer.encode(t, False) != reference(t, add_special_tokens=False).input_ids]
    assert not differing, differing[:3]
    assert 701 in tokenizer.stops and all(tokenizer.decode(tokenizer.encode(t, False)) == t for t in TALK)
    (tmp_path / "b").mkdir()
    for name, data in tokenizer_files(tokenizer).items():
        (tmp_path / "b" / name).write_bytes(data)
    again = folder_tokenizer(tmp_path / "b")
    assert again and [again.encode(t, False) for t in texts] == [tokenizer.encode(t, False) for t in texts]
    assert again.stops == tokenizer.stops


def test_pieces_with_spaces_are_found_whole(tmp_path: Path) -> None:
    added = {"700": {"content": "two words", **ROLES}, "701": {"content": " before", **ROLES}}
    tokenizer = folder_tokenizer(pieced(tmp_path / "a", added_tokens_decoder=added))
    assert tokenizer and tokenizer.encode("two words", False) == [700]
    assert tokenizer.encode("x before", False)[-1] == 701
    assert tokenizer.decode(tokenizer.encode("x before", False)) == "x before"


def test_merges_of_equal_score_go_by_the_longer_left_part() -> None:
    """A tokenizer.json written from a SentencePiece model has its ids on source code too."""
    shared = Path(__file__).resolve().parents[4] / "shared/data/llama2-tokenizer.model"
    if not shared.exists():
        pytest.skip(f"needs {shared}")
    proto = shared.read_bytes()
    model = sentencepiece_tokenizer(proto, "proto")
    written = pipeline_tokenizer(describe_proto(read_proto(proto, "proto"), "proto"), "proto")
    source = Path(os.__file__).read_text()
    for begin in range(0, len(source), 2000):
        part = source[begin : begin + 2000]
        assert written.encode(part, False) == model.encode(part, False)


def test_a_gap_before_added_tokens_is_filled(tmp_path: Path) -> None:
    """In a SentencePiece model, and in a tokenizer.json."""
    token = {"705": {"content": "<new>", **ROLES, "special": True}}
    first = folder_tokenizer(pieced(tmp_path / "a", added_tokens_decoder=token), 710)
    (tmp_path / "b").mkdir()
    bpe = train_bpe(corpus()[:2], 700)
    for name, data in tokenizer_files(bpe).items():
        (tmp_path / "b" / name).write_bytes(data)
    config = json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())
    (tmp_path / "b" / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": token}))
    for tokenizer in (first, folder_tokenizer(tmp_path / "b", 710)):
        assert tokenizer and tokenizer.specials["<new>"] == 705 and tokenizer.encode("<new>", True) == [705]
        assert tokenizer.decode([*tokenizer.encode("the sky", False), 703, 708]) == "the sky"


def test_a_token_beyond_the_embedding_that_no_text_has_is_left_out(tmp_path: Path) -> None:
    token = {"700": {"content": "<pad>", **ROLES, "special": True}}
    path = pieced(tmp_path / "a", added_tokens_decoder=token, pad_token="<pad>")
    tokenizer = folder_tokenizer(path, 700)
    assert tokenizer and len(tokenizer.pieces) == 700 and "<pad>" not in tokenizer.specials and tokenizer.pad is None
    token["700"]["special"] = False
    with pytest.raises(LlamaError, match="pieces: got 701, expected at most 700"):
        folder_tokenizer(pieced(tmp_path / "b", added_tokens_decoder=token), 700)


def test_a_sentencepiece_vocabulary_of_transformers_5_becomes_a_gguf(tmp_path: Path) -> None:
    """Its tokenizer.json has no unk_token, as every byte has a token."""
    path = pieced(tmp_path / "a")
    tokenizer = folder_tokenizer(path)
    assert tokenizer
    written = json.loads(tokenizer_files(tokenizer)["tokenizer.json"])
    written["model"]["unk_token"] = None
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "tokenizer.json").write_text(json.dumps(written))
    again = folder_tokenizer(tmp_path / "b")
    config = replace(CONFIG, vocab=700)
    save(Model(config, random_params(config), again), tmp_path / "a.gguf")
    got = tokenizer_of(load(tmp_path / "a.gguf"))
    assert all(got.encode(text, False) == tokenizer.encode(text, False) for text in drawn(300))


# ---- GGUF ------------------------------------------------------------------------------------------------------------


def described(**changes: Any) -> Any:
    """A GGUF's tokenizer, with some keys otherwise; None leaves one out."""
    encode = train_sentencepiece(corpus()[:2], 700).encode
    assert isinstance(encode, SentencePiece)
    found: Vocabulary = read_proto(encode.proto, "proto")
    texts, scores, kinds = (list(column) for column in zip(*found.pieces, strict=True))
    fields: dict[str, Any] = {"model": "llama", "tokens": texts, "scores": scores, "token_type": kinds}
    fields |= {"bos_token_id": 1, "eos_token_id": 2}
    for name, change in changes.items():
        fields[name] = change(fields[name]) if callable(change) else change
    fields = {f"tokenizer.ggml.{name}": value for name, value in fields.items() if value is not None}
    return gguf_tokenizer(fields, 700, Path("a.gguf")), sentencepiece_tokenizer(encode.proto, "proto")


def at(place: int, value: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda values: [*values[:place], value, *values[place + 1 :]]


@pytest.mark.parametrize(
    "changes",
    [{"token_type": at(0, 3)}, {"token_type": at(0, 3), "unknown_token_id": 0}, {"token_type": None},
     {"token_type": at(690, 2), "unknown_token_id": 0}, {"eos_token_id": -1}, {"eos_token_id": 2**32 - 1}],
)  # fmt: skip
def test_a_vocabulary_as_llama_cpps_converter_writes_it(changes: dict[str, Any]) -> None:
    """<unk> marked as a control token, or no kinds at all; and no EOS. The ids are those of SentencePiece."""
    tokenizer, reference = described(**changes)
    unused = reference.pieces[690].decode() if changes.get("unknown_token_id") == 0 else "\0"
    texts = [text for text in drawn(600) if unused not in text]
    assert all(tokenizer.encode(text, False) == reference.encode(text, False) for text in texts)
    assert tokenizer.eos == (None if "eos_token_id" in changes else 2) and tokenizer.adds_bos


def test_a_vocabulary_without_scores_or_with_an_empty_piece_is_read() -> None:
    tokenizer, _ = described(scores=None)
    assert tokenizer.decode(tokenizer.encode("the sky is blue", False)) == "the sky is blue"
    tokenizer, reference = described(tokens=at(699, ""))
    texts = [text for text in drawn(600) if reference.pieces[699].decode() not in f" {text}"]
    assert all(tokenizer.encode(text, False) == reference.encode(text, False) for text in texts)


NEUTRAL_KEYS: dict[str, Any] = {
    "llama.use_parallel_residual": False, "llama.logit_scale": 1.0, "llama.attention.clamp_kqv": 0.0,
    "llama.rope.scaling.yarn_beta_fast": 32.0,
}  # fmt: skip


def test_keys_that_change_nothing_are_read_over(tmp_path: Path) -> None:
    want = load(write_gguf(tmp_path / "a.gguf", tiny_fields(), tiny_arrays()))
    got = load(write_gguf(tmp_path / "b.gguf", tiny_fields() | NEUTRAL_KEYS, tiny_arrays()))
    assert_close(got.params, want.params, 0, "params")
    path = write_gguf(tmp_path / "c.gguf", tiny_fields() | {"llama.logit_scale": 0.5}, tiny_arrays())
    with pytest.raises(LlamaError, match=r"llama\.logit_scale: got a value, expected no unknown field"):
        load(path)
    assert load(path, allow=["llama.logit_scale"]).config == want.config


@pytest.mark.parametrize(
    ("pre", "like"),
    [("llama-v3", "llama-bpe"), ("falcon3", "llama-bpe"), (None, "default"), ("phi-2", "gpt-2"),
     ("starcoder", "smollm"), ("dbrx", "smaug-bpe")],
)  # fmt: skip
def test_a_split_has_other_names(pre: str | None, like: str, tmp_path: Path) -> None:
    """BOS is added under those of Llama 3 alone, where a file does not say."""
    unsaid = ("tokenizer.ggml.pre", "tokenizer.ggml.add_bos_token")
    rest = {name: value for name, value in tiny_fields().items() if name not in unsaid}
    named = {} if pre is None else {"tokenizer.ggml.pre": pre}
    paths = [write_gguf(tmp_path / f"{i}.gguf", rest | fields, tiny_arrays())
             for i, fields in enumerate((named, {"tokenizer.ggml.pre": like}))]  # fmt: skip
    got, want = (tokenizer_of(load(path)) for path in paths)
    assert all(got.encode(text, False) == want.encode(text, False) for text in drawn(300))
    assert got.adds_bos == want.adds_bos == (like == "llama-bpe")
