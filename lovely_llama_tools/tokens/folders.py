"""The tokenizer of a folder: read from whichever files it holds, and written for other programs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lovely_llama import LlamaError, check, is_number

from ..strict_json import read_json, to_json
from .base import Tokenizer, fit, note, small_file, with_ends
from .characters import Characters, read_characters, write_characters
from .converting import describe_proto
from .pieces import (
    CONTROL,
    UNUSED,
    USER_DEFINED,
    Piece,
    SentencePiece,
    bin_tokenizer,
    read_proto,
    sentencepiece_tokenizer,
    without_prefix,
    write_proto,
)
from .pipelines import GAP, Pipeline, added_token, as_list, as_object, pipeline_tokenizer, token_names, without_gap
from .ranks import LLAMA3_SPECIALS, is_ranks, rank_tokenizer
from .templates import check_template

CONFIG = "tokenizer_config.json"
SPECIALS = (CONFIG, "special_tokens_map.json", "added_tokens.json")  # files that name special tokens
NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
# What else of tokenizer_config.json is kept: it changes no ids here, but does so in other programs.
SETTINGS = (
    *NAMES[2:], "additional_special_tokens", "extra_special_tokens", "padding_side", "truncation_side",
    "model_max_length", "add_eos_token", "clean_up_tokenization_spaces",
)  # fmt: skip
UNLIMITED = 10**18  # from here on a model_max_length says nothing: transformers writes 1e30
SOURCES = ("characters.json", "tokenizer.json", "tokenizer.model", "tokenizer.bin")  # the first that is there
TOKENIZER_FILES = (
    *SOURCES, CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "additional_chat_templates",
)  # fmt: skip


def folder_tokenizer(folder: str | Path, vocab: int | None = None) -> Tokenizer | None:
    """The tokenizer whose files are in a folder, for a model of this vocabulary; None where there are none.

    A characters.json, beside which a tokenizer.json has the same ids, comes before a tokenizer.json, a tokenizer.model
    (SentencePiece's, or a list of ranks) and llama2.c's tokenizer.bin. tokenizer_config.json and
    special_tokens_map.json name BOS, EOS and more special tokens, as transformers 4 and 5 write them; chat templates
    are there, or in chat_template.jinja.
    """
    folder = Path(folder)
    for name in SOURCES:
        path = folder / name
        data = small_file(path, folder)
        if data is None:
            continue
        config = read_config(folder)
        tokenizer = read_source(data, path, config, vocab)
        templates = read_templates(folder, config)
        template = templates.pop("default", None)
        settings = {**tokenizer.settings, **read_settings(config, folder / CONFIG)}
        tokenizer = tokenizer._replace(template=template, templates=templates, settings=settings)
        return tokenizer if vocab is None else fit(tokenizer, vocab, path)
    return None


def read_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, with what only the older special_tokens_map.json and added_tokens.json say."""
    found = {name: small_file(folder / name, folder) for name in SPECIALS}
    config, older, added = (read_json(data, folder / name) if data else {} for name, data in found.items())
    named: dict[str, Any] = config.get("added_tokens_decoder") or {}
    check("added_tokens_decoder", type(named).__name__, type(named) is dict, "an object", folder / CONFIG)
    listed = {str(i): {"content": name, "special": False} for name, i in added.items()}
    return older | config | {"added_tokens_decoder": listed | named}


def token_text(config: Mapping[str, Any], key: str, file: object) -> str | None:
    """The name of a token, which stands alone or with its flags."""
    value = config.get(key)
    text = as_object(value).get("content") if isinstance(value, dict) else value
    check(key, repr(text), text is None or (isinstance(text, str) and bool(text)), "the name of a token", file)
    return text


def read_settings(config: Mapping[str, Any], file: object) -> dict[str, Any]:
    """What a config says of `SETTINGS`, tokens by their names alone. False is the default where it can be said."""
    found = {key: config[key] for key in SETTINGS if config.get(key) not in (None, False)}
    for key in found.keys() & {*NAMES}:
        found[key] = token_text(config, key, file)
    for key in [key for key in found if isinstance(found[key], list)]:
        found[key] = [as_object(token).get("content", token) for token in as_list(found[key])]
    if is_number(found.get("model_max_length")) and found["model_max_length"] >= UNLIMITED:
        del found["model_max_length"]
    return found


def named_tokens(config: Mapping[str, Any], file: object) -> dict[str, tuple[int | None, bool]]:
    """The tokens that a config names: the id, where it says one, and whether each is special."""
    found = dict[str, tuple[int | None, bool]]()
    for i, token in config["added_tokens_decoder"].items():
        ok = i.isascii() and i.isdecimal() and len(i) < 10
        check("added_tokens_decoder", f"{i!r}", ok, "an id", file)
        if name := token_text({"added_tokens_decoder": token}, "added_tokens_decoder", file):
            found[name] = int(i), bool(as_object(token).get("special"))
    for key in NAMES:
        if name := token_text(config, key, file):
            found[name] = found.get(name, (None, True))[0], True
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(key)
        for value in [*as_object(more).values(), *as_list(more)]:
            if name := token_text({key: value}, key, file):
                found[name] = found.get(name, (None, True))[0], True
    return found


def read_source(data: bytes, path: Path, config: Mapping[str, Any], vocab: int | None) -> Tokenizer:
    """The tokenizer of one file, with the tokens that the config names."""
    file = path.with_name(CONFIG)
    if path.name == "characters.json":
        return read_characters(data, path)
    if path.name == "tokenizer.bin":
        return bin_tokenizer(data, path, vocab)
    tokens, adds = named_tokens(config, file), config.get("add_bos_token")
    check("add_bos_token", repr(adds), adds in (None, True, False), "true or false", file)
    if path.name == "tokenizer.json":
        given = read_json(data, path)
        description = without_gap(given)
        names = {name: i for i, name in enumerate(token_names(description, path)[0])}
        more = new_tokens(tokens, names, {token["content"] for token in as_list(description.get("added_tokens"))}, file)
        if more:
            entries = [added_token(name, i, special) for name, (i, special) in more.items()]
            description["added_tokens"] = [*as_list(description.get("added_tokens")), *entries]
        description = without_gap(description)
        tokenizer = pipeline_tokenizer(description, path, data.decode() if description == given else None)
        if adds not in (None, tokenizer.adds_bos):
            does = "adds BOS" if tokenizer.adds_bos else "adds no BOS"
            note(f"{file}: add_bos_token is {to_json(adds)}, but {path.name} {does}, which counts")
        adds = tokenizer.adds_bos
    elif is_ranks(data):
        ids = {i: name for name, (i, _) in tokens.items() if i is not None}
        first = min(ids, default=0)
        listed = [ids.get(i, f"<|reserved_token_{i}|>") for i in range(first, max(ids, default=0) + 1)]
        tokenizer = rank_tokenizer(data, path, listed if ids else LLAMA3_SPECIALS)
        new_tokens(tokens, tokenizer.specials, set(), file)
        adds = tokenizer.adds_bos if adds is None else adds
    else:
        bare, legacy = config.get("add_prefix_space"), config.get("legacy")
        for name, value in {"add_prefix_space": bare, "legacy": legacy}.items():
            check(name, repr(value), value in (None, True, False), "true or false", file)
        proto = with_tokens(data, tokens, path, file)
        proto = write_proto(without_prefix(read_proto(proto, path))) if bare is False else proto
        tokenizer = sentencepiece_tokenizer(proto, path, once=legacy is False)
        adds = tokenizer.adds_bos if adds is None else adds
    ends = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos}
    for key in ends:
        if name := token_text(config, key, file):
            check(key, repr(name), name in tokenizer.specials, "a token of the vocabulary", file)
            ends[key] = tokenizer.specials.get(name)
    bos, eos = ends.values()
    return with_ends(tokenizer, bos, eos, bool(adds), file)


