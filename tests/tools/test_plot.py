"""`plot`: pictures show what was measured, are written whole, and over nothing unless forced."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from lovely_llama import LlamaError
from lovely_llama_tools.commands import main
from lovely_llama_tools.plot import draw_losses


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
    assert picture.shape[:2] == (675, 1200) and picture.min() < 0.2 and picture[0, 0].min() == 1
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
