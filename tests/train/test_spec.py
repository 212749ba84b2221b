"""A run is a typed value: from Python it is the very run of a config, and what it was is kept and compared."""

from dataclasses import replace

import pytest
import yaml

import meristem
from meristem.cli.run_config import parse
from meristem.errors import ConfigError
from meristem.objectives.masked import MaskedTokens
from meristem.objectives.objective import Objective
from meristem.train.optim import OptimizerConfig
from meristem.train.spec import DataSpec, ModelSpec, RunSpec, Split, TrainerSpec, Watch, values_of

ARCHITECTURE = {
    "width": 32,
    "num_layers": 2,
    "embedding": {"mask_dropout_frac": 0.12},
    "attention": {"num_heads": 4, "dropout": 0.1},
    "feedforward": {"width": 64, "dropout": 0.1},
}

SPEC = RunSpec(
    model=ModelSpec(
        architecture=ARCHITECTURE,
        objective=MaskedTokens(rate=0.2),
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=5),
        dropout=0.1,
    ),
    data=DataSpec(domain="protein", sources="proteins.fasta", tokens_per_batch=256, split=Split(validation_frac=0.2)),
    trainer=TrainerSpec(max_steps=9, accumulate_grad_batches=2, accelerator="cpu", enable_progress_bar=False),
    watch=Watch(validate_every_n_steps=7, save_every_n_steps=3),
    seed=4,
    run_dir="python",
)


def _weights(run) -> bytes:
    return (run / "model-last" / "model.safetensors").read_bytes()


def test_training_from_python_gives_the_bits_of_the_command(bench):
    meristem.fit(SPEC)
    arguments = ["--trainer.max_steps", "9", "--model.objective.rate", "0.2", "--trainer.enable_progress_bar", "false"]
    done = bench.run("--run_dir", "command", "--seed", "4", *arguments)
    assert done.code == 0, done.err
    assert bench.rows("python") == bench.rows("command")
    assert _weights(bench.path / "python") == _weights(bench.path / "command")
    said = [yaml.safe_load((bench.path / run / "config.yaml").read_text()) for run in ("python", "command")]
    assert said[0] | {"run_dir": ""} == said[1] | {"run_dir": ""}
    # the mutant: another seed
    meristem.fit(replace(SPEC, seed=5, run_dir="other"))
    assert _weights(bench.path / "python") != _weights(bench.path / "other")


def test_a_spec_is_run_again_and_goes_on_as_the_command_does(bench):
    first = meristem.fit(replace(SPEC, trainer=replace(SPEC.trainer, max_steps=3)))
    assert first.read_state()["step"] == 3
    assert SPEC.model.objective.config is None  # training binds a copy
    lines: list[str] = []
    meristem.fit(replace(SPEC, trainer=replace(SPEC.trainer, max_steps=5)), lines.append)
    assert "goes on from step 3" in lines
    figures = meristem.validate(replace(SPEC, trainer=replace(SPEC.trainer, max_steps=5)))
    shown = bench.run(config="python/config.yaml", verb="validate")
    assert dict(line.split() for line in shown.out.splitlines()[1:]) == {k: f"{v:.5g}" for k, v in figures.items()}
    with pytest.raises(ConfigError, match=r"python was started otherwise: model\.optimizer\.lr was 0\.001, is 0\.01"):
        meristem.fit(replace(SPEC, model=replace(SPEC.model, optimizer=OptimizerConfig(lr=1e-2, warmup_steps=5))))


def test_a_run_of_an_earlier_version_goes_on(bench):
    """It wrote `head: null` where the objective needs one, and the numbers of a split that has none."""
    bench.replace("max_steps: 40", "max_steps: 2")
    bench.replace("    head: {}\n", "")
    assert bench.run("--run_dir", "run").code == 0
    kept = bench.path / "run" / "config.yaml"
    values = yaml.safe_load(kept.read_text())
    assert values["model"]["architecture"]["head"] is not None
    values["model"]["architecture"]["head"] = None
    values["data"]["split"] |= {"k": 5, "threshold": 0.25}
    for steps, config in enumerate(("tiny.yaml", "run/config.yaml"), 3):
        kept.write_text(yaml.safe_dump(values))
        done = bench.run("--run_dir", "run", "--trainer.max_steps", str(steps), config=config)
        assert done.code == 0, done.err
        assert len(bench.rows("run")) == steps
    # the mutants: what such a run did say
    values["data"]["split"]["seed"] = 1
    values["model"]["architecture"]["width"] = 64
    kept.write_text(yaml.safe_dump(values))
    done = bench.run("--run_dir", "run", "--trainer.max_steps", "5")
    assert done.code == 2
    assert "data.split.seed was 1, is 0 and 1 more" in done.err


