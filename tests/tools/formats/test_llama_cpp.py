"""GGUFs in llama.cpp itself, those written here and those with vocabularies as others write them: the same ids, and the
same tokens.

Runs where node is, and node-llama-cpp, which carries llama.cpp built: `./dev conformance node-llama-cpp` installs it.
"""

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from builders import random_params, write_gguf
from texts import ROOT, corpus, drawn

from lovely_llama import Config, Sampling
from lovely_llama_tools import generate, load, save
from lovely_llama_tools.formats.layout import GGUF, to_arrays
from lovely_llama_tools.formats.model import Model
from lovely_llama_tools.tokens import Tokenizer, tokenizer_fields
from lovely_llama_tools.tokens.pieces import (
    CONTROL,
    USER_DEFINED,
    Piece,
    SentencePiece,
    read_proto,
    sentencepiece_tokenizer,
    write_proto,
)
from lovely_llama_tools.tokens.pipelines import OTHER_NAMES
from lovely_llama_tools.tokens.training import train_bpe, train_sentencepiece

PLACE = ROOT / ".venv" / "conformance" / "node-llama-cpp"
WHY = "needs node, and what ./dev conformance node-llama-cpp installs"
pytestmark = pytest.mark.skipif(not (shutil.which("node") and (PLACE / "node_modules").exists()), reason=WHY)
SCRIPT = """
import {getLlama, LlamaLogLevel} from "node-llama-cpp";
process.execArgv = [];
const {gguf, texts, prompt, count} = JSON.parse(process.argv[1]);
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.disabled});
const model = await llama.loadModel({modelPath: gguf});
const ids = [false, true].map((special) => texts.map((text) => [...model.tokenize(text, special)]));
const greedy = [];
const context = await model.createContext({
    contextSize: 64, threads: 1, flashAttention: false,
    experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32"
});
for await (const token of context.getSequence().evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
    greedy.push(token);
    if (greedy.length === count) break;
}
process.stdout.write(JSON.stringify({ids, greedy}), () => process.exit(0));
"""
SIZES: dict[str, Any] = {
    "llama.block_count": 1, "llama.context_length": 64, "llama.embedding_length": 32,
    "llama.feed_forward_length": 24, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.dimension_count": 8,
}  # fmt: skip
TEXTS = [text for text in drawn(400) if text and "\0" not in text and "<|im_end|>" not in text]
WORDS = ["<|im_start|>", "<tool>", "two words", " before"]
TALK = ["<|im_start|>user\nhi", "a two words b", "two words", "x before y", " <tool> x", "<tool><tool>"]


