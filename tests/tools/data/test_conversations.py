"""Rows of conversations: the ids of transformers' apply_chat_template, and a mask for each answer, or no row."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_templates import DEEPSEEK, GEMMA, LLAMA2, LLAMA3, LLAMA31, MISTRAL, QWEN, ZEPHYR
from texts import drawn, tokenizer_with
from transformers import AutoTokenizer

from lovely_llama import LlamaError
from lovely_llama_tools.data.conversations import Encoder, Learned
from lovely_llama_tools.data.prepare import Corpus, prepare
from lovely_llama_tools.data.records import Conversation, is_records, read_records
from lovely_llama_tools.tokens import Tokenizer, folder_tokenizer, tokenizer_files

TEMPLATES = {
    "llama 2": LLAMA2, "llama 3": LLAMA3, "llama 3.1": LLAMA31, "zephyr": ZEPHYR, "mistral": MISTRAL, "qwen": QWEN,
    "gemma": GEMMA, "deepseek": DEEPSEEK,
}  # fmt: skip


def with_template(folder: Path, template: str) -> tuple[Tokenizer, Any]:
    """A tokenizer with this template, and transformers' of the same folder."""
    folder.mkdir(exist_ok=True)
    for file, data in tokenizer_files(tokenizer_with("<s>", "</s>")._replace(template=template)).items():
        (folder / file).write_bytes(data)
    tokenizer = folder_tokenizer(folder)
    assert tokenizer
    return tokenizer, AutoTokenizer.from_pretrained(folder)


def conversations(n: int = 30) -> list[list[dict[str, str]]]:
    """Conversations of up to six turns; texts with spaces at either end, or nothing but these."""
    rng, found = random.Random(1), list[list[dict[str, str]]]()
    texts = [text for text in drawn() if "<" not in text]
    for i in range(n):
        turns = ["user", "assistant"] * rng.randint(1, 3)
        spaces = ("", "", " ", "\n", "\t ", "\n\n", "    ")
        found.append(
            [
                {"role": role, "content": rng.choice(spaces) + rng.choice(texts)[:40] + rng.choice(spaces)}
                for role in turns
            ]
        )
        if i % 3 == 0:
            found[-1].insert(0, {"role": "system", "content": "Be brief."})
    return found


def ids_of(reference: Any, messages: list[dict[str, Any]], **how: Any) -> list[int]:
    found = reference.apply_chat_template(messages, tokenize=True, **how)
    return list(found["input_ids"] if hasattr(found, "keys") else found)


def learned_by(reference: Any, messages: list[dict[str, Any]], stops: frozenset[int]) -> list[int] | None:
    """Each answer from where its prompt ends up to a token to stop at; None if a prompt is no beginning of the row."""
    text, ids = reference.apply_chat_template(messages, tokenize=False), ids_of(reference, messages)
    mask = [0] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            asked: Any = messages[:i], {"add_generation_prompt": True}
            if not text.startswith(reference.apply_chat_template(asked[0], tokenize=False, **asked[1])):
                return None
            prompt = ids_of(reference, asked[0], **asked[1])
            begin = next((n for n, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), len(prompt))
            end = next(n for n in range(begin, len(ids)) if ids[n] in stops) + 1
            mask[begin:end] = [1] * (end - begin)
    return mask


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_masks_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    tokenizer, reference = with_template(tmp_path, TEMPLATES[name])
    talks, accepted = conversations(), 0
    for talk, found in zip(talks, Encoder(tokenizer).encode([Conversation(t, {}) for t in talks]), strict=True):
        try:
            want = learned_by(reference, talk, tokenizer.stops)
        except Exception:  # jinja2's, which transformers lets through
            assert isinstance(found, LlamaError) and "expected a conversation that the template accepts" in str(found)
            continue
        assert isinstance(found, Learned) and want is not None, found
        assert found.ids == ids_of(reference, talk)
        assert found.answers == want, talk
        assert found.ended
        accepted += 1
    assert accepted == 30 or (accepted == 20 and "no system" in TEMPLATES[name])


# ---- Files -----------------------------------------------------------------------------------------------------------

