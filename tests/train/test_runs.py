"""What a run leaves, and what the same command does then."""

import json

import numpy as np
import pytest
from random_proteins import random_proteins

from meristem.model.heads import Symbols
from meristem.model_directory import load_model

SUPERVISED = """
model:
  architecture:
    width: 32
    num_layers: 2
    embedding: {mask_dropout_frac: 0.12}
    attention: {num_heads: 4}
    feedforward: {width: 64}
  objective:
    class_path: Supervised
    init_args:
      targets:
        - {name: place, class_weights: balanced}
        - {name: score, task: regression}
        - {name: states, level: token}
  optimizer: {lr: 3e-3, warmup_steps: 2}
data:
  domain: protein
  sources: table.csv
  tokens_per_batch: 512
  split: {method: column, column: part}
trainer: {max_steps: 12, accelerator: cpu}
watch: {validate_every_n_steps: 4, save_every_n_steps: 5, monitor: place/mcc, mode: max}
"""


@pytest.fixture
def table(bench, rng):
    """Labels that a model can learn: the share of one residue, and each residue's own class."""
    lines = ["sequence,place,score,states,part"]
    for i, sequence in enumerate(random_proteins(rng, 60)):
        place = "" if i % 7 == 0 else "ab"[sequence.count("L") > len(sequence) / 20]
        score = "" if i % 5 == 0 else f"{sequence.count('A') / len(sequence):.4f}"
        states = "" if i % 6 == 0 else "".join("HE"[residue in "AGVLI"] for residue in sequence)
        lines.append(f"{sequence},{place},{score},{states},{['train', 'train', 'validation', 'test'][i % 4]}")
    (bench.path / "table.csv").write_text("\n".join(lines) + "\n")
    (bench.path / "supervised.yaml").write_text(SUPERVISED)
    return bench


def test_finished_run_leaves_models_figures_and_a_way_on(bench):
    bench.replace("max_steps: 40", "max_steps: 8")
    done = bench.run("--run_dir", "run")
    assert done.code == 0, done.err
    run = bench.path / "run"
    for name in ("config.yaml", "metrics.csv", "curves.png", "checkpoints/last.ckpt", "model/config.json"):
        assert (run / name).stat().st_size
    assert list((run / "tensorboard").iterdir())
    rows = bench.rows("run")
    assert [row["step"] for row in rows] == [str(n) for n in range(1, 9)]
    assert [row["step"] for row in rows if row["val/loss"]] == ["7", "8"]
    card, _ = load_model(run / "model-last")
    assert card.heads == {"tokens": Symbols()}
    again = bench.run("--run_dir", "run")
    assert again.code == 0
    assert "--trainer.max_steps 16" in again.err
    assert bench.rows("run") == rows
    other = bench.run("--run_dir", "run", "--model.optimizer.lr", "1e-2")
    assert other.code == 2
    assert "model.optimizer.lr was 0.001, is 0.01" in other.err
    assert "meristem fit --config run/config.yaml" in other.err
    (run / "checkpoints" / "last.ckpt").unlink()
    gone = bench.run("--run_dir", "run", "--trainer.max_steps", "9")
    assert gone.code == 2
    assert "no checkpoints/last.ckpt" in gone.err
    assert bench.rows("run") == rows


def test_records_with_bad_labels_are_skipped_and_listed_where_that_is_asked_for(table):
    lines = (table.path / "table.csv").read_text().splitlines()
    sequence, place, _, states, part = lines[9].split(",")
    lines[9] = ",".join([sequence, place, "high", states, part])
    lines[10] = lines[10].rpartition(",")[0] + "H,train"
    (table.path / "table.csv").write_text("\n".join([*lines, ""]))
    done = table.run("--run_dir", "run", config="supervised.yaml")
    assert done.code == 2
    assert "table.csv:10: label 'score' must be a finite number; got 'high'" in done.err
    done = table.run("--run_dir", "run", "--data.on_error", "skip", config="supervised.yaml")
    assert done.code == 0, done.err
    assert "2 record(s) refused and left out, listed in refused.csv" in done.err
    listed = (table.path / "run" / "refused.csv").read_text().splitlines()[1:]
    assert [line.split(",")[0] for line in listed] == ["table.csv:10", "table.csv:11"]
    assert all(float(row["val/loss"]) > 0 for row in table.rows("run") if row["val/loss"])


def test_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(bench):
    done = bench.run(
        *("--run_dir", "run", "--model.optimizer.lr", "1e25", "--model.optimizer.warmup_steps", "0"),
        *("--trainer.gradient_clip_val", "0"),
    )
    assert done.code == 2
    assert "the last good checkpoint is kept" in done.err.splitlines()[-1]
    step = json.loads((bench.path / "run" / "run.json").read_text())["step"]
    assert step < 4
    assert all(np.isfinite(float(row["loss"])) for row in bench.rows("run"))


