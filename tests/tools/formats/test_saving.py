"""Saving: what may be replaced and what goes beside, a failure in the last step, and reading back what was written."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import CHATML, TINY, random_params, tokenizer_of, write_sentencepiece, write_talker

from lovely_llama import LlamaError, Sampling
from lovely_llama_tools import Model, Tokenizer, folder_tokenizer, load, save
from lovely_llama_tools.formats import files
from lovely_llama_tools.formats.files import WRITERS
from lovely_llama_tools.tokens.characters import characters_tokenizer
from lovely_llama_tools.tokens.pipelines import added_token, pipeline_tokenizer

FORMATS = [*WRITERS]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A tiny model whose tokenizer says all that a tokenizer can say."""
    tokenizer = tokenizer_of(load(write_talker(tmp_path_factory.mktemp("talker") / "a.gguf")))
    settings = {"pad_token": "<|endoftext|>", "unk_token": "<|im_start|>", "padding_side": "left"}
    return Model(TINY, random_params(TINY), tokenizer._replace(
        stops=frozenset({0, 2, 7, 8, 9}), sampling=Sampling(temperature=0.5), settings=settings,
        unstated=frozenset(Sampling._fields) - {"temperature"},
    ))  # fmt: skip


def tree(folder: Path) -> dict[str, bytes | str]:
    """Every entry below a folder: the contents of a file, or what a link points to."""
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*"))}
    return {
        name: os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else "another"
        for name, path in found.items()
    }


def refused(model: Model, path: Path | str, says: str, folder: Path, **options: Any) -> LlamaError:
    """A save is refused, and nothing has changed in a folder."""
    before = tree(folder)
    with pytest.raises(LlamaError, match=says) as caught:
        save(model, path, **options)
    assert tree(folder) == before
    return caught.value


