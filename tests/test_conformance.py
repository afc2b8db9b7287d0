"""`./dev conformance`: it names what is wrong with a program, and what cannot be run costs its own row alone.

The programs here are transformers, in this environment, right and with a fault; docs/conformance.md is held to the
files that it is made of.
"""

import re
import sys
from pathlib import Path

import conformance
import pytest
from conformance import COLUMNS, FOLDER, MARKS, PAGE, programs, stated

RIGHT = (FOLDER / "run_transformers.py").read_text()
WRONG = RIGHT.replace(
    "from_pretrained(folder, ",
    'from_pretrained(folder, hidden_act="silu" if "finding_wrong_act" in cured else "gelu", ',
).replace("INSTALL = ()", "INSTALL = ()\ncured = list[str]()")
FINDING = '''"""gelu takes the place of silu.

The paper has silu.
"""

import sys

KIND = "Fault"
WHERE = "wrong/model.py:1"
SHOWS = ("plain",)
CURE = "silu"
SEEN = ""


def cure() -> None:
    sys.modules["__main__"].cured.append(__name__)
'''
EMPTY = "\n".join(first + last + "\n" for first, last in MARKS.values())


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty page, of programs in a folder of their own and one checkpoint."""
    monkeypatch.setattr(conformance, "FOLDER", tmp_path)
    monkeypatch.setattr(conformance, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(conformance, "README", tmp_path / "page.md")
    monkeypatch.setattr(conformance, "ENVIRONMENTS", tmp_path / "environments")
    monkeypatch.setattr(conformance, "CONFIGS", {"plain": conformance.CONFIGS["plain"]})
    (tmp_path / "page.md").write_text(EMPTY)
    (tmp_path / "serving.py").write_text((FOLDER / "serving.py").read_text())
    return tmp_path / "page.md"


def test_a_fault_is_named_and_cured(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = page.parent
    (folder / "run_right.py").write_text(RIGHT)
    (folder / "run_wrong.py").write_text(WRONG)
    (folder / "finding_wrong_act.py").write_text(FINDING)
    (folder / "run_broken.py").write_text('"""Raises."""\n\nINSTALL = ()\nraise ValueError("no luck")\n')
    monkeypatch.setattr(sys, "argv", ["conformance"])
    conformance.main()
    text = page.read_text()
    rows = {line.split(" | ")[0]: line for line in text.splitlines() if line.startswith("| ")}
    number = r"[0-2]\.\d"
    assert re.fullmatch(rf"\| right \| [\d.]+ \| [\d-]+ \|(( {number}| –) \|){{{len(COLUMNS)}}}", rows["| right"])
    assert len(re.findall(rf"\*\*\d+e\+0[3-7]\*\* → {number} ", rows["| wrong"])) == 4  # 40 ids, 300, cache, gradient
    assert "not run: " in rows["| broken"] and "ValueError: no luck" in rows["| broken"]
    section = text[text.index("### wrong") :]
    assert "Found: gelu\n" in section and "The paper has silu." in section and "`wrong/model.py:1`" in section
    assert re.search(rf"Cure: silu; then {number} × rounding is left", section)
    assert "Not explained" not in section and "### right" not in text


@pytest.mark.parametrize("step", ["pip install no-such-package-at-all", "npm install no-such-package-at-all"])
def test_without_network_the_others_go_on(step: str, page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in ("PIP_INDEX_URL", "npm_config_registry"):
        monkeypatch.setenv(setting, "http://127.0.0.1:9")
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    (page.parent / "run_absent.py").write_text(f'"""Is not there."""\n\nINSTALL = ("{step}",)\n')
    monkeypatch.setattr(sys, "argv", ["conformance", "absent"])
    conformance.main()
    (row,) = [line for line in page.read_text().splitlines() if "absent" in line]
    assert re.fullmatch(r"\| absent \| – \| [\d-]+ \| not run: [^|]+ \|+", row)


def test_an_unknown_program_lists_those_known(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["conformance", "litgtp"])
    with pytest.raises(SystemExit, match="2"):
        conformance.main()
    assert "got litgtp, expected programs of transformers, " in capsys.readouterr().err


def test_the_page_explains_every_deviation() -> None:
    text, known = PAGE.read_text(), programs()
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert [name for name in rows if name != "program"] == [*known]
    ran = [name for name, row in rows.items() if "not run" not in row and name not in ("program", "transformers")]
    assert len(ran) >= 14
    assert "Not explained" not in text
    for program in known.values():
        path = FOLDER / f"run_{program.name.replace('-', '_')}.py"
        assert len(path.read_text().splitlines()) <= 90 and stated(path)["says"], path
        for name, finding in program.findings.items():
            assert finding["KIND"] in ("Fault", "Deliberate difference", "Limit") and f"/{name}.py" in text, name


def test_the_readme_shows_rows_of_the_page() -> None:
    assert conformance.shown(PAGE.read_text()) in conformance.README.read_text()