ASKED, SAID = "Why is the sky blue?", "Rayleigh: é 日本"
MESSAGES = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}]
SYSTEM = {"role": "system", "content": "Be kind."}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 12}}}
ROWS: dict[str, tuple[Any, Any]] = {  # the messages that a row stands for
    "messages": ({"messages": MESSAGES, "id": 7, "source": "x"}, MESSAGES),
    "a list": (MESSAGES, MESSAGES),
    "messages and their prompt again": ({"prompt": ASKED, "messages": MESSAGES}, MESSAGES),
    "null beside it": ({"messages": MESSAGES, "tools": None, "functions": None}, MESSAGES),
    "ShareGPT": ({"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": SAID}]}, MESSAGES),
    "ShareGPT with a system message": (
        {
            "system": "Be kind.",
            "conversations": [{"from": "user", "value": ASKED}, {"from": "assistant", "value": SAID}],
        },
        [SYSTEM, *MESSAGES],
    ),
    "messages under conversations": ({"conversations": MESSAGES}, MESSAGES),
    "prompt and completion": ({"prompt": ASKED, "completion": SAID}, MESSAGES),
    "prompt and completion of messages": ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, MESSAGES),
    "Alpaca": ({"instruction": ASKED, "input": "", "output": SAID}, MESSAGES),
    "Alpaca with an input": (
        {"instruction": "Why?", "input": "the sky", "output": SAID},
        [{"role": "user", "content": "Why?\n\nthe sky"}, MESSAGES[1]],
    ),
    "Alpaca with a history": ({"instruction": ASKED, "output": SAID, "history": [[ASKED, SAID]]}, MESSAGES * 2),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": ASKED}]}, MESSAGES[1]]}, MESSAGES),
}


