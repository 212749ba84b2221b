"""Models of `transformers` at random weights, every parameter redrawn.

Shapes: the first three are those published, from 8 to 150 million parameters.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import EsmConfig, EsmForMaskedLM

SYMBOLS = ("<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>")

COMMON = {
    "vocab_size": 33,
    "mask_token_id": 32,
    "pad_token_id": 1,
    "token_dropout": True,
    "layer_norm_eps": 1e-5,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "max_position_embeddings": 1026,
}


def esm2(num_layers: int, width: int, num_heads: int, **settings: object) -> EsmConfig:
    shape = {
        "num_hidden_layers": num_layers,
        "hidden_size": width,
        "num_attention_heads": num_heads,
        "intermediate_size": 4 * width,
    }
    return EsmConfig(
        **{**COMMON, "position_embedding_type": "rotary", "emb_layer_norm_before": False, **shape, **settings}
    )


def esm1b(num_layers: int, width: int, num_heads: int, **settings: object) -> EsmConfig:
    kind = {"position_embedding_type": "absolute", "emb_layer_norm_before": True}
    return esm2(num_layers, width, num_heads, **{**kind, **settings})


SHAPES = {
    "8M": esm2(6, 320, 20),
    "35M": esm2(12, 480, 20),
    "150M": esm2(30, 640, 20),
    "reduced ESM-1b": esm1b(3, 96, 6),
    "small": esm2(3, 48, 6),
}


def redrawn(config: EsmConfig, rng: np.random.Generator) -> EsmForMaskedLM:
    """A model none of whose parameters stands at its initial value.

    At initial values biases are 0 and norms 1, so a dropped bias or a swapped norm would pass. Queries and keys
    are drawn large, so that attention is sharp; with flat attention a wrong rotation would hardly show.
    """
    model = EsmForMaskedLM(config).eval()
    for name, parameter in model.named_parameters():
        draw = torch.from_numpy(rng.standard_normal(parameter.shape, dtype=np.float32))
        if parameter.ndim == 1:
            is_norm = name.endswith("weight")
            parameter.data = 1 + 0.3 * draw if is_norm else 0.3 * draw
        elif "embeddings" in name:
            # logits about as large as those of trained models
            parameter.data = 4 * draw / parameter.shape[1] ** 0.5
        else:
            gain = 2.0 if ".query." in name or ".key." in name else 1.0
            parameter.data = gain * draw / parameter.shape[1] ** 0.5
    model.tie_weights()
    return model


def save(model: torch.nn.Module, folder: Path, **options: object) -> Path:
    """As `save_pretrained` writes it, with the vocabulary."""
    model.save_pretrained(folder, **options)
    (folder / "vocab.txt").write_text("\n".join(SYMBOLS))
    return folder
