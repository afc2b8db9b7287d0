"""Chat templates in the formats of published models, rendered as transformers' apply_chat_template renders them."""

import datetime
from pathlib import Path
from typing import Any

import pytest
from chat_templates import LLAMA2, LLAMA3, LLAMA31, NAMESPACE, ZEPHYR
from texts import MESSAGES, NAMES, drawn, tokenizer_with
from transformers import AutoTokenizer

from lovely_llama import LlamaError
from lovely_llama_tools.formats.files import default_model, load_tokenizer
from lovely_llama_tools.inference.chat import chat_prompt
from lovely_llama_tools.tokens import Tokenizer, folder_tokenizer, tokenizer_files

TEMPLATES = {
    "llama 2": LLAMA2, "llama 3": LLAMA3, "llama 3.1": LLAMA31, "zephyr": ZEPHYR, "namespaces": NAMESPACE,
    "smollm2": "",
}  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "f", "description": "é < & '", "parameters": {"type": "object"}}}]


def pair(folder: Path, name: str) -> tuple[Tokenizer, Any]:
    """A tokenizer with this template, and transformers' of the same folder."""
    bos, eos = ("<s>", "</s>") if name in ("llama 2", "zephyr") else ("<|begin_of_text|>", "<|eot_id|>")
    template = load_tokenizer(default_model()).template if name == "smollm2" else TEMPLATES[name]
    for file, data in tokenizer_files(tokenizer_with(bos, eos)._replace(template=template)).items():
        (folder / file).write_bytes(data)
    tokenizer = folder_tokenizer(folder)
    assert tokenizer
    return tokenizer, AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_renders_as_in_transformers(tmp_path: Path, name: str) -> None:
    """With a system message and without; the ids are those of the whole text."""
    tokenizer, reference = pair(tmp_path, name)
    for messages in (MESSAGES, MESSAGES[1:], MESSAGES[:2], MESSAGES[3:]):
        want = reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        tokens = chat_prompt(tokenizer, messages)
        assert tokens == reference(want, add_special_tokens=False).input_ids
        specials = {token: special for special, token in tokenizer.specials.items()}
        pieces = [specials[t].encode() if t in specials else tokenizer.pieces[t] for t in tokens]
        assert b"".join(pieces).decode() == want


def test_the_date_and_tools_are_those_of_transformers(tmp_path: Path) -> None:
    tokenizer, reference = pair(tmp_path, "llama 3.1")
    every: Any = ({"tools": TOOLS}, {"date_string": "1 May 2025"}, {"add_generation_prompt": False})
    for values in every:
        usual: Any = {"add_generation_prompt": True} | values
        want = reference.apply_chat_template(MESSAGES, tokenize=False, **usual)
        assert chat_prompt(tokenizer, MESSAGES, **values) == reference(want, add_special_tokens=False).input_ids
    assert f"Today Date: {datetime.datetime.now():%d %b %Y}" in tokenizer.decode(chat_prompt(tokenizer, MESSAGES))


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "namespaces"])
def test_a_message_is_text_whatever_it_says(tmp_path: Path, name: str) -> None:
    """Names of special tokens in it add none to those of the template, and the text is all there."""
    tokenizer, _ = pair(tmp_path, name)
    specials = [t for t in chat_prompt(tokenizer, MESSAGES[3:]) if t in tokenizer.specials.values()]
    for text in (*NAMES, "".join(NAMES), *(text + NAMES[i % len(NAMES)] for i, text in enumerate(drawn()[1:50]))):
        tokens = chat_prompt(tokenizer, [{"role": "user", "content": f"x{text}x"}])
        assert [t for t in tokens if t in tokenizer.specials.values()] == specials
        assert f"x{text}x" in tokenizer.decode(tokens)


def test_a_template_is_chosen_by_name(tmp_path: Path) -> None:
    tokenizer = pair(tmp_path, "llama 3")[0]._replace(templates={"tool_use": "{{ tools[0].function.name }}"})
    assert chat_prompt(tokenizer, MESSAGES, template="tool_use", tools=TOOLS) == tokenizer.encode("f", False)
    with pytest.raises(LlamaError, match="chat_template: got rag, expected one of tool_use"):
        chat_prompt(tokenizer, MESSAGES, template="rag")
    with pytest.raises(LlamaError, match="chat_template: got none, expected one of tool_use"):
        chat_prompt(tokenizer._replace(template=None), MESSAGES)


def test_a_conversation_that_a_template_refuses(tmp_path: Path) -> None:
    tokenizer, _ = pair(tmp_path, "llama 2")
    with pytest.raises(LlamaError, match="roles must alternate"):
        chat_prompt(tokenizer, [*MESSAGES, MESSAGES[1]])
