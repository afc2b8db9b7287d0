"""What a server of somebody else's Llama computes: log-probabilities, by OpenAI's completions API.

github.com/vllm-project/vllm, vllm/entrypoints/openai/completion; github.com/sgl-project/sglang,
sglang/srt/entrypoints/openai; github.com/ggml-org/llama.cpp, tools/server/server-task.cpp.
"""

import http.client
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import numpy as np

from lovely_llama import LlamaError, check, check_tokens, is_number, is_whole

from ...extras import progress
from ...strict_json import read_value
from ...tokens import Tokenizer
from .theirs import Recorded

TIMEOUT = 300.0  # seconds without a byte
LARGEST = 2**28  # bytes of an answer
LOWEST = -9998.0  # JSON has no −∞: vLLM returns −9999 in its place, llama.cpp the lowest of float32
# Strings for ids without ambiguity, and no BOS: parameters of vLLM's, which others ignore or refuse.
PARAMETERS = {"add_special_tokens": False, "return_tokens_as_token_ids": True}
# One after the other until a server accepts one: 20 is the limit of vLLM unless it is told another, 5 that of OpenAI.
ATTEMPTS: tuple[dict[str, Any], ...] = ({"logprobs": 20, **PARAMETERS}, {"logprobs": 5, **PARAMETERS}, {"logprobs": 5})
# Statuses that another request cannot mend: no authority, no such path, too many requests, not ready.
FINAL = (401, 403, 404, 405, 407, 429, 502, 503, 504)
RETURNS = "a server that returns log-probabilities: vLLM, SGLang, llama-server, or another with /v1/completions"


class Refused(LlamaError):
    """A request that the server refuses as it is."""


class Position(NamedTuple):
    """What an answer says of one position."""

    token: Any  # the token there: its id, or a string
    value: Any  # its log-probability; None of the first of a prompt
    others: Sequence[tuple[Any, Any]]  # the likeliest tokens, with theirs


def read_server(
    url: str, tokens: Any, tokenizer: Tokenizer | None, vocab: int, model_name: str | None = None,
    *, timeout: float = TIMEOUT,
) -> Recorded:  # fmt: skip
    """Log-probabilities after each token of a prompt, as far as a server returns them; NaN elsewhere.

    Of a prompt that it echoes, a server returns the log-probability of each token, and those of the likeliest ones.
    One that does not is asked for a token after each prefix. Strings that are not the text of just one token of the
    tokenizer are left out."""
    base, ids = base_of(url), check_tokens(tokens, vocab, np.size(tokens))
    post = partial(positions, f"{base}/completions", timeout, model_name or served(base, timeout))
    known = ids_by_text(tokenizer) if tokenizer else {}
    rows, unknown = np.full((len(ids), vocab), np.nan), list[Any]()

    def fill(row: int, position: Position, own: int | None = None) -> None:
        """Note what is said of the token after `row`, which is `own` if it is one of the prompt's."""
        for token, value in [*position.others, (position.token if own is None else own, position.value)]:
            i = id_of(token, known)
            if i is None or i >= vocab:
                unknown.append(token)
            elif is_number(value) and value > LOWEST:
                rows[row, i] = value

    settings, echoed = accepted(lambda settings: post(ids, settings | {"echo": True}), optional=True)
    if is_echo(echoed, ids, base):
        for row, position in enumerate((echoed or [])[1:]):
            fill(row, position, int(ids[row + 1]) if row + 1 < len(ids) else None)
    else:
        settings, first = accepted(lambda settings: post(ids[:1], settings), first=settings)
        check("logprobs", "none", first is not None, RETURNS, base)
        with progress(f"asking {base}", len(ids), " prefixes") as advance:
            for row in range(len(ids)):
                found = first if row == 0 else post(ids[: row + 1], settings)
                for position in (found or [])[:1]:
                    fill(row, position)
                advance(1)
    if not np.isfinite(rows).any():
        got = f"{unknown[0]!r:.60} and others that are no tokens here" if unknown else "none"
        check("logprobs", got, False, "those of tokens: by their ids, or of a model with its tokenizer", base)
    return Recorded(ids, rows, {}, log_probabilities=True)


def accepted(
    post: Callable[[dict[str, Any]], list[Position] | None], first: dict[str, Any] | None = None, optional: bool = False
) -> tuple[dict[str, Any], list[Position] | None]:
    """The first settings that a server accepts, and its answer; if it accepts none, its last refusal.

    Where that is `optional`, it is the settings to begin with."""
    refusal: Refused | None = None
    for settings in ATTEMPTS[ATTEMPTS.index(first or ATTEMPTS[0]) :]:
        try:
            return settings, post(settings)
        except Refused as error:
            refusal = error
    if refusal and not optional:
        raise refusal
    return ATTEMPTS[0], None


def is_echo(found: list[Position] | None, ids: Any, base: str) -> bool:
    """Whether these are the positions of the prompt, and one after it. A prompt of other ids is refused."""
    if not found or len(found) < len(ids) or (len(found) == len(ids) and found[0].value is not None):
        return False
    says = "the prompt's and one after it: a server that adds no BOS"
    check("logprobs", f"{len(found)} positions", len(found) <= len(ids) + 1, f"{len(ids) + 1}, {says}", base)
    theirs = [id_of(position.token, {}) for position in found[: len(ids)]]
    for t, (own, given) in enumerate(zip(theirs, ids.tolist(), strict=True)):
        check("tokens", f"{own} at position {t}", own is None or own == given, f"{given}, as in the prompt", base)
    return True


