"""Masked patches: the trunk reads some patches of a picture, and a small decoder predicts the others."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from meristem.data.parts import Encoder, RunData
from meristem.data.tokenizer import Tokenizer
from meristem.errors import require
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
"""Name of the target, which is 0 where a patch is hidden, and of the loss term."""

SCORED = 0

EPS = 1e-6
"""Added to the variance of a patch before its root is taken."""

PICTURES = 8
"""Number of pictures in the figure of reconstructions."""

DECODER = "decoder"


class MaskedPatches(Objective):
    """Predict the hidden patches of a picture (masked autoencoder; He 2022, arXiv 2111.06377).

    The trunk reads the special tokens and the visible patches only. A small decoder, used only in training, puts a
    learned vector in the place of each hidden patch and predicts its values. The loss is the mean squared error over
    the values of the hidden patches. The number of hidden patches is exact; which ones they are is drawn anew in each
    epoch. Pictures of any sizes train together.

    Args:
        rate: fraction of a picture's patches that are hidden; at least one is hidden, and at least one is not.
        is_normalised: predict each value minus the mean of its patch, divided by the patch's standard deviation.
        decoder_width: width of the decoder.
        decoder_layers: number of blocks of the decoder.
        decoder_heads: number of attention heads of the decoder.
    """

    _tokenizer: Tokenizer  # set by bind

    def __init__(
        self,
        rate: float = 0.75,
        is_normalised: bool = True,
        decoder_width: int = 128,
        decoder_layers: int = 2,
        decoder_heads: int = 4,
    ):
        require_fractions({"rate": rate}, above_zero=("rate",))
        require(rate < 1, "objective.rate must be below 1: something of a picture must be left", rate)
        is_stack, got = decoder_layers >= 1 and decoder_heads >= 1, f"{decoder_layers}, {decoder_heads}"
        require(is_stack, "objective.decoder_layers and decoder_heads must be 1 or more", got)
        is_width = decoder_width >= 1 and not decoder_width % 4 and not decoder_width % decoder_heads
        rule = "objective.decoder_width must be divisible by 4, for two axes of positions, and by decoder_heads"
        require(is_width, rule, f"decoder_width={decoder_width}, decoder_heads={decoder_heads}")
        self.rate, self.is_normalised = rate, is_normalised
        self.decoder_width, self.decoder_layers, self.decoder_heads = decoder_width, decoder_layers, decoder_heads

    def bind(self, data: RunData) -> None:
        tokenizer = data.tokenizer
        got = f"{tokenizer.num_features} features of a patch and {tokenizer.num_axes} axes"
        is_of_patches = tokenizer.num_features > 0 and tokenizer.num_axes == 2
        require(is_of_patches, "objective MaskedPatches needs a domain of pictures: patches that lie on two axes", got)
        self._tokenizer = tokenizer

    def bind_model(self, config: TransformerConfig) -> None:
        super().bind_model(config)
        got = f"num_decoder_layers={config.num_decoder_layers} (architecture.num_decoder_layers)"
        rule = "objective MaskedPatches needs a model of one stack, and brings a decoder of its own"
        require(not config.num_decoder_layers, rule, got)
        has_patches, got = bool(config.embedding.patch_features), "0 (architecture.embedding.patch_features)"
        require(has_patches, "objective MaskedPatches needs a model of patches", got)

    def lengths(self, lengths: np.ndarray) -> np.ndarray:
        num_hidden = self._num_hidden(lengths - sum(self._tokenizer.num_special))
        return 2 * lengths - num_hidden

    def prepare(self, record: Record, encode: Encoder, rng: np.random.Generator) -> tuple[Tokens, ...]:
        """The visible tokens, which the trunk reads, and all tokens, which the decoder is asked for."""
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
        most = np.maximum(num_patches - 1, 0)  # of a single patch, none
        return np.clip(np.rint(self.rate * num_patches).astype(np.int64), np.minimum(1, most), most)

    def router_counts(self, batch: PackedBatch) -> dict[str, float]:
        assert batch.source is not None
        return super().router_counts(batch.source)  # the trunk sees that side only

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
        """The decoder's prediction for every row, and which rows are scored."""
        is_hidden_T = batch.targets[PIXELS] == SCORED
        return extra[DECODER](outputs.hidden.final, batch, is_hidden_T), is_hidden_T

    def _values(self, batch: PackedBatch) -> Float[Tensor, "T P"]:
        """The targets: the values of each patch, normalised where the objective says so."""
        assert batch.features is not None
        if not self.is_normalised:
            return batch.features
        mean, deviation = _moments(batch.features)
        return (batch.features - mean) / deviation

    @torch.no_grad()
    def figures(self, model: Model, extra: nn.ModuleDict, batch: PackedBatch) -> Mapping[str, np.ndarray]:
        """`reconstruction`: some pictures, each beside its visible patches and its reconstruction.

        Hidden patches are shown in the mean colour. A normalised prediction is shown with the true mean and standard
        deviation of its patch, which the model does not know.
        """
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
    """Mean and standard deviation of the values of each patch, as in He 2022."""
    return patches.mean(1, keepdim=True), (patches.var(1, keepdim=True) + EPS).sqrt()


class PatchDecoder(nn.Module):
    """A small transformer that predicts the values of all patches from the outputs at the visible ones.

    Positions are fixed sines and cosines of row and column, so any grid is possible.

    Args:
        source_width: width of the trunk's outputs.
        patch_features: number of values of a patch (P).
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
            source: outputs at the rows of `batch` that are not hidden, in their order.
            is_hidden: which rows of `batch` are hidden.
        """
        seen_RW = self.read(source)
        # spare rows of the batch may take any row
        place_T = ((~is_hidden).cumsum(0) - 1).clamp(0, len(seen_RW) - 1)
        x_TW = torch.where(is_hidden[:, None], self.hidden.to(seen_RW.dtype), seen_RW.index_select(0, place_T))
        x_TW = x_TW + self.position(batch.positions).to(x_TW.dtype)
        painted: Tensor = self.paint(self.stack.run(x_TW, batch).final)
        return painted

    def init_own_weights(self, config: Init | None) -> None:
        """Initialise the vector of hidden patches like the embedding of a symbol."""
        nn.init.trunc_normal_(self.hidden, std=config.std if config else 0.02)
