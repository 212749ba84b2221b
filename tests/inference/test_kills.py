"""Every verb leaves the output of an unbroken run, however often it was killed on its way."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import READOUTS, random_protein, records_with_repeats, snapshot, write_fasta

from meristem.generation.options import GenerateOptions
from meristem.inference.embed import Embed
from meristem.inference.generate import Generate
from meristem.inference.job import Job, Running
from meristem.inference.predict import Predict
from meristem.inference.run import run_job
from meristem.inference.score import Score
from meristem.model.config import Attention, Causal, Embedding
from meristem.scoring.likelihood_options import LikelihoodOptions

NUM_KILLS = 20

LONGEST_SECONDS = 0.2
"""Between a part that is finished and the kill, at most."""


JOBS: dict[str, tuple[Job, str]] = {
    "embed": (Embed(), "vectors"),
    "embed tokens": (Embed(pool="none", format="npz"), "vectors"),
    "predict": (Predict(), "labels.csv"),
    "predict tokens": (Predict(is_per_token=True), "labels.parquet"),
    "score": (Score(scorer_options=LikelihoodOptions(one_pass=True)), "scores.csv"),
    "contacts": (Score(scorer="contacts"), "contacts.npz"),
    "generate": (Generate(options=GenerateOptions(max_new_tokens=2)), "texts.jsonl"),
}


def content(output: Path) -> Any:
    """All that a finished output holds, without what depends on the clock."""
    if output.suffix == ".npz":
        with np.load(output) as file:
            return [(name, file[name].shape, file[name].tobytes()) for name in file.files]
    if not output.is_dir():
        return output.read_bytes()
    return snapshot(output), [content(file) for file in output.glob("*.npz")]


def kill_at_random_moments(work: Callable[[], Any], parts: Path, count: int, rng: np.random.Generator) -> None:
    """Start the work `count` times and kill it each time, after it has added to the folder `parts`.

    It waits until a part is there, whatever the start takes, then strikes at any moment of the next seconds: also while
    a part is written.
    """
    for _ in range(count):
        had = len(list(parts.glob("part-*.parquet")))
        # a fork has imported everything
        process = multiprocessing.get_context("fork").Process(target=work)
        process.start()
        while process.is_alive() and len(list(parts.glob("part-*.parquet"))) <= had:
            time.sleep(0.005)
        time.sleep(float(rng.uniform(0, LONGEST_SECONDS)))
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the input must be long enough for all kills"


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_twenty_kills_at_random_moments_leave_the_output_of_an_unbroken_run(
    tmp_path: Path,
    make_model_directory: Callable[..., Path],
    rng: np.random.Generator,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job, output = JOBS[name]
    if name == "generate":
        causal = Attention(num_heads=4, pattern=Causal())
        model = make_model_directory(embedding=Embedding(vocab_size=33), attention=causal)
        source = str(tmp_path / "in.txt")
        Path(source).write_text("".join(f"{random_protein(rng, 3, 20)}\n" for _ in range(4000)))
    else:
        model = make_model_directory(readouts=READOUTS)
        records = [(f"{name}-{row}", text) for row, (name, text) in enumerate(records_with_repeats(rng, 4000))]
        source = str(write_fasta(tmp_path / "in.fa", records))
    run_job(job, model, [source], tmp_path / "whole" / output)
    rows = job.running.rows

    def slow(self: Running, *given: Any) -> Any:
        time.sleep(0.02)
        return rows(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(job.running, "rows", slow)
        broken = tmp_path / "broken" / output
        parts = broken if name.startswith("embed") else broken.with_name(f"{output}.parts")
        kill_at_random_moments(lambda: run_job(job, model, [source], broken), parts, NUM_KILLS, rng)
    run_job(job, model, [source], broken)
    assert content(broken) == content(tmp_path / "whole" / output)
    left = sorted(item.name for item in broken.parent.iterdir())
    assert left == sorted(item.name for item in (tmp_path / "whole").iterdir())
    assert not list(broken.parent.rglob("*.tmp"))