def test_numbers_of_a_split_that_does_not_use_them_are_refused(bench):
    for name, number in (("k", 7), ("threshold", 0.3)):
        with pytest.raises(ConfigError, match=rf"data\.split\.{name} has an effect with method similarity only"):
            Split(**{name: number})
    bench.replace("validation_frac: 0.2", "validation_frac: 0.2, k: 7")
    done = bench.run()
    assert done.code == 2
    assert "tiny.yaml:17: data.split.k has an effect" in done.err
    filled = values_of(replace(SPEC, data=replace(SPEC.data, split=Split(method="similarity", k=7))))
    assert filled["data"]["split"]["k"] == 7
    assert filled["data"]["split"]["threshold"] == 0.25


class Odd(Objective):
    def __init__(self, first: int, *, second: float = 0.5, inner: Objective | None = None, **more: int):
        self.second = second

    prepare = wanted = loss = None


def test_an_objective_keeps_what_it_was_made_with():
    made = Odd(3, inner=MaskedTokens(0.3), third=4)
    made.second = 7
    assert {k: v for k, v in made.arguments.items() if k != "inner"} == {"first": 3, "second": 0.5, "third": 4}
    inner = values_of(replace(SPEC, model=replace(SPEC.model, objective=made)))["model"]["objective"]["init_args"]
    assert inner["inner"]["class_path"] == "meristem.objectives.masked.MaskedTokens"
    assert inner["inner"]["init_args"]["rate"] == 0.3


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: ModelSpec(objective="MaskedTokens"),
            r"objective must be an Objective, such as MaskedTokens\(\)",
        ),
        (lambda: replace(SPEC.model, architecture=7), r"model\.architecture must be a preset or a mapping; got 7"),
        (lambda: replace(SPEC.model, drop_path=1.0), r"model\.drop_path must be in \[0, 1\); got 1\.0"),
        (lambda: TrainerSpec(accumulate_grad_batches=0), r"trainer\.accumulate_grad_batches must be 1 or more; got 0"),
    ],
)
def test_what_a_spec_cannot_hold_is_said_at_once(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


def test_objects_of_lightning_come_from_a_config_and_from_python(bench):
    seen = "{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: logs}}"
    done = bench.run("--run_dir", "run", "--trainer.max_steps", "1", "--trainer.logger", seen)
    assert done.code == 0, done.err
    assert list((bench.path / "logs").rglob("metrics.csv"))
    assert bench.run("--trainer.max_steps", "2", config="run/config.yaml").code == 0
    wrong = bench.run("--run_dir", "other", "--trainer.callbacks", "[{class_path: no.Such}]")
    assert wrong.code == 2
    assert "trainer: no.Such cannot be made" in wrong.err


def test_values_of_arguments_are_read_by_their_type(bench):
    arguments = ["--data.sources", "0123", "--data.tokenizer.nonstandard", "x", "--model.architecture", "esm2_8m"]
    spec = parse(["--config", "tiny.yaml", "--data.sources=@x", *arguments, "--model.optimizer", "{lr: 1e-2}"])
    assert spec.data.sources == "0123"
    assert spec.data.tokenizer == {"nonstandard": "x"}
    assert spec.model.architecture["preset"] == "esm2_8m"
    assert spec.model.optimizer == OptimizerConfig(lr=1e-2, warmup_steps=5)
    assert parse(["--config", "tiny.yaml", "--data.column.source=a"]).data.column == {"source": "a"}
    with pytest.raises(ConfigError, match="must be --config FILE or --key"):
        parse(["tiny.yaml"])
    with pytest.raises(ConfigError, match="--seed needs a value"):
        parse(["--seed", "--config", "tiny.yaml"])