@pytest.mark.parametrize("form", ["x.jsonl", "x.JSON", "indented.json", "x.ndjson", "x.txt", "x", "bom.jsonl"])
@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_known_by_its_keys_and_a_file_by_its_contents(name: str, form: str, tmp_path: Path) -> None:
    row, want = ROWS[name]
    lines, path = [json.dumps(row, ensure_ascii=False)] * 3, tmp_path / form
    text = {".JSON": f"[{', '.join(lines)}]", ".json": json.dumps([row] * 3, indent=2)}.get(
        path.suffix, "\n".join(lines)
    )
    if isinstance(row, list) and path.suffix in (".txt", ""):
        return  # nothing tells lists on lines from an array in such a file
    path.write_text(("\ufeff" if "bom" in form else "") + text)
    assert is_records(path)
    found = [record for _, record in read_records(path)]
    assert found == [Conversation(want, {})] * 3


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"question": 1, "answer": 2}, 'keys: got question, answer, expected rows with "messages"; .* or "text"'),
        ({}, "keys: got none"),
        (5, "JSON: got a value of type int"),
        ({"text": 5}, "text: got a value of type int"),
        ({"messages": []}, "messages: got none"),
        ({"messages": "hi"}, "messages: got a value of type str"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "from: got 'narrator', expected one of system, user"),
        ({"messages": MESSAGES, "system": "x", "functions": [{}]}, "functions: got .*, expected a row without it"),
        ({"messages": [SYSTEM, *MESSAGES], "system": "x"}, "system: got one beside messages that have one"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "keys: got prompt, chosen, rejected"),
        ({"messages": MESSAGES, "images": ["a.png"]}, "images: got"),
        ({"messages": MESSAGES, "tools": "[}"}, "JSON: got"),
        ({"messages": MESSAGES, "tools": {"a": 1}}, "tools: got a value of type dict, expected a list"),
        ({"instruction": "a", "output": "b", "history": "c"}, "history: got 'c', expected pairs"),
    ],
)
@pytest.mark.parametrize("array", [False, True])
def test_other_rows_are_refused_where_they_stand(row: Any, says: str, array: bool, tmp_path: Path) -> None:
    path, rows = tmp_path / "rows.json", [{"text": "good"}, row]
    path.write_text(json.dumps(rows, indent=1) if array else "\n".join(map(json.dumps, rows)))
    with pytest.raises(LlamaError, match=says) as caught:
        list(read_records(path))
    assert caught.value.file == f"{path}{', row ' if array else ':'}2"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[{"text": "a"},\n {"text": "b"]', ":2: JSON: got Expecting ',' delimiter at column 14"),
        ('[{"text": "a"}\n {"text": "b"}]', ":2: JSON: got '{' in place of ',' at column 2"),
        ('[{"text": "a"},\n]', ":2: JSON: got Expecting value at column 1"),
        ('[{"text": "a"}', ":1: JSON: got an array that does not end at column 15"),
        ('[{"text": "a"}]\n[]', ":2: JSON: got more after the array at column 1"),
        ('[{"text": "\\ud800"}]', "JSON: got bytes that are not UTF-8"),
        ('[{"text": "a", "text": "b"}]', ", row 1: text: got 2 values"),
        ('{"text": "a"}\n{"text: "b"}', ":2: JSON: got Expecting ':' delimiter at column 10"),
    ],
)
def test_broken_json_names_its_place_once(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(LlamaError) as caught:
        list(read_records(path))
    assert says in str(caught.value) and str(caught.value).count(" at ") <= 1


@pytest.mark.parametrize(
    "text", ["{x: 1}\n", "[Chapter 1]\nIt was", '{"a": 1} and more', "{{ template }}", "[[1]]", ""]
)
def test_other_texts_are_texts(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text)
    assert not is_records(tmp_path / "a.txt")


def test_an_array_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lovely_llama_tools.data.reading.BLOCK", 37)
    rows = [{"text": f"{'é]},{[' * (i % 5)}{i}"} for i in range(50)]
    for indent in (None, 2):
        (tmp_path / "a.json").write_text(json.dumps(rows, indent=indent, ensure_ascii=False))
        assert [record for _, record in read_records(tmp_path / "a.json")] == [row["text"] for row in rows]


@pytest.mark.parametrize("name", ["a.csv", "a.TSV", "a.parquet", "table"])
def test_tables_are_refused_with_how_to_convert_them(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"PAR1" if name == "table" else b"prompt,answer\n1,2\n")
    with pytest.raises(
        LlamaError, match=r"path: got a table \(\..*, expected JSON lines: pandas\.read_\w+\(.*lines=True"
    ):
        prepare([str(tmp_path / name)], tmp_path / "data", seq=8)


def test_what_a_folder_holds_and_files_without_rows(tmp_path: Path) -> None:
    """Arrays, and rows under their names; settings in JSON are passed over. What is refused leaves no tokens behind."""
    tokenizer, _ = with_template(tmp_path / "model", QWEN)
    (folder := tmp_path / "rows").mkdir()
    for name, content in (
        ("a.json", [{"text": "b" * 9}]),
        ("config.json", {"text": "c" * 9}),
        ("d.NDJSON", {"text": "d"}),
    ):
        (folder / name).write_text(json.dumps(content))
    corpus = prepare([str(folder)], tmp_path / "data", tokenizer=tokenizer, seq=40, fraction=0.0, pack=True)
    assert corpus.says[0].startswith("data: 2 texts, ")
    (tmp_path / "none.json").write_text("[]")
    with pytest.raises(LlamaError, match="rows: got none, expected texts or conversations"):
        prepare([str(tmp_path / "none.json")], tmp_path / "empty", tokenizer=tokenizer, seq=8)
    assert not [*(tmp_path / "empty").iterdir()]


# ---- What is learned -------------------------------------------------------------------------------------------------


def prepared(folder: Path, rows: list[Any], template: str, **how: Any) -> Corpus:
    tokenizer, _ = with_template(folder, template)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    usual: dict[str, Any] = {"tokenizer": tokenizer, "seq": 100, "fraction": 0.0, "replace": True}
    return prepare([str(folder / "rows.jsonl")], folder / "data", **{**usual, **how})


def targets(corpus: Corpus) -> list[str]:
    """What is learned of each row."""
    assert corpus.tokenizer
    names = {token: name.encode() for name, token in corpus.tokenizer.specials.items()}
    return [
        b"".join(names.get(i) or corpus.tokenizer.pieces[i] for i in row[row >= 0].tolist()).decode()
        for batch in corpus.train.sweep(1)
        for row in np.asarray(batch.targets)
    ]


def test_rows_that_cannot_be_learned_are_left_out_and_named(tmp_path: Path) -> None:
    """They stop no run, unless no other is there."""
    gone = QWEN.replace("in messages %}", "in messages if m.content != 'gone' %}", 1)
    rows = [MESSAGES, [MESSAGES[0], {"role": "assistant", "content": "gone"}], MESSAGES[:1], MESSAGES]
    corpus = prepared(tmp_path, rows, gone)
    assert targets(corpus) == [f"{SAID}<|im_end|>"] * 2
    said, note = corpus.says
    assert said.startswith("data: 2 rows, ") and said.endswith(" of them to learn from")
    assert note.startswith(
        f"note: 2 rows left out: {tmp_path / 'rows.jsonl'}:2: chat_template: got a prompt for message 2"
    )
    assert f"{tmp_path / 'rows.jsonl'}:3: messages: got 1 of the roles 'user', none of an assistant" in note
    with pytest.raises(LlamaError, match=r"rows\.jsonl:1: messages: got 1 of the roles"):
        prepared(tmp_path, [MESSAGES[:1]] * 2, gone)


def test_a_row_that_a_template_fails_on_stops_no_other(tmp_path: Path) -> None:
    """By an error of its own, or by more time than it is given."""
    loops = "{% for i in range(99999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"
    each = "{%- for m in messages %}"
    odd_or_slow = f"{{% set x = 1 // (m.content != 'odd') %}}{{% if 'slow' in m.content %}}{loops}{{% endif %}}"
    template = QWEN.replace(each, each + odd_or_slow, 1)
    odd, late = ([{**MESSAGES[0], "content": text}, MESSAGES[1]] for text in ("odd", "slow"))
    corpus = prepared(tmp_path, [MESSAGES, odd, MESSAGES, late], template)
    assert targets(corpus) == [f"{SAID}<|im_end|>"] * 2
    assert "2 rows left out: " in corpus.says[1] and "jsonl:2: chat_template: got ZeroDivisionError" in corpus.says[1]
    assert "jsonl:4: chat_template: got one that takes more than 2 s" in corpus.says[1]


@pytest.mark.parametrize("content", ["return", "    return", "\n\nHere.", "  two", "\n", "\t1. tea", "ends \n"])
def test_an_answer_with_spaces_around_it_is_learned(content: str, tmp_path: Path) -> None:
    (found,) = targets(prepared(tmp_path, [[MESSAGES[0], {"role": "assistant", "content": content}]], QWEN))
    assert found.removesuffix("<|im_end|>").endswith(content) and found.endswith("<|im_end|>")
    assert found.removesuffix(f"{content}<|im_end|>") in ("", "\n")  # in one token with what follows


def test_a_weight_of_0_is_not_learned(tmp_path: Path) -> None:
    first: Any = [MESSAGES[0], {**MESSAGES[1], "content": "Hm.", "weight": 0}]
    assert targets(prepared(tmp_path, [[*first, *MESSAGES]], QWEN)) == [f"{SAID}<|im_end|>"]
    for wrong, says in (
        ([first], "weight: got 0 for every answer"),
        ([[MESSAGES[0], {**MESSAGES[1], "weight": 2}]], "got 2"),
    ):
        with pytest.raises(LlamaError, match=says):
            prepared(tmp_path, wrong, QWEN)


def test_tools_go_to_the_template(tmp_path: Path) -> None:
    """Beside the messages, in a text too; a call is learned as an answer is."""
    template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content or '' }}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer, reference = with_template(tmp_path, template)
    messages: Any = [MESSAGES[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}, *MESSAGES]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
    for given in (tools, json.dumps(tools)):
        (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages, "tools": given}))
        ((_, record),) = read_records(tmp_path / "a.jsonl")
        assert isinstance(record, Conversation)
        (found,) = Encoder(tokenizer).encode([record])
        assert isinstance(found, Learned)
        assert found.ids == ids_of(reference, messages, tools=tools)
        assert found.answers == learned_by_tools(reference, messages, tools, tokenizer)


