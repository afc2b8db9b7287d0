"""Log-probabilities from servers in the dialects of vLLM, SGLang and llama.cpp, all of them threads of this process."""

import json
import signal
import sys
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread, main_thread
from typing import Any, cast

import jax
import numpy as np
import pytest
from builders import SMALL, letter_tokenizer, random_params
from foreign import in_transformers

import lovely_llama as ll
from lovely_llama import LlamaError
from lovely_llama_tools import save
from lovely_llama_tools.commands import main
from lovely_llama_tools.comparing.recordings.server import ids_by_text, read_server
from lovely_llama_tools.comparing.recordings.theirs import Recorded
from lovely_llama_tools.formats.model import Model

IDS = np.array([3, 1, 4, 1, 5, 9, 2, 6])
ROWS = np.asarray(jax.nn.log_softmax(ll.logits(random_params(SMALL), IDS, SMALL)), np.float64)
# With and without a space, bytes that are no characters, two ids of the same text, and tokens without one.
PIECES = [
    *(b"", b"", b"\xe9", b" the", b"the", b" of", b"\xe2", b"\xc3\xa2", b" sky", b",", b" ,", b"\xc3\x89"),
    *(bytes([letter]) for letter in b"abcdefghijklmnopp"),
]
TOKENIZER = letter_tokenizer(PIECES, prefix=b" ")
BODY = {"model": "tiny", "max_tokens": 1, "temperature": 0}
EXTRAS = {"add_special_tokens": False, "return_tokens_as_token_ids": True}


class Server(ThreadingHTTPServer):
    """A server of the model, in a dialect."""

    daemon_threads = True

    def __init__(self, dialect: str) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.dialect, self.url = dialect, f"http://127.0.0.1:{self.server_port}/v1"
        self.bodies, self.keys, self.faults, self.done = list[Any](), list[Any](), list[str](), Event()
        Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def hang_up(self) -> None:
        self.done.set()
        self.shutdown()
        self.server_close()


def text_of(i: int) -> str:
    """What a tokenizer of Hugging Face's decodes one token of sentencepiece to."""
    return PIECES[i].removeprefix(b" ").decode(errors="replace") or ("<s>", "</s>", "")[min(i, 2)]


def likeliest(row: int, count: int) -> list[int]:
    return np.argsort(-ROWS[row])[:count].tolist()


