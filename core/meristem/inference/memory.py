"""How much memory is at hand, and what a pack takes of it."""

from pathlib import Path

import torch

from meristem.model.config import TransformerConfig

MOST_TOKENS = {"cpu": 4096, "cuda": 65536}
"""Tokens of a pack where memory allows. More gains nothing on a CPU and takes memory: at the width of ESM-2 8M,
2,048 to 8,192 tokens are equally fast and 16,384 are 15 % slower."""

FEWEST_TOKENS = 256
"""A pack of fewer is not worth its overhead; a model for which even this is too much says so when it is run."""

USED_FRAC = 0.5
"""Of the memory at hand: what `bytes_per_token` leaves out (vectors, chunks that wait, holes) needs room as well."""


def fitting_tokens(config: TransformerConfig, device: torch.device, dtype: torch.dtype) -> int:
    """Tokens of a pack that suit a device: as many as are worth it, or as memory allows."""
    most = MOST_TOKENS.get(device.type, MOST_TOKENS["cpu"])
    at_hand = available_bytes(device)
    if at_hand is None:
        return most
    return max(min(most, int(USED_FRAC * at_hand) // bytes_per_token(config, dtype)), FEWEST_TOKENS)


def bytes_per_token(config: TransformerConfig, dtype: torch.dtype) -> int:
    """What a token of a pack takes at most while a layer runs, weights and a bias of scores left out."""
    # numbers alive at once: trunk, norm, kept layer; queries, keys and values as made, turned, and cut into groups
    most = 0
    for parts in map(config.layer, range(config.total_layers)):
        heads = parts.attention.num_heads + 2 * parts.attention.kv_heads
        attention = 3 * heads * parts.head_width + 2 * parts.attention.num_heads * parts.head_width
        up = parts.feedforward.width * (2 if parts.feedforward.is_gated else 1)
        most = max(most, 4 * parts.width + max(attention, up + 2 * parts.feedforward.width))
    return dtype.itemsize * most


def available_bytes(device: torch.device) -> int | None:
    """Memory that can still be taken; None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    # of the whole machine, as Linux says it, and of the control group that a container runs in
    found = [int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemAvailable:")]
    limit, used = (_lines(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit and used and limit[0] != "max":
        found.append(max(int(limit[0]) - int(used[0]), 0))
    return min(found, default=None)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
