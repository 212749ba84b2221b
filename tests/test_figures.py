"""Figures: colours mean what they say, and a file is there as a whole or as it was."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from meristem.figures.canvas import save_array
from meristem.figures.predictions import draw_confusion, draw_values


@pytest.mark.parametrize("count", [21, 30, 90])
def test_colours_are_shares_of_rows(count: int, rng: np.random.Generator, tmp_path: Path) -> None:
    """A row counted several times looks the same; columns counted several times, which a mutant shares by, do not."""
    names = [f"class {'x' * int(rng.integers(40))} {i}" for i in range(count)]
    counts, factors = rng.integers(0, 50, (count, count)), rng.integers(1, 9, (count, 1))
    drawn = {}
    for name, values in {"once": counts, "rows": counts * factors, "columns": counts * factors.T}.items():
        draw_confusion(tmp_path / f"{name}.png", {"one": values, "two": values.T}, names)
        with Image.open(tmp_path / f"{name}.png") as shown:
            drawn[name] = np.asarray(shown)[:, : shown.width // 2]
    assert np.array_equal(drawn["once"], drawn["rows"])
    assert not np.array_equal(drawn["once"], drawn["columns"])


def test_a_figure_that_cannot_be_drawn_leaves_the_old_one(
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = rng.bytes(50)
    draws = {
        "confusion.png": lambda path: draw_confusion(path, {"one": np.eye(2, dtype=int)}, ["a", "b"]),
        "values.png": lambda path: draw_values(path, rng.random(9), {"one": rng.random(9)}, "label"),
    }

    def fail(figure: Figure, file: Path, **options: object) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("No space left on device")

    for name, draw in draws.items():
        (tmp_path / name).write_bytes(old)
        with monkeypatch.context() as patch:
            patch.setattr(Figure, "savefig", fail)
            with pytest.raises(OSError, match="No space"):
                draw(tmp_path / name)
        assert (tmp_path / name).read_bytes() == old
        draw(tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(draws)


def test_an_array_is_written_as_it_is(rng: np.random.Generator, tmp_path: Path) -> None:
    colours = rng.integers(0, 256, (9, 13, 3), np.uint8)
    save_array(colours, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as shown:
        assert np.array_equal(np.asarray(shown.convert("RGB")), colours)
