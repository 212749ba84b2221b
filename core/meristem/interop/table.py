"""Key tables: which foreign tensor is which of ours, said once and used in both directions.

A name in a table is a tensor's or a module's: `trunk.final_norm` stands for its weight and, where there is one,
its bias. `{}` is the number of a layer.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from meristem.errors import CheckpointError
from meristem.interop.weights import refuse_tensors
from meristem.model.config import TransformerConfig
from meristem.shapes import Tensor


@dataclass(frozen=True)
class Row(ABC):
    """One line of a key table.

    Attributes:
        own: name of ours.
        foreign: names that the tensor is made of, in this order.
    """

    own: str
    foreign: tuple[str, ...]

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(re.escape(self.own).replace(r"\{\}", r"(\d+)") + r"(\.weight|\.bias)?")

    def names(self, own: str) -> tuple[str, ...]:
        """Foreign names of our tensor `own`; none where this row is not about it."""
        match = self._pattern.fullmatch(own)
        if match is None:
            return ()
        *layer, ending = match.groups(default="")
        return tuple(name.format(*layer) + ending for name in self.foreign)

    @abstractmethod
    def read(self, tensors: Sequence[Tensor]) -> Tensor:
        """Our tensor, of the foreign ones."""

    @abstractmethod
    def write(self, tensor: Tensor, config: TransformerConfig) -> Sequence[Tensor]:
        """The foreign tensors, of ours."""


class Rename(Row):
    """The same tensor under another name."""

    def __init__(self, own: str, foreign: str):
        super().__init__(own, (foreign,))

    def read(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0]

    def write(self, tensor: Tensor, config: TransformerConfig) -> Sequence[Tensor]:
        return [tensor]


class FuseHeads(Row):
    """Maps to queries, keys and values, one after the other in one tensor of ours."""

    def __init__(self, own: str, query: str, key: str, value: str):
        super().__init__(own, (query, key, value))

    def read(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(tensors))

    def write(self, tensor: Tensor, config: TransformerConfig) -> Sequence[Tensor]:
        queries, keys = (heads * config.head_width for heads in (config.attention.num_heads, config.num_kv_heads))
        return tensor.split([queries, keys, keys])


@dataclass(frozen=True)
class Tied:
    """A foreign tensor that repeats another one; checked to be equal, and not kept."""

    foreign: str
    same_as: str


@dataclass(frozen=True)
class Ignored:
    """Foreign tensors that we need not keep.

    Attributes:
        pattern: a regular expression for the whole name.
        note: what the user is told where they are there; empty for nothing worth telling.
    """

    pattern: str
    note: str = ""


@dataclass(frozen=True)
class KeyTable:
    """Every tensor of a family: nothing is left over on either side.

    Attributes:
        rows: one for each tensor of ours.
        tied: foreign tensors that repeat others.
        ignored: foreign tensors that we need not keep.
        spellings: other spellings of foreign names, a regular expression and what to write in its place.
    """

    rows: tuple[Row, ...]
    tied: tuple[Tied, ...] = ()
    ignored: tuple[Ignored, ...] = ()
    spellings: tuple[tuple[str, str], ...] = ()

    def spell(self, where: Path, foreign: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors, under the names that the rows use.

        Raises:
            CheckpointError: a tensor that is there under two names.
        """
        spelled: dict[str, Tensor] = {}
        for old, tensor in foreign.items():
            name = old
            for pattern, plain in self.spellings:
                name = re.sub(pattern, plain, name)
            if name in spelled:
                raise CheckpointError(f"{where}: a tensor must be there once; got {name} under two names")
            spelled[name] = tensor
        return spelled

    def read(
        self, where: Path, foreign: Mapping[str, Tensor], wanted: Mapping[str, torch.Size]
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Our tensors, of foreign ones.

        Args:
            where: the file, for messages.
            wanted: shapes of our tensors by name.

        Returns:
            The tensors by our names, and notes for the user.

        Raises:
            CheckpointError: names what is missing, extra, mis-shaped, or tied and not equal.
        """
        tensors: dict[str, Tensor] = {}
        missing: list[str] = []
        shapes: list[str] = []
        used: set[str] = set()
        for own, shape in wanted.items():
            row, names = self._row_of(own)
            lacking = [name for name in names if name not in foreign]
            missing += lacking
            used.update(names)
            if lacking:
                continue
            tensors[own] = row.read([foreign[name] for name in names])
            if tensors[own].shape != shape:
                shapes.append(f"{' + '.join(names)} {list(tensors[own].shape)} for {list(shape)}")
        extra = set(foreign) - used
        for tie in self.tied:
            if tie.foreign in extra and tie.same_as in foreign:
                if not torch.equal(foreign[tie.foreign], foreign[tie.same_as]):
                    raise CheckpointError(
                        f"{where}: {tie.foreign} must equal {tie.same_as}, to which the config ties it; they differ"
                    )
                extra.discard(tie.foreign)
        notes = []
        for ignored in self.ignored:
            found = {name for name in extra if re.fullmatch(ignored.pattern, name)}
            extra -= found
            if found and ignored.note:
                notes.append(ignored.note)
        refuse_tensors(where, missing, sorted(extra), shapes)
        return tensors, notes

    def write(self, tensors: Mapping[str, Tensor], config: TransformerConfig) -> dict[str, Tensor]:
        """Foreign tensors by name, of ours."""
        foreign: dict[str, Tensor] = {}
        for own, tensor in tensors.items():
            row, names = self._row_of(own)
            parts = row.write(tensor, config)
            foreign.update({name: part.detach().cpu().contiguous() for name, part in zip(names, parts, strict=True)})
        return foreign

    def _row_of(self, own: str) -> tuple[Row, tuple[str, ...]]:
        found = [(row, names) for row in self.rows if (names := row.names(own))]
        assert len(found) == 1, f"{own} must be in one row of the table; it is in {len(found)}"
        return found[0]
