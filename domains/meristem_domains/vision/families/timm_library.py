"""timm as a library: directories that it loads, and models that it builds by name (`meristem import timm:NAME OUT`)."""

import importlib
import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch

from meristem.errors import ConfigError
from meristem.interop.library import FetchOptions, Library
from meristem_domains.vision.families.timm_facts import ARCHITECTURES

FILES = ("model.safetensors", "pytorch_model.bin")
"""Weights of a model in the cache of the Hugging Face hub, the preferred file first."""


def fetch(name: str, folder: Path, options: FetchOptions) -> list[str]:
    """Build a vision transformer with the installed timm and write it as a directory of timm.

    Args:
        name: of an architecture, with or without the tag of its weights (`vit_tiny_patch16_224.augreg_in21k`).

    Raises:
        ConfigError: timm is not installed, does not know the name, or has no weights of it on this machine; or the
            architecture is not supported.
    """
    architecture = name.partition(".")[0]
    if architecture not in ARCHITECTURES:
        close = get_close_matches(architecture, ARCHITECTURES) or ["vit_tiny_patch16_224"]
        raise ConfigError(
            f"timm:{name} must be a supported vision transformer of timm, one of {len(ARCHITECTURES)} such as "
            f"{', '.join(close)}"
        )
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise ConfigError(f"timm:{name} needs timm, which is not installed: pip install 'meristem[vision]'") from error
    try:
        config = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        raise ConfigError(f"timm:{name}: the installed timm {timm.__version__} has no such model: {error}") from error
    if options.random_weights:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            model = timm.create_model(name)
        note = f"built by timm {timm.__version__} with random weights (seed {options.seed}): it has learned nothing"
    else:
        file = _local_weights(config)
        if file is None:
            raise ConfigError(
                f"timm:{name}: its weights must be on this machine, and nothing is downloaded; they are not in timm's "
                f"cache: have timm.create_model({name!r}, pretrained=True) fetch them, or take --random-weights"
            )
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(file)})
        note = f"built by timm {timm.__version__} with the weights of its cache: {file}"
    timm.models.save_for_hf(model.eval(), folder, safe_serialization=True)
    return [note]


def _local_weights(config: Any) -> Path | None:
    """The file of a model's weights in the caches that timm uses; None where there is none."""
    if config is None:
        return None
    if config.hf_hub_id:
        hub = importlib.import_module("huggingface_hub")
        repository, _, revision = config.hf_hub_id.partition("@")
        for file in [config.hf_hub_filename] if config.hf_hub_filename else FILES:
            found = hub.try_to_load_from_cache(repository, file, revision=revision or None)
            if isinstance(found, str):
                return Path(found)
    if config.url:
        file = Path(torch.hub.get_dir(), "checkpoints", os.path.basename(urlparse(config.url).path))
        return file if file.is_file() else None
    return None


TIMM = Library(
    name="timm",
    line_that_loads=lambda folder, config: f"timm.create_model({f'local-dir:{folder}'!r}, pretrained=True)",
    fetch=fetch,
)
