"""Fixtures of the tests of probing: a tiny model, a labelled table, and the verb."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import small_probes
from small_probes import protein_of, write_table

from meristem.cli.main import main

Probe = Callable[..., dict]


@pytest.fixture
def probe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Probe:
    """Runs the verb; gives what `metrics.json` says, and what was said under `said`."""

    def run(model: Path, *arguments: object, code: int = 0, output: str = "probe") -> dict:
        command = ["probe", str(model), *map(str, arguments), "--output", str(tmp_path / output)]
        if "--label" not in arguments:
            command += ["--label", "kind"]
        assert main([*command, "--cache", str(tmp_path / "cache")]) == code
        said = capsys.readouterr()
        if code:
            assert len(said.err.splitlines()) == 1, said.err
            return {"said": said.err}
        return json.loads((tmp_path / output / "metrics.json").read_text()) | {"said": said.out, "progress": said.err}

    return run


@pytest.fixture
def model(tmp_path: Path, rng: np.random.Generator) -> Path:
    return small_probes.save_protein_model(tmp_path / "model")


@pytest.fixture
def table(tmp_path: Path, rng: np.random.Generator) -> Path:
    kinds = rng.integers(0, 3, 300)
    rows = [{"id": f"p{i}", "sequence": protein_of(rng, kind), "kind": f"k{kind}"} for i, kind in enumerate(kinds)]
    return write_table(tmp_path / "in.csv", rows)
