"""Names on the hub: downloaded from a server on this machine, read from the cache, or refused in one line."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import jax
import pytest
from asserts import assert_close
from builders import SMALL, random_params, write_sentencepiece
from huggingface_hub import constants, utils

from lovely_llama import LlamaError
from lovely_llama_tools import Model, load, save
from lovely_llama_tools.commands import main
from lovely_llama_tools.formats.adapters import save_adapter
from lovely_llama_tools.tokens import folder_tokenizer
from lovely_llama_tools.training.step import new_adapters, stacked

NAME, COMMIT = "someone/tiny.llama", "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """A server with one model, which may give the same answer to everything: a status and an error's code."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.asked, self.answer = files, list[str](), (0, "")
        Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def hang_up(self) -> None:
        self.shutdown()
        self.server_close()


class Answer(BaseHTTPRequestHandler):
    """The hub's answers to what huggingface_hub asks."""

    server: Any

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        status, code = self.server.answer
        if status == -1:  # the connection breaks
            return
        self.server.asked.append(self.path)
        place, _, name = self.path.partition("?")[0].partition(COMMIT)
        body = b"{}"
        if "/resolve/" in place:
            body = self.server.files[name[1:]]
        elif "/tree/" in place:
            sizes = {name: len(data) for name, data in self.server.files.items()}
            body = json.dumps([{"type": "file", "path": n, "size": sizes[n], "oid": "0"} for n in sizes]).encode()
        elif "/revision/" in place:
            body = json.dumps({"id": NAME, "sha": COMMIT}).encode()
        self.send_response(status or 200)
        tag = hashlib.sha1(body).hexdigest()
        for key, value in (("X-Error-Code", code), ("X-Repo-Commit", COMMIT), ("ETag", f'"{tag}"')):
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, with a tokenizer in two files."""
    folder = tmp_path_factory.mktemp("model")
    write_sentencepiece(folder / "tokenizer.model", 41)
    config = replace(SMALL, vocab=42)
    save(Model(config, random_params(config), folder_tokenizer(folder)), folder / "model")
    assert {"tokenizer.json", "tokenizer.model"} < {path.name for path in (folder / "model").iterdir()}
    return folder / "model"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no hub; the folder of the model in it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(tmp_path / "harnesses"), raising=False)
    reach(monkeypatch, "http://127.0.0.1:9")
    return tmp_path / "hub" / f"models--{NAME.replace('/', '--')}" / "snapshots" / COMMIT


def reach(monkeypatch: pytest.MonkeyPatch, url: str, offline: bool = False) -> None:
    """Have the hub at this address."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)


@pytest.fixture
def hub(model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the model, and with other files that are not to be downloaded."""
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    others = ("README.md", "onnx/config.json", "pytorch_model.bin", "consolidated.safetensors")
    hub = Hub(files | dict.fromkeys(others, b"-"))
    reach(monkeypatch, f"http://127.0.0.1:{hub.server_port}")
    yield hub
    hub.hang_up()


def by_hand(model: Path, cache: Path) -> None:
    """A cache that other programs have filled, from which the hub's list of files is missing."""
    cache.mkdir(parents=True)
    repository = cache.parents[1]
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "blobs").mkdir()
    for file in model.iterdir():
        shutil.copy(file, repository / "blobs" / f"blob-{file.name}")
        (cache / file.name).symlink_to(f"../../blobs/blob-{file.name}")


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """The line with which the command line ends, and nothing else."""
    assert main(["inspect", NAME]) == 2
    out, err = capsys.readouterr()
    assert not out and re.fullmatch(r"error: [^\n]{,500}\n", err), err
    return err


