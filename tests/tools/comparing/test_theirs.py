"""What other programs record: files, SGLang's dumps, transformers' debug trees; nothing in them is executed."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_tensors
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.model_debugging_utils import model_addition_debugger_context

from lovely_llama import LlamaError
from lovely_llama_tools.comparing.recordings import dumps
from lovely_llama_tools.comparing.recordings.theirs import read_theirs

IDS = np.array([3, 1, 4, 1, 5, 9, 2])
RNG = np.random.default_rng(0)
LOGITS, HIDDEN = (RNG.standard_normal((7, n)).astype(np.float32) for n in (11, 6))


def assert_read(path: Path, tokens: Any = IDS, logits: Any = LOGITS, **activations: Any) -> None:
    """A recording holds these arrays and no others, bit for bit."""
    found = read_theirs(path)
    assert found.tokens.tolist() == np.asarray(tokens).tolist() and not found.log_probabilities
    assert (found.logits is None) == (logits is None)
    assert logits is None or np.array_equal(np.asarray(found.logits), logits)
    assert sorted(found.activations) == sorted(activations)
    for name, array in activations.items():
        assert np.array_equal(np.asarray(found.activations[name], np.float64), np.asarray(array, np.float64)), name


def assert_refused(path: Path, says: str) -> None:
    """A recording is refused in one line."""
    with pytest.raises(LlamaError) as error:
        read_theirs(path)
    assert str(error.value).startswith(f"{path}"), error.value
    assert says in str(error.value) and "\n" not in str(error.value)


# ---- Files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", ["tokens", "input_ids", "ids"])
@pytest.mark.parametrize("logits", ["logits", "lm_head", "model.lm_head", "output", "result_output", "unembed"])
def test_other_names(tmp_path: Path, tokens: str, logits: str) -> None:
    arrays: dict[str, Any] = {tokens: IDS[None], logits: LOGITS[None], "hidden": HIDDEN[None], "mask": IDS > 1}
    np.savez(tmp_path / "r.npz", **arrays)
    assert_read(tmp_path / "r.npz", hidden=HIDDEN[None])


def test_every_kind_of_file(tmp_path: Path) -> None:
    """In float32 as in bfloat16; what is no floating-point number is left out."""
    path, half = tmp_path / "r", torch.tensor(HIDDEN).bfloat16()
    wide = half.double().numpy()
    save_tensors(
        {"input_ids": torch.tensor(IDS)[None].short(), "logits": torch.tensor(LOGITS), "a.b": half,
         "mask": torch.ones(3, dtype=torch.bool), "bytes": torch.ones(3, dtype=torch.uint8)},
        path,
    )  # fmt: skip
    assert_read(path, **{"a.b": wide})
    nested = {"ids": torch.tensor(IDS), "output": torch.tensor(LOGITS), "mask": torch.ones(3, 3) > 0,
              "layers": [{"q": half}, {"q": half * 2, "text": "no array"}],
              "parameter": torch.nn.Parameter(torch.tensor(HIDDEN)),
              "expanded": torch.zeros(1).expand(2**20, 2**20)}  # fmt: skip
    for new in (True, False):
        torch.save(nested, path, _use_new_zipfile_serialization=new)
        assert_read(path, parameter=HIDDEN, **{"layers.0.q": wide, "layers.1.q": wide * 2})
    same = [torch.tensor(HIDDEN)]
    torch.save({"tokens": IDS.tolist(), "a": same, "b": same, "logits": torch.tensor(LOGITS)}, path)
    assert_read(path, **{"a.0": HIDDEN, "b.0": HIDDEN})
    line = {"tokens": IDS.tolist(), "hidden": HIDDEN.tolist(), "ragged": [[0.5], []], "about": {"x": 1}, "n": [1, 2]}
    path.write_text(json.dumps(line))
    assert_read(path, logits=None, hidden=HIDDEN)
    path.write_text(json.dumps({**line, "result_output": LOGITS.tolist()}))
    assert_read(path, hidden=HIDDEN)
    lines = [json.dumps({"ids": int(i), "logits": [float(i), float("nan")]}) for i in IDS]
    path.write_text("\n\n".join(lines))
    found = read_theirs(path)
    assert found.logits is not None and found.tokens.tolist() == found.logits[:, 0].tolist() == IDS.tolist()
    assert np.isnan(found.logits[:, 1]).all() and not found.activations
    np.savez(path, tokens=IDS, hidden=HIDDEN, config=np.array({"a": 1}, object))
    assert_read(path.with_suffix(".npz"), logits=None, hidden=HIDDEN)


def test_one_token_and_other_axes(tmp_path: Path) -> None:
    for tokens, logits in ((IDS[:1, None], LOGITS[None, :1]), (IDS[:, None], LOGITS[:, None])):
        np.savez(tmp_path / "r.npz", tokens=tokens, logits=logits)
        assert_read(tmp_path / "r.npz", tokens.ravel(), logits.reshape(-1, 11))


class Payload:
    """What would run on reading."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


