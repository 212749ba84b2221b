"""Rows of a key table give back what they were given, and say what is wrong before anything is read."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from meristem.errors import CheckpointError, ConfigError
from meristem.interop.table import (
    AS_IS,
    HEADS,
    STACKED,
    TRANSPOSED,
    Ignored,
    KeyTable,
    Lacking,
    Rename,
    Row,
    Transform,
    joined,
)
from meristem.interop.weights import Weights, open_weights
from meristem.model.config import Attention, Embedding, Experts, FeedForward, NoPosition, TransformerConfig

CONFIG = TransformerConfig(
    width=12,
    num_layers=2,
    embedding=Embedding(vocab_size=5),
    attention=Attention(num_heads=4, num_kv_heads=2, head_width=5),
    feedforward=FeedForward(width=8),
    position=NoPosition(),
    experts=Experts(count=3),
)


@pytest.mark.parametrize(
    ("transform", "shape", "foreign"),
    [
        (AS_IS, (3, 4), [(3, 4)]),
        (TRANSPOSED, (3, 4), [(4, 3)]),
        (TRANSPOSED, (3,), [(3,)]),
        (HEADS, (40, 12), [(20, 12), (10, 12), (10, 12)]),
        (HEADS, (40,), [(20,), (10,), (10,)]),
        (STACKED, (3, 8, 12), [(8, 12)] * 3),
        (joined(2), (16, 12), [(8, 12), (8, 12)]),
    ],
)
def test_a_transform_undoes_itself(
    transform: Transform, shape: tuple[int, ...], foreign: list[tuple[int, ...]], rng: np.random.Generator
) -> None:
    ours = torch.randn(shape)
    parts = transform.write(ours, CONFIG)
    assert [tuple(part.shape) for part in parts] == foreign
    assert torch.equal(transform.read(parts, CONFIG), ours)
    # and on the meta device, where shapes are checked
    meta = transform.read([torch.empty(s, device="meta") for s in foreign], CONFIG)
    assert tuple(meta.shape) == shape


TABLE = KeyTable(
    rows=(
        Rename("a", "old.a"),
        Row("blocks.{}.experts.up", ("layer.{}.expert_{expert}.wi.weight",), STACKED),
        Lacking("norm.bias"),
    ),
    ignored=(Ignored("junk", "junk is left out"),),
)
WANTED = {
    "a.weight": torch.Size([2, 3]),
    "a.bias": torch.Size([2]),
    "blocks.1.experts.up": torch.Size([3, 4, 2]),
    "norm.bias": torch.Size([12]),
}


def weights(folder: Path, **changes: torch.Tensor | None) -> Weights:
    tensors: dict[str, torch.Tensor | None] = {
        "old.a.weight": torch.ones(2, 3),
        "old.a.bias": torch.ones(2, dtype=torch.bfloat16),
        **{f"layer.1.expert_{x}.wi.weight": torch.full((4, 2), float(x)) for x in range(3)},
        **changes,
    }
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / "model.safetensors")
    return open_weights(folder)


def test_a_table_reads_and_writes_every_tensor(tmp_path: Path) -> None:
    found, notes = TABLE.read(weights(tmp_path, junk=torch.ones(1)), WANTED, CONFIG)
    assert {name: tensor.shape for name, tensor in found.items()} == WANTED
    assert notes == ["junk is left out"]
    assert found["a.bias"].dtype == torch.float32
    assert found["blocks.1.experts.up"][2].eq(2).all()
    assert not found["norm.bias"].any()
    back = TABLE.write(found, CONFIG)
    assert set(back) == {"old.a.weight", "old.a.bias", *(f"layer.1.expert_{x}.wi.weight" for x in range(3))}
    with pytest.raises(ConfigError, match=r"no place for norm\.bias, which must be zero"):
        TABLE.write({"norm.bias": torch.ones(12)}, CONFIG)
    with pytest.raises(ConfigError, match=r"no place for b\.weight"):
        TABLE.write({"b.weight": torch.ones(12)}, CONFIG)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer.1.expert_2.wi.weight": None}, r"missing: layer\.1\.expert_2\.wi\.weight$"),
        ({"layer.1.expert_3.wi.weight": torch.ones(4, 2)}, r"extra: layer\.1\.expert_3\.wi\.weight$"),
        ({"layer.0.expert_0.wi.weight": torch.ones(4, 2)}, r"extra: layer\.0\.expert_0"),
        (
            {"layer.1.expert_2.wi.weight": torch.ones(4, 3)},
            r"shape: .*\[4, 2\] \+ .*\[4, 3\] for \[3, 4, 2\]$",
        ),
        ({"old.a.weight": torch.ones(3, 2)}, r"of another shape: old\.a\.weight \[3, 2\] for \[2, 3\]$"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, torch.Tensor | None], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        TABLE.read(weights(tmp_path, **changes), WANTED, CONFIG)


def test_nothing_is_read_before_names_and_shapes_are_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = weights(tmp_path, **{"old.a.bias": None})
    monkeypatch.setattr(Weights, "__getitem__", lambda self, name: pytest.fail(f"{name} was read"))
    with pytest.raises(CheckpointError, match="missing"):
        TABLE.read(stored, WANTED, CONFIG)


def test_a_file_cut_short_while_it_is_read_is_refused(tmp_path: Path) -> None:
    stored = weights(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as stream:
        stream.truncate((tmp_path / "model.safetensors").stat().st_size - 60)
    with pytest.raises(CheckpointError, match="was cut short while it was read"):
        TABLE.read(stored, WANTED, CONFIG)