class Answer(BaseHTTPRequestHandler):
    """What the dialects answer, and what they refuse."""

    server: Any

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def say(self, status: int, value: Any, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.server.keys.append(self.headers["Authorization"])
        if self.path != "/v1/models":
            self.server.faults.append(f"GET {self.path}")
        name = {"llama.cpp": 404}.get(self.server.dialect, 200)
        self.say(name, {"object": "list", "data": [{"id": "tiny"}, {"id": "other"}]})

    def do_POST(self) -> None:
        body: Any = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(dict(body))
        self.server.keys.append(self.headers["Authorization"])
        prompt = body["prompt"]
        if self.path != "/v1/completions" or self.headers["Content-Type"] != "application/json":
            self.server.faults.append(f"POST {self.path} {self.headers['Content-Type']}")
        if prompt != IDS[: len(prompt)].tolist() or not all(type(i) is int for i in prompt):
            self.server.faults.append(f"prompt {prompt}")
        getattr(self, self.server.dialect.replace(".", "_"))(body, prompt)

    def legacy(self, prompt: Any, echo: bool, count: int, token: Any, more: int = 0) -> None:
        """Lists as OpenAI's: of the prompt, whose first token has no log-probability, and of one token after it."""
        rows = [*range(len(prompt) - 1)] * echo + [len(prompt) - 1]
        ids = [*(int(i) for i in prompt[1:])] * echo + likeliest(len(prompt) - 1, 1)
        tops: list[Any] = [{i: ROWS[row, i] for i in likeliest(row, count)} for row in rows]
        tops = [top | {i: ROWS[row, i]} for top, row, i in zip(tops, rows, ids, strict=True)]
        told: dict[str, list[Any]] = {"tokens": [token(i) for i in ids], "text_offset": [0] * len(ids)}
        told["token_logprobs"] = [ROWS[row, i] for row, i in zip(rows, ids, strict=True)]
        told["top_logprobs"] = [{token(i): value for i, value in reversed(top.items())} for top in tops]
        if echo:
            told["tokens"].insert(0, token(prompt[0]))
            told["token_logprobs"].insert(0, None)
            told["top_logprobs"].insert(0, None)
        for values in (told["tokens"], told["token_logprobs"], told["top_logprobs"]):
            values += values[-1:] * more
        self.say(200, {"object": "text_completion", "choices": [{"index": 0, "text": "", "logprobs": told}]})

    def vllm(self, body: Any, prompt: Any, limit: int = 20, more: int = 0, shift: int = 0) -> None:
        if body["logprobs"] > limit:
            says = f"Requested sample logprobs of {body['logprobs']}, which is greater than max allowed: {limit}"
            return self.say(400, {"error": {"message": says, "type": "BadRequestError", "code": 400}})
        if {name: body.get(name) for name in EXTRAS} != EXTRAS:
            self.server.faults.append(f"parameters {body}")
        return self.legacy(prompt, body.get("echo", False), body["logprobs"], lambda i: f"token_id:{i + shift}", more)

    def vllm5(self, body: Any, prompt: Any) -> None:
        self.vllm(body, prompt, 5)

    def bos(self, body: Any, prompt: Any) -> None:
        self.vllm(body, prompt, more=1)

    def shifted(self, body: Any, prompt: Any) -> None:
        self.vllm(body, prompt, shift=1)

    def sglang(self, body: Any, prompt: Any) -> None:
        self.legacy(prompt, body.get("echo", False), body["logprobs"], text_of)

    def strict(self, body: Any, prompt: Any) -> None:
        """A server that knows OpenAI's parameters alone, and ignores echo."""
        if extra := [name for name in body if name in EXTRAS]:
            return self.say(422, {"detail": f"Extra inputs are not permitted: {extra[0]}"})
        return self.legacy(prompt, False, body["logprobs"], text_of)

    def llama_cpp(self, body: Any, prompt: Any) -> None:
        if body.get("echo"):
            error = {"code": 500, "message": "Only no echo is supported", "type": "server_error"}
            return self.say(500, {"error": error})
        row, lowest = len(prompt) - 1, float(np.finfo(np.float32).min)
        tops = [{"id": i, "token": text_of(i), "bytes": [], "logprob": ROWS[row, i]}
                for i in likeliest(row, body["logprobs"])]  # fmt: skip
        tops[-1]["logprob"] = lowest
        content = [{**tops[0], "top_logprobs": tops}]
        return self.say(200, {"choices": [{"text": "", "index": 0, "logprobs": {"content": content}}]})

    def native(self, body: Any, prompt: Any) -> None:
        tops = [{"id": i, "token": "", "logprob": ROWS[len(prompt) - 1, i]} for i in likeliest(len(prompt) - 1, 4)]
        self.say(200, {"content": "", "completion_probabilities": [{**tops[0], "top_logprobs": tops}]})

    def silent(self, body: Any, prompt: Any) -> None:
        self.say(200, {"choices": [{"index": 0, "text": "a", "logprobs": None}]})

    def strange(self, body: Any, prompt: Any) -> None:
        told = {"tokens": ["Ġsky"], "token_logprobs": [-1.0], "top_logprobs": [{"Ġsky": -1.0, "▁sky": -2.0}]}
        self.say(200, {"choices": [{"logprobs": told}]})

    def html(self, body: Any, prompt: Any) -> None:
        self.say(200, b"<html>")

    def nothing(self, body: Any, prompt: Any) -> None:
        self.close_connection = True

    def keyless(self, body: Any, prompt: Any) -> None:
        self.say(401, {"error": {"message": "Invalid\n API Key " + "x" * 300}})

    def refusing(self, body: Any, prompt: Any) -> None:
        self.say(400, b"This model does\r\nnot support it\n")

    def moved(self, body: Any, prompt: Any) -> None:
        self.say(302, b"", Location=f"{self.server.url}/elsewhere")

    def interrupted(self, body: Any, prompt: Any) -> None:
        signal.pthread_kill(cast(int, main_thread().ident), signal.SIGINT)  # a process may give it to any thread
        self.server.done.wait(20)

    def slow(self, body: Any, prompt: Any) -> None:
        self.server.done.wait(20)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy, and no key of the user's."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server in the dialect that the test names."""
    found = Server(request.param)
    yield found
    found.hang_up()
    assert not found.faults


def dialects(*names: str) -> Any:
    return pytest.mark.parametrize("server", names, indirect=True)


def assert_told(found: Recorded, columns: Sequence[Sequence[int]]) -> None:
    """Each row has the log-probabilities of these tokens, and NaN elsewhere."""
    rows = cast(Any, found.logits)
    assert found.log_probabilities and not found.activations and found.tokens.tolist() == IDS.tolist()
    assert rows.shape == ROWS.shape and rows.dtype == np.float64
    for row, (got, want) in enumerate(zip(rows, ROWS, strict=True)):
        assert np.flatnonzero(~np.isnan(got)).tolist() == sorted(set(columns[row])), row
        assert (got[columns[row]] == want[columns[row]]).all(), row


def own(row: int) -> list[int]:
    """The token of the prompt after a row."""
    return IDS[row + 1 : row + 2].tolist()


@dialects("vllm", "vllm5")
def test_a_server_that_echoes_ids(server: Server) -> None:
    """In one request, or after one that asks for more than is permitted. No tokenizer is needed."""
    found = read_server(server.url, IDS, None, SMALL.vocab)
    count = {"vllm": 20, "vllm5": 5}[server.dialect]
    assert_told(found, [[*likeliest(row, count), *own(row)] for row in range(8)])
    sent = BODY | {"prompt": IDS.tolist(), "echo": True, **EXTRAS}
    assert server.bodies == [sent | {"logprobs": n} for n in (20, 5) if n >= count]
    assert server.keys == [None] * (1 + len(server.bodies))


@dialects("sglang")
def test_a_server_that_echoes_texts(server: Server) -> None:
    """Texts that are not just one token's are left out: with a space or without, of odd bytes, of two ids."""
    sure = {0, 1, 5, 8, 11, *range(12, 27)}
    assert {i for i in range(29) if ids_by_text(TOKENIZER).get(text_of(i)) == i} == sure
    known = ids_by_text(TOKENIZER)
    assert known[" the"] == 3 and not {"the", ",", "â", "\ufffd", "p", ""} & known.keys()
    spaced = ids_by_text(letter_tokenizer(PIECES))  # of Llama 3's kind
    assert (spaced["the"], spaced[" the"], spaced[" ,"]) == (4, 3, 10) and not {",", "of"} & spaced.keys()
    found = read_server(server.url, IDS, TOKENIZER, SMALL.vocab)
    assert_told(found, [[*(i for i in likeliest(row, 20) if i in sure), *own(row)] for row in range(8)])
    assert len(server.bodies) == 1
    assert_told(read_server(server.url, IDS, None, SMALL.vocab), [own(row) for row in range(8)])


@dialects("strict")
def test_a_server_that_ignores_echo(server: Server) -> None:
    found = read_server(server.url, IDS, TOKENIZER, SMALL.vocab)
    known = ids_by_text(TOKENIZER).values()
    assert_told(found, [[i for i in likeliest(row, 5) if i in known] for row in range(8)])
    assert [len(body["prompt"]) for body in server.bodies] == [8, 8, 8, *range(1, 9)]
    assert server.bodies[-1] == BODY | {"prompt": IDS.tolist(), "logprobs": 5}


@dialects("llama.cpp", "native")
def test_a_server_that_is_asked_prefix_by_prefix(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """By ids; −∞ is left out. A key is sent where there is one."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    found = read_server(f"{server.url}/", IDS, None, SMALL.vocab, None if server.dialect == "native" else "mine")
    count = {"llama.cpp": 19, "native": 4}[server.dialect]
    assert_told(found, [likeliest(row, count) for row in range(8)])
    assert set(server.keys) == {"Bearer secret"}
    assert server.bodies[-1]["model"] == ("tiny" if server.dialect == "native" else "mine")
    assert "echo" not in server.bodies[-1] and server.bodies[-1]["logprobs"] == 20


@dialects("llama.cpp")
def test_a_server_without_a_list_of_models(server: Server) -> None:
    read_server(server.url.removesuffix("/v1"), IDS[:2], None, SMALL.vocab)
    assert {body["model"] for body in server.bodies} == {"default"}


@dialects("vllm", "sglang", "strict", "llama.cpp")
def test_a_prompt_of_one_token(server: Server) -> None:
    found = read_server(server.url, IDS[:1], TOKENIZER, SMALL.vocab)
    row = cast(Any, found.logits)[0]
    told = ~np.isnan(row)
    assert found.tokens.tolist() == [3] and told.sum() >= 3 and (row[told] == ROWS[0, told]).all()


REFUSED = {
    "silent": "logprobs: got none, expected a server that returns log-probabilities: vLLM, SGLang, llama-server",
    "strange": "logprobs: got 'Ġsky' and others that are no tokens here, expected those of tokens",
    "html": "/completions: JSON: got Expecting value at line 1, column 1, expected an object in JSON",
    "nothing": "/completions: connection: got RemoteDisconnected, expected a server that answers",
    "keyless": "/completions: status: got 401: Invalid API Key " + "x" * 184 + ", expected 200",
    "refusing": "/completions: status: got 400: This model does not support it, expected 200",
    "moved": "/completions: status: got 302: Found, expected 200",
    "slow": "/completions: connection: got TimeoutError, expected a server that answers",
    "bos": "logprobs: got 10 positions, expected 9, the prompt's and one after it: a server that adds no BOS",
    "shifted": "tokens: got 4 at position 0, expected 3, as in the prompt",
}


@dialects(*REFUSED)
def test_answers_that_are_refused(server: Server) -> None:
    with pytest.raises(LlamaError) as error:
        read_server(server.url, IDS, TOKENIZER, SMALL.vocab, timeout=0.3 if server.dialect == "slow" else 20.0)
    assert str(error.value).startswith(server.url), error.value
    assert REFUSED[server.dialect] in str(error.value) and "\n" not in str(error.value)
    most = {"refusing": 6, "strange": 9, "silent": 2}  # all that is worth trying; nothing mends the others
    assert len(server.bodies) == most.get(server.dialect, 1)


def test_addresses_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("file:///etc/passwd", "127.0.0.1:80", "http://", "http://[::1", "http://a:b/v1", "http://u:p@h/v1", ""):
        with pytest.raises(LlamaError, match=r"url: got .*, expected http://HOST:PORT/v1"):
            read_server(url, IDS, None, SMALL.vocab)
    server = Server("vllm")
    server.hang_up()
    with pytest.raises(LlamaError, match="completions: connection: got Connection refused"):
        read_server(server.url, IDS, None, SMALL.vocab)
    monkeypatch.setenv("OPENAI_API_KEY", "sec\nret")
    with pytest.raises(LlamaError, match="connection: got ValueError") as error:
        read_server(server.url, IDS, None, SMALL.vocab)
    assert "ret" not in str(error.value).removeprefix(server.url)
    with pytest.raises(LlamaError, match="tokens: got"):
        read_server(server.url, [29], None, SMALL.vocab)


@dialects("interrupted")
def test_an_interrupt_ends_it(server: Server) -> None:
    with pytest.raises(KeyboardInterrupt):
        read_server(server.url, IDS, None, SMALL.vocab)
    assert len(server.bodies) == 1


def test_the_command_names_the_bug_of_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of which only the few likeliest tokens are known; and a right one is called so."""
    model = Model(SMALL, random_params(SMALL), None)
    save(model, tmp_path / "model")
    server = Server("vllm5")
    command = ["diff", str(tmp_path / "model"), server.url, "--tokens", " ".join(map(str, IDS)), "--json"]
    try:
        assert main(command) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["verdict"] == "same" and len(told["positions"]) == len(IDS) and told["notes"] == []
        with in_transformers(model, "relu") as run:
            monkeypatch.setattr(sys.modules[__name__], "ROWS", run(IDS).double().log_softmax(-1).numpy())
        assert main(command) == 1
        told = json.loads(capsys.readouterr().out)
        assert told["verdict"] == "bug" and told["bugs"] == ["relu"] and told["error"] < 1e-5
        assert main([*command[:-3], "--tokens", "29"]) == 2
    finally:
        server.hang_up()
    assert "tokens: got" in capsys.readouterr().err and not server.faults
