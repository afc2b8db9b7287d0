"""Chat prompts: rendered by the model's own template, as transformers renders it."""

from typing import Any

import pytest
from builders import CHATML, write_talker
from transformers.utils.chat_template_utils import render_jinja_template

from lovely_llama import LlamaError
from lovely_llama_tools.chat import chat_prompt
from lovely_llama_tools.files import load
from lovely_llama_tools.formats import Model

MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "  Why is the\nsky blue? "},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "é"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(write_talker(tmp_path_factory.mktemp("talker") / "talker.gguf"))


@pytest.mark.parametrize(
    "template", [CHATML, "{%- for m in messages %}\n  {{- m.role }}: {{ m.content | trim }}\n{% endfor %}"]
)
def test_a_prompt_is_rendered_as_by_transformers(model: Model, template: str) -> None:
    tokenizer = model.tokenizer._replace(template=template)
    conversation: Any = [MESSAGES]
    (want,), _ = render_jinja_template(conversation, chat_template=template, add_generation_prompt=True)
    tokens = chat_prompt(tokenizer, MESSAGES)
    assert tokens == tokenizer.encode(want, True)
    specials = {token: name for name, token in tokenizer.specials.items()}
    assert "".join(specials.get(t, "") or tokenizer.pieces[t].decode("utf-8", "replace") for t in tokens)


def test_a_template_may_refuse_a_conversation(model: Model) -> None:
    tokenizer = model.tokenizer._replace(template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(LlamaError, match="roles must alternate") as caught:
        chat_prompt(tokenizer, MESSAGES)
    assert (caught.value.file, caught.value.field) == ("model", "chat_template")


def test_a_model_without_a_template_cannot_chat(model: Model) -> None:
    with pytest.raises(LlamaError, match="generate") as caught:
        chat_prompt(model.tokenizer._replace(template=None), MESSAGES)
    assert caught.value.field == "chat_template"
