"""Run an image model of ours and its reference in `transformers` or timm on the same random images."""

import importlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from meristem.data.tokenizer import Tokenizer
from meristem.interop.runners import Results, Runner, load_transformers
from meristem.model.model import Model
from meristem.shapes import Tensor
from meristem.types import Tokens
from meristem_domains.vision.families.labels import LABEL
from meristem_domains.vision.patches import PatchTokenizer


def draw_images(model: Model, tokenizer: Tokenizer, rng: np.random.Generator) -> list[Tokens]:
    """Draw random images of the model's size, cut into patches. The label `image` is the normalised `[C, H, W]`."""
    assert isinstance(tokenizer, PatchTokenizer)
    # the other library gets its picture behind its own resizing, so ours must not resize either
    plain = replace(tokenizer, resize_px=None, crop_frac=1.0, crop="squash")
    mean, std = np.array(plain.mean, np.float32), np.array(plain.std, np.float32)
    found = []
    for _ in range(3):
        pixels = rng.random((*plain.fixed_px, plain.num_channels), dtype=np.float32)
        image = np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1))
        found.append(replace(plain.encode(pixels), labels={"image": image}))
    return found


def run_transformers(reference: Any, sequences: Sequence[Tokens]) -> Results:
    """Run a model of `transformers`. Its last hidden state is taken after the final norm, as ours is."""
    out = reference(pixel_values=_pixels(sequences), output_hidden_states=True)
    trunk = reference.base_model
    states = [*out.hidden_states[:-1], trunk.layernorm(out.hidden_states[-1])]
    found = {f"layer {index}": list(state) for index, state in enumerate(states)}
    pooled = getattr(out, "pooler_output", None)
    if pooled is not None:
        found["pooled"] = list(pooled)
    if getattr(out, "logits", None) is not None:
        found[LABEL] = list(out.logits)
    return found


def load_timm(folder: Path) -> Any:
    timm = importlib.import_module("timm")
    level = logging.getLogger("timm").level
    logging.getLogger("timm").setLevel(logging.ERROR)
    try:
        return timm.create_model(f"local-dir:{folder}", pretrained=True).float().eval()
    finally:
        logging.getLogger("timm").setLevel(level)


def run_timm(reference: Any, sequences: Sequence[Tokens]) -> Results:
    """Run a vision transformer of timm and keep the output of each block."""
    kept: list[Tensor] = []
    hooks = [reference.norm_pre.register_forward_hook(lambda *call: kept.append(call[2]))]
    hooks += [block.register_forward_hook(lambda *call: kept.append(call[2])) for block in reference.blocks]
    try:
        last = reference.forward_features(_pixels(sequences))
    finally:
        for hook in hooks:
            hook.remove()
    found = {f"layer {index}": list(state) for index, state in enumerate([*kept[:-1], last])}
    if reference.num_classes:
        found[LABEL] = list(reference.forward_head(last))
    if hasattr(reference, "head_dist"):  # it averages the two rows that ours puts side by side
        found["pooled"] = list(last[:, :2].flatten(1))
    elif reference.global_pool:
        found["pooled"] = list(reference.forward_head(last, pre_logits=True))
    return found


def _pixels(sequences: Sequence[Tokens]) -> Tensor:
    return torch.from_numpy(np.stack([tokens.labels["image"] for tokens in sequences]))


HF_IMAGES = Runner("transformers", load_transformers, draw_images, run_transformers)
TIMM_IMAGES = Runner("timm", load_timm, draw_images, run_timm)
