"""The checks of a parity test: forward, gradients, export, and that a mutant fails the first of them.

case = Case.of(folder, FAMILY, tokenizer)            # a directory of the other library
case.check_forward(rng)
case.check_gradients(rng, tmp_path)
case.check_export(rng, tmp_path)
case.check_mutant(rng, drop_bias)
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from meristem.data.tokenizer import Tokenizer
from meristem.errors import UserError
from meristem.interop.directory import Imported, read_config_file, read_directory, refuse_config, write_directory
from meristem.interop.family import Family, find_family, installed_families
from meristem.interop.runners import compare, is_layer, run_ours
from meristem.model.model import Model
from meristem.shapes import Tensor

TOLERANCE = 1e-4
"""fp32 rounds at 1e-7; sharp attention, and a norm before the head, multiply it by some hundreds."""

GRADIENT_TOLERANCE = 1e-4
"""Of a parameter's largest entry; the same roundings, once more on the way back."""


@dataclass
class Case:
    """A directory of another library, as that library reads it and as we do.

    Attributes:
        folder: the directory.
        family: that it is of; with the tokenizer's reading and writing left out where a stand-in is given.
        imported: what we make of it; read anew for every mutant.
        reference: what the other library makes of it.
    """

    folder: Path
    family: Family
    imported: Imported
    reference: Any

    @classmethod
    def of(cls, folder: Path, family: Family, tokenizer: Tokenizer | None = None) -> "Case":
        """Read a directory with both libraries.

        Args:
            tokenizer: stands in for the one of the directory, which then need hold none.
        """
        if tokenizer is not None:
            stand_in = tokenizer
            family = replace(
                family, read_tokenizer=lambda folder, config: (stand_in, []), write_tokenizer=lambda tokenizer: {}
            )
        assert family.runner is not None
        assert find_family(folder, read_config_file(folder)).name == family.name
        return cls(folder, family, read_directory(folder, family), family.runner.load(folder))

    def compare(self, model: Model, reference: Any, rng: np.random.Generator) -> dict[str, float]:
        """The same random input through both."""
        assert self.family.runner is not None
        return compare(model, self.imported.tokenizer, reference, rng, self.family.runner)

    def check_forward(self, rng: np.random.Generator, tolerance: float = TOLERANCE) -> float:
        """Layers and outputs are those of the reference.

        Returns:
            The largest difference of an output (of a layer, where there are no outputs), for the record.
        """
        parity = self.compare(self.imported.model, self.reference, rng)
        refuse_distance(parity, tolerance)
        return max((outputs_of(parity) or parity).values())

    def check_export(self, rng: np.random.Generator, tmp_path: Path, tolerance: float = TOLERANCE) -> bool:
        """The exported directory loads in the other library, holds the same tensors, and gives the same."""
        imported = self.imported
        back = tmp_path / "back"
        check_one_most_general(self.family, imported)
        assert self.family.runner is not None
        write_directory(back, imported.model.config, imported.tokenizer, imported.model, family=self.family)
        exported = self.family.runner.load(back)
        refuse_distance(self.compare(imported.model, exported, rng), tolerance)
        original = self.reference.state_dict()
        assert set(exported.state_dict()) == set(original)
        again = read_directory(back, self.family)
        assert again.model.config == imported.model.config
        assert again.model.readouts == imported.model.readouts
        for name, tensor in again.model.state_dict().items():
            assert torch.equal(tensor, imported.model.state_dict()[name]), name
        return True

    def check_mutant(
        self, rng: np.random.Generator, mutate: Callable[[Model], None], tolerance: float = TOLERANCE
    ) -> None:
        """A model that is not quite the family's fails `check_forward`."""
        model = copy.deepcopy(self.imported.model)
        mutate(model)
        with pytest.raises(AssertionError, match="differ"):
            refuse_distance(self.compare(model, self.reference, rng), tolerance)

    def check_gradients(
        self,
        rng: np.random.Generator,
        tmp_path: Path,
        tolerance: float = GRADIENT_TOLERANCE,
        ignore: Sequence[str] = (),
        save: Callable[[Any, Path], Any] = lambda model, folder: model.save_pretrained(folder),
    ) -> float:
        """The gradient of every parameter is that of the reference, through the key table.

        The reference's gradients are saved in the place of its weights and read as if they were a checkpoint.

        Args:
            ignore: parameters of ours that the reference does without.

        Returns:
            The largest difference, relative to the largest entry of the parameter's gradient.
        """
        reference, model = copy.deepcopy(self.reference), self.imported.model
        assert self.family.runner is not None
        sequences = self.family.runner.draw(model, self.imported.tokenizer, rng)
        model.zero_grad()
        ours = run_ours(model, self.imported.tokenizer, sequences)
        theirs = self.family.runner.theirs(reference, sequences)
        names = [name for name in ours if name in theirs and "layer" not in name] or [max(ours, key=_depth)]
        ways = {name: [torch.from_numpy(_draw(rng, part)) for part in theirs[name]] for name in names}
        for results in (ours, theirs):
            total: Tensor = sum((p * w).sum() for name in names for p, w in zip(results[name], ways[name], strict=True))
            total.backward()
        for parameter in reference.parameters():
            parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        save(reference, tmp_path / "gradients")
        for file in self.folder.iterdir():  # the tokenizer, whatever its files
            if not (tmp_path / "gradients" / file.name).exists():
                (tmp_path / "gradients" / file.name).write_bytes(file.read_bytes())
        wanted = dict(read_directory(tmp_path / "gradients", self.family).model.named_parameters())
        scale = max(float(tensor.detach().abs().max()) for tensor in wanted.values())
        worst = 0.0
        for name, parameter in model.named_parameters():
            if name in ignore:
                continue
            got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            want = wanted[name].detach()
            # what is zero but for rounding has no scale of its own
            distance = float((got - want).abs().max()) / max(float(want.abs().max()), 1e-4 * scale)
            assert distance <= tolerance, f"gradient of {name} differs by {distance:.1e}"
            worst = max(worst, distance)
        return worst


def check_one_most_general(family: Family, imported: Imported) -> None:
    """Of all families that can say a model, one is the most general: the family itself, or one it is a variant of."""
    able = {}
    for other in installed_families():
        if other.library == family.library:
            with suppress(UserError, TypeError):
                config = other.write_config(imported.model.config, imported.tokenizer)
                refuse_config(other, config, imported.model.config)
                able[other.name] = other
    most_general = [name for name, other in able.items() if not {more.name for more in other.general} & set(able)]
    assert len(most_general) == 1, most_general
    assert most_general[0] in {family.name, *(more.name for more in family.general)}


def outputs_of(parity: Mapping[str, float]) -> dict[str, float]:
    """Differences of what heads and pools give."""
    return {name: value for name, value in parity.items() if not is_layer(name)}


def refuse_distance(parity: Mapping[str, float], tolerance: float = TOLERANCE) -> None:
    """The check that every shape must pass and no mutant may."""
    print(", ".join(f"{name} {value:.1e}" for name, value in parity.items()))
    for name, distance in parity.items():
        assert distance <= tolerance, f"{name} differs by {distance:.1e}"


def _draw(rng: np.random.Generator, like: Tensor) -> np.ndarray:
    return rng.standard_normal(tuple(like.shape), dtype=np.float32)


def _depth(name: str) -> tuple[bool, int]:
    return (not name.startswith("source "), int(name.rpartition(" ")[2])) if "layer" in name else (True, -1)
