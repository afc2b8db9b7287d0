"""Folders: what is read from one, and that what is written into one gives transformers the same ids."""

import contextlib
import json
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor
from test_vocabularies import ALL, need, plain, plain_ids
from texts import corpus, differing, drawn, tokenizer_with
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lovely_llama import LlamaError
from lovely_llama_tools.inference.chat import chat_prompt
from lovely_llama_tools.tokens import Tokenizer, folder_tokenizer, tokenizer_bin, tokenizer_fields, tokenizer_files
from lovely_llama_tools.tokens.gguf_fields import gguf_tokenizer
from lovely_llama_tools.tokens.pieces import bin_tokenizer, sentencepiece_tokenizer
from lovely_llama_tools.tokens.training import train_bpe, train_sentencepiece

SHARED = Path(__file__).resolve().parents[4] / "shared/data"
GGUF = Path("a.gguf")


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def found(folder: Path) -> Tokenizer:
    tokenizer = folder_tokenizer(folder)
    assert tokenizer
    return tokenizer


def llama2() -> Tokenizer:
    path = need(SHARED / "llama2-tokenizer.model")
    return sentencepiece_tokenizer(path.read_bytes(), path)


MORE: dict[str, Callable[[], Tokenizer]] = {"llama2": llama2}


@pytest.mark.parametrize("name", ALL | MORE)
def test_what_is_written_is_read_again(tmp_path: Path, name: str) -> None:
    """By this library with the same ids, pieces, BOS, EOS and templates; and with the same ids by transformers."""
    tokenizer = (ALL | MORE)[name]()._replace(template="{{ messages }}", templates={"tools": "{{ tools }}"})
    folder = write(tmp_path, tokenizer_files(tokenizer))
    again = found(folder)
    assert not differing(again, partial(plain, tokenizer))
    same: dict[str, Any] = {"encode": str.split, "specials": dict(tokenizer.specials)}
    if name in ("sentencepiece", "llama2"):  # what is unknown is written as the token's name there
        same["pieces"] = again.pieces
        assert [a for a, b in zip(tokenizer.pieces, again.pieces, strict=True) if a != b] == [" ⁇ ".encode()]
    assert again._replace(**same) == tokenizer._replace(**same)
    reference: Any = AutoTokenizer.from_pretrained(folder)
    assert not differing(again, partial(plain_ids, reference))
    assert (reference.bos_token_id, reference.eos_token_id) == (tokenizer.bos, tokenizer.eos)
    assert reference("sky").input_ids == tokenizer.begin("sky")
    assert reference.chat_template == {"default": "{{ messages }}", "tools": "{{ tools }}"}
    for text in drawn()[:300]:
        assert again.encode(text, True) == reference(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("name", ["sentencepiece", "json", "ranks", "gguf", "llama2"])
def test_what_is_written_into_a_gguf_is_read_again(name: str) -> None:
    """Out of a model whose vocabulary is larger, with the ids of the tokenizer, or of what a folder makes of it."""
    tokenizer = (ALL | MORE)[name]()._replace(template="{{ messages }}", templates={"tools": "{{ tools }}"})
    vocab = len(tokenizer.pieces)
    again = gguf_tokenizer(tokenizer_fields(tokenizer, vocab + 2), vocab + 2, GGUF)
    assert not differing(again, partial(plain, tokenizer))
    same = {"encode": str.split, "pieces": (), "specials": dict(tokenizer.specials)}
    assert again._replace(**same) == tokenizer._replace(**same)
    assert again.pieces[:vocab] == tokenizer.pieces


def test_a_sentencepiece_model_goes_through_a_tokenizer_json(tmp_path: Path) -> None:
    """Its scores are recovered from the order of the merges, so that a GGUF and a tokenizer.bin can be written."""
    tokenizer = train_sentencepiece(corpus()[:2], 700)
    again = found(write(tmp_path, {"tokenizer.json": tokenizer_files(tokenizer)["tokenizer.json"]}))
    fields = tokenizer_fields(again._replace(eos=2), 700)
    for other in (gguf_tokenizer(fields, 700, GGUF), bin_tokenizer(tokenizer_bin(again), "tokenizer.bin", 700)):
        assert not differing(other, partial(plain, tokenizer))


def test_a_model_with_its_own_normaliser_keeps_it(tmp_path: Path) -> None:
    """SentencePiece's default: NFKC, and no runs of spaces. A GGUF cannot say so, and refuses it."""
    from sentencepiece import SentencePieceTrainer

    path = tmp_path / "tokenizer.model"
    with path.open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(corpus()[0].splitlines()), model_writer=file, vocab_size=500, model_type="bpe",
            byte_fallback=True, character_coverage=1.0, minloglevel=2,
        )  # fmt: skip
    tokenizer, reference = found(tmp_path), SentencePieceProcessor(model_file=str(path))
    assert not differing(tokenizer, reference.encode)
    again = found(write(tmp_path, tokenizer_files(tokenizer)))
    texts = [" a  b ", "ﬁ", "１２", "a\u00a0b", "sky", "日本語"]
    assert all(again.encode(text, False) == reference.encode(text) for text in texts)
    with pytest.raises(LlamaError, match="a normaliser"):
        tokenizer_fields(tokenizer, 500)


