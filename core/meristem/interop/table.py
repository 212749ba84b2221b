"""Key tables: the names of our tensors and of those of another library, one table for reading and writing.

A name in a table is a tensor's or a module's: `trunk.final_norm` stands for its weight and, where there is one,
its bias. `{}` is the number of a layer, `{expert}` that of an expert.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from meristem.errors import CheckpointError, ConfigError
from meristem.interop.weights import Weights, refuse_tensors
from meristem.model.config import TransformerConfig
from meristem.shapes import Tensor


@dataclass(frozen=True)
class Transform:
    """How tensors of another library are converted to one of ours, and back.

    Both must run on the meta device too, where shapes are checked before anything is read.

    Attributes:
        read: makes our tensor of the foreign ones, given in the order of the row.
        write: makes the foreign tensors of ours; None for one that another row writes.
    """

    read: Callable[[Sequence[Tensor], TransformerConfig], Tensor]
    write: Callable[[Tensor, TransformerConfig], Sequence[Tensor | None]]


def _split_heads(tensor: Tensor, config: TransformerConfig) -> Sequence[Tensor]:
    queries, keys = (heads * config.head_width for heads in (config.attention.num_heads, config.num_kv_heads))
    return tensor.split([queries, keys, keys])


AS_IS = Transform(lambda tensors, _: tensors[0], lambda tensor, _: [tensor])
"""The same tensor."""

TRANSPOSED = Transform(lambda tensors, _: tensors[0].t(), lambda tensor, _: [tensor.t()])
"""A matrix kept the other way round (`[in, out]`); a bias, of one axis, stays as it is."""

HEADS = Transform(lambda tensors, _: torch.cat(list(tensors)), _split_heads)
"""Maps to queries, keys and values, one after the other in one tensor of ours."""

STACKED = Transform(lambda tensors, _: torch.stack(list(tensors)), lambda tensor, _: tensor.unbind())
"""A tensor an expert, along a new first axis of ours."""


def joined(count: int) -> Transform:
    """Concatenates `count` equal parts into one tensor of ours, such as keys and values, or gate and value."""
    return Transform(lambda tensors, _: torch.cat(list(tensors)), lambda tensor, _: tensor.chunk(count))


@dataclass(frozen=True)
class Row:
    """One line of a key table.

    Attributes:
        own: name of our tensor.
        foreign: names of the foreign tensors that it is made of, in this order.
        via: the conversion.
    """

    own: str
    foreign: tuple[str, ...]
    via: Transform = AS_IS

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(re.escape(self.own).replace(r"\{\}", r"(\d+)") + r"(\.weight|\.bias)?")

    def names(self, own: str, config: TransformerConfig) -> tuple[str, ...] | None:
        """Names of the foreign tensors for our tensor `own`; None if this row is not about it."""
        match = self._pattern.fullmatch(own)
        if match is None:
            return None
        *layer, ending = match.groups(default="")
        count = 1
        if any("{expert}" in name for name in self.foreign):
            found = [config.experts, *(rule.experts for rule in config.layers)]
            count = next((experts.count for experts in found if experts is not None), 0)
        return tuple(name.format(*layer, expert=expert) + ending for expert in range(count) for name in self.foreign)


def Rename(own: str, foreign: str) -> Row:
    return Row(own, (foreign,))


def Transposed(own: str, foreign: str) -> Row:
    """A row for a matrix that the other library keeps transposed, `[in, out]`."""
    return Row(own, (foreign,), TRANSPOSED)


def Lacking(own: str) -> Row:
    """A row for a bias that the other library lacks: read as zero, and refused on writing unless it is zero."""

    def write(tensor: Tensor, _: TransformerConfig) -> Sequence[Tensor]:
        if tensor.any():
            raise ConfigError(f"the other library has no place for {own}, which must be zero")
        return []

    return Row(own, (), Transform(lambda _, config: torch.zeros(config.width), write))


@dataclass(frozen=True)
class Tied:
    """A foreign tensor that repeats another one. It is checked to be equal and then dropped."""

    foreign: str
    same_as: str


@dataclass(frozen=True)
class Ignored:
    """Foreign tensors that are dropped on reading.

    Attributes:
        pattern: a regular expression for the whole name.
        note: what the user is told where they are there; empty for nothing worth telling.
    """

    pattern: str
    note: str = ""


@dataclass(frozen=True)
class KeyTable:
    """Names and conversions of all tensors of a family; no tensor may be left over on either side."""

    rows: tuple[Row, ...]
    tied: tuple[Tied, ...] = ()
    ignored: tuple[Ignored, ...] = ()

    def read(
        self, weights: Weights, wanted: Mapping[str, torch.Size], config: TransformerConfig
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Convert foreign tensors to ours. Names and shapes are checked first, then each tensor is read once.

        Args:
            weights: foreign tensors under the names that the rows have.
            wanted: shapes of our tensors by name.

        Returns:
            The tensors by our names, and notes for the user.

        Raises:
            CheckpointError: names what is missing, extra, mis-shaped, or tied and not equal.
        """
        rows = {own: self._row_of(own, config) for own in wanted}
        used = {name for _, names in rows.values() for name in names}
        missing = sorted(used - set(weights))
        unused = set(weights) - used
        ties = [tie for tie in self.tied if tie.foreign in unused and tie.same_as in weights]
        extra, notes = unused - {tie.foreign for tie in ties}, []
        for ignored in self.ignored:
            found = {name for name in extra if re.fullmatch(ignored.pattern, name)}
            extra -= found
            if found and ignored.note:
                notes.append(ignored.note)
        shapes = []
        for own, (row, names) in rows.items():
            if not set(names) & set(missing) and (wrong := _wrong_shape(row, names, weights, wanted[own], config)):
                shapes.append(wrong)
        refuse_tensors(weights.file, missing, sorted(extra), shapes)
        for tie in ties:
            if not torch.equal(weights[tie.foreign], weights[tie.same_as]):
                raise CheckpointError(
                    f"{weights.file}: {tie.foreign} must equal {tie.same_as}, to which the config ties it; they differ"
                )
        # in the order of the files, so that none is opened twice where that can be helped
        order = sorted(rows, key=lambda own: [weights.places[name][0].file.name for name in rows[own][1]])
        own_tensors = {}
        for own in order:
            row, names = rows[own]
            own_tensors[own] = row.via.read([weights[name] for name in names], config).contiguous()
        return own_tensors, notes

    def without_heads(self, heads: Collection[str]) -> "KeyTable":
        """The same table for models without some heads, whose foreign tensors are ignored."""
        rows = [row for row in self.rows if any(row.own.startswith(f"heads.{head}.") for head in heads)]
        names = {re.escape(foreign) + r"(\.weight|\.bias)?" for row in rows for foreign in row.foreign}
        return replace(self, ignored=(*self.ignored, *map(Ignored, sorted(names))))

    def write(self, tensors: Mapping[str, Tensor], config: TransformerConfig) -> dict[str, Tensor]:
        """Convert our tensors to foreign ones, by name.

        Raises:
            ConfigError: a tensor that the family has no place for.
        """
        foreign: dict[str, Tensor] = {}
        for own, tensor in tensors.items():
            if not self.has(own, config):
                raise ConfigError(f"the other library has no place for {own}")
            row, names = self._row_of(own, config)
            for name, part in zip(names, row.via.write(tensor, config), strict=True):
                if part is not None:
                    foreign[name] = part.detach().cpu().contiguous()
        return foreign

    def has(self, own: str, config: TransformerConfig) -> bool:
        return any(row.names(own, config) is not None for row in self.rows)

    def _row_of(self, own: str, config: TransformerConfig) -> tuple[Row, tuple[str, ...]]:
        found = [(row, names) for row in self.rows if (names := row.names(own, config)) is not None]
        assert len(found) == 1, f"{own} must be in one row of the table; it is in {len(found)}"
        return found[0]


