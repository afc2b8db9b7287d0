"""Conversations: messages to the tokens of a prompt, by the model's own chat template."""

from collections.abc import Mapping, Sequence

from lovely_llama import LlamaError

from .extras import extra
from .tokens import Tokenizer, check_text


def chat_prompt(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The tokens that ask for an answer to messages, each a mapping with "role" and "content"."""
    jinja2 = extra("jinja2.sandbox", "chat")
    if tokenizer.template is None:
        raise LlamaError("model", "chat_template", "none", "a template: this model continues texts, with `generate`")

    def refuse(message: str) -> None:
        raise LlamaError("model", "chat_template", f"{message!r}", "a conversation that the template accepts")

    for message in messages:
        check_text("message", message["content"])
    names = {token: name for name, token in tokenizer.specials.items()}
    environment = jinja2.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    values = {"add_generation_prompt": True, "raise_exception": refuse, "bos_token": names.get(tokenizer.bos or 0, "")}
    text = environment.from_string(tokenizer.template).render(messages=messages, **values)
    return tokenizer.encode(text, True)