def save_endless(path: Path) -> None:
    """Save a list that contains itself, twice."""
    found = list[Any]()
    found += [found, found]
    torch.save({"tokens": found}, path)


def write(path: Path, save: Callable[..., Any], *arrays: Any, **named: Any) -> None:
    """Save arrays by numpy under a name without its suffix."""
    with path.open("wb") as file:
        save(file, *arrays, **named)


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "code": (lambda path: torch.save({"logits": Payload(path.parent / "canary")}, path), "which is code"),
    "old code": (
        lambda path: torch.save([Payload(path.parent / "canary")], path, _use_new_zipfile_serialization=False),
        "which is code",
    ),
    "an endless list": (save_endless, "contents: got more than 100,000 values"),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps(Payload(path.parent / "canary"))), "contents: got "),
    "a module": (lambda path: torch.save(torch.nn.Linear(2, 2), path), "which is code"),
    "objects": (
        lambda path: write(path, np.savez, tokens=np.array([Payload(path.parent / "canary")], object)),
        "tokens: got Python objects",
    ),
    "an array of objects": (
        lambda path: write(path, np.save, np.array([Payload(path.parent / "canary")], object)),
        "that numpy does not read without pickles",
    ),
    "no tokens": (lambda path: write(path, np.savez, logits=LOGITS), "tokens: got none, expected tokens, and"),
    "tokens alone": (lambda path: write(path, np.savez, tokens=IDS), "logits: got none, expected tokens, and"),
    "one tensor": (lambda path: torch.save(torch.tensor(LOGITS), path), "tokens: got none"),
    "cut": (
        lambda path: (torch.save({"tokens": torch.tensor(IDS)}, path), path.write_bytes(path.read_bytes()[:-50])),
        "contents: got a zip file",
    ),
    "a cut array": (
        lambda path: (write(path, np.save, LOGITS), path.write_bytes(path.read_bytes()[:-9])),
        "contents: got ",
    ),
    "a line": (lambda path: path.write_text('{"tokens": [1]}'), "logits: got none in line 1"),
    "two prompts": (lambda path: path.write_text('{"tokens": [1], "logits": [[1]]}\n' * 2), "line 2: got another"),
    "a number for rows": (
        lambda path: path.write_text('{"tokens": [1], "logits": 5}'),
        "logits: got no list in line 1",
    ),
    "a large number": (lambda path: path.write_text(f'{{"ids": 1, "logits": [1{"0" * 400}]}}'), "logits: got rows"),
    "a pipe": (lambda path: os.mkfifo(path), "path: got not a regular file"),
    "nothing": (lambda path: None, "path: got no such file"),
    "an empty file": (lambda path: path.touch(), "tokens: got none"),
    "an empty folder": (lambda path: path.mkdir(), "contents: got 0 files of other kinds, expected a dump of"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    make, says = REFUSED[name]
    make(tmp_path / "r")
    assert_refused(tmp_path / "r", says)
    assert not (tmp_path / "canary").exists()


def test_a_link_that_the_user_names(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    torch.save({"tokens": torch.tensor(IDS), "logits": torch.tensor(LOGITS)}, tmp_path / "r.pt")
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "r.pt")
    assert_read(tmp_path / "folder" / "link")


# ---- Folders of arrays -----------------------------------------------------------------------------------------------


def test_a_folder_of_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "r"
    folder.mkdir()
    np.save(folder / "input_ids.npy", IDS)
    np.savez(folder / "model.layers.0.mlp.npz", HIDDEN)
    torch.save(torch.tensor(HIDDEN) * 2, folder / "model.norm.pt")
    torch.save({"a": torch.tensor(HIDDEN), "lm_head": torch.tensor(LOGITS)}, folder / "rest.pth")
    save_file({"data": HIDDEN * 3}, folder / "odd name.safetensors")
    (folder / "notes.txt").write_text("no array")
    (folder / "more").mkdir()
    want = {"model.layers.0.mlp": HIDDEN, "model.norm": HIDDEN * 2, "a": HIDDEN, "odd name": HIDDEN * 3}
    assert_read(folder, **want)
    np.save(folder / "a.npy", HIDDEN)
    assert_refused(folder, "a: got another array of this name in rest.pth")
    (folder / "a.npy").unlink()
    os.mkfifo(folder / "a.npy")
    assert_refused(folder, "/a.npy: path: got not a regular file")
    (folder / "a.npy").unlink()
    np.save(tmp_path / "outside.npy", HIDDEN)
    (folder / "b.npy").symlink_to(tmp_path / "outside.npy")
    assert_refused(folder, "/b.npy: path: got a link to")
    monkeypatch.setattr(dumps, "FILES", 6)
    assert_refused(folder, "files: got more than 6, expected at most 6")


# ---- SGLang ----------------------------------------------------------------------------------------------------------

HOOKS = "model.forward_batch_info."


def write_passes(folder: Path, *prompts: Any, start: int = 0, seqs: int = 1) -> list[dict[str, Any]]:
    """The files of sglang's --debug-tensor-dump-output-folder, and what a pass over each prompt computes."""
    folder.mkdir(parents=True)
    computed, late = list[dict[str, Any]](), dict[str, Any]()

    def draw(n: int, rows: int = 0) -> Any:
        return torch.tensor(RNG.standard_normal((rows or len(ids), n)))

    for number, ids in enumerate(prompts):
        rotated = [draw(4), draw(2)]  # of the last layer, for all of them
        own: dict[str, Any] = {"model.embed_tokens": draw(6), "model.layers.0.input_layernorm": draw(6)}
        for layer in range(11):
            own |= {f"model.layers.{layer}.self_attn.{name}": draw(n) for name, n in (("qkv_proj", 8), ("o_proj", 6))}
            own[f"model.layers.{layer}.self_attn.rotary_emb"] = rotated
            own[f"model.layers.{layer}.post_attention_layernorm"] = [draw(6), draw(6)]
            own |= {f"model.layers.{layer}.mlp.{name}": draw(n) for name, n in (("gate_up_proj", 10), ("down_proj", 6))}
        own["model.norm"] = [draw(6), draw(6)]
        about = {"input_ids": torch.tensor(ids), "seq_lens": torch.tensor([len(ids)] * seqs),
                 "positions": torch.arange(len(ids)) + start}  # fmt: skip
        torch.save(late | own | {HOOKS + name: a for name, a in about.items()}, folder / f"Pass{number:05d}.pt")
        late = {"model": draw(6), "logits_processor": draw(11, 1)}
        computed.append(own | late)
    return computed


def test_sglang_s_passes(tmp_path: Path) -> None:
    """The prompt's pass, with its logits out of the next file; of shared modules only what is the layer's."""
    inner = tmp_path / "r" / "TP0_PP0_Rank0_pid77"
    computed = write_passes(inner, IDS[:3], [1], IDS[::-1].copy(), IDS, [2], [3])[3]
    for folder in (tmp_path / "r", inner):
        logits = computed["logits_processor"].numpy()
        want: dict[str, Any] = {}
        for name, value in computed.items():
            if "rotary_emb" not in name or ".10." in name:
                want |= {f"{name}.{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {name: value}
        del want["logits_processor"]
        assert {"model", "model.norm.1", "model.layers.10.self_attn.rotary_emb.0"} < want.keys()
        assert_read(folder, logits=logits, **want)
    (inner / "Pass00004.pt").unlink()  # without the pass after it, what is recorded late is missing
    assert_read(inner, logits=None, **{name: array for name, array in want.items() if name != "model"})
    (tmp_path / "r" / "TP1_PP0_Rank1_pid78").mkdir()
    says = "recordings: got 2 (TP0_PP0_Rank0_pid77, TP1_PP0_Rank1_pid78), expected one: name it"
    assert_refused(tmp_path / "r", says)


@pytest.mark.parametrize(
    ("how", "says"),
    [(dict(start=1), "positions: got a pass that begins at [1], expected [0], as with --disable-radix-cache"),
     (dict(seqs=2), "seq_lens: got 2 prompts, expected one")],
)  # fmt: skip
def test_sglang_s_passes_that_are_no_prompt(tmp_path: Path, how: dict[str, Any], says: str) -> None:
    write_passes(tmp_path / "r", IDS, **how)
    assert_refused(tmp_path / "r", says)


def write_dumper(folder: Path, values: dict[str, Any], step: int, bare: bool = False, rank: int = 0) -> None:
    """Files of sglang's dumper: names with tags, values with meta beside them or, of older versions, alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, (tags, value) in enumerate(values.items()):
        name = f"step={step}___rank={rank}___dump_index={index + 1}___{tags}"
        value = torch.tensor(value) if isinstance(value, np.ndarray) else value
        meta = {"step": step, "rank": rank, "sglang_parallel_info": {"tp_rank": 0}, "world_size": 1}
        torch.save(value if bare else {"value": value, "meta": meta}, folder / f"{name}.pt")


@pytest.mark.parametrize("bare", [False, True])
def test_sglang_s_dumper(tmp_path: Path, bare: bool) -> None:
    folder, tags = tmp_path / "r" / "dump_1700000000", "___recompute_status=disabled"
    values: dict[str, Any] = {
        f"name=input_ids{tags}": IDS,
        f"name=rids{tags}": ["a", "b"],
        f"name=positions{tags}": np.arange(7),
        f"name=attn_in{tags}___layer_id=3": HIDDEN,
        f"name=non_intrusive__model.layers.0.self_attn.qkv_proj.inputs.0{tags}___layer_id=0": HIDDEN * 2,
        f"name=non_intrusive__model.layers.0.self_attn.qkv_proj.output{tags}___layer_id=0": HIDDEN * 3,
        f"name=non_intrusive__model.layers.0.self_attn.rotary_emb.output.1{tags}___layer_id=4": HIDDEN * 4,
        f"name=non_intrusive__model.layers.0.inputs.hidden_states{tags}___layer_id=0": HIDDEN * 5,
        f"name=non_intrusive__model.norm.output.0{tags}": HIDDEN * 6,
        f"name=non_intrusive__logits_processor.output.next_token_logits{tags}": LOGITS[-1:],
        f"name=param__model.norm.weight{tags}": HIDDEN * 7,
        f"name=grad__attn_in{tags}": HIDDEN * 8,
    }
    write_dumper(folder, {f"name=input_ids{tags}": IDS[:2], f"name=attn_in{tags}": HIDDEN}, 0, bare)
    write_dumper(folder, values, 1, bare)
    write_dumper(folder, {f"name=input_ids{tags}": IDS[:1], f"name=late{tags}": HIDDEN}, 2, bare)
    want = {
        "layers.3.attn_in": HIDDEN, "model.layers.0.self_attn.qkv_proj.input": HIDDEN * 2,
        "model.layers.0.self_attn.qkv_proj": HIDDEN * 3, "model.layers.4.self_attn.rotary_emb.1": HIDDEN * 4,
        "model.layers.0.inputs.hidden_states": HIDDEN * 5, "model.norm.0": HIDDEN * 6,
    }  # fmt: skip
    for path in (tmp_path / "r", folder):
        assert_read(path, logits=LOGITS[-1:], **want)
    write_dumper(folder, {f"name=attn_in{tags}": HIDDEN}, 1, bare, rank=1)
    assert_refused(folder, "rank: got 0, 1, expected the files of one process")


# ---- transformers ----------------------------------------------------------------------------------------------------


def write_tree(folder: Path, use_repr: bool = False, **how: Any) -> tuple[Any, dict[str, Any]]:
    """A debug tree of a small Llama, its logits, and what its innermost modules return."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(
        vocab_size=11, hidden_size=8, intermediate_size=9, num_hidden_layers=3, num_attention_heads=4
    )
    model: Any = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, head_dim=4, **sizes)).eval()
    found, handles = dict[str, Any](), list[Any]()

    def hook(name: str) -> Any:
        def keep(_: Any, given: Any, out: Any) -> None:
            found.update({name: out, f"{name}.input": given[0]})

        return keep

    for name, module in model.named_modules():
        if name.endswith(("_proj", "norm", "lm_head", "act_fn")):
            handles.append(module.register_forward_hook(hook(name)))
    logits = model(torch.tensor(IDS)[None]).logits
    for handle in handles:
        handle.remove()
    with model_addition_debugger_context(model, debug_path=str(folder), use_repr=use_repr, **how):
        model(torch.tensor(IDS)[None], attention_mask=torch.ones(1, 7).long())
    return logits[0].detach().numpy(), {name: a.detach().numpy() for name, a in found.items()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, dict[str, Any]]:
    """A debug tree in full."""
    folder = tmp_path_factory.mktemp("tree")
    return folder, *write_tree(folder, do_prune_layers=False)


