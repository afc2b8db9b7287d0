"""Conversations: messages to the tokens of a prompt, by the model's own chat template."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lovely_llama import LlamaError, check

from .tokens import Tokenizer, check_text, template_environment


def recent(tokenizer: Tokenizer | None, messages: list[dict[str, str]], limit: int) -> list[dict[str, str]]:
    """The messages without the oldest turns, as many as are dropped to fit the prompt into `limit` tokens.

    A system message and the last message always remain.
    """
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns = messages[len(system) :]
    while len(turns) > 1 and len(chat_prompt(tokenizer, [*system, *turns])) > limit:
        turns = turns[2:]
    return [*system, *turns]


def chat_prompt(tokenizer: Tokenizer | None, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """The tokens that ask for an answer to messages, each a mapping with "role" and "content".

    The names of special tokens in the template are those tokens; in a message they are text, and begin no turn.
    """
    if tokenizer is None or tokenizer.template is None:
        raise LlamaError("model", "chat_template", "none", "a template: this model continues texts, with `generate`")

    def refuse(message: str) -> None:
        raise LlamaError("model", "chat_template", f"{message!r}", "a conversation that the template accepts")

    for value in (value for message in messages for value in message.values()):
        check("message", type(value).__name__, isinstance(value, str), "texts only")
        check_text("message", value)
    # Names of special tokens in a message go through the template as numbers between two characters that are in none.
    written = "".join(value for message in messages for value in message.values()) + tokenizer.template
    mark = next(chr(c) for c in range(0xE000, 0xF8FF) if chr(c) not in written)
    names = sorted(tokenizer.specials, key=len, reverse=True)
    special = re.compile("|".join(map(re.escape, names)) or "(?!)")
    escaped = [
        {key: special.sub(lambda m: f"{mark}{names.index(m[0])}{mark}", value) for key, value in message.items()}
        for message in messages
    ]
    name_of = {token: name for name, token in tokenizer.specials.items()}
    bos, eos = ("" if token is None else name_of.get(token, "") for token in (tokenizer.bos, tokenizer.eos))
    values = {"add_generation_prompt": True, "raise_exception": refuse, "bos_token": bos, "eos_token": eos}
    try:
        text = template_environment().from_string(tokenizer.template).render(messages=escaped, **values)
    except LlamaError:
        raise
    except Exception as error:  # of jinja2, or of whatever the template calls
        raise LlamaError("model", "chat_template", f"{type(error).__name__}: {error}", "one that renders") from error
    tokens, end = list[int](), 0
    for found in [*special.finditer(text), None]:
        part = text[end : found.start() if found else None]
        part = re.sub(f"{mark}(\\d+){mark}", lambda m: names[int(m[1])], part)
        tokens += tokenizer.encode(part, False) if part else []
        if found:
            tokens.append(tokenizer.specials[found[0]])
            end = found.end()
    return tokens
