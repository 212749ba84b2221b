"""A small model of pictures, a config that trains one, and the command line in this process."""

import contextlib
import io
from pathlib import Path

import torch

from meristem.cli.main import main
from meristem.model.config import Attention, Embedding, FeedForward, SinCos2D, TransformerConfig
from meristem.model.heads import Readout
from meristem.model_directory import ModelCard, save_model
from meristem_domains.vision import domain
from model_runs import specs

CONFIG = """
model:
  architecture: {width: 16, num_layers: 1, attention: {num_heads: 2}, feedforward: {width: 32}, pool: {kind: Prefix}}
  objective: {class_path: Supervised, init_args: {targets: [{name: label, pool: cls}]}}
  optimizer: {lr: 3e-3, warmup_steps: 2}
data:
  domain: vision
  sources: pets
  tokenizer: {image_px: [8, 12], patch_px: 4}
  tokens_per_batch: 70
  split: {validation_frac: 0.2}
trainer: {max_steps: 6, accelerator: cpu, logger: false}
watch: {validate_every_n_steps: 3, save_every_n_steps: 3}
"""

Done = tuple[int, str, str]


def run(*arguments: object) -> Done:
    """In this process: imports are paid for once."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


def small_model(folder: Path, num_channels: int = 3) -> Path:
    """A model directory that tells cats from dogs, untrained."""
    tokenizer = domain.tokenizer(image_px=[8, 12], patch_px=4, num_channels=num_channels)
    config = TransformerConfig(
        width=16,
        num_layers=1,
        embedding=Embedding(vocab_size=1, patch_features=tokenizer.num_features),
        position=SinCos2D(),
        attention=Attention(num_heads=2),
        feedforward=FeedForward(width=32),
    )
    readout = Readout(name="label", level="record", task="classification", classes=("cat", "dog"))
    card = ModelCard(config, tokenizer, specs((), (readout,)), domain="vision")
    torch.manual_seed(1)
    save_model(folder, card, card.build())
    return folder
