"""Options of a domain's tokenizer on the command line: taken out wherever they stand, and nothing else is."""

import argparse
import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meristem.cli import tokenizer_options as tokenizer_options_module
from meristem.cli.main import main
from meristem.cli.tokenizer_options import take_tokenizer_options, tokenizer_options
from meristem.errors import ConfigError


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="meristem try")
    found.add_argument("model")
    found.add_argument("inputs", nargs="+")
    found.add_argument("--output")
    found.add_argument("-n", type=int)
    return found


GIVEN: dict[str, tuple[list[str], Any]] = {
    "image_px": (["--image-px", "384", "192"], [384, 192]),
    "patch_px": (["--patch-px=8"], 8),
    "crop": (["--crop", "border"], "border"),
    "max_patches": (["--max-patches", "null"], None),
    "has_class": (["--has-class", "False"], False),
    "mean": (["--mean", "[0.25, -1e-3, .5]"], "[0.25, -1e-3, .5]"),
    "std": (["--std", "[0.25, 0.5]"], [0.25, 0.5]),
    "nonstandard": (["--nonstandard", "x"], "x"),
}


def test_options_are_found_wherever_they_stand(parser: argparse.ArgumentParser, rng: np.random.Generator) -> None:
    """Between any other arguments; a word after numbers is no value."""
    own = [["model"], ["one", "two"], ["--output", "out"], ["-n", "7"]]
    given = [words for words, _ in GIVEN.values()]
    for _ in range(20):
        # positional arguments keep their order and their company
        places = np.sort(rng.integers(0, len(given) + 1, len(own)))
        mixed, order = [], rng.permutation(len(given))
        for at in range(len(given) + 1):
            mixed += [word for words, place in zip(own, places) if place == at for word in words]
            mixed += given[order[at]] if at < len(given) else []
        rest, found = take_tokenizer_options(parser, mixed)
        assert rest == [word for words in own for word in words]
        assert found == {name: value for name, (_, value) in GIVEN.items()}


def test_what_the_verb_knows_stays_with_it(parser: argparse.ArgumentParser) -> None:
    """Abbreviations, short options, and what stands behind a bare `--`; the mutant asks domains first."""
    parser.add_argument("--crop")
    argv = ["m", "i", "--out", "o", "--crop", "border", "-n", "3", "--", "--patch-px", "8"]
    assert take_tokenizer_options(parser, argv) == (argv, {})


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            ["--outptu", "o"],
            r"unrecognized option --outptu: neither meristem try has it .* vision --image-px --patch-px",
        ),
        (["--image_pxx", "o"], "unrecognized option --image_pxx: "),
        (["--patch-px"], "--patch-px needs a value"),
        (["--patch-px", "--output", "o"], "--patch-px needs a value"),
    ],
)
def test_other_options_are_one_line(parser: argparse.ArgumentParser, argv: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        take_tokenizer_options(parser, ["model", "input", *argv])
    assert "\n" not in str(caught.value)


def test_a_model_says_whose_options_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other domain is imported to tell that an option is unknown."""
    monkeypatch.setattr(tokenizer_options_module, "find_all", lambda group: pytest.fail("every domain was imported"))
    for folder in (tmp_path, tmp_path / "run" / "model"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text('{"domain": "protein"}')
    for model in (tmp_path, tmp_path / "run"):
        assert set(tokenizer_options(["--output", "o", str(model)])) == {"protein"}


def test_every_installed_domain_is_asked() -> None:
    options = tokenizer_options()
    assert set(options) >= {"protein", "vision"}
    assert "nonstandard" in options["protein"]


@pytest.mark.parametrize("verb", ["embed", "predict", "probe", "generate", "score", "import"])
def test_every_verb_that_reads_a_model_takes_them(verb: str) -> None:
    """What is missing is named, and not the option."""
    error = io.StringIO()
    with redirect_stderr(error):
        code = main([verb, "--nonstandard", "x", "nowhere", "--nonsense", "x"])
    assert (code, error.getvalue().partition(":")[2].partition(":")[0]) == (2, " error")
    assert "unrecognized option --nonsense" in error.getvalue()
