"""Trunks, made of stacks of `Block`: an encoder, a decoder, or both with cross-attention."""

from torch import nn

from meristem.errors import ConfigError, DataError, require
from meristem.model.attention import Context, KeptRows, Placed
from meristem.model.block import Block
from meristem.model.cache import Cache
from meristem.model.config import BlockSparse, BucketBias, Full, LinearBias, Position, TransformerConfig
from meristem.model.config.pattern import sees_the_future
from meristem.model.embed import EmbeddingLayer
from meristem.model.init import init_weights
from meristem.model.norm import build_norm
from meristem.model.outputs import Wanted
from meristem.model.patterns import parts_of
from meristem.model.position import BetweenLayer, build_between
from meristem.shapes import Float, Tensor
from meristem.types import Hidden, Layout, PackedBatch

ROWS_ALONE = Wanted()


class Stack(nn.Module):
    """Blocks, whose numbers `layers` count through both stacks of a model, and a final norm: `[T, D]` to `[T, D]`."""

    def __init__(self, config: TransformerConfig, layers: range):
        super().__init__()
        self.config, self.first = config, layers.start
        kinds: list[tuple[Position, int, int]] = []
        self.positions, self.blocks = nn.ModuleList(), nn.ModuleList()
        for layer in layers:
            parts = config.layer(layer)
            kind = (parts.position, parts.head_width, parts.attention.num_heads)
            if kind not in kinds:
                kinds.append(kind)
                self.positions.append(build_between(*kind))
            self.blocks.append(Block(parts, layer, kinds.index(kind)))
        self.final_norm = build_norm(config.norm, config.width) if config.final_norm else nn.Identity()

    def run(
        self,
        x_TD: Float[Tensor, "T D"],
        batch: PackedBatch,
        wanted: Wanted = ROWS_ALONE,
        source: Hidden | None = None,
        last_rows: KeptRows | None = None,
    ) -> Hidden:
        """Run the blocks over embedded rows.

        Args:
            wanted: layers, attention maps and the cache of these are read here.
            source: hidden rows that a decoder attends to.
            last_rows: rows of the last block that are computed; None for all.
        """
        resolved = {layer: self.resolve_layer(layer) for layer in wanted.layers}
        layout, cache = batch.layout, wanted.cache
        placed = tuple(_place(position, batch) for position in self.positions)
        context = Context(layout, placed, source, cache, [self.first + block for block in wanted.attentions])
        if cache is not None:
            cache.begin(layout)
        kept: dict[int, Tensor] = {0: x_TD}
        last = len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            x_TD = block(x_TD, context, last_rows if index == last else None)
            if index + 1 in resolved.values():
                kept[index + 1] = x_TD
        if cache is not None:
            cache.end(layout)
        x_TD = self.final_norm(x_TD)
        kept[len(self.blocks)] = x_TD
        return Hidden(
            final=x_TD,
            layout=layout if last_rows is None else last_rows.layout,
            layers={layer: kept[index] for layer, index in resolved.items()},
            attentions={layer - self.first: maps for layer, maps in context.maps.items()},
            routing=context.routing,
            source=source,
        )

    def resolve_layer(self, layer: int) -> int:
        """The number of a layer counted from 0, where negative numbers count from the last one.

        Raises:
            ConfigError: the stack does not have the layer.
        """
        num_layers = len(self.blocks)
        resolved = layer + num_layers + 1 if layer < 0 else layer
        require(0 <= resolved <= num_layers, f"layer must be in 0..{num_layers} or -{num_layers + 1}..-1", layer)
        return resolved


def _place(position: nn.Module, batch: PackedBatch) -> Placed:
    """A position as it stands in a batch."""
    assert isinstance(position, BetweenLayer)
    return Placed(position, position.tables(batch.positions), position.bias(batch.ids.device))


