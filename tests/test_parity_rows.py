"""The page of parity is put together from what tests saw, and only where it was asked for."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import parity_rows


def test_rows_of_several_tests_are_put_together() -> None:
    record, rows = recorder()
    record("B", "2 layers", library="pytest", forward=3.14e-6)
    record("A", "1 layer", reference="a plain model", export=True, generation=False)
    record("B", "2 layers", generation=True, gradients=2e-5)
    page = parity_rows.render(rows)
    table = [line for line in page.splitlines() if line.startswith("| ") and "---" not in line]
    assert table[1] == "| A | a plain model | 1 layer | - | - | no | verified |"
    assert table[2] == f"| B | pytest {pytest.__version__} | 2 layers | 3e-06 | 2e-05 | equal | - |"
    with pytest.raises(AssertionError, match="got speed"):
        record("B", "2 layers", speed=1)


@pytest.mark.parametrize(("asked", "status", "is_written"), [(True, 0, True), (False, 0, False), (True, 1, False)])
def test_the_page_is_written_only_where_it_was_asked_for_and_all_held(
    asked: bool, status: int, is_written: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity_rows, "FILE", tmp_path / "parity.md")
    _, rows = recorder()
    rows["A", "1 layer"] = {}
    config = SimpleNamespace(stash={parity_rows.STORE: rows}, getoption=lambda name: asked)
    parity_rows.pytest_sessionfinish(SimpleNamespace(config=config), status)
    assert (tmp_path / "parity.md").exists() == is_written


def recorder() -> tuple[Callable[..., None], parity_rows.Rows]:
    rows: parity_rows.Rows = {}
    return parity_rows.recorder_of({parity_rows.STORE: rows}), rows