def new_tokens(
    tokens: Mapping[str, tuple[int | None, bool]], names: Mapping[str, int], added: set[str], file: object
) -> dict[str, tuple[int, bool]]:  # fmt: skip
    """Of the tokens that a config names, those that a tokenizer does not treat as added yet, with their ids."""
    found = dict[str, tuple[int, bool]]()
    for name, (i, special) in tokens.items():
        known = names.get(name, i)
        if known is None:  # such as a token for padding, which the model does not have
            continue
        check("added_tokens_decoder", f"{i} for {name!r}", i in (None, known), f"{known}, as elsewhere", file)
        if name not in added:
            found[name] = known, special
    return found


def with_tokens(
    proto: bytes, tokens: Mapping[str, tuple[int | None, bool]], path: Path, file: object
) -> bytes:  # fmt: skip
    """A SentencePiece model with the tokens that a config names."""
    vocabulary = read_proto(proto, path)
    names = {piece.text: i for i, piece in enumerate(vocabulary.pieces)}
    apart = {piece.text for piece in vocabulary.pieces if piece.kind != 1}
    if not (more := new_tokens(tokens, names, apart, file)):
        return proto
    pieces = dict(enumerate(vocabulary.pieces))
    for name, (i, special) in more.items():
        pieces[i] = Piece(name, 0.0, CONTROL if special else USER_DEFINED)
    last = max(pieces)
    check("added_tokens_decoder", f"the id {last}", last < len(pieces) + GAP, f"ids soon after {len(names)}", file)
    filled = [pieces.get(i, Piece(f"[PAD{i}]", 0.0, UNUSED)) for i in range(last + 1)]
    return write_proto(vocabulary._replace(pieces=filled))


