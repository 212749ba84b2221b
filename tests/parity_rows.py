"""`docs/parity.md`, written by the tests that compare with other libraries (`pytest --write-parity`, `make parity`).

A test says what it saw through the fixture `parity_row`; rows of one family and shape are put together, so that
several tests may each fill a column. Nothing is written without the option, or where a test failed.
"""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[1] / "docs" / "parity.md"
COLUMNS = ("family", "reference", "shape", "forward", "gradients", "generation", "export")
TITLES = (
    "family",
    "reference and version",
    "shape",
    "forward, largest difference",
    "gradients, largest relative difference",
    "generation",
    "export",
)

HEAD = """# Parity

Every family is compared with the library that it comes from: the same weights, every one of them redrawn at random and
attention made sharp; the same random input, here packed, there padded; fp32 on a CPU. *Forward* is the largest absolute
difference of logits (of all outputs, where there are no logits), *gradients* the largest difference of a gradient
relative to the largest entry of its parameter. *Generation*: 64 greedy tokens of 8 ragged prompts. *Export*: the
exported directory loads in that library and gives the same numbers. A dash: not compared here.

Written by the tests, on random weights drawn anew each time: `make parity`.
"""

Rows = dict[tuple[str, str], dict[str, str]]
Recorder = Callable[..., None]
STORE = pytest.StashKey[Rows]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-parity", action="store_true", help="write docs/parity.md from what parity tests see")


@pytest.fixture
def parity_row(request: pytest.FixtureRequest) -> Recorder:
    """Records what a test saw: `parity_row("BERT", "2 layers of 48", library="transformers", forward=3e-6)`.

    Family and shape name the row. Columns: `library` (a package, whose version is looked up) or `reference` (words),
    `forward` and `gradients` (numbers), `generation` and `export` (words, or whether it held).
    """
    return recorder_of(request.config.stash)


def recorder_of(stash: pytest.Stash) -> Recorder:
    """What `parity_row` is."""
    rows = stash.setdefault(STORE, {})

    def record(family: str, shape: str, library: str = "", **columns: float | bool | str) -> None:
        if library:
            columns["reference"] = f"{library} {version(library)}"
        unknown = set(columns) - set(COLUMNS)
        assert not unknown, f"columns are {', '.join(COLUMNS)}; got {', '.join(sorted(unknown))}"
        rows.setdefault((family, shape), {}).update({name: _cell(name, value) for name, value in columns.items()})

    return record


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    rows = session.config.stash.get(STORE, {})
    if session.config.getoption("--write-parity") and exitstatus == 0 and rows:
        FILE.write_text(render(rows), encoding="utf-8")


def render(rows: Rows) -> str:
    """The page: a line a family and shape, sorted."""
    lines = [f"| {' | '.join(TITLES)} |", f"|{' --- |' * len(TITLES)}"]
    for (family, shape), columns in sorted(rows.items()):
        cells = {"family": family, "shape": shape, **columns}
        lines.append(f"| {' | '.join(cells.get(name, '-') for name in COLUMNS)} |")
    return HEAD + "\n" + "\n".join(lines) + "\n"


def _cell(name: str, value: float | bool | str) -> str:
    if isinstance(value, bool):
        return {"generation": "equal", "export": "verified"}.get(name, "yes") if value else "no"
    return value if isinstance(value, str) else f"{value:.0e}"
