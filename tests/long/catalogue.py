"""The catalogue of known bugs as a table: the beginning of docs/diff.md.

    ./dev catalogue            print it
    ./dev catalogue --write    put it into docs/diff.md

test_docs.py fails if the table there is out of date.
"""

import argparse
from pathlib import Path

from numerics import split

from lovely_llama_tools.comparing.bugs import BUGS, SECTIONS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "diff.md"
MARKS = "<!-- catalogue -->\n", "<!-- /catalogue -->"


def table() -> str:
    """A table for each section."""
    lines = [f"{len(BUGS)} bugs."]
    for title, bugs in SECTIONS.items():
        lines += [
            "",
            f"### {title}",
            "",
            "| bug | the program | cure | seen | to show, it takes |",
            "|---|---|---|---|---|",
        ]
        lines += [f"| {' | '.join((bug.name, bug.does, bug.cure, bug.seen, bug.needs))} |" for bug in bugs]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser("./dev catalogue", description="The known bugs, as in docs/diff.md.")
    parser.add_argument("--write", action="store_true", help="put the table into docs/diff.md")
    if parser.parse_args().write:
        before, _, after = split(PAGE.read_text(), MARKS)
        PAGE.write_text(before + table() + after)
    else:
        print(table())


if __name__ == "__main__":
    main()