# ---- What may be replaced --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["README.md", "LICENSE", ".gitattributes", "loss.png", "images/a.svg", "USE_POLICY.md"]
)
def test_a_folder_with_a_checkpoint_and_what_describes_it_is_replaced(name: str, model: Model, tmp_path: Path) -> None:
    path = tmp_path / "model"
    save(model, path)
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_text("old")
    save(model, path, force=True)
    assert not (path / name).exists() and [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize(
    "name",
    ["notes.txt", "train.py", "optimizer.safetensors", "state.json", "other.gguf", "photos/me.jpg", "src/config.json"],
)
def test_a_folder_with_anything_else_is_not(name: str, model: Model, tmp_path: Path) -> None:
    path = tmp_path / "model"
    save(model, path)
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_text("{}")
    refused(model, path, f": path: got a folder with {name}", tmp_path, force=True)


@pytest.mark.parametrize("kept", [("config.json", "README.md"), ("logo.png",), ("tokenizer.json", "LICENSE")])
def test_a_folder_that_no_reader_takes_for_a_checkpoint_is_not(
    kept: tuple[str, ...], model: Model, tmp_path: Path
) -> None:
    (tmp_path / "site").mkdir()
    for name in kept:
        (tmp_path / "site" / name).write_text("{}")
    refused(model, tmp_path / "site", ": path: got a folder that is no checkpoint", tmp_path, force=True)


def test_files_and_folders_replace_each_other(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "model"
    for to in ("gguf", "hf", "llama2c-v0", "hf", "gguf"):
        save(model._replace(tokenizer=None), path, to, force=True)
        assert path.is_dir() == (to == "hf") and load(path).config == TINY
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    "place", [".", "./", "..", "sub/..", "../here", "link", "nowhere", "model-link", "pipe", "{}", "", "/"]
)
def test_places_that_cannot_be_meant_are_refused(
    place: str, force: bool, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The current folder, one above it, links, and what is neither a file nor a folder."""
    here = tmp_path / "here"
    save(model, here)  # the current folder is a checkpoint, which could be replaced elsewhere
    save(model, tmp_path / "model")
    (here / "sub").mkdir()
    for name, to in {"link": tmp_path / "model", "nowhere": "none", "model-link": here / "config.json"}.items():
        (here / name).symlink_to(to)
    os.mkfifo(here / "pipe")
    monkeypatch.chdir(here)
    refused(model, place.format(here), ": path: got ", tmp_path, to="hf", force=force)


# ---- Failures, and files beside --------------------------------------------------------------------------------------


def spoken(folder: Path, pieces: int) -> Tokenizer:
    """A SentencePiece tokenizer with this many pieces."""
    folder.mkdir()
    write_sentencepiece(folder / "tokenizer.model", pieces)
    tokenizer = folder_tokenizer(folder)
    assert tokenizer
    return tokenizer


def model_for(tokenizer: Tokenizer, seed: int = 0) -> Model:
    config = replace(TINY, vocab=len(tokenizer.pieces))
    return Model(config, random_params(config, seed), tokenizer)


@pytest.mark.parametrize("to", FORMATS)
def test_the_old_model_is_back_if_the_last_rename_fails(
    to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its companions too, though another tokenizer's were in their places already."""
    path, place = tmp_path / "to" / "model", Path.replace
    path.parent.mkdir()
    old, new = (model_for(spoken(tmp_path / str(pieces), pieces)) for pieces in (40, 44))
    drop = ["tokenizer"] * (to == "gguf")  # which has no place for its normaliser
    save(old, path, to, drop=drop)

    def fail(part: Path, target: Path) -> Path:
        if target == path and "part" in str(part.parent):
            raise OSError(28, "No space left on device")
        return place(part, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        refused(new, path, "No space left", path.parent, to=to, force=True, drop=drop)
    assert load(path).config.vocab == 40
    save(new, path, to, force=True, drop=drop)
    assert load(path).config.vocab == 44


@pytest.mark.parametrize("force", [False, True])
def test_a_companion_is_never_taken_from_another_model(force: bool, tmp_path: Path) -> None:
    """Neither overwritten nor hidden by a file that comes first; and a tokenizer without a model is no model's own."""
    folder = tmp_path / "to"
    one, other = (model_for(spoken(tmp_path / str(pieces), pieces)) for pieces in (40, 44))
    characters = model_for(characters_tokenizer("abcdefgh"))
    save(one, folder / "a.bin")
    for new in (other, characters):
        refused(new, folder / "b.bin", ", which a.bin reads, expected", folder, force=force)
    save(one, folder / "b.bin", "llama2c-v2", force=force)  # reads the same, and stays
    refused(other, folder / "a.bin", "which b.bin reads" if force else "--force", folder, force=force)
    (folder / "a.bin").unlink()
    (folder / "b.bin").unlink()
    refused(other, folder / "c.bin", "tokenizer.bin: path: got a path that exists", folder, force=force)
    hf = tmp_path / "hf"
    save(one, hf)
    refused(characters, hf / "d.bin", "which config.json reads", hf, force=force)
    refused(one, tmp_path / "tokenizer.bin", "File exists", tmp_path, to="llama2c-v0", force=force)


def test_a_tokenizer_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    """A model with run.c's tokenizer.bin alone keeps it alone: a tokenizer.json would come before it."""
    one = model_for(spoken(tmp_path / "spoken", 40))
    save(one, tmp_path / "to" / "a.bin")
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"):
        (tmp_path / "to" / name).unlink()
    save(load(tmp_path / "to" / "a.bin"), tmp_path / "to" / "b.bin", "llama2c-v2")
    assert {path.name for path in (tmp_path / "to").iterdir()} == {"a.bin", "b.bin", "tokenizer.bin"}


# ---- Reading back ----------------------------------------------------------------------------------------------------


def said(**fields: Any) -> Callable[[Model], Model]:
    return lambda model: model._replace(tokenizer=tokenizer_of(model)._replace(**fields))


def off_by_one_bit(model: Model) -> Model:
    return model._replace(params=model.params._replace(norm=model.params.norm.at[3].add(2**-20)))


def with_settings(**settings: Any) -> Callable[[Model], Model]:
    return lambda model: said(settings={**tokenizer_of(model).settings, **settings})(model)


FAULTS: dict[str, Callable[[Model], Model]] = {
    "ctx": lambda model: model._replace(config=replace(TINY, ctx=32)),
    "eps": lambda model: model._replace(config=replace(TINY, eps=1e-6)),
    "theta": lambda model: model._replace(config=replace(TINY, theta=2e4)),
    "norm": off_by_one_bit,
    "tokenizer": lambda model: model._replace(tokenizer=None),
    "template": said(template=None),
    "stops": said(stops=frozenset({0, 2, 8})),
    "eos_token": said(eos=0),
    "bos_token": said(bos=0),
    "add_bos_token": said(adds_bos=True),
    "sampling": said(sampling=Sampling(temperature=0.25)),
    "pad_token": with_settings(pad_token="<|im_end|>"),
    "unk_token": with_settings(unk_token="<|im_end|>"),
}


@pytest.mark.parametrize("to", ["hf", "gguf"])
@pytest.mark.parametrize("field", FAULTS)
def test_what_differs_from_the_model_is_not_published(
    field: str, to: str, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a writer gets wrong, here by being given another model."""
    writer, change = WRITERS[to], FAULTS[field]
    wrong = writer._replace(write=lambda model, path, dtype: writer.write(change(model), path, dtype))
    monkeypatch.setitem(files.WRITERS, to, wrong)
    error = refused(said(stops=frozenset({0, 2, 7}))(model), tmp_path / "model", ": got .*, expected ", tmp_path, to=to)
    assert field in error.field and error.file == str(tmp_path / "model")


def other_ids(model: Model) -> Model:
    """The same names and specials, two of which have changed places."""
    description: Any = tokenizer_of(model).encode.description()  # pyright: ignore[reportFunctionMemberAccess]
    vocab = description["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    other = pipeline_tokenizer(description, "tokenizer.json")
    return said(encode=other.encode, pieces=other.pieces)(model)


@pytest.mark.parametrize("to", FORMATS)
def test_other_ids_of_a_text_are_not_published(
    to: str, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = WRITERS[to]
    wrong = writer._replace(write=lambda model, path, dtype: writer.write(other_ids(model), path, dtype))
    monkeypatch.setitem(files.WRITERS, to, wrong)
    assert refused(model, tmp_path / "model", "or --drop ids", tmp_path, to=to).field == "ids"
    save(model, tmp_path / "model", to, drop="ids")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0"])
@pytest.mark.parametrize("large", [1.0, 1e-3])
def test_numbers_agree_within_rounding(
    dtype: str, large: float, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One number out of place in a matrix is found, whatever the others are rounded to."""
    plain = model._replace(tokenizer=None)
    embed = plain.params.embed * large
    plain = plain._replace(params=plain.params._replace(embed=embed))
    save(plain, tmp_path / "good", "gguf", dtype)
    writer, row = WRITERS["gguf"], np.asarray(embed[5])
    at = int(np.abs(row).argmax())
    moved = plain._replace(params=plain.params._replace(embed=embed.at[5, at].set(row[at] * 0.96)))
    wrong = writer._replace(write=lambda _, path, dtype: writer.write(moved, path, dtype))
    monkeypatch.setitem(files.WRITERS, "gguf", wrong)
    error = refused(
        plain, tmp_path / "bad", "got other numbers, expected the model's", tmp_path, to="gguf", dtype=dtype
    )
    assert error.field == "token_embd.weight"


# ---- What a format has no place for ----------------------------------------------------------------------------------

LEFT_OUT: Mapping[str, set[str]] = {
    "hf": set(),
    "gguf": {"stops [9]", "padding_side left"},
    "llama2c": {"stops [7, 8, 9]", "template", "temperature", "padding_side left", "pad_token <|endoftext|>"},
}


@pytest.mark.parametrize("to", FORMATS)
def test_what_a_format_has_no_place_for_is_named_in_a_line(
    to: str, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once, and only that; the rest is read back. What is dropped on purpose is not named."""
    save(model, tmp_path / "a", to)
    err, found = capsys.readouterr().err, tokenizer_of(load(tmp_path / "a"))
    named = LEFT_OUT[to.partition("-")[0]]
    assert err.count("\n") == bool(named) and all(text in err for text in named)
    assert not named or err.startswith(f"note: {tmp_path / 'a'}: no place in this format for ")
    assert "unk_token" not in err and (to != "gguf" or ("pad_token" not in err and "template" not in err))
    assert found.encode("the é", False) == tokenizer_of(model).encode("the é", False)
    if to in ("hf", "gguf"):
        assert (found.template, found.pad) == (CHATML, 0)
        more = {"top_k": None, "top_p": 0.9} if to == "hf" else {}  # which transformers would not have otherwise
        assert found.stated == {"temperature": 0.5} | more and found.settings["unk_token"] == "<|im_start|>"
    names = ["stops,template", "sampling", "padding_side", "pad_token", "unk_token"]
    save(model, tmp_path / "b" / "a", to, drop=names)
    assert not capsys.readouterr().err
    bare = tokenizer_of(load(tmp_path / "b" / "a"))
    assert (bare.stops, bare.template, bare.sampling, bare.settings) == ({0, 2}, None, None, {})


def test_stated_sampling_goes_through_a_gguf(model: Model, tmp_path: Path) -> None:
    """Where transformers has another default than what is used here, this is stated."""
    save(model, tmp_path / "a.gguf", drop="padding_side,stops")
    save(load(tmp_path / "a.gguf"), tmp_path / "b")
    fields = json.loads((tmp_path / "b" / "generation_config.json").read_text())
    assert {name: fields.get(name) for name in ("do_sample", *Sampling._fields)} == {
        "do_sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 0, "min_p": None, "repetition_penalty": None,
    }  # fmt: skip


def metaspace() -> Tokenizer:
    """Like Llama 2's newer tokenizer.json: no space is put before a text that begins with one."""
    vocab = {text: i for i, text in enumerate(["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "▁b", "▁▁"])}
    return pipeline_tokenizer({
        "added_tokens": [added_token(text, i, True) for text, i in [*vocab.items()][:3]],
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": False, "vocab": vocab,
                  "merges": ["▁ a", "▁ b", "▁ ▁"]},
    }, "tokenizer.json")  # fmt: skip


def test_where_ids_would_change_it_is_refused_unless_dropped(tmp_path: Path) -> None:
    spaced, characters = model_for(metaspace()), model_for(characters_tokenizer("abcdefgh"))
    assert refused(spaced, tmp_path / "a.gguf", "or --drop ids$", tmp_path).file == str(tmp_path / "a.gguf")
    save(spaced, tmp_path / "a.gguf", drop="ids")
    assert tokenizer_of(load(tmp_path / "a.gguf")).encode("a b", False) == metaspace().encode("a b", False)
    error = refused(characters, tmp_path / "b.gguf", "or --drop tokenizer$", tmp_path)
    assert error.file == str(tmp_path / "b.gguf")
    save(characters, tmp_path / "b.gguf", drop=["tokenizer"])
    assert load(tmp_path / "b.gguf").tokenizer is None
    for names in ("warmth", ["template", ""], "ids,theta"):
        assert refused(spaced, tmp_path / "c.gguf", "drop: got ", tmp_path, drop=names).field == "drop"
