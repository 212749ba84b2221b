"""A model is used with other options of its tokenizer: by every door alike, and a run goes on with the same ones."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small_models import random_protein, write_fasta

import meristem
from meristem.cli.main import main
from meristem.errors import ConfigError
from meristem.inference.embed import Embed
from meristem.inference.formats import read_embeddings
from meristem.inference.run import run_job

MakeModel = Callable[..., Path]


@pytest.mark.parametrize("devices", ["1", "2"])
def test_vectors_are_those_of_the_tokenizer_asked_for(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator, devices: str
) -> None:
    """Unknown residues read as X, or as what they are; the mutant that forgets the option gives the other vectors."""
    model = make_model_directory()
    texts = [random_protein(rng) + "UZB" for _ in range(5)]
    file = write_fasta(tmp_path / "in.fa", [(f"r{i}", text) for i, text in enumerate(texts)])
    argv = ["embed", str(model), str(file), "--output", str(tmp_path / "out"), "--devices", devices]
    assert main([*argv, "--nonstandard", "x"]) == 0
    got = np.stack(list(read_embeddings(tmp_path / "out")))
    replaced = [text.translate(str.maketrans("UZB", "XXX")) for text in texts]
    assert np.array_equal(got, meristem.load(model, "cpu", tokenizer={"nonstandard": "x"}).embed(texts))
    assert np.array_equal(got, meristem.load(model, "cpu").embed(replaced))
    assert not np.array_equal(got, meristem.load(model, "cpu").embed(texts))


def test_a_run_does_not_go_on_with_another_tokenizer(
    tmp_path: Path, make_model_directory: MakeModel, rng: np.random.Generator
) -> None:
    model, file = make_model_directory(), write_fasta(tmp_path / "in.fa", [("r", random_protein(rng))])
    run_job(Embed(), model, [str(file)], tmp_path / "out")
    with pytest.raises(ConfigError, match="tokenizer"):
        run_job(Embed(tokenizer={"nonstandard": "x"}), model, [str(file)], tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"patch_px": 4}, "the tokenizer of protein does not take that: .*patch_px.*; its options: nonstandard"),
        ({"nonstandard": "drop"}, "nonstandard must be one of keep, x, refuse; got 'drop'"),
    ],
)
def test_options_of_another_domain_are_refused(
    make_model_directory: MakeModel, options: dict[str, object], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        meristem.load(make_model_directory(), "cpu", tokenizer=options)