def test_a_model_is_downloaded_once(
    hub: Hub, model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All that is read of it, and nothing else; then only its revision is asked for, and no connection is needed."""
    want = load(model)
    assert_close(load(NAME).params, want.params, 0, "params")
    assert {path.name for path in cache.iterdir()} == {path.name for path in model.iterdir()}
    hub.asked.clear()
    assert load(NAME).tokenizer
    assert len(hub.asked) == 1
    hub.answer = (-1, "")
    assert_close(load(NAME).params, want.params, 0, "params")
    hub.hang_up()
    assert_close(load(NAME).params, want.params, 0, "params")
    reach(monkeypatch, "http://127.0.0.1:9", offline=True)
    assert_close(load(NAME).params, want.params, 0, "params")
    assert capsys.readouterr() == ("", "")
    assert not utils.are_progress_bars_disabled()


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"])
def test_a_download_that_was_interrupted_is_completed(
    name: str, hub: Hub, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or refused by the name of what is missing, where there is no connection."""
    load(NAME)
    (cache / name).unlink()
    load(NAME)
    assert (cache / name).exists()
    (cache / name).unlink()
    hub.hang_up()
    assert f"without {name}, expected a connection" in refusal(capsys)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer"])
@pytest.mark.parametrize("offline", [True, False])
def test_a_cache_of_other_programs_is_read_if_it_is_complete(
    name: str, offline: bool, model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    by_hand(model, cache)
    reach(monkeypatch, "http://127.0.0.1:9", offline)
    assert_close(load(NAME).params, load(model).params, 0, "params")
    (cache.parents[1] / "blobs" / f"blob-{name}").unlink(missing_ok=True)  # only its link remains
    for file in cache.glob("tokenizer.*") if name == "tokenizer" else ():
        file.unlink()
    assert re.search(rf"/{name}(\.json)?: path: got no such file", refusal(capsys))


def test_weights_in_another_format_are_not_taken_for_a_model(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    del hub.files["model.safetensors"]
    assert "model.safetensors: path: got no such file, expected a model in .safetensors" in refusal(capsys)


REFUSALS = {
    "no such model": (401, "RepoNotFound", "no such model, or a private one"),
    "gated": (403, "GatedRepo", "a gated model, expected access"),
    "a token that is not valid": (401, "", "the answer 401 Unauthorized, expected access"),
    "no branch": (404, "RevisionNotFound", "a model without a branch main"),
    "an outage": (503, "", "the answer 503 Service Unavailable, expected a model in the cache"),
    "no answer": (-1, "", "none in the cache, and no connection, expected a model in the cache"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_a_model_that_cannot_be_had_is_one_line(what: str, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    status, code, says = REFUSALS[what]
    hub.answer = (status, code)
    assert refusal(capsys).startswith(f"error: {NAME}: hub: got {says}")


@pytest.mark.parametrize(("offline", "says"), [(True, "HF_HUB_OFFLINE is set"), (False, "no connection")])
def test_a_model_in_no_cache_is_one_line(
    offline: bool, says: str, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reach(monkeypatch, "http://127.0.0.1:9", offline)
    assert refusal(capsys).startswith(f"error: {NAME}: hub: got none in the cache, and {says}, expected a model")


def test_a_path_is_no_name_on_the_hub(tmp_path: Path) -> None:
    """Nothing is looked for on a network where a path is meant."""
    for path in ("nowhere/model.gguf", "nowhere/a/b", "/nowhere/model", "./model", f"{tmp_path}/model", "../a", "é/a"):
        with pytest.raises(LlamaError, match="no such file"):
            load(path)


def test_an_adapter_is_downloaded_and_merged_with_its_base(
    model: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    made = load(model)
    blocks: Any = stacked(made.params).blocks
    adapters = new_adapters(jax.random.key(0), blocks, 2, ["q"])
    save_adapter(tmp_path / "adapter", adapters, made.config, str(model), 2, 4.0)
    hub = Hub({path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()})
    reach(monkeypatch, f"http://127.0.0.1:{hub.server_port}")
    assert_close(load(NAME).params, made.params, 0, "params")
    hub.hang_up()
    assert {path.name for path in cache.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