class Encoder(Stack):
    """A trunk of one stack: embedding, blocks, final norm."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config, range(config.num_layers))
        self.embedding = EmbeddingLayer(config)
        init_weights(self, config.init, config.num_layers)

    def forward(self, batch: PackedBatch, wanted: Wanted = ROWS_ALONE, last_rows: KeptRows | None = None) -> Hidden:
        """Run the model.

        Args:
            last_rows: rows of the last block that will be used, where `may_leave_rows_of` allows it.

        Raises:
            ConfigError: the stack does not have a layer, or a cache is given to a model whose tokens see later ones.
            DataError: a sequence is longer than positions allow.
        """
        check_lengths(self.config, batch.layout, wanted.cache)
        if wanted.cache is not None:
            self._check_cached()
        assert last_rows is None or self.may_leave_rows_of(wanted)
        return self.run(self.embedding(batch), batch, wanted, last_rows=last_rows)

    def may_leave_rows_of(self, wanted: Wanted) -> bool:
        """Whether the last block may compute some rows and not others in a run."""
        return self.may_leave_rows and not wanted.layers and not wanted.attentions and wanted.cache is None

    @property
    def may_leave_rows(self) -> bool:
        """Whether the last block can compute some rows and not others: each query sees all keys, at any place."""
        parts = self.config.layer(self.config.num_layers - 1)
        is_free = isinstance(parts.attention.pattern, Full) and not isinstance(parts.position, LinearBias | BucketBias)
        return is_free and parts.experts is None

    def _check_cached(self) -> None:
        patterns = [self.config.layer(layer).attention.pattern for layer in range(self.config.num_layers)]
        if any(map(sees_the_future, patterns)):
            raise ConfigError("a cache needs a model whose tokens see none behind them (attention.pattern: Causal)")
        if any(isinstance(part, BlockSparse) for pattern in patterns for part in parts_of(pattern)):
            raise ConfigError(
                "a cache needs patterns that stay as a sequence grows; the random blocks of BlockSparse are drawn anew "
                "for each length"
            )


class Decoder(Encoder):
    """A trunk of one stack in which no token sees a later one, so that it can continue from a cache."""


class EncoderDecoder(nn.Module):
    """Two stacks that share an embedding; each block of the second attends to the output of the first."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.embedding = EmbeddingLayer(config)
        self.encoder = Stack(config, range(config.num_layers))
        self.decoder = Stack(config, range(config.num_layers, config.total_layers))
        init_weights(self, config.init, config.num_layers)

    def forward(self, batch: PackedBatch, wanted: Wanted = ROWS_ALONE, last_rows: None = None) -> Hidden:
        """Read `batch.source`, then run the decoder over the batch; or read the batch alone where only that is wanted.

        Layers and attentions are kept of both sides: those of the source in `Hidden.source`. A cache keeps the source
        too, so that only the first batch must have one. Errors are those of `Encoder.forward`.
        """
        if wanted.is_source_only:
            return self._read(batch, wanted)
        cache = wanted.cache
        check_lengths(self.config, batch.layout, cache)
        source = cache.source if cache is not None else None
        if source is None:
            assert batch.source is not None, "an encoder-decoder needs a source side"
            layers = wanted.layers if wanted.source_layers is None else wanted.source_layers
            source = self._read(batch.source, wanted.but(layers=layers))
            if cache is not None:
                cache.source = source
        return self.decoder.run(self.embedding(batch), batch, wanted, source)

    def _read(self, batch: PackedBatch, wanted: Wanted) -> Hidden:
        check_lengths(self.config, batch.layout)
        return self.encoder.run(self.embedding(batch), batch, wanted.but(cache=None))

    def resolve_layer(self, layer: int) -> int:
        """As `Stack.resolve_layer`, of the encoder."""
        return self.encoder.resolve_layer(layer)


def build_trunk(config: TransformerConfig) -> Encoder | EncoderDecoder:
    """Build the trunk that a config describes."""
    if config.num_decoder_layers:
        return EncoderDecoder(config)
    sees_ahead = any(sees_the_future(config.layer(layer).attention.pattern) for layer in range(config.num_layers))
    return Encoder(config) if sees_ahead else Decoder(config)


def check_lengths(config: TransformerConfig, layout: Layout, cache: Cache | None = None) -> None:
    """Raise a `DataError` for sequences longer than positions allow."""
    before = cache.lengths if cache is not None and cache.lengths else [0] * layout.num_sequences
    longest, limit = max((n + more for n, more in zip(before, layout.lengths)), default=0), config.max_length
    if limit is not None and longest > limit:
        raise DataError(f"a sequence must have {limit} tokens or fewer, as its positions allow; got {longest}")