# ---- Tokens ----------------------------------------------------------------------------------------------------------


def id_of(token: Any, known: Mapping[str, int]) -> int | None:
    """The id that is meant: itself, vLLM's string with it, or a text."""
    if is_whole(token):
        return int(token) if token >= 0 else None
    found = re.fullmatch(r"token_id:(\d{1,9})", token) if isinstance(token, str) else None
    return int(found[1]) if found else known.get(token) if isinstance(token, str) else None


def ids_by_text(tokenizer: Tokenizer) -> dict[str, int]:
    """The texts that are just one token's, in all the ways in which servers decode a token alone."""
    found = dict[str, set[int]]()
    for i, piece in enumerate(tokenizer.pieces):
        for part in {piece, piece.removeprefix(tokenizer.prefix)}:  # sentencepiece drops the space before a text
            text = part.decode(errors="replace")
            forms = {text, re.sub(r" (?=[.?!,']|n't)", "", text)}  # transformers' clean_up_tokenization_spaces
            if "\ufffd" in text:
                forms.add(part.decode("latin-1"))  # SGLang's, of bytes that are no characters
            for form in forms:
                found.setdefault(form, set()).add(i)
    for name, i in tokenizer.specials.items():
        found.setdefault(name, set()).add(i)
    return {text: i for text, (i, *others) in found.items() if text and not others}


# ---- HTTP ------------------------------------------------------------------------------------------------------------


def base_of(url: str) -> str:
    """The address under which models and completions are."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and not parts.username
    except ValueError:
        good, parts = False, urlsplit("")
    check("url", repr(url), good and not parts.query and not parts.fragment, "http://HOST:PORT/v1")
    path = parts.path.rstrip("/").removesuffix("/completions")
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"


def served(base: str, timeout: float) -> str:
    """The name of the first model of a server."""
    try:
        models = items(field(request(f"{base}/models", None, min(timeout, 10.0)), "data"))
    except LlamaError:
        models = []
    names = [name for model in models if isinstance(name := field(model, "id"), str)]
    return names[0] if names else "default"


def positions(url: str, timeout: float, model: str, prompt: Any, settings: dict[str, Any]) -> list[Position] | None:
    """What a completion of one token says: of that, and of an echoed prompt; None if it has no log-probabilities.

    OpenAI's has lists of tokens, token_logprobs and top_logprobs, which are dicts. llama.cpp's has a list of tokens, in
    logprobs.content or completion_probabilities, with id, logprob and top_logprobs."""
    body = {"model": model, "prompt": [int(i) for i in prompt], "max_tokens": 1, "temperature": 0}
    answer = request(url, body | settings, timeout)
    choice = next(iter(items(field(answer, "choices"))), answer)
    told = field(choice, "logprobs")
    for listed in (field(told, "content"), field(choice, "completion_probabilities")):
        if isinstance(listed, list):
            return [Position(*pair_of(one), pairs(field(one, "top_logprobs"))) for one in cast(list[Any], listed)]
    tokens, values, tops = (items(field(told, key)) for key in ("tokens", "token_logprobs", "top_logprobs"))
    if not isinstance(told, dict) or len(tokens) != len(values):
        return None
    tops += [None] * (len(tokens) - len(tops))
    return [Position(token, value, pairs(top)) for token, value, top in zip(tokens, values, tops, strict=False)]


def pair_of(one: Any) -> tuple[Any, Any]:
    """A token, by its id if there is one, and its log-probability."""
    i = field(one, "id")
    return field(one, "token") if i is None else i, field(one, "logprob")


def pairs(top: Any) -> list[tuple[Any, Any]]:
    """Tokens with log-probabilities, of a dict or of a list."""
    return [*cast(dict[str, Any], top).items()] if isinstance(top, dict) else [pair_of(one) for one in items(top)]


def field(value: Any, key: str) -> Any:
    """The value of an object's key; None where there is none."""
    return cast(dict[str, Any], value).get(key) if isinstance(value, dict) else None


def items(value: Any) -> list[Any]:
    """A list; an empty one in place of anything else."""
    return [*cast(list[Any], value)] if isinstance(value, list) else []


class Stay(HTTPRedirectHandler):
    """No redirection: it would take the key to another server, and make a GET of a POST."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:
        return None


def request(url: str, body: dict[str, Any] | None, timeout: float) -> Any:
    """The JSON that a server answers to a GET, or to a POST of an object."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    try:
        asked = Request(url, None if body is None else json.dumps(body).encode(), headers)
        with build_opener(Stay).open(asked, timeout=timeout) as answer:
            data = answer.read(LARGEST + 1)
    except HTTPError as error:
        kind = LlamaError if error.code in FINAL or error.code < 400 else Refused
        raise kind(url, "status", f"{error.code}: {message_of(error)}", "200") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason: Any = error.reason if isinstance(error, URLError) else error
        why = getattr(reason, "strerror", None) or type(reason).__name__  # other texts could hold the key
        raise LlamaError(url, "connection", why, "a server that answers") from error
    check("answer", f"more than {LARGEST} bytes", len(data) <= LARGEST, "less", url)
    return read_value(data, url)


def message_of(error: HTTPError) -> str:
    """What a server says of an error, in one line of at most 200 characters."""
    try:
        text = error.read(2**16).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        text = ""
    try:
        found = json.loads(text)
        inner = field(found, "error")
        said = field(inner, "message") or inner or field(found, "message") or field(found, "detail") or text
    except (ValueError, RecursionError):
        said = text
    return " ".join(str(said).split())[:200] or error.reason
