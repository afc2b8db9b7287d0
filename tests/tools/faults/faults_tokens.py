"""Cases E: tokenizers, and the files they come in."""

import base64
import json
import os
import struct
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import tokenizers
from builders import write_talker
from faults import Accepted, Act, Case, TooLong, Unlike, Variant, World, guarded, refused, unchecked
from sentencepiece import SentencePieceProcessor

from lovely_llama_tools.formats.files import load
from lovely_llama_tools.inference.chat import chat_prompt
from lovely_llama_tools.inference.generate import generate
from lovely_llama_tools.tokens import Tokenizer, folder_tokenizer, tokenizer_bin
from lovely_llama_tools.tokens.base import with_ends
from lovely_llama_tools.tokens.characters import characters_tokenizer
from lovely_llama_tools.tokens.training import train_bpe, train_sentencepiece

TEXTS = ["the sky is blue", "the sea is blue too", "why is the sky so blue", "so it goes"]
PLACE = "lovely_llama_tools.tokens"
BARE = {f"{PLACE}.base:contained": "lambda *a: __import__('contextlib').nullcontext()"}
SERVED = {f"{PLACE}.base:STEAD": "{}"}
LENIENT = {".strict_json:read_json": "lambda data, file: json.loads(data)"}


@cache
def json_source() -> str:
    """A tokenizer.json."""
    encode: Any = train_bpe(TEXTS, 280).encode
    return encode.source


@cache
def proto() -> bytes:
    """A SentencePiece model."""
    encode: Any = train_sentencepiece(TEXTS, 285).encode
    return encode.proto


def ranks(*more: tuple[bytes, int]) -> bytes:
    """A list of ranks: all bytes, and some pairs."""
    tokens = [*((bytes([b]), b) for b in range(256)), (b"th", 256), (b"the", 257), *more]
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in tokens)


@cache
def binary() -> bytes:
    """llama2.c's tokenizer.bin."""
    return tokenizer_bin(train_sentencepiece(TEXTS, 285))


def described(change: Callable[[dict[str, Any]], object]) -> bytes:
    """The tokenizer.json, changed."""
    found = json.loads(json_source())
    change(found)
    return json.dumps(found).encode()


def read(world: World, vocab: int | None = None, **files: bytes | str | Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer of a folder with these files, by their names without dots: json, model, bin, config, map."""
    names = {
        "json": "tokenizer.json", "model": "tokenizer.model", "bin": "tokenizer.bin", "chars": "characters.json",
        "config": "tokenizer_config.json", "map": "special_tokens_map.json", "jinja": "chat_template.jinja",
    }  # fmt: skip
    for key, content in files.items():
        data = json.dumps(content) if isinstance(content, Mapping) else content
        (world.folder / names[key]).write_bytes(data.encode() if isinstance(data, str) else data)
    return folder_tokenizer(world.folder, vocab)


def bad(field: str, says: str = "", removed: Mapping[str, str] | None = None, end: type[BaseException] = Accepted,
        vocab: int | None = None, **files: Any) -> Variant:  # fmt: skip
    """A folder with these files is refused for this field."""
    return refused(lambda world: read(world, vocab, **files), field, says, removed, end)


def good(world: World) -> None:
    """Each kind of file gives the ids of the library that it is for."""
    text = "the sky <s> is  blue é"
    sources: Any = (("bin", binary()), ("model", ranks()), ("model", proto()), ("json", json_source()))
    tokenizer = None
    for kind, data in sources:
        tokenizer = read(world, **{kind: data})
        assert tokenizer and tokenizer.decode(tokenizer.encode(text, False)) == text
    reference = tokenizers.Tokenizer.from_str(json_source())
    assert tokenizer and tokenizer.encode(text, False) == reference.encode(text, add_special_tokens=False).ids


# ---- E1: other files -------------------------------------------------------------------------------------------------

HTML = b"<!DOCTYPE html><html><body>Not found</body></html>"
LIBRARY = BARE | {f"{PLACE}.pieces:read_proto": "lambda *a: Vocabulary([Piece('<unk>', 0.0, UNKNOWN)], b'')"}


class Untold(Exception):
    """What is raised where an error of a library is not said in this one's words."""


UNTOLD = {"lovely_llama:LlamaError": "__import__('faults_tokens').Untold"}


def link(world: World, target: str) -> Tokenizer | None:
    (world.folder / "tokenizer.model").symlink_to(target)
    return folder_tokenizer(world.folder)


def no_tokenizer(world: World) -> None:
    """A model without one takes ids; a text says what is missing."""
    generate(world.model._replace(tokenizer=None), "abc")


# ---- E2, E3: the ids and the model's vocabulary ----------------------------------------------------------------------


def hole(found: dict[str, Any]) -> None:
    found["model"]["vocab"]["zzz"] = 99999


def same_id(found: dict[str, Any]) -> None:
    found["model"]["vocab"]["zzz"] = 5


def negative(found: dict[str, Any]) -> None:
    found["model"]["vocab"]["zzz"] = -1


def moved(found: dict[str, Any]) -> None:
    """A special token with another id than in the vocabulary."""
    found["added_tokens"][0]["id"] = 300


def pieces_twice() -> bytes:
    """A SentencePiece model with a piece twice."""
    entry = proto()[: proto()[1] + 2]
    return entry + proto()


def beyond(world: World) -> None:
    """The ids that only the model has add nothing to a text, and none is an error."""
    tokenizer = read(world, 310, json=json_source())
    assert tokenizer and len(tokenizer.pieces) == 310
    assert tokenizer.decode([*tokenizer.encode("sky", False), 280, 309]) == "sky"


# ---- E4: tokenizer.bin -----------------------------------------------------------------------------------------------


def patched(offset: int, data: bytes) -> bytes:
    return binary()[:offset] + data + binary()[offset + len(data) :]


def added(i: int, name: str = "<new>", special: bool = True) -> dict[str, Any]:
    """A config that names a token."""
    return {"added_tokens_decoder": {str(i): {"content": name, "special": special}}}


FIRST = 4  # where the first piece begins: its score, its length


# ---- E5: what makes libraries panic ----------------------------------------------------------------------------------

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
RENDERING = "lovely_llama_tools.tokens.rendering"
HERE = {".tokens.templates:render": f"lambda *a: __import__('{RENDERING}', fromlist='x').compiled(a[0]).render(a[1])"}
CATASTROPHE = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}


