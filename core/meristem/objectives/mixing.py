"""Records of a pack mixed in pairs, in training: mixup and cutmix, on patches.

Mixup: Zhang 2017 (arXiv 1710.09412). Cutmix: Yun 2019 (arXiv 1905.04899), here of whole patches, so that it asks for
nothing but the places of rows; the share of labels is the share of patches, exactly. Each record draws its own partner
and share, from torch's generator, which a run reseeds at every step.
"""

from dataclasses import dataclass, replace

import torch
from torch.distributions import Beta

from meristem.errors import require
from meristem.model.config.checks import require_all
from meristem.shapes import Bool, Int, Tensor
from meristem.types import PackedBatch


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """How records are mixed; by default not at all.

    Attributes:
        mixup: both parameters of the beta distribution that the share of a mean of two records is drawn from; 0 for
            none.
        cutmix: the same for a rectangle that is taken out of the other record; 0 for none.
        rate: chance that a record is mixed.
        cutmix_frac: share of the mixed ones that get a rectangle, where both kinds are asked for.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    rate: float = 1.0
    cutmix_frac: float = 0.5

    def __post_init__(self) -> None:
        require_all(self, "mixing.", "0 or more", "mixup", "cutmix")
        for name in ("rate", "cutmix_frac"):
            require(0 <= getattr(self, name) <= 1, f"mixing.{name} must be in [0, 1]", getattr(self, name))

    @property
    def is_on(self) -> bool:
        return bool(self.rate and (self.mixup or self.cutmix))


PARTNER, SHARE = "mixed.partner", "mixed.share"
"""Labels that `mix` adds. No column's name has a dot."""


def mix(batch: PackedBatch, mixing: Mixing, grid: tuple[int, ...], may_S: Bool[Tensor, "S"]) -> PackedBatch:
    """Mix sequences of patches, all of one grid; only two that both may be mixed (`may_S`) are.

    Returns:
        The pack with other features, and two more labels, both `[S]`: the sequence that each is mixed with (`PARTNER`),
        and its share of itself (`SHARE`), between 0 and 1; 1 where it was not mixed.
    """
    num = batch.layout.num_sequences
    assert batch.features is not None, "only patches are mixed"
    assert len(set(batch.layout.lengths)) == 1, "sequences of one length are mixed"
    length, device = batch.layout.lengths[0], batch.features.device
    # drawn on the host: the same numbers on every device
    partners = torch.randperm(num)
    is_mixed = torch.rand(num) < mixing.rate
    is_cut = torch.rand(num) < (mixing.cutmix_frac if mixing.mixup else 1.0) if mixing.cutmix else torch.zeros(num) > 0
    mean_shares = Beta(mixing.mixup, mixing.mixup).sample((num,)) if mixing.mixup else torch.ones(num)
    starts, stops = _rectangles(mixing.cutmix, num, grid)

    partners, is_mixed, is_cut = partners.to(device), is_mixed.to(device), is_cut.to(device)
    is_mixed &= may_S & may_S[partners]
    places_SnA = batch.positions[: num * length].view(num, length, -1)
    is_inside = (places_SnA >= starts.to(device)[:, None]) & (places_SnA < stops.to(device)[:, None])
    own_Sn = torch.where(is_cut[:, None], 1.0 - is_inside.all(-1).float(), mean_shares.to(device)[:, None])
    own_Sn = torch.where(is_mixed[:, None], own_Sn, 1.0)
    is_patch_Sn = (batch.ids[: num * length] < 0).view(num, length)
    shares = (own_Sn * is_patch_Sn).sum(1) / is_patch_Sn.sum(1)
    features_SnP = batch.features[: num * length].view(num, length, -1)
    mixed = torch.lerp(features_SnP[partners], features_SnP, own_Sn[..., None].to(features_SnP.dtype))
    features = torch.cat([mixed.flatten(0, 1), batch.features[num * length :]])
    return replace(batch, features=features, labels={**batch.labels, PARTNER: partners, SHARE: shares})


def _rectangles(alpha: float, num: int, grid: tuple[int, ...]) -> tuple[Int[Tensor, "S A"], Int[Tensor, "S A"]]:
    """First places of rectangles anywhere on a grid, and those behind the last; empty without `alpha`."""
    sides = torch.tensor(grid)
    taken = 1 - Beta(alpha, alpha).sample((num,)) if alpha else torch.zeros(num)
    sizes = (sides * taken[:, None] ** (1 / len(grid))).round().long()
    starts = (torch.rand(num, len(grid)) * (sides - sizes + 1)).long()
    return starts, starts + sizes
