"""Write the tables of docs/speed.md from the newest result files.

    python benchmarks/report.py

What stands between the two marks is made anew from `results/*.json`; the rest of the page is left as it is.
"""

import json
import statistics
from pathlib import Path

from harness import RESULTS, Finding

PAGE = Path(__file__).parent.parent / "docs" / "speed.md"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


def main() -> None:
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables()}\n{END}{after}")
    print(f"{PAGE} written from {len(newest())} result files")


def newest() -> list[Path]:
    """The last file of each theme and machine, by name: `<theme>_<hardware>_<date>.json`."""
    last: dict[str, Path] = {}
    for path in sorted(RESULTS.glob("*.json")):
        last[path.stem.rsplit("_", 1)[0]] = path
    return [last[key] for key in sorted(last)]


def tables() -> str:
    """A section a file: how many times as long each peer takes, a row each."""
    parts = []
    for path in newest():
        theme, hardware, date = path.stem.rsplit("_", 2)
        lines = [
            f"### {theme.capitalize()}, {hardware}",
            "",
            f"[benchmarks/results/{path.stem}.md](../benchmarks/results/{path.stem}.md), {date}.",
            "",
            "| what | program | times as long: median (least to most) |",
            "| --- | --- | --- |",
        ]
        for values in json.loads(path.read_text()):
            lines += _rows(Finding(**values))
        parts.append("\n".join([*lines, ""]))
    return "\n".join(parts)


def _rows(finding: Finding) -> list[str]:
    rows = []
    for program in finding.seconds:
        if program != finding.reference:
            ratios = finding.ratios(program)
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            rows.append(f"| {finding.title} | {program} | {spread} |")
    rows += [f"| {finding.title} | {name} | {value} |" for name, value in finding.values.items()]
    return rows


if __name__ == "__main__":
    main()
