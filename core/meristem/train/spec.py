"""Typed values of everything that a config can set. These docstrings are the help texts of its keys."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Literal

import lightning as L

from meristem.domain import load_domain
from meristem.errors import ConfigError, require
from meristem.model.config import TransformerConfig
from meristem.model.config.checks import require_all
from meristem.model.plain import to_json
from meristem.objectives.objective import Objective
from meristem.train.architecture import resolve_architecture
from meristem.train.optim import OptimizerConfig
from meristem.train.suite import Suite

if TYPE_CHECKING:
    Made = Any
else:  # as a config says it: it stays as said, so that `config.yaml` can say it again
    Made = dict[str, Any] | list[dict[str, Any]] | str | bool | None

FREE_KEYS = (
    *("trainer.max_steps", "trainer.max_time", "trainer.accumulate_grad_batches"),
    *("trainer.devices", "trainer.accelerator", "trainer.num_nodes", "trainer.strategy"),
    *("trainer.log_every_n_steps", "trainer.enable_progress_bar", "trainer.logger", "trainer.profiler"),
    *("trainer.callbacks", "data.workers", "data.cache_dir", "watch", "run_dir"),
)
"""Keys that may differ when a run is continued, since they do not change the steps that were taken."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The model, its training objective and its optimiser.

    Attributes:
        architecture: a preset of the domain (`preset: small`), or the fields of a transformer (`width`,
            `num_layers`, `attention.num_heads`, `feedforward.width` ...), or both: fields go over the preset's. In
            Python a `TransformerConfig` as well.
        objective: what the model is trained for: the name of an installed objective (`MaskedTokens`, `NextToken`,
            `Supervised` ...), or the import path of a class, with its arguments as `init_args`. In Python the object.
        optimizer: AdamW and its schedule.
        init_from: a model directory to start from: its trunk, and the heads that fit; its architecture is then used.
        freeze_trunk: only heads are trained; the trunk is as in evaluation.
        dropout: share of the outputs of every residual branch that are dropped in training; null leaves what the
            architecture says.
        ema_decay: decay of a moving average of the weights, which is what is validated and saved; null for none.
        drop_path: share of sequences whose residual branch is left out in training, in the last layer; it grows evenly
            from 0 at the first; null leaves what the architecture says.
        compile: let torch compile the blocks (a minute at the start; worth it on a GPU); without a compiler the run
            says so and goes on as it is.
    """

    objective: Objective
    architecture: Any = None
    optimizer: OptimizerConfig = OptimizerConfig()
    init_from: str | None = None
    freeze_trunk: bool = False
    dropout: float | None = None
    ema_decay: float | None = None
    drop_path: float | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        is_objective = isinstance(self.objective, Objective)
        require(is_objective, "model.objective must be an Objective, such as MaskedTokens()", repr(self.objective))
        is_right = isinstance(self.architecture, Mapping | TransformerConfig | None)
        require(is_right, "model.architecture must be a preset or a mapping", repr(self.architecture))
        require_all(self, "model.", "in [0, 1)", "dropout", "drop_path")
        is_decay = self.ema_decay is None or 0 < self.ema_decay < 1
        require(is_decay, "model.ema_decay must be above 0 and below 1", self.ema_decay)
        if self.freeze_trunk and not self.init_from:
            raise ConfigError(
                "model.freeze_trunk needs model.init_from: a frozen trunk of random weights learns little"
            )


@dataclass(frozen=True, kw_only=True)
class Split:
    """How records are dealt to the parts.

    Attributes:
        method: `hash` of the payload, so that equal payloads never straddle; a `column` that says `train`,
            `validation` or `test`; or `similarity`, so that similar payloads never straddle.
        column: name of the column, with method `column`.
        validation_frac: share of the records for validation.
        test_frac: share of the records for the test.
        seed: random seed of the split.
        k: with method `similarity`: length of the k-mers that it is measured by; null for the domain's.
        threshold: with method `similarity`: share of the k-mers of the shorter of two payloads that makes them
            similar; null for the domain's.
    """

    method: Literal["hash", "column", "similarity"] = "hash"
    column: str = ""
    validation_frac: float = 0.05
    test_frac: float = 0.0
    seed: int = 0
    k: int | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        is_right, got = (self.method == "column") == bool(self.column), f"method {self.method}"
        rule = "data.split.column must be set with method column, and only then"
        require(is_right, rule, f"{got}, column {self.column!r}")
        for name in ("k", "threshold"):
            value = getattr(self, name)
            is_right = self.method == "similarity" or value is None
            require(is_right, f"data.split.{name} has an effect with method similarity only", f"{got}, {name} {value}")
        fracs = (self.validation_frac, self.test_frac)
        are_right = min(fracs) >= 0 and sum(fracs) < 1
        require(are_right, "data.split: fractions must be 0 or more and leave some for training", fracs)


@dataclass(frozen=True, kw_only=True)
class Input:
    """The domain and tokenizer that read one input.

    Attributes:
        domain: whose tokenizer reads it; empty for the domain of the run.
        tokenizer: options of that tokenizer.
    """

    domain: str = ""
    tokenizer: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """What a model is trained on, and how it is read, dealt and packed.

    Attributes:
        domain: name of an installed domain, or a dotted path to one.
        sources: file or files to train on; `@sample` is the sample that ships with the domain.
        weights: share of the training tokens of each of `sources`, one number above 0 for each; they need not add up
            to 1. A small source with a large share comes again sooner. Null: each record once an epoch.
        validation_sources: file or files to validate on; then nothing of `sources` is kept for that.
        column: column of a table that holds the payload, or a mapping of the objective's inputs to columns; empty for a
            column of the input's name, or for the first input the domain's usual name.
        id_column: column of a table that holds the ids; empty for id, entry, accession or mutant.
        group_column: column of a table that names what must stay in one part of the split, such as a patient.
        tokenizer: options of the domain's tokenizer.
        inputs: domain and tokenizer of inputs that the domain's own tokenizer does not read, by name of the input.
        views: options of the domain's views of a record; null for the records as they are.
        split: how records are dealt to training, validation and test.
        tokens_per_batch: tokens that a device computes at once: the memory it takes goes with it.
        max_tokens_per_record: a longer record is cropped to another random window each time it is trained on;
            null for none. Evaluation takes whole records, but for what learned positions do not reach.
        on_error: `refuse` stops at a record that cannot be used; `skip` leaves it out, and lists it in `refused.csv`.
        workers: processes that prepare packs; the packs are the same for any number of them.
        cache_dir: where record stores are kept; null for `$MERISTEM_CACHE`, else `~/.cache/meristem`.
        missing_labels: words of label columns that mean "no label", such as `[NA, unknown]`; an empty cell always does.
    """

    domain: str
    sources: list[str] | str = ""
    weights: list[float] | None = None
    validation_sources: list[str] | str | None = None
    column: str | dict[str, str] = ""
    id_column: str = ""
    group_column: str = ""
    tokenizer: dict[str, Any] | None = None
    inputs: dict[str, Input] | None = None
    views: dict[str, Any] | None = None
    split: Split = Split()
    tokens_per_batch: int = 8192
    max_tokens_per_record: int | None = 1024
    on_error: Literal["refuse", "skip"] = "refuse"
    workers: int = 0
    cache_dir: str | None = None
    missing_labels: list[str] | None = None


@dataclass(frozen=True, kw_only=True)
class TrainerSpec:
    """Options of Lightning's trainer that have an effect here: duration, devices, precision and the like.

    A run is counted in steps, not epochs, and saved by `watch`. What takes objects (`logger`, `callbacks`, `plugins`,
    `profiler`, `strategy`) takes them from Python, and from a config as `class_path` and `init_args`.

    Attributes:
        max_steps: optimiser steps of the whole run.
        max_time: time after which the run ends, `DD:HH:MM:SS` or a mapping of `days`, `hours`, `minutes`.
        accumulate_grad_batches: packs of each device that make one step.
        gradient_clip_val: largest norm of the gradient over all parameters, to which a larger one is scaled down; null
            or 0 for no bound.
        precision: `32-true`, `bf16-mixed`, `16-mixed` ...; null for `bf16-mixed` on a GPU that has it, else `32-true`.
        accelerator: `auto`, `cpu` or `gpu`.
        devices: how many devices, or which.
        num_nodes: machines that train together.
        strategy: how devices train together, such as `ddp`.
        limit_val_batches: packs that a validation takes at most, of all processes together, or a share of them (1.0).
        log_every_n_steps: steps between what loggers get; `metrics.csv` has each step.
        enable_progress_bar: whether progress is shown on stderr; null for yes.
        logger: loggers beside TensorBoard's; false for none at all.
        callbacks: callbacks of Lightning, beside the run's own.
        plugins: plugins of Lightning.
        profiler: `simple`, `advanced` or a profiler of Lightning.
        detect_anomaly: name the operation that gave a gradient that is no number; slow.
        deterministic: use deterministic algorithms of torch alone.
        benchmark: let cuDNN time its algorithms.
    """

    max_steps: int = 1000
    max_time: str | dict[str, int] | None = None
    accumulate_grad_batches: int = 1
    gradient_clip_val: int | float | None = 1.0
    precision: (
        Literal[
            *("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true"),
            *("64", "32", "16", "bf16", 64, 32, 16, "transformer-engine", "transformer-engine-float16"),
        ]
        | None
    ) = None
    accelerator: str = "auto"
    devices: list[int] | str | int = "auto"
    num_nodes: int = 1
    strategy: Made = "auto"
    limit_val_batches: int | float | None = None
    log_every_n_steps: int | None = 10
    enable_progress_bar: bool | None = None
    logger: Made = None
    callbacks: Made = None
    plugins: Made = None
    profiler: Made = None
    detect_anomaly: bool = False
    deterministic: bool | Literal["warn"] | None = None
    benchmark: bool | None = None

    def __post_init__(self) -> None:
        require_all(self, "trainer.", "1 or more", "max_steps", "accumulate_grad_batches")


@dataclass(frozen=True, kw_only=True)
class Watch:
    """When a run validates and saves, which of its models is the best, and when it stops early.

    Attributes:
        validate_every_n_steps: optimiser steps between validations; the last step is validated as well.
        save_every_n_steps: optimiser steps between checkpoints to go on from.
        monitor: figure of the validation that the best model is chosen by: `loss` or a metric (`location/mcc`).
        mode: whether less or more of it is better.
        patience: validations without a better figure after which the run stops; null to run to the end.
    """

    validate_every_n_steps: int = 100
    save_every_n_steps: int = 50
    monitor: str = "loss"
    mode: Literal["min", "max"] = "min"
    patience: int | None = None

    def __post_init__(self) -> None:
        require_all(self, "watch.", "1 or more", "validate_every_n_steps", "save_every_n_steps")
        is_right = self.patience is None or self.patience >= 1
        require(is_right, "watch.patience must be 1 or more, or null", self.patience)

    def is_due(self, trainer: L.Trainer) -> bool:
        """Whether a validation follows the step that was just taken."""
        if not trainer.enable_validation:
            return False
        step = trainer.global_step
        return step % self.validate_every_n_steps == 0 or step == trainer.max_steps

    def is_better(self, value: float, best: float | None) -> bool:
        if best is None:
            return value == value
        return value < best if self.mode == "min" else value > best


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """A run: what `meristem.fit` trains, `meristem.validate` and `meristem.test` measure, and a config says.

    Attributes:
        model: what is trained, and for what.
        data: what it is trained on.
        trainer: how long, where and in which precision.
        watch: when to validate, save and stop.
        evals: what is measured at each validation beside the loss: the names of installed suites (`Probe`), or import
            paths of classes, each with its arguments as `init_args`; null for nothing. In Python the objects.
        seed: random seed of weights, order, corruption and dropout.
        run_dir: folder that the run is kept in; null for `runs/` and the name of the config.

    Example:
        >>> spec = meristem.RunSpec(
        ...     model=ModelSpec(architecture={"preset": "small"}, objective=MaskedTokens()),
        ...     data=DataSpec(domain="lab_rna", sources="@sample"),
        ...     trainer=TrainerSpec(max_steps=20),
        ... )
    """

    model: ModelSpec
    data: DataSpec
    trainer: TrainerSpec = field(default_factory=TrainerSpec)
    watch: Watch = Watch()
    evals: list[Suite] | None = None
    seed: int = 0
    run_dir: str | None = None

    def __post_init__(self) -> None:
        for one in self.evals or ():
            if not (isinstance(one, Suite) and is_dataclass(one)):
                raise ConfigError(f"evals must be suites that are dataclasses, such as Probe(...); got {one!r}")

    @property
    def folder(self) -> str:
        """The folder of the run."""
        return self.run_dir or "runs/unnamed"


def values_of(spec: RunSpec) -> dict[str, Any]:
    """A run as plain values, with what it leaves open filled in: as `config.yaml` keeps it.

    Raises:
        ConfigError: no such domain, or an architecture that cannot be.
    """
    values: dict[str, Any] = plain(spec)
    fill_in(values, type(spec.model.objective))
    return values | {"run_dir": spec.folder}


def fill_in(values: dict[str, Any], objective: type[Objective]) -> None:
    """Complete the values of a run with what its domain decides: the architecture and the numbers of the split.

    Raises:
        ConfigError: as `values_of`.
    """
    model, data = values["model"], values["data"]
    domain, split = load_domain(data["domain"]), data["split"]
    if model["init_from"]:
        model["architecture"] = None
    else:
        tokenizer = domain.build_tokenizer(**(data["tokenizer"] or {}))
        wanted = model["architecture"] or {}
        model["architecture"] = to_json(resolve_architecture(wanted, domain, tokenizer, objective))
    numbers = domain.similarity_with(split["k"], split["threshold"]) if split["method"] == "similarity" else None
    split |= {name: getattr(numbers, name, None) for name in ("k", "threshold")}


def plain(value: Any) -> Any:
    """A value of a run as YAML can keep it; of objects other than objectives and suites, the path of their class."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, TransformerConfig):
        return to_json(value)
    path = f"{type(value).__module__}.{type(value).__qualname__}"
    if is_dataclass(value):
        found = {one.name: plain(getattr(value, one.name)) for one in fields(value)}
        return {"class_path": path, "init_args": found} if isinstance(value, Suite) else found
    return {"class_path": path, "init_args": plain(value.arguments)} if isinstance(value, Objective) else path