def read_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates by name. One file, or files in a folder, come before those in the config."""
    said: Any = config.get("chat_template")
    listed = [as_object(entry) for entry in as_list(said)]
    right = all({*entry} == {"name", "template"} for entry in listed)
    check("chat_template", "other entries", right, "a name and a template each", folder / CONFIG)
    found = {str(entry["name"]): entry["template"] for entry in listed}
    if said is not None and not isinstance(said, list):
        found = {"default": said}
    where = dict.fromkeys(found, folder / CONFIG)
    more = folder / "additional_chat_templates"
    files = {path.stem: path for path in sorted(more.glob("*.jinja"))} if more.is_dir() else {}
    for name, path in {"default": folder / "chat_template.jinja", **files}.items():
        if (data := small_file(path, folder)) is not None:
            found[name], where[name] = data.decode("utf-8", "surrogateescape"), path
    for name, template in found.items():
        check("chat_template", type(template).__name__, isinstance(template, str), "a text", where[name])
        check_template(template, "chat_template", where[name])
    return found


# ---- Writing ---------------------------------------------------------------------------------------------------------


def tokenizer_files(tokenizer: Tokenizer, file: object = "tokenizer") -> dict[str, bytes]:
    """The files, by name, that a folder needs for `folder_tokenizer` and transformers' AutoTokenizer alike."""
    encode, names = tokenizer.encode, {i: name for name, i in tokenizer.specials.items()}
    for key, i in (("bos_token", tokenizer.bos), ("eos_token", tokenizer.eos)):
        check(key, f"the id {i}", i is None or i in names, "a special token", file)
    if isinstance(encode, Characters):
        files = write_characters(encode)
    elif isinstance(encode, Pipeline):
        files = {"tokenizer.json": write_description(encode.description(), tokenizer, names)}
    elif isinstance(encode, SentencePiece):
        files = {"tokenizer.model": encode.proto}
        if not encode.once or not tokenizer.prefix:  # no tokenizer.json puts a space before the first part alone
            description = describe_proto(read_proto(encode.proto, file), file)
            files["tokenizer.json"] = write_description(description, tokenizer, names)
    else:
        raise LlamaError(file, "tokenizer", f"a {type(encode).__name__}", "one that this library has made")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": tokenizer.adds_bos,
    }
    config |= {"legacy": False} if isinstance(encode, SentencePiece) and encode.once else {}
    config |= {key: value for key, value in tokenizer.settings.items() if key in SETTINGS}
    for key, i in (("bos_token", tokenizer.bos), ("eos_token", tokenizer.eos)):
        config |= {} if i is None else {key: names[i]}
    if tokenizer.templates:
        every = ({} if tokenizer.template is None else {"default": tokenizer.template}) | {**tokenizer.templates}
        config["chat_template"] = [{"name": name, "template": template} for name, template in every.items()]
    elif tokenizer.template is not None:
        config["chat_template"] = tokenizer.template
    return files | {CONFIG: to_json(config, ensure_ascii=False, indent=2).encode()}


def write_description(description: dict[str, Any], tokenizer: Tokenizer, names: Mapping[int, str]) -> bytes:
    """A tokenizer.json that puts BOS before a text where the tokenizer does."""
    if tokenizer.bos is not None and tokenizer.adds_bos:
        name = names[tokenizer.bos]
        single = [{"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        description["post_processor"] = {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {name: {"id": name, "ids": [tokenizer.bos], "tokens": [name]}},
        }
    return to_json(description, ensure_ascii=False).encode()