def test_supervised_run_starts_from_scratch_or_from_a_model(table):
    scratch = table.run("--run_dir", "scratch", config="supervised.yaml")
    assert scratch.code == 0, scratch.err
    last = table.rows("scratch")[-1]
    for name in ("place/mcc", "place/accuracy", "place/macro_f1", "score/spearman", "score/mae", "states/accuracy"):
        assert last[f"val/{name}"]
    assert {"loss/place", "loss/score", "loss/states"} <= last.keys()
    card, _ = load_model(table.path / "scratch" / "model")
    assert {readout.name: readout.classes for readout in card.readouts} == {
        "place": ("a", "b"),
        "score": (),
        "states": ("E", "H"),
    }

    table.replace("max_steps: 40", "max_steps: 3")
    assert table.run("--run_dir", "base").code == 0
    trunk = load_model(table.path / "base" / "model-last")[1].trunk.state_dict()
    for name, frozen in (("frozen", "true"), ("whole", "false")):
        done = table.run(
            *("--run_dir", name, "--model.init_from", "base/model-last", "--model.freeze_trunk", frozen),
            *("--trainer.max_steps", "4"),
            config="supervised.yaml",
        )
        assert done.code == 0, done.err
        assert "new heads: place, score, states" in done.err
        after = load_model(table.path / name / "model-last")[1].trunk.state_dict()
        is_same = all((after[key] == value).all() for key, value in trunk.items())
        assert is_same == (name == "frozen")


def test_validate_and_test_measure_the_best_model(table):
    done = table.run("--run_dir", "run", config="supervised.yaml")
    assert done.code == 0, done.err
    best = max(float(row["val/place/mcc"]) for row in table.rows("run") if row["val/loss"])
    validated = table.run(config="run/config.yaml", verb="validate")
    assert validated.code == 0, validated.err
    said = dict(line.split() for line in validated.out.splitlines()[1:])
    assert float(said["place/mcc"]) == pytest.approx(best, abs=1e-4)
    tested = table.run(config="run/config.yaml", verb="test")
    assert tested.code == 0, tested.err
    assert "score/spearman" in tested.out


def test_patience_ends_a_run_that_does_not_get_better(table):
    done = table.run(
        *("--run_dir", "run", "--watch.patience", "1", "--watch.validate_every_n_steps", "1"),
        *("--model.optimizer.lr", "1e-12"),
        config="supervised.yaml",
    )
    assert done.code == 0, done.err
    assert len(table.rows("run")) == 2
    assert "no better place/mcc" in done.err
    assert "is finished" in table.run("--run_dir", "run", config="run/config.yaml").err


def test_a_label_column_that_is_not_there_is_named_with_those_that_are(table):
    done = table.run("--model.objective.targets", "[{name: charge}]", "--run_dir", "run", config="supervised.yaml")
    assert done.code == 2
    assert "table.csv" in done.err
    assert "charge" in done.err
    assert "place" in done.err
    assert not (table.path / "run").exists()


def test_sources_are_mixed_by_weight_and_weights_that_cannot_be_are_refused(bench, rng):
    more = "".join(f">other{i}\n{sequence}\n" for i, sequence in enumerate(random_proteins(rng, 12)))
    (bench.path / "others.fasta").write_text(more)
    bench.replace("sources: proteins.fasta", "sources: [proteins.fasta, others.fasta]")
    few = ("--trainer.max_steps", "4")
    mixed = bench.run("--run_dir", "mixed", "--data.weights", "[1, 3]", *few)
    assert mixed.code == 0, mixed.err
    assert "; tokens of proteins.fasta 25.0%, others.fasta 75.0%" in mixed.out + mixed.err
    assert bench.run("--run_dir", "plain", *few).code == 0
    assert bench.rows("mixed")[0]["loss"] != bench.rows("plain")[0]["loss"]
    for weights in ("[1]", "[1, 0]", "[1, -2]", "[1, .inf]"):
        done = bench.run("--run_dir", "wrong", "--data.weights", weights)
        assert done.code == 2
        assert "data.weights must be one finite number above 0 for each of data.sources (2)" in done.err
    (bench.path / "others.fasta").write_text(">one\nMK1V\n")
    done = bench.run("--run_dir", "wrong", "--data.weights", "[1, 3]", "--data.on_error", "skip")
    assert done.code == 2
    assert "others.fasta: no record of this source is left for training" in done.err
    assert not (bench.path / "wrong").exists()
