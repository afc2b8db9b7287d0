"""Chat prompts: messages to tokens, by the model's own chat template."""

import re
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from lovely_llama import LlamaError, check

from ..tokens import Tokenizer, check_text, encode_parts, render, segments


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

    Names of special tokens in the template become those tokens; in a message they are plain text, so that no message
    can open a turn. `template` names one of several templates. `values` are further variables of the template, such as
    `tools`, and are trusted as the template is.
    """
    if tokenizer is None:
        raise LlamaError("model", "chat_template", "none", "a template: this model continues texts, with `generate`")
    source = template_of(tokenizer, template)
    check_messages(messages)
    # A special token's name in a message passes through the template as its id between two marks, which occur nowhere.
    written = "".join(value for message in messages for value in message.values()) + source
    mark = next(chr(c) for c in range(0xE000, 0xF8FF) if chr(c) not in written)

    def escape(text: str) -> str:
        parts = segments(text, tokenizer.specials)
        return "".join(part if token is None else f"{part}{mark}{token}{mark}" for part, token in parts)

    escaped = [{key: escape(value) for key, value in message.items()} for message in messages]
    name_of = {token: name for name, token in tokenizer.specials.items()}
    text = rendered(tokenizer, source, escaped, values)
    if mark not in text:
        return [*chain.from_iterable(encode_parts(tokenizer, text, True))]
    tokens = list[int]()
    for part, token in segments(text, tokenizer.specials):
        part = re.sub(f"{mark}(\\d+){mark}", lambda found: name_of[int(found[1])], part)
        tokens += chain.from_iterable(encode_parts(tokenizer, part)) if part else []
        tokens += [] if token is None else [token]
    return tokens


def chat_text(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], template: str | None = None, **values: Any
) -> str:
    """What the template makes of messages, as a text: nothing tells a special token's name in a message from the
    template's own."""
    check_messages(messages)
    return rendered(tokenizer, template_of(tokenizer, template), messages, values)


def template_of(tokenizer: Tokenizer, name: str | None) -> str:
    """The source of the model's template, or of one of several by its name."""
    source, named = tokenizer.template if name is None else tokenizer.templates.get(name), tokenizer.templates
    if source is None:
        which = f"one of {', '.join(named)}" if named else "a template: this model continues texts, with `generate`"
        raise LlamaError("model", "chat_template", name or "none", which)
    return source


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuse messages with anything but texts in them."""
    for value in (value for message in messages for value in message.values()):
        check("message", type(value).__name__, isinstance(value, str), "texts only")
        check_text("message", value)


def rendered(
    tokenizer: Tokenizer, source: str, messages: Sequence[Mapping[str, Any]], values: Mapping[str, Any]
) -> str:
    """The template's text, with the variables that transformers gives it besides these."""
    name_of = {token: name for name, token in tokenizer.specials.items()}
    bos, eos = ("" if token is None else name_of.get(token, "") for token in (tokenizer.bos, tokenizer.eos))
    usual = {"tools": None, "documents": None, "add_generation_prompt": True, "bos_token": bos, "eos_token": eos}
    return render(source, {"messages": [*messages], **usual, **values})