def test_what_a_format_cannot_carry_is_refused() -> None:
    for name in ("json", "characters"):
        with pytest.raises(LlamaError) as caught:
            tokenizer_bin(ALL[name](), "a.bin")
        assert (caught.value.file, caught.value.field) == ("a.bin", "tokenizer")
    with pytest.raises(LlamaError, match="a Characters"):
        tokenizer_fields(ALL["characters"](), 9999)
    description = json.loads(tokenizer_files(ALL["json"]())["tokenizer.json"])
    description["pre_tokenizer"]["add_prefix_space"] = True
    from lovely_llama_tools.tokens.pipelines import pipeline_tokenizer

    with pytest.raises(LlamaError, match="pre_tokenizer"):
        tokenizer_fields(pipeline_tokenizer(description, "file"), 600)


# ---- Configs, as transformers writes them ----------------------------------------------------------------------------


def source() -> str:
    return tokenizer_files(train_bpe(corpus(), 600))["tokenizer.json"].decode()


def reads_as_transformers(folder: Path) -> Tokenizer:
    tokenizer = found(folder)
    reference: Any = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos, tokenizer.eos) == (reference.bos_token_id, reference.eos_token_id)
    assert tokenizer.begin("the sky") == reference("the sky").input_ids
    for text in ("the [EOS] <new> sky", "<word>a", "[BOS]x<|eot_id|>"):
        assert tokenizer.encode(text, True) == reference(text, add_special_tokens=False).input_ids
        assert tokenizer.encode(text, False) == plain_ids(reference, text)
    return tokenizer


def test_a_folder_that_transformers_saves_is_read(tmp_path: Path) -> None:
    """With tokens added, special ones and words, and templates by name."""
    (tmp_path / "tokenizer.json").write_text(source())
    saved: Any = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="[BOS]", eos_token="<|eot_id|>", pad_token="[PAD]"
    )
    saved.add_special_tokens({"additional_special_tokens": ["<new>"]})
    saved.add_tokens(["<word>"])
    saved.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    saved.save_pretrained(tmp_path)
    tokenizer = reads_as_transformers(tmp_path)
    assert tokenizer.template == "{{ messages }}" and tokenizer.templates == {"tool_use": "{{ tools }}"}
    assert tokenizer.specials["<new>"] == saved.convert_tokens_to_ids("<new>")
    assert tokenizer.stops == {tokenizer.specials["<|eot_id|>"]}


@pytest.mark.parametrize("processor", [True, False], ids=["a post-processor", "none"])
@pytest.mark.parametrize("adds", [True, False, None])
def test_bos_is_added_as_transformers_adds_it(tmp_path: Path, processor: bool, adds: bool | None) -> None:
    description = json.loads(source())
    if not processor:
        description["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    config |= {} if adds is None else {"add_bos_token": adds}
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert reads_as_transformers(tmp_path).adds_bos == processor


def test_the_older_files_are_read(tmp_path: Path) -> None:
    """Tokens with their flags, special_tokens_map.json, and an added_tokens_decoder that the tokenizer.json lacks."""
    (tmp_path / "tokenizer.json").write_text(source())
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"content": "[BOS]", **flags},
        "pad_token": "<pad>",  # which no id stands for
        "added_tokens_decoder": {"600": {"content": "<new>", "special": True, **flags}},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<new>", **flags}}))
    tokenizer = found(tmp_path)
    assert "<pad>" not in tokenizer.specials and len(tokenizer.pieces) == 601
    assert tokenizer.specials["<new>"] == tokenizer.eos == 600 and tokenizer.stops == {600}
    assert tokenizer.encode("a<new>", True)[-1] == 600 and tokenizer.decode([600]) == ""