def _wrong_shape(
    row: Row, names: Sequence[str], weights: Weights, wanted: torch.Size, config: TransformerConfig
) -> str:
    """What is wrong with the shapes of the foreign tensors of one row; empty where nothing is."""
    shapes = [weights.shape(name) for name in names]
    try:
        got = row.via.read([torch.empty(shape, device="meta") for shape in shapes], config).shape
    except (RuntimeError, IndexError, ValueError, TypeError):
        return f"{' + '.join(names)} {' + '.join(str(list(shape)) for shape in shapes)} for {list(wanted)}"
    return "" if got == wanted else f"{' + '.join(names)} {list(got)} for {list(wanted)}"


BLOCK = "trunk.blocks.{}"

PARTS = {
    "attention_norm": "attention_norm",
    "qkv": "attention.qkv",
    "q_norm": "attention.q_norm",
    "k_norm": "attention.k_norm",
    "out": "attention.out",
    "attention_scale": "attention_scale",
    "feedforward_norm": "feedforward_norm",
    "up": "feedforward.up",
    "down": "feedforward.down",
    "feedforward_scale": "feedforward_scale",
}
"""Parts of a block of ours, by their short names."""


def block_rows(layer: str, own: str = BLOCK, **modules: str | tuple[str, ...]) -> tuple[Row, ...]:
    """Rows for the parts of a block: `block_rows("h.{}", attention_norm="ln_1", up="mlp.fc")`.

    Args:
        layer: foreign name of a layer, `{}` for its number.
        own: our name of a block.
        modules: foreign modules within the layer, by the short names of `PARTS`. Several lie one after the other in
            one of ours: queries, keys and values in `qkv`, gate and value in `up`.
    """
    rows = []
    for part, names in modules.items():
        name = f"{own}.{PARTS[part]}"
        if isinstance(names, str):
            rows.append(Rename(name, f"{layer}.{names}"))
        else:
            via = HEADS if part == "qkv" else joined(len(names))
            rows.append(Row(name, tuple(f"{layer}.{module}" for module in names), via))
    return tuple(rows)


def head_rows(**modules: str) -> tuple[Row, ...]:
    """Rows for the symbol head: `head_rows(dense="lm_head.dense", out="lm_head.decoder", bias="lm_head.bias")`."""
    return tuple(Rename(f"heads.tokens.{part}", module) for part, module in modules.items())


def lm_head_rows(bias: str) -> tuple[Row, ...]:
    """Rows for a symbol head whose modules are named as those of RoBERTa; `bias` is the tensor of its last bias."""
    return head_rows(dense="lm_head.dense", norm="lm_head.layer_norm", out="lm_head.decoder", bias=bias)
