"""What a run's config may say: its keys, and what is made of the model's part."""

from typing import Any

from meristem.model.config import TransformerConfig
from meristem.model.plain import from_json
from meristem.objectives.objective import Objective
from meristem.train.optim import OptimizerConfig
from meristem.train.task import Task

ARCHITECTURE, OBJECTIVE = "model.architecture", "model.objective"

TOP_KEYS = "model, data, trainer, watch, run_dir, seed"

TRAINER_KEYS = (
    "accelerator",
    "accumulate_grad_batches",
    "benchmark",
    "callbacks",
    "detect_anomaly",
    "deterministic",
    "devices",
    "enable_progress_bar",
    "gradient_clip_val",
    "limit_val_batches",
    "log_every_n_steps",
    "logger",
    "max_steps",
    "max_time",
    "num_nodes",
    "plugins",
    "precision",
    "profiler",
    "strategy",
)
"""Of Lightning's trainer, what has a meaning here: a run is counted in steps, not epochs, and saved by `watch`."""

TRAINER_DEFAULTS = {"max_steps": 1000, "gradient_clip_val": 1.0, "log_every_n_steps": 10}

FREE_KEYS = (
    "trainer.max_steps",
    "trainer.max_time",
    "trainer.log_every_n_steps",
    "trainer.enable_progress_bar",
    "trainer.logger",
    "trainer.profiler",
    "trainer.callbacks",
    "trainer.devices",
    "trainer.accelerator",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.accumulate_grad_batches",
    "data.workers",
    "data.cache_dir",
    "watch",
    "run_dir",
)
"""What may change when a run goes on: nothing that its past would contradict."""


def build_task(
    architecture: dict[str, Any] | None,
    objective: Objective,
    optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 (frozen)
    init_from: str | None = None,
    freeze_trunk: bool = False,
    dropout: float | None = None,
    ema_decay: float | None = None,
    seed: int = 0,
    drop_path: float | None = None,
    compile: bool = False,
) -> Task:
    """A model, an objective and an optimiser.

    Args:
        architecture: a preset of the domain (`preset: esm2_8m`), or the fields of a transformer (`width`,
            `num_layers`, `attention.num_heads`, `feedforward.width` ...), or both: fields go over the preset's.
        objective: what the model is trained for: the name of an installed objective (`MaskedTokens`, `NextToken`,
            `Supervised` ...), or the import path of a class.
        optimizer: AdamW and its schedule.
        init_from: a model directory to start from; its architecture is then used.
        freeze_trunk: only heads are trained.
        dropout: of every residual branch; null leaves what the architecture says.
        ema_decay: of a moving average of the weights, which is what is validated and saved; null for none.
        seed: of initial weights and dropout.
        drop_path: share of sequences whose residual branch is left out in training, in the last layer; it grows evenly
            from 0 at the first; null leaves what the architecture says.
        compile: let torch compile the blocks (a minute at the start; worth it on a GPU); without a compiler the run
            says so and goes on as it is.
    """
    config = None if architecture is None else from_json(TransformerConfig, architecture)
    return Task(config, objective, optimizer, init_from, freeze_trunk, dropout, ema_decay, seed, drop_path, compile)