def test_a_sentencepiece_model_gets_the_tokens_of_its_config(tmp_path: Path) -> None:
    encode: Any = train_sentencepiece(corpus()[:2], 700).encode
    config = {
        "add_bos_token": False,
        "eos_token": "<|im_end|>",
        "added_tokens_decoder": {
            "700": {"content": "<|im_start|>", "special": True},
            "701": {"content": "<|im_end|>", "special": True},
            "702": {"content": "<word>", "special": False},
        },
    }
    files = {"tokenizer.model": encode.proto, "tokenizer_config.json": json.dumps(config).encode()}
    tokenizer = found(write(tmp_path, files))
    assert (tokenizer.bos, tokenizer.eos, tokenizer.adds_bos, len(tokenizer.pieces)) == (1, 701, False, 703)
    assert tokenizer.encode("<|im_start|>", True) == [700] and 700 not in tokenizer.encode("<|im_start|>", False)
    assert 702 in tokenizer.encode("a <word>", False)
    assert not differing(tokenizer, encode.library.encode, [text for text in drawn(2500) if "<word>" not in text])


def test_templates_of_a_folder(tmp_path: Path) -> None:
    """A chat_template.jinja comes before the config; others by name lie in a folder."""
    (tmp_path / "tokenizer.json").write_text(source())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "old"}))
    assert found(tmp_path).template == "old"
    (tmp_path / "chat_template.jinja").write_text("new é")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("documents")
    tokenizer, reference = found(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.template == "new é" and tokenizer.templates == {"rag": "documents"}
    assert reference.chat_template == {"default": "new é", "rag": "documents"}


def test_what_another_thread_writes_on_stderr_arrives(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """While files are read, and texts are tokenized with a regular expression that might panic."""
    description, stop, written = json.loads(source()), threading.Event(), list[int]()
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    description["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, description["pre_tokenizer"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))

    def write() -> None:
        while not stop.is_set():
            written.append(os.write(2, b"line\n"))

    thread = threading.Thread(target=write)
    thread.start()
    proto = train_sentencepiece(corpus()[:2], 400).encode
    for _ in range(9):
        tokenizer = found(tmp_path)
        for text in ("the sky is blue", "a" * 40 + "c"):
            with contextlib.suppress(LlamaError):
                tokenizer.encode(text, False)
        sentencepiece_tokenizer(proto.__reduce__()[1][0], "a.model")  # pyright: ignore
    stop.set()
    thread.join()
    assert len(written) > 9 and capfd.readouterr().err == "line\n" * len(written)


@pytest.mark.parametrize("adds", [None, True, False])
@pytest.mark.parametrize("processed", [True, False])
def test_a_post_processor_decides_about_bos(
    processed: bool, adds: bool | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in transformers 5; a note says so where add_bos_token is something else."""
    write(tmp_path, tokenizer_files(tokenizer_with("<s>", "</s>")._replace(adds_bos=processed)))
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "add_bos_token": adds}))
    reference: Any = AutoTokenizer.from_pretrained(tmp_path)
    assert found(tmp_path).begin("hi") == reference("hi").input_ids
    note = (
        f"note: {config}: add_bos_token is {json.dumps(adds)}, but tokenizer.json adds {'' if processed else 'no '}BOS"
    )
    said = capsys.readouterr().err
    assert said.startswith(note) if adds not in (None, processed) else not said


def test_tokens_that_a_config_names_reach_templates(tmp_path: Path) -> None:
    """Those for padding and for what is unknown, as in transformers."""
    write(tmp_path, tokenizer_files(tokenizer_with("<s>", "</s>")))
    config, template = tmp_path / "tokenizer_config.json", "{{ pad_token }}|{{ unk_token }}|{{ bos_token }}"
    named = {"pad_token": "<|eot_id|>", "unk_token": "<|im_end|>", "chat_template": template}
    config.write_text(json.dumps({**json.loads(config.read_text()), **named}))
    messages, reference = [{"role": "user", "content": "hi"}], AutoTokenizer.from_pretrained(tmp_path)
    want: Any = reference.apply_chat_template(messages, tokenize=False)
    assert want == "<|eot_id|>|<|im_end|>|<s>"
    assert chat_prompt(found(tmp_path), messages) == reference(want, add_special_tokens=False).input_ids