def in_llama_cpp(path: Path, texts: Sequence[str], prompt: Sequence[int] = (1, 5), count: int = 1) -> Any:
    """Ids of texts, of names of special tokens as letters and as these, and the likeliest tokens after a prompt."""
    job = json.dumps({"gguf": str(path), "texts": list(texts), "prompt": list(prompt), "count": count})
    command = ["node", "--input-type=module", "--eval", SCRIPT, job]
    done = subprocess.run(command, cwd=PLACE, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    return json.loads(done.stdout)


def assert_same_ids(path: Path, tokenizer: Tokenizer | None, texts: Sequence[str]) -> None:
    assert tokenizer
    for special, theirs in zip((False, True), in_llama_cpp(path, texts)["ids"], strict=True):
        ours = [tokenizer.encode(text, special) for text in texts]
        differing = [(text, a, b) for text, a, b in zip(texts, ours, theirs, strict=True) if a != b]
        assert not differing, differing[:3]


def pieced() -> Tokenizer:
    """A SentencePiece vocabulary with user-defined pieces."""
    encode = train_sentencepiece(corpus()[:2], 700).encode
    assert isinstance(encode, SentencePiece)
    found = read_proto(encode.proto, "proto")
    words = [Piece(word.replace(" ", "▁"), 0.0, USER_DEFINED) for word in WORDS]
    return sentencepiece_tokenizer(write_proto(found._replace(pieces=[*found.pieces, *words])), "proto")


@pytest.mark.parametrize("kind", ["sentencepiece", "bpe"])
def test_a_gguf_written_here_has_the_same_ids_and_tokens_there(kind: str, tmp_path: Path) -> None:
    tokenizer = pieced() if kind == "sentencepiece" else train_bpe(corpus()[:2], 700)
    config = Config(len(tokenizer.pieces), 32, 2, 2, 2, 8, 24, 64, 1e-5, 1e4, None, True)
    model, prompt = Model(config, random_params(config), tokenizer), [1, 40, 300, 7, 99]
    save(model, tmp_path / "a.gguf")
    assert_same_ids(tmp_path / "a.gguf", load(tmp_path / "a.gguf").tokenizer, TEXTS + TALK)
    bare = Model(config, model.params, None)
    ours = generate(bare, prompt, max_new=12, sampling=Sampling(temperature=0))
    for _ in ours:
        pass
    assert in_llama_cpp(tmp_path / "a.gguf", [], prompt, 12)["greedy"] == ours.tokens


def described(path: Path, **changes: Any) -> Path:
    """A GGUF with a SentencePiece vocabulary, and some of its keys otherwise; None leaves one out."""
    encode = pieced().encode
    assert isinstance(encode, SentencePiece)
    pieces = read_proto(encode.proto, "proto").pieces
    config = Config(len(pieces), 32, 1, 2, 2, 8, 24, 64, 1e-5, 1e4, None, True)
    fields: dict[str, Any] = {
        "model": "llama", "tokens": [piece.text.replace("▁", " ") if piece.kind == USER_DEFINED else piece.text
                                     for piece in pieces],
        "scores": [piece.score for piece in pieces], "token_type": [piece.kind for piece in pieces],
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    fields = {name: value for name, value in (fields | changes).items() if value is not None}
    arrays = to_arrays(GGUF, random_params(config), config)
    return write_gguf(path, SIZES | {f"tokenizer.ggml.{name}": value for name, value in fields.items()}, arrays)


def kinds(*changes: tuple[int, int]) -> list[int]:
    encode = pieced().encode
    assert isinstance(encode, SentencePiece)
    found = [piece.kind for piece in read_proto(encode.proto, "proto").pieces]
    for i, kind in changes:
        found[i] = kind
    return found


OTHERS: dict[str, dict[str, Any]] = {
    "<unk> a control token": {"token_type": kinds((0, CONTROL))},
    "<unk> a control token, stated": {"token_type": kinds((0, CONTROL)), "unknown_token_id": 0},
    "no scores": {"scores": None},
    "no EOS": {"eos_token_id": 2**32 - 1},
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_vocabulary_as_others_write_it_has_llama_cpps_ids(name: str, tmp_path: Path) -> None:
    path = described(tmp_path / "a.gguf", **OTHERS[name])
    tokenizer = load(path).tokenizer
    texts = [text for text in TEXTS + TALK if "<unk>" not in text and "</s>" not in text]
    assert_same_ids(path, tokenizer, texts)
    assert tokenizer and tokenizer.eos == (None if name == "no EOS" else 2)


@pytest.mark.parametrize("pre", [None, *(name for names in OTHER_NAMES.values() for name in names.split())])
def test_a_split_under_another_name_has_llama_cpps_ids(pre: str | None, tmp_path: Path) -> None:
    tokenizer = train_bpe(corpus()[:2], 700)
    config = Config(len(tokenizer.pieces), 32, 1, 2, 2, 8, 24, 64, 1e-5, 1e4, None, True)
    fields = {name: x for name, x in tokenizer_fields(tokenizer, config.vocab).items() if not name.endswith(".pre")}
    fields |= {} if pre is None else {"tokenizer.ggml.pre": pre}
    path = write_gguf(tmp_path / "a.gguf", SIZES | fields, to_arrays(GGUF, random_params(config), config))
    assert_same_ids(path, load(path).tokenizer, TEXTS)
