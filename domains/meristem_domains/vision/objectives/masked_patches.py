"""Masked patches: the trunk reads some patches of a picture, and a light decoder paints those that it did not see."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from meristem.data.parts import Encoder, RunData
from meristem.data.tokenizer import Tokenizer
from meristem.errors import ConfigError
from meristem.model.config import Attention, Embedding, FeedForward, Init, SinCos2D, TransformerConfig
from meristem.model.init import init_weights
from meristem.model.model import Model
from meristem.model.outputs import Outputs, Wanted
from meristem.model.position import SinCos2DLayer
from meristem.model.transformer import Stack
from meristem.objectives.objective import Objective
from meristem.objectives.symbols import require_fractions
from meristem.shapes import Bool, Float, Tensor
from meristem.types import IGNORE, SOURCE, LossOut, PackedBatch, Record, Term, Tokens
from meristem_domains.vision.picture_grid import picture_grid

PIXELS = "pixels"
"""Name of the target (0 where a patch is hidden), and of the term."""

SCORED = 0

EPS = 1e-6
"""Added to the variance of a patch that its values are divided by the root of."""

PICTURES = 8
"""That a reconstruction is shown of."""

DECODER = "decoder"


class MaskedPatches(Objective):
    """Paint the hidden patches of a picture (masked autoencoder; He 2022, arXiv 2111.06377).

    The trunk reads the special rows and the patches that are left, and nothing of the hidden ones. A light decoder
    puts a learned vector where each hidden patch was and predicts its values; it is needed in training alone. The
    loss is the squared error of a hidden patch, the mean over its values. How many patches of a picture are hidden is
    exact; which ones, is drawn anew each epoch. Pictures of any sizes train together.

    Args:
        rate: fraction of a picture's patches that are hidden; at least one is, and at least one is left.
        is_normalised: values are predicted less the mean of their patch, over its deviation.
        decoder_width: of the decoder.
        decoder_layers: blocks of the decoder.
        decoder_heads: attention heads of the decoder.
    """

    def __init__(
        self,
        rate: float = 0.75,
        is_normalised: bool = True,
        decoder_width: int = 128,
        decoder_layers: int = 2,
        decoder_heads: int = 4,
    ):
        require_fractions({"rate": rate}, above_zero=("rate",))
        if rate == 1:
            raise ConfigError("objective.rate must be below 1: something of a picture must be left; got 1")
        if decoder_layers < 1 or decoder_heads < 1:
            raise ConfigError(
                f"objective.decoder_layers and decoder_heads must be 1 or more; got {decoder_layers}, {decoder_heads}"
            )
        if decoder_width < 1 or decoder_width % 4 or decoder_width % decoder_heads:
            raise ConfigError(
                "objective.decoder_width must be divisible by 4, for two axes of positions, and by decoder_heads; "
                f"got decoder_width={decoder_width}, decoder_heads={decoder_heads}"
            )
        self.rate, self.is_normalised = rate, is_normalised
        self.decoder_width, self.decoder_layers, self.decoder_heads = decoder_width, decoder_layers, decoder_heads
        self._tokenizer: Tokenizer | None = None

    def bind(self, data: RunData) -> None:
        tokenizer = data.tokenizer
        if not tokenizer.num_features or tokenizer.num_axes != 2:
            raise ConfigError(
                "objective MaskedPatches needs a domain of pictures: patches that lie on two axes; got "
                f"{tokenizer.num_features} features of a patch and {tokenizer.num_axes} axes"
            )
        self._tokenizer = tokenizer

    def bind_model(self, config: TransformerConfig) -> None:
        super().bind_model(config)
        if config.num_decoder_layers:
            raise ConfigError(
                "objective MaskedPatches needs a model of one stack, and brings a decoder of its own; "
                f"got num_decoder_layers={config.num_decoder_layers} (architecture.num_decoder_layers)"
            )
        if not config.embedding.patch_features:
            raise ConfigError(
                "objective MaskedPatches needs a model of patches; got 0 (architecture.embedding.patch_features)"
            )

    def lengths(self, lengths: np.ndarray) -> np.ndarray:
        assert self._tokenizer is not None, "bind comes first"
        num_hidden = self._num_hidden(lengths - sum(self._tokenizer.num_special))
        return 2 * lengths - num_hidden

    def prepare(self, record: Record, encode: Encoder, rng: np.random.Generator) -> tuple[Tokens, ...]:
        """What the trunk reads, and all that the decoder is to know of."""
        tokens = encode(self.inputs[0])
        assert tokens.features is not None, "patches have features"
        patches = tokens.payload_rows
        num_hidden = int(self._num_hidden(np.array(len(patches))))
        is_hidden = np.zeros(len(tokens), bool)
        is_hidden[patches[rng.permutation(len(patches))[:num_hidden]]] = True
        source = Tokens(
            positions=tokens.positions[~is_hidden],
            ids=tokens.ids[~is_hidden],
            features=tokens.features[~is_hidden],
            side=SOURCE,
            is_special=None if tokens.is_special is None else tokens.is_special[~is_hidden],
        )
        asked = np.where(is_hidden, SCORED, IGNORE)
        return source, replace(tokens, targets={**tokens.targets, PIXELS: asked})

    def _num_hidden(self, num_patches: np.ndarray) -> np.ndarray:
        """How many patches are hidden of so many."""
        most = np.maximum(num_patches - 1, 0)  # of a single patch, none
        return np.clip(np.rint(self.rate * num_patches).astype(np.int64), np.minimum(1, most), most)

    def router_counts(self, batch: PackedBatch) -> dict[str, float]:
        assert batch.source is not None
        return super().router_counts(batch.source)  # the trunk sees that side alone

    def build(self, config: TransformerConfig) -> nn.ModuleDict:
        light = TransformerConfig(
            width=self.decoder_width,
            num_layers=self.decoder_layers,
            embedding=Embedding(vocab_size=1),  # a stack has none
            attention=Attention(num_heads=self.decoder_heads),
            feedforward=FeedForward(width=4 * self.decoder_width),
            position=SinCos2D(),
            norm=config.norm,
        )
        return nn.ModuleDict({DECODER: PatchDecoder(light, config.width, config.embedding.patch_features)})

    def wanted(self, batch: PackedBatch) -> Wanted:
        return Wanted(is_source_only=True)

    def loss(self, outputs: Outputs, extra: nn.ModuleDict, batch: PackedBatch) -> LossOut:
        predicted_TP, is_hidden_T = self._paint(outputs, extra, batch)
        errors_T = (predicted_TP.float() - self._values(batch)).square().mean(1)
        return LossOut({PIXELS: Term((errors_T * is_hidden_T).sum(), is_hidden_T.sum())})

    def _paint(
        self, outputs: Outputs, extra: nn.ModuleDict, batch: PackedBatch
    ) -> tuple[Float[Tensor, "T P"], Bool[Tensor, "T"]]:
        """What the decoder predicts at every row, and which rows are scored."""
        is_hidden_T = batch.targets[PIXELS] == SCORED
        return extra[DECODER](outputs.hidden.final, batch, is_hidden_T), is_hidden_T

    def _values(self, batch: PackedBatch) -> Float[Tensor, "T P"]:
        """The values of each patch as they are to be predicted."""
        assert batch.features is not None
        if not self.is_normalised:
            return batch.features
        mean, deviation = _moments(batch.features)
        return (batch.features - mean) / deviation

    @torch.no_grad()
    def figures(self, model: Model, extra: nn.ModuleDict, batch: PackedBatch) -> Mapping[str, np.ndarray]:
        """`reconstruction`: some pictures, what the trunk sees of each, and what the decoder makes of it.

        Hidden patches show the mean colour where nothing is painted. A normalised prediction is shown with the mean
        and the deviation of the patch it stands for, which the model does not know.
        """
        assert self._tokenizer is not None
        assert batch.features is not None
        predicted_TP, is_hidden_T = self._paint(model(batch, self.wanted(batch)), extra, batch)
        predicted_TP = predicted_TP.float()
        if self.is_normalised:
            mean, deviation = _moments(batch.features)
            predicted_TP = predicted_TP * deviation + mean
        is_hidden_T1 = is_hidden_T[:, None]
        seen = batch.features.masked_fill(is_hidden_T1, 0.0)
        painted = torch.where(is_hidden_T1, predicted_TP, batch.features)
        columns = [one.cpu().numpy() for one in (batch.features, seen, painted)]
        positions, ids = batch.positions.cpu().numpy(), batch.ids.cpu().numpy()
        rows = []
        for start, length in list(zip(batch.layout.starts, batch.layout.lengths))[:PICTURES]:
            own = slice(start, start + length)
            tokens = [Tokens(positions=positions[own], ids=ids[own], features=values[own]) for values in columns]
            rows.append([self._tokenizer.decode(one) for one in tokens])
        return {"reconstruction": picture_grid(rows)}


def _moments(patches: Float[Tensor, "T P"]) -> tuple[Float[Tensor, "T 1"], Float[Tensor, "T 1"]]:
    """Mean and deviation of the values of each patch, as He 2022 takes them."""
    return patches.mean(1, keepdim=True), (patches.var(1, keepdim=True) + EPS).sqrt()


class PatchDecoder(nn.Module):
    """From the rows of patches that were seen to the values of all patches.

    Positions are fixed sines and cosines of row and column, so that any grid will do.

    Args:
        config: of its stack.
        source_width: of the rows that it reads.
        patch_features: values of a patch (P).
    """

    def __init__(self, config: TransformerConfig, source_width: int, patch_features: int):
        super().__init__()
        assert isinstance(config.position, SinCos2D)
        self.read = nn.Linear(source_width, config.width)
        self.hidden = nn.Parameter(torch.empty(config.width))
        self.position = SinCos2DLayer(config.position, config.width)
        self.stack = Stack(config, range(config.num_layers))
        self.paint = nn.Linear(config.width, patch_features)
        init_weights(self, config.init, config.num_layers)
        self.init_own_weights(config.init)

    def forward(
        self, source: Float[Tensor, "R D"], batch: PackedBatch, is_hidden: Bool[Tensor, "T"]
    ) -> Float[Tensor, "T P"]:
        """Predict the values of every row.

        Args:
            source: rows that were seen; in each sequence those of `batch` that are not hidden, in their order.
            is_hidden: rows of `batch` that were not seen.
        """
        seen_RW = self.read(source)
        # spare rows of the batch have no row to take: any will do
        place_T = ((~is_hidden).cumsum(0) - 1).clamp(0, len(seen_RW) - 1)
        x_TW = torch.where(is_hidden[:, None], self.hidden.to(seen_RW.dtype), seen_RW.index_select(0, place_T))
        x_TW = x_TW + self.position(batch.positions).to(x_TW.dtype)
        painted: Tensor = self.paint(self.stack.run(x_TW, batch).final)
        return painted

    def init_own_weights(self, config: Init | None) -> None:
        """The vector of hidden patches starts as a symbol's does."""
        nn.init.trunc_normal_(self.hidden, std=config.std if config else 0.02)
