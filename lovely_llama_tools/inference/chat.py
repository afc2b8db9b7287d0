"""Chat prompts: messages to tokens, by the model's own chat template."""

import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple, cast

from lovely_llama import LlamaError, check

from ..tokens import NAMES, Tokenizer, check_text, encode_parts, render, segments
from ..tokens.parts import continue_text, specials


def recent(tokenizer: Tokenizer | None, messages: list[dict[str, str]], limit: int) -> list[dict[str, str]]:
    """Drop the oldest turns until the prompt fits into `limit` tokens. A system message and the last message stay."""
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns = messages[len(system) :]
    while len(turns) > 1 and len(chat_prompt(tokenizer, [*system, *turns])) > limit:
        turns = turns[2:]
    return [*system, *turns]


def chat_prompt(
    tokenizer: Tokenizer | None, messages: Sequence[Mapping[str, Any]], template: str | None = None, **values: Any
) -> list[int]:  # fmt: skip
    """The prompt for the assistant's answer to messages, each a mapping with "role" and "content".

    A content may be a list of parts of text, and none beside "tool_calls", as transformers takes them. Names of special
    tokens in the template become those tokens; in a message they are plain text, so that no message can open a turn.
    `template` names one of several templates. `values` are further variables of the template, such as `tools`, and are
    trusted as the template is.
    """
    source = template_of(tokenizer, template)
    tokenizer = cast(Tokenizer, tokenizer)
    given = as_messages(messages)
    (mark,) = unused(given, source, 1)
    text = render(source, {"messages": escape(tokenizer, given, mark), **variables(tokenizer), **values})
    return tokens_of(tokenizer, text, mark).ids


def chat_text(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], template: str | None = None, **values: Any
) -> str:
    """What the template makes of messages, as a text: nothing tells a special token's name in a message from the
    template's own."""
    source = template_of(tokenizer, template)
    return render(source, {"messages": as_messages(messages), **variables(tokenizer), **values})


# ---- Messages --------------------------------------------------------------------------------------------------------


def as_messages(value: Any) -> list[dict[str, Any]]:
    """Messages as templates take them, each with a role, and a text for its content unless it only calls tools.

    Parts of text are joined. Other keys stay as they are, as transformers gives them to a template.
    """
    expected = 'messages, each with a "role" and a "content"'
    check("messages", f"a value of type {type(value).__name__}", isinstance(value, list | tuple), expected, "arguments")
    check("messages", "none", bool(value), expected, "arguments")
    found = list[dict[str, Any]]()
    for message in cast(Sequence[Any], value):
        check("messages", f"{message!r:.40}", isinstance(message, Mapping), expected, "arguments")
        given = cast(Mapping[str, Any], message)
        role = given.get("role")
        check("messages", f"{role!r:.40} as the role", isinstance(role, str), expected, "arguments")
        check("function_call", "one in a message", not given.get("function_call"), '"tool_calls"', "arguments")
        content = joined(given.get("content"))
        good = isinstance(content, str) or (content is None and bool(given.get("tool_calls")))
        check("messages", f"{given.get('content')!r:.40} as the content", good, expected, "arguments")
        for text in strings(given):
            check_text("message", text)
        found.append({**given, "content": content})
    return found


def joined(content: Any) -> Any:
    """A content in parts of text as one text; another as it is."""
    if not isinstance(content, list):
        return content
    parts = cast(list[Any], content)
    for part in parts:
        given = cast(dict[str, Any], part) if isinstance(part, dict) else {"type": type(part).__name__}
        kind = given.get("type", "text")
        good = kind == "text" and isinstance(given.get("text"), str)
        check("content", f"a part of type {kind!r:.40}", good, 'parts of "text" alone', "arguments")
    return "".join(part["text"] for part in parts)


def strings(value: Any) -> Iterator[str]:
    """All texts in a message."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        given = cast(Any, value)
        for part in given.values() if isinstance(value, Mapping) else given:
            yield from strings(part)


# ---- Templates -------------------------------------------------------------------------------------------------------


def template_of(tokenizer: Tokenizer | None, name: str | None = None) -> str:
    """The source of the model's template, or of one of several by its name."""
    how = "a template: this model continues texts, with `generate`"
    if tokenizer is None:
        raise LlamaError("model", "chat_template", "none", how)
    source, named = tokenizer.template if name is None else tokenizer.templates.get(name), tokenizer.templates
    if source is None:
        raise LlamaError("model", "chat_template", name or "none", f"one of {', '.join(named)}" if named else how)
    return source