def test_transformers_debug_tree(tree: tuple[Path, Any, dict[str, Any]]) -> None:
    """Under the names of `naming`, each with its batch axis."""
    folder, logits, hooked = tree
    found = read_theirs(folder)
    assert found.tokens.tolist() == IDS.tolist() and np.allclose(np.asarray(found.logits), logits, atol=1e-6)
    del hooked["lm_head"]
    for name, array in hooked.items():
        assert found.activations[name].shape == array.shape, name
        assert np.allclose(found.activations[name], array, atol=1e-6), name
    assert "model.layers.2.mlp.down_proj.input" in hooked and len(hooked) == 3 * 20 + 3
    others = found.activations.keys() - hooked.keys()
    layers = {f"model.layers.{i}{part}.input" for i in range(3) for part in ("", ".self_attn", ".mlp")}
    rotary = {f"model.rotary_emb.{part}" for part in ("0", "1", "input")}
    assert others == layers | rotary | {"model.embed_tokens"}


def test_transformers_debug_trees_that_are_refused(tmp_path: Path, tree: tuple[Path, Any, dict[str, Any]]) -> None:
    write_tree(tmp_path / "r", use_repr=True)
    says = "value: got numbers as text, expected the name of a file: model_addition_debugger_context(…, use_repr=False)"
    assert_refused(tmp_path / "r", says)
    path = tmp_path / "r" / "LlamaForCausalLM_debug_tree_FULL_TENSORS.json"
    np.save(tmp_path / "outside.npy", HIDDEN)
    leaf = {"shape": "", "dtype": "torch.float32", "value": "../outside.npy"}
    for text, says in (
        (json.dumps({"module_path": "A", "outputs": leaf}), "outside.npy: path: got a link to"),
        (json.dumps({"module_path": "A", "outputs": leaf | {"value": "./none"}}), "none: path: got no such file"),
        (json.dumps({"module_path": "A", "children": [[]]}), "module_path: got none"),
        (json.dumps({"module_path": "A", "children": 5}), "children: got a int"),
        (json.dumps({"module_path": "A", "children": []}), "tokens: got none"),
        ("{", "JSON: got "),
        ('{"module_path": ' + "[" * 10**5, "JSON: got values nested too deep"),
    ):
        path.write_text(text)
        assert_refused(tmp_path / "r", says)
    path.with_name("B_debug_tree_FULL_TENSORS.json").write_text("{}")
    assert_refused(tmp_path / "r", "debug trees: got 2 (B_debug_tree")


def test_a_debug_tree_without_its_middle_layers(tmp_path: Path) -> None:
    write_tree(tmp_path)
    names = {name.split(".")[2] for name in read_theirs(tmp_path).activations if name.startswith("model.layers.")}
    assert names == {"0", "2"}
