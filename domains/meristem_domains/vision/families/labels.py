"""The label that the classifier of an image model predicts."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from meristem.errors import ConfigError
from meristem.model.config import Pool
from meristem.model.heads import Readout

LABEL = "label"
"""Name of the label that a classifier predicts."""


def label_of(classes: Sequence[str], pool: Pool | None = None) -> Readout:
    """Make the label of a classifier; a single output is a regression.

    Args:
        pool: pooling that the classifier reads; None for the model's own.
    """
    if len(classes) == 1:
        return Readout(name=LABEL, task="regression", pool=pool)
    return Readout(name=LABEL, classes=tuple(classes), pool=pool)


def read_classifier(config: Mapping[str, Any], names: Collection[str], pool: Pool | None = None) -> tuple[Readout, ...]:
    """The label of a classifier of `transformers`, if there is one; classes are in the order of the logits.

    Args:
        pool: as for `label_of`.
    """
    if "classifier.weight" not in names:
        return ()
    classes = config.get("id2label")
    if not classes:
        return (label_of([f"LABEL_{index}" for index in range(config.get("num_labels", 2))], pool),)
    return (label_of([str(classes[index]) for index in sorted(classes, key=int)], pool),)


def write_classes(readouts: Sequence[Readout], pools: Collection[Pool | None]) -> dict[str, Any]:
    """Settings of `transformers` about the classes of a label.

    Raises:
        ConfigError: a label that its classifier cannot be.
    """
    settings: dict[str, Any] = {}
    for readout in readouts:
        require_plain(readout, pools)
        classes = readout.classes or ("LABEL_0",)
        settings["id2label"] = {str(index): name for index, name in enumerate(classes)}
        settings["label2id"] = {name: index for index, name in enumerate(classes)}
    return settings


def require_plain(readout: Readout, pools: Collection[Pool | None]) -> None:
    """Refuse a label that the other library's classifier cannot predict: a linear map of what it reads.

    Raises:
        ConfigError: names what differs.
    """
    name = f"label {readout.name!r}"
    if readout.level != "record":
        raise ConfigError(f"{name} must be one of records to be exported; it is one of tokens")
    if readout.pool not in pools:
        allowed = ", ".join("the model's own" if pool is None else repr(pool) for pool in pools)
        raise ConfigError(f"{name} must read {allowed} to be exported; its pool is {readout.pool!r}")
    if readout.task == "regression" and (set(readout.mean), set(readout.std)) != ({0.0}, {1.0}):
        raise ConfigError(f"{name} must have mean 0 and std 1 to be exported; got {readout.mean} and {readout.std}")