def with_regex(found: dict[str, Any]) -> None:
    found["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [CATASTROPHE, found["pre_tokenizer"]]}


def panics(found: dict[str, Any]) -> None:
    found["model"]["continuing_subword_prefix"] = "abcdefgh"


def no_merge(found: dict[str, Any]) -> None:
    found["model"]["merges"].append(["the", "zzz"])


def no_regex(found: dict[str, Any]) -> None:
    found["pre_tokenizer"] = CATASTROPHE | {"pattern": {"Regex": "(a"}}


def encode(world: World, text: str, **files: Any) -> list[int]:
    tokenizer = read(world, **files)
    assert tokenizer
    return tokenizer.encode(text, False)


def quiet(act: Act) -> Act:
    """Nothing is written to file descriptor 2, where panics go past Python."""

    def variant(world: World) -> object:
        kept, path = os.dup(2), world.folder / "stderr"
        with path.open("wb") as file:
            os.dup2(file.fileno(), 2)
            try:
                return act(world)
            finally:
                os.dup2(kept, 2)
                os.close(kept)
                said = path.read_bytes()
                if said:
                    raise Unlike(said[:200].decode("utf-8", "replace"))

    return variant


def word_piece(found: dict[str, Any]) -> None:
    found["model"]["type"] = "WordPiece"


def endless(world: World) -> None:
    chat_prompt(world.model.tokenizer._replace(template=ENDLESS), [{"role": "user", "content": "a"}])


def catastrophe(world: World) -> None:
    encode(world, "a" * 40 + "c", json=described(with_regex))


def without_stderr(world: World) -> None:
    """File descriptor 2 may be closed; it then is afterwards, too."""
    kept = os.dup(2)
    os.close(2)
    try:
        catastrophe(world)
    finally:
        closed = True
        try:
            os.fstat(2)
            closed = False
        except OSError:
            pass
        os.dup2(kept, 2)
        os.close(kept)
        assert closed


# ---- E6: BOS and EOS -------------------------------------------------------------------------------------------------


NONE, FLAGGED = {"bos_token": "<bos>"}, {"eos_token": {"content": "<eos>"}}
ADDED = {"add_bos_token": True, "added_tokens_decoder": {"258": {"content": "<x>", "special": True}}}


def ends(bos: int | None, eos: int | None) -> Act:
    return lambda world: with_ends(characters_tokenizer("abc"), bos, eos, False, "file")


# ---- E7: names of special tokens -------------------------------------------------------------------------------------

NAMES = {"bin": "<s>", "model": "<|eot_id|>", "json": "[BOS]"}
FORGET = {
    f"{PLACE}.pipelines:Pipeline.__call__": "lambda self, text, special: original(self, text, True)",
    f"{PLACE}.pieces:SentencePiece.__call__": "lambda self, text, special: original(self, text, True)",
}
FORGED = {".inference.chat:segments": "lambda text, specials: iter([(text, None)])"}
DATA: dict[str, Callable[[], Any]] = {"bin": binary, "model": ranks, "json": json_source}


def plain(kind: str) -> Act:
    """The name of a special token in a text is text; asked for, it is that token."""

    def act(world: World) -> None:
        tokenizer, text = read(world, **{kind: DATA[kind]()}), f"a {NAMES[kind]} b"
        assert tokenizer
        token = tokenizer.specials[NAMES[kind]]
        assert token in tokenizer.encode(text, True)
        assert token not in tokenizer.encode(text, False) and tokenizer.decode(tokenizer.encode(text, False)) == text

    return act


def forged(kind: str) -> Act:
    """A message that holds the name of a special token ends no turn."""

    def act(world: World) -> None:
        template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
        config = {"eos_token": "[EOS]"} if kind == "json" else {}
        tokenizer = read(world, jinja=template, config=config, **{kind: DATA[kind]()})
        assert tokenizer
        tokens = chat_prompt(tokenizer, [{"role": "user", "content": f"a {NAMES[kind]} b"}])
        wanted = [tokenizer.bos, tokenizer.eos]
        assert [token for token in tokens if token in tokenizer.specials.values()] == wanted

    return act


# ---- E8, E9: characters ----------------------------------------------------------------------------------------------

ODD = ("\x00", "\n\n\n", "  a   b ", "😀", "e\u0301", "\ufeff", "\u00a0", "\u200b", "\ufb01", "１")


def as_sentencepiece(world: World) -> None:
    """What llama2.c's file says is encoded as SentencePiece encodes with the model that the file was made from."""
    tokenizer, reference = read(world, bin=binary()), SentencePieceProcessor(model_proto=proto())
    assert tokenizer and all(tokenizer.encode(text, False) == reference.encode(text) for text in ODD)


def as_tokenizers(world: World) -> None:
    tokenizer, reference = read(world, json=json_source()), tokenizers.Tokenizer.from_str(json_source())
    assert tokenizer
    assert all(tokenizer.encode(text, False) == reference.encode(text, add_special_tokens=False).ids for text in ODD)


def halves(world: World) -> None:
    """A model that says halves of characters: what is streamed is what decoding all at once gives."""
    model = load(write_talker(world.folder / "halves.gguf", "Ã©"))
    generation = generate(model, "abc", max_new=20)
    text = "".join(generation)
    assert model.tokenizer and text == model.tokenizer.decode(generation.tokens) and "é" in text


SQUEEZED = "lambda *a: original(*a).replace(b' \\x00', b' \\x01')"  # spaces that follow spaces are removed
TRIMMED = "lambda self, text, special: original(self, text.strip(), special)"


def no_tab(found: dict[str, Any]) -> None:
    """A vocabulary that lacks a byte, and has no token for what is unknown."""
    found["model"] |= {"unk_token": None}
    vocab: dict[str, int] = found["model"]["vocab"]
    found["model"]["vocab"] = {"ẑ" if name == "ĉ" else name: i for name, i in vocab.items()}


def whole(world: World) -> None:
    generation = generate(load(world.french), "abc", max_new=5)
    assert "".join(generation) == "é" * 5


EACH = (
    "lambda name: type('Each', (), {'__init__': lambda self, errors: None,"
    " 'decode': lambda self, data, final=False: data.decode('utf-8', 'replace')})"
)

CASES: dict[str, Case] = {
    "E1": Case(
        "C", "a tokenizer's file that is none",
        {
            "json: empty": bad("JSON", "no bytes", LENIENT, ValueError, json=b""),
            "json: cut short": bad("JSON", "column", LENIENT, ValueError, json=json_source()[:500]),
            "json: HTML": bad("contents", "a web page", SERVED | LENIENT, ValueError, json=HTML),
            "json: a list": bad("JSON", "list", end=AttributeError, json=b"[1]"),
            "json: another object": bad("model", "NoneType", unchecked("model", "model.vocab"), IndexError, json=b"{}"),
            "json: not UTF-8": bad("JSON", "UTF-8", LENIENT, UnicodeError, json=b'{"\xff": 1}'),
            "model: empty": bad("pieces", "got 0", model=b"", end=IndexError),
            "model: cut short": bad("contents", "", LIBRARY, RuntimeError, model=proto()[:1000]),
            "model: HTML": bad("contents", "a web page", SERVED | LIBRARY, RuntimeError, model=HTML),
            "model: JSON": bad("contents", "", LIBRARY, RuntimeError, model=json_source()),
            "model: a rank without a number": bad("line 2", "other data", UNTOLD, Untold, model=b"AA== 0\nAQ== x"),
            "bin: empty": bad("size", "0 bytes", end=struct.error, bin=b""),
            "bin: HTML": bad("contents", "a web page", SERVED, bin=HTML, end=Unlike),
            "characters: a number": bad("characters", "int", chars={"characters": 5}),
            "a pipe": refused(lambda w: link(w, "/dev/zero"), "path", "not a regular file", end=Unlike),
            "no tokenizer, and a text": refused(no_tokenizer, "tokenizer", "token ids", UNTOLD, Untold),
        },
        good,
    ),
    "E2": Case(
        "S", "ids that the model has no row for",
        {
            "json: a hole": bad("model.vocab", "99999", json=described(hole), end=Unlike),
            "json: two names of an id": bad("model.vocab", "among the ids", json=described(same_id), end=Unlike),
            "json: below 0": bad("model.vocab", "", json=described(negative), end=Unlike),
            "json: a special token's id": bad("model.vocab", "among the", json=described(moved), end=Unlike),
            "json: too many": bad("pieces", "got 280", vocab=279, json=json_source()),
            "json: a word": bad("pieces", "281", vocab=280, json=json_source(), config=added(280, "<new>", False)),
            "json: a token added after a gap": bad("model.vocab", "99999", json=json_source(), config=added(99999)),
            "json: an id of a name elsewhere": bad(
                "added_tokens_decoder", "9", json=json_source(), config=added(9, "[BOS]")
            ),
            "model: a piece twice": bad("pieces", "2 times", end=Unlike, model=pieces_twice()),
            "model: too many": bad("pieces", "285", vocab=284, model=proto()),
            "model: a token added after a gap": bad(
                "added_tokens_decoder", "99999", model=proto(), config=added(99999)
            ),
            "model: ranks with a gap": bad("ranks", "", model=ranks((b"sk", 259))),
            "model: a rank twice": bad("ranks", "", model=ranks((b"sk", 257))),
            "model: a rank's bytes twice": bad("ranks", "", model=ranks((b"the", 258))),
            "model: no token for a byte": bad(
                "ranks", "no token for the bytes", model=ranks().replace(b"CQ== 9", b"CQk= 9")
            ),
            "model: ranks beyond": bad("pieces", "514", vocab=250, model=ranks()),
            "bin: too many": bad("pieces", "285", vocab=284, bin=binary()),
            "characters: one twice": bad("characters", "a", chars={"characters": "aba"}),
        },
        good,
    ),
    "E3": Case(
        "S", "a vocabulary larger than the tokenizer's",
        {"decoding": guarded(beyond, {f"{PLACE}.folders:fit": "lambda tokenizer, *a: tokenizer"})},
        good,
    ),
    "E4": Case(
        "C", "llama2.c's tokenizer.bin",
        {
            "a length of -1": bad("pieces[0]", "-1", bin=patched(FIRST + 4, struct.pack("<i", -1)), end=Unlike),
            "a length of 0": bad("pieces[0]", "a length of 0", bin=patched(FIRST + 4, bytes(4)), end=Unlike),
            "a length of 2³¹ - 1": bad(
                "pieces[0]", "2147483647", bin=patched(FIRST + 4, struct.pack("<i", 2**31 - 1)), end=AssertionError
            ),
            "the longest is -1": bad("pieces[0]", "", bin=patched(0, struct.pack("<i", -1)), end=Unlike),
            "the longest is too short": bad("pieces[2]", "1 to 5", bin=patched(0, struct.pack("<i", 5)), end=Unlike),
            "fewer pieces than the model": bad("pieces", "285, expected 300", vocab=300, bin=binary()),
            "cut in a header": bad("pieces[284]", "8 bytes", bin=binary()[:-7], end=struct.error),
            "cut in a piece": bad("pieces[284]", "a length of 1", bin=binary()[:-1], end=Unlike),
            "only two pieces": bad("pieces", "expected at least 3", bin=binary()[: 4 + 13 + 13], end=IndexError),
            "no UTF-8": bad("pieces[0]", "other bytes", UNTOLD, Untold, bin=patched(FIRST + 8, b"\xff")),
            "a score of NaN": bad("scores", "nan", bin=patched(FIRST, struct.pack("<f", float("nan")))),
            "a piece twice": bad("pieces", "2 times", bin=binary() + binary()[-9:], end=Unlike),
        },
        good,
    ),
    "E5": Case(
        "C", "what makes libraries panic",
        {
            "a prefix of merges": bad("model.continuing_subword_prefix", "abc", json=described(panics), end=Unlike),
            "a merge of no tokens": bad("contents", "", BARE, Exception, json=described(no_merge)),
            "a regex that is none": bad("contents", "", BARE, Exception, json=described(no_regex)),
            "a catastrophic regex": refused(quiet(catastrophe), "text", "fails to split", BARE, BaseException),
            "the same, stderr closed": refused(without_stderr, "text", "fails to split", BARE, BaseException),
            "stderr": refused(
                quiet(catastrophe), "text", "fails to split",
                {f"{PLACE}.base:apart": "lambda work: work()"}, Unlike,
            ),
            "a template without an end": refused(endless, "chat_template", "2 s", HERE, TooLong),
            "no decoder": bad("decoder", "none", json=described(lambda found: found.pop("decoder"))),
            "dropout": bad("model.dropout", "0.5", json=described(lambda found: found["model"].update(dropout=0.5))),
            "another model": bad("model.type", "WordPiece", json=described(word_piece), end=Unlike),
            "a template that does not parse": bad(
                "chat_template", "syntax", UNTOLD, Untold, json=json_source(), jinja="{% for %}"
            ),
        },
        good,
    ),
    "E6": Case(
        "S", "BOS and EOS that are no tokens",
        {
            "a name that is none": bad("bos_token", "<bos>", end=Unlike, json=json_source(), config=NONE),
            "of a special_tokens_map": bad("eos_token", "<eos>", json=json_source(), map=FLAGGED),
            "a number": bad("bos_token", "5", json=json_source(), config={"bos_token": 5}, end=Exception),
            "of a model": bad("bos_token", "<bos>", end=Unlike, model=proto(), config=NONE),
            "of ranks": bad("bos_token", "<bos>", end=Unlike, model=ranks(), config=NONE),
            "to be added, but none": bad("bos_token_id", "none", model=ranks(), config=ADDED),
            "perhaps to be added": bad("add_bos_token", "'yes'", json=json_source(), config={"add_bos_token": "yes"}),
            "an id out of range": refused(ends(9, None), "bos_token_id", "0 to 2"),
            "an id below 0": refused(ends(None, -1), "eos_token_id", "-1"),
            "an id that is true": refused(ends(True, None), "bos_token_id", "True"),
        },
        good,
    ),
    "E7": Case(
        "S", "names of special tokens in a text",
        {kind: guarded(plain(kind), FORGET) for kind in NAMES}
        | {f"{kind}, in a message": guarded(forged(kind), FORGED) for kind in NAMES},
        good,
    ),
    "E8": Case(
        "S", "characters that tokenizers change or lose",
        {
            "llama2.c": guarded(as_sentencepiece, {f"{PLACE}.pieces:new_settings": SQUEEZED}),
            "tokenizers": guarded(as_tokenizers, {f"{PLACE}.pipelines:Pipeline.__call__": TRIMMED}),
            "a byte that has no token": refused(lambda w: encode(w, "sky\t", json=described(no_tab)), "text", "9"),
            "a character that has none": refused(
                lambda w: encode(w, "aé", chars={"characters": "a"}), "text", "é", end=KeyError
            ),
        },
        good,
    ),
    "E9": Case(
        "S", "characters that are streamed in halves",
        {"halves": guarded(halves, {"codecs:getincrementaldecoder": EACH})},
        whole,
    ),
}  # fmt: skip
