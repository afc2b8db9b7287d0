"""`plot`: pictures show what was measured, are written whole, and over nothing unless forced."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asserts import assert_close
from builders import SMALL, TINY, random_params, tiny_arrays, tiny_fields, write_gguf
from matplotlib.image import imread
from test_3_transformers import DRAWN, our_config, rotary

from lovely_llama import LlamaError
from lovely_llama_tools import to_hf
from lovely_llama_tools.commands import main
from lovely_llama_tools.commands.plot import draw_losses
from lovely_llama_tools.pictures.rotary import products
from lovely_llama_tools.pictures.style import write_figure
from lovely_llama_tools.pictures.weights import draw_spectra, spectra


def texts(svg: Path) -> list[str]:
    """The texts in a picture: matplotlib names each in a comment beside its outlines."""
    return re.findall(r"<!-- (.*?) -->", svg.read_text())


# ---- Losses ----------------------------------------------------------------------------------------------------------


def write_run(folder: Path, lines: list[dict[str, Any]], more: bytes = b"") -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_bytes(b"".join(json.dumps(line).encode() + b"\n" for line in lines) + more)
    return folder


def lines(steps: int, every: int, floor: float) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = [{"step": i, "train_loss": floor + 3 / (1 + i), "lr": 0.1} for i in range(steps)]
    return [m | ({"val_loss": m["train_loss"] + 0.1} if m["step"] % every == 0 else {}) for m in made]


def test_losses_of_one_run(tmp_path: Path) -> None:
    """The least validation loss is told; a step that was run again counts once, and a line in writing does not."""
    again = [{"step": 300, "train_loss": 1.5, "val_loss": 1.25}, {"step": 301, "train_loss": None}]
    run = write_run(tmp_path / "ru$n$", [*lines(400, 100, 1.5), *again], b'{"step": 302, "train_lo')
    draw_losses([run], tmp_path / "losses.svg")
    shown = texts(tmp_path / "losses.svg")
    assert {"training", "validation, least 1.25 at step 300", "step", "loss (nats per token)"} <= {*shown}
    assert "ru$n$" in shown
    draw_losses([run], tmp_path / "losses.png")
    picture = imread(tmp_path / "losses.png")
    assert picture.shape[:2] == (585, 1040) and picture.min() < 0.2 and picture[0, 0].min() == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["losses.png", "losses.svg", "ru$n$"]


def test_losses_of_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By their names, or by their paths where names are the same; over nothing unless forced."""
    first, out = write_run(tmp_path / "first", lines(9, 4, 2.0)), tmp_path / "out.svg"
    second = write_run(tmp_path / "_second", lines(9, 20, 1.0))
    assert main(["plot", "losses", str(first), str(second / "metrics.jsonl"), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    shown = texts(out)
    for name in ("first: training", "first: validation, least 2.433 at step 8", "_second: training"):
        assert name in shown
    (tmp_path / "other").mkdir()
    third, before = write_run(tmp_path / "other" / "first", lines(3, 2, 2.0)), out.read_bytes()
    both = ["plot", "losses", str(first), str(third), "--out", str(out)]
    assert main(both) == 2 and out.read_bytes() == before
    assert capsys.readouterr().err == f"error: {out}: path: got a path that exists, expected a new one, or --force\n"
    assert main([*both, "--force"]) == 0
    assert f"{first}: training" in texts(out)


def test_a_malformed_line_is_refused_with_its_number(tmp_path: Path) -> None:
    good = {"step": 0, "train_loss": 1.0}
    for i, (bad, says) in enumerate(
        (
            (b'{"step": 1, "train_loss": NaN}\n', "line 2: JSON: got NaN"),
            (b'{"step": 1, "train_loss": "1"}\n', "line 2: train_loss: got '1'"),
            (b'{"step": -1, "train_loss": 1}\n', "line 2: step: got -1"),
            (b'{"train_loss": 1}\n', "line 2: step: got None"),
            (b"\n{}\n", "line 2: JSON: got no bytes"),
            (b'{"step": 1}\n[1]\n{"step": 2}\n', "line 3: JSON: got a value of type list"),
        )
    ):
        run = write_run(tmp_path / str(i), [good], bad)
        with pytest.raises(LlamaError, match=re.escape(f"{run}/metrics.jsonl: {says}")):
            draw_losses([run], tmp_path / "out.png")
    with pytest.raises(LlamaError, match="losses: got none"):
        draw_losses([write_run(tmp_path / "none", [{"step": 3}])], tmp_path / "out.png")
    with pytest.raises(LlamaError, match=r"nowhere: path: got no regular file, expected a run's folder"):
        draw_losses([tmp_path / "nowhere"], tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


def test_a_picture_that_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", lines(3, 2, 2.0))
    (tmp_path / "folder.png").mkdir()
    for out, says in (
        ("out.jpg", "path: got '.jpg', expected a name that ends in .png, .svg, .pdf"),
        ("folder.png", "path: got a folder, expected a file"),
        ("no/out.png", "path: got a folder that does not exist"),
    ):
        assert main(["plot", "losses", str(run), "--out", str(tmp_path / out), "--force"]) == 2
        assert capsys.readouterr().err.startswith(f"error: {tmp_path / out}: {says}")
    assert main(["plot", "losses", str(run)]) == 2
    assert "--out" in capsys.readouterr().err


# ---- Attention maps --------------------------------------------------------------------------------------------------


def test_a_picture_of_attention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row for each layer and a column for each head; tokens are named where they are few."""
    model, out = write_gguf(tmp_path / "tiny.gguf", tiny_fields(), tiny_arrays()), tmp_path / "out.svg"
    draw = ["plot", "attention", str(model), "the é$x$", "--out", str(out), "--force"]
    assert main(draw) == 0
    assert capsys.readouterr() == (f"{out}\n", "")
    shown = texts(out)
    assert [s for s in shown if s.startswith(("layer", "head"))] == [
        *(f"head {i}" for i in range(4)), "layer 0", "layer 1",
    ]  # fmt: skip
    assert shown.count(" ") == 6 and shown.count("é") == 6 and shown.count("$") == 12  # in two rows and four columns
    assert any("the é$x$" in s for s in shown)
    assert main([*draw, "--layers", "1"]) == 0
    assert "layer 0" not in texts(out) and "layer 1" in texts(out)
    assert main([*draw[:3], "abcdefgh" * 5, *draw[4:]]) == 0
    assert "a" not in texts(out)
    for layers in ("2", "0,", "-1", "1-2", ""):
        capsys.readouterr()
        assert main([*draw, f"--layers={layers}"]) == 2
        expected = "numbers from 0 to 1, with commas between"
        assert capsys.readouterr().err == f"error: arguments: layers: got {layers!r}, expected {expected}\n"
    assert main([*draw[:3], "a" * 65, *draw[4:]]) == 2
    assert main([*draw[:3], "", *draw[4:]]) == 0  # BOS alone


# ---- Rotary embeddings and spectra -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
def test_products_decay_as_the_frequencies_say(kind: str) -> None:
    """¹⁄ₙ Σ cos(m fᵢ), with the frequencies of transformers."""
    hf = next(case.hf for name, case in DRAWN.items() if kind in name)
    distances = np.array([0, 1, 7, 100, 1000])
    want = np.cos(distances[:, None] * rotary(hf).inv_freq.numpy()).mean(axis=1)
    assert_close(products(our_config(hf), distances), want, 1e-4, kind)


def test_a_picture_of_rotary_embeddings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a published config, or of a file; it says which scaling is the model's own."""
    model, out = write_gguf(tmp_path / "tiny.gguf", tiny_fields(), tiny_arrays()), tmp_path / "out.svg"
    for arguments, own, about in (
        ([], "llama3", "llama-3.1-8b: 64 pairs, θ = 500,000; scaled by 8"),
        (["llama-3.2-1b"], "llama3", "llama-3.2-1b: 32 pairs, θ = 500,000; scaled by 32"),
        ([str(model)], "none", "tiny.gguf: 4 pairs, θ = 10,000; scaled by 8"),
    ):
        assert main(["plot", "rope", *arguments, "--out", str(out), "--force"]) == 0
        shown = texts(out)
        labels = [f"{kind} (the model's)" if kind == own else kind for kind in ("none", "linear", "llama3", "yarn")]
        assert about in shown and {*labels} <= {*shown}
        assert "original context, 64" in shown or arguments != [str(model)]
    capsys.readouterr()
    assert main(["plot", "rope", "llama-9", "--out", str(out), "--force"]) == 2
    assert capsys.readouterr().err.startswith("error: llama-9: path: got no such file")


def test_singular_values(tmp_path: Path) -> None:
    """Those that torch finds in the matrices of Hugging Face's layout, of each layer that is asked for."""
    params, names = random_params(SMALL), {"o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj"}
    names |= {name: f"self_attn.{name}_proj" for name in "qkv"} | {"down": "mlp.down_proj"}
    outer, kinds = spectra(params, [1])
    theirs = {name: torch.tensor(np.asarray(array)).double() for name, array in to_hf(params, SMALL).items()}

    def values(name: str) -> Any:
        return torch.linalg.svdvals(theirs[f"{name}.weight"]).numpy()

    assert {name: [*found] for name, found in kinds.items()} == {name: [1] for name in kinds}
    assert_close({name: found[1] for name, found in kinds.items()},
                 {name: values(f"model.layers.1.{names[name]}") for name in kinds}, 1e-6)  # fmt: skip
    assert_close(outer, {"embed": values("model.embed_tokens"), "unembed": values("lm_head")}, 1e-6)
    draw = draw_spectra(outer, kinds, SMALL, "Sm$ll")
    write_figure(draw, tmp_path / "out.svg")
    shown = texts(tmp_path / "out.svg")
    assert {"q, 120 × 14", "k, 30 × 14", "o, 14 × 120", "down, 14 × 19", "embed and unembed, 29 × 14"} <= {*shown}


def test_a_picture_of_spectra(tmp_path: Path) -> None:
    model, out = write_gguf(tmp_path / "tiny.gguf", tiny_fields(), tiny_arrays()), tmp_path / "out.svg"
    assert main(["plot", "spectra", str(model), "--layers", "0", "--out", str(out)]) == 0
    assert {f"embed, {TINY.vocab} × 32", "Singular values of the matrices of tiny.gguf"} <= {*texts(out)}


def test_help_lists_every_picture(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, shown in (
        ([], ("losses", "attention", "rope", "spectra")),
        (["losses"], ("RUN", "--out", "--force")),
        (["attention"], ("MODEL", "TEXT", "--layers", "--out", "--force")),
        (["rope"], ("MODEL", "llama-3.1-8b", "--out", "--force")),
        (["spectra"], ("MODEL", "--layers", "--out", "--force")),
    ):
        with pytest.raises(SystemExit):
            main(["plot", *arguments, "--help"])
        text = capsys.readouterr().out
        assert all(word in text for word in shown), text