def test_documents_and_variables_go_to_the_template(tmp_path: Path) -> None:
    template = "{{ documents | tojson }}{{ style }}" + QWEN
    tokenizer, reference = with_template(tmp_path, template)
    given: Any = {"documents": [{"title": "é"}], "chat_template_kwargs": {"style": "brief"}}
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": MESSAGES, **given}))
    ((_, record),) = read_records(tmp_path / "a.jsonl")
    assert isinstance(record, Conversation)
    (found,) = Encoder(tokenizer).encode([record])
    assert isinstance(found, Learned)
    assert found.ids == ids_of(reference, MESSAGES, documents=given["documents"], style="brief")


def learned_by_tools(reference: Any, messages: list[Any], tools: list[Any], tokenizer: Tokenizer) -> list[int]:
    ids = ids_of(reference, messages, tools=tools)
    mask, stop = [0] * len(ids), tokenizer.specials["<|im_end|>"]
    for i in (1, 3):
        begin = len(ids_of(reference, messages[:i], tools=tools, add_generation_prompt=True))
        end = ids.index(stop, begin) + 1
        mask[begin:end] = [1] * (end - begin)
    return mask


def test_a_template_that_ends_no_turn_is_told(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    corpus = prepared(tmp_path, [MESSAGES * 2], template)
    assert targets(corpus) == [SAID * 2]
    assert corpus.says[1].startswith("note: no token to stop at follows an answer in 1 conversation: ")


def test_names_of_special_tokens_in_texts(tmp_path: Path) -> None:
    """Letters, and a note says so; with `special` the tokens, and the end of a turn then ends no document."""
    tokenizer, reference = with_template(tmp_path, QWEN)
    text = reference.apply_chat_template(MESSAGES, tokenize=False)
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    tokens = reference(text, add_special_tokens=False).input_ids
    for name in ("a.txt", "a.jsonl"):
        plain, named = (
            prepare(
                [str(tmp_path / name)], tmp_path / f"{name}{special}", tokenizer=tokenizer, seq=100, fraction=0.0,
                pack=True, special=special,
            )
            for special in (False, True)
        )  # fmt: skip
        ids, learned = named.train.first()
        assert ids == [*tokens, tokenizer.eos] and learned == [False, *[True] * len(tokens)]
        assert {tokenizer.specials["<|im_start|>"]}.isdisjoint(plain.train.first()[0])
        note = "<|im_start|> in texts is read as letters; with --special-tokens, as the token of that name"
        assert plain.says[1:] == [f"note: {note}"] and not named.says[1:]