def variables(tokenizer: Tokenizer) -> dict[str, Any]:
    """What transformers gives to every template."""
    name_of = {token: name for name, token in tokenizer.specials.items()}
    named = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos}
    names = {key: name_of.get(token, "") for key, token in named.items() if token is not None}
    others = {key: name for key, name in tokenizer.settings.items() if key in NAMES and isinstance(name, str)}
    usual = {"tools": None, "documents": None, "add_generation_prompt": True, "bos_token": "", "eos_token": ""}
    return {**usual, **others, **names}


def unused(messages: Sequence[Mapping[str, Any]], source: str, n: int) -> list[str]:
    """Characters for private use that occur neither in messages nor in a template."""
    written = {*source}.union(*strings(messages))
    return [*islice((c for c in map(chr, range(0xE000, 0xF8FF)) if c not in written), n)]


def escape(tokenizer: Tokenizer, value: Any, mark: str) -> Any:
    """Messages in which the name of a special token is its id between two marks, so that templates pass it through."""
    if isinstance(value, str):
        parts = segments(value, tokenizer.specials)
        return "".join(part if token is None else f"{part}{mark}{token}{mark}" for part, token in parts)
    if isinstance(value, Mapping):
        return {key: escape(tokenizer, part, mark) for key, part in cast(Mapping[str, Any], value).items()}
    if isinstance(value, list | tuple):
        return [escape(tokenizer, part, mark) for part in cast(Sequence[Any], value)]
    return value


class Placed(NamedTuple):
    """The tokens of a rendered text, and where places of it are among them."""

    ids: list[int]
    places: list[tuple[int, int]]  # of each place: the tokens that end before it, and those that begin before it
    specials: list[tuple[int, int]]  # of each special token: where it begins in the text, and its index


def tokens_of(tokenizer: Tokenizer, text: str, mark: str, places: Sequence[int] = ()) -> Placed:
    """Tokenize a rendered text, in which `mark` is that of `escape`, and find ascending places of it."""
    name_of = {token: name for name, token in tokenizer.specials.items()}

    def plain(part: str) -> str:
        return re.sub(f"{mark}(\\d+){mark}", lambda found: name_of[int(found[1])], part) if mark in part else part

    found, at, waiting = Placed([], [], []), 0, deque(places)
    for part, own, token in parts_of(tokenizer, text, mark, plain):
        while waiting and waiting[0] <= at + len(part):
            before = part[: waiting.popleft() - at]
            n, m = (len(own), len(own)) if before == part else common(tokenizer, plain(before), own)
            found.places.append((len(found.ids) + n, len(found.ids) + m))
        found.ids.extend(own)
        at += len(part)
        if token is not None:
            found.specials.append((at, len(found.ids)))
            found.ids.append(token)
            at += len(name_of[token])
    return found


def parts_of(
    tokenizer: Tokenizer, text: str, mark: str, plain: Callable[[str], str]
) -> Iterator[tuple[str, list[int], int | None]]:
    """The text before each special token, its tokens, and that token."""
    parts = [*segments(text, tokenizer.specials)]
    if mark in text:  # where a special token's name stands for itself, the tokenizer must not see the others
        for part, token in parts:
            yield part, [*chain.from_iterable(encode_parts(tokenizer, plain(part)))] if part else [], token
        return
    whole = [*chain.from_iterable(encode_parts(tokenizer, text, True))]
    wanted, special = [token for _, token in parts if token is not None], specials(tokenizer)
    at = [i for i, token in enumerate(whole) if token in special]
    if [whole[i] for i in at] != wanted:  # as where a special token takes the space before it
        yield text, whole, None
        return
    for (part, token), begin, end in zip(parts, [0, *(i + 1 for i in at)], [*at, len(whole)], strict=True):
        yield part, whole[begin:end], token


def common(tokenizer: Tokenizer, before: str, ids: list[int]) -> tuple[int, int]:
    """How many of a text's tokens lie within a beginning of it; and how many begin there."""
    if not before:
        return 0, 0
    found = (0, 0)
    for alone in (tokenizer.encode(before, True), continue_text(tokenizer, before)):
        n = next((i for i, (a, b) in enumerate(zip(alone, ids, strict=False)) if a != b), min(len(alone), len(ids)))
        found = max(found, (n, n if n == len(alone) else n + 1))
        if not tokenizer.prefix or found[0]:
            break
    return found
