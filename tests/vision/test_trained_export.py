"""Imported from timm, trained on, exported to timm: it says of a picture's file what `meristem predict` says."""

import contextlib
import csv
import io
from pathlib import Path

import numpy as np
import pytest
import timm
import timm.data
import torch
from images import redraw_image_model
from PIL import Image
from timm.models import save_for_hf

from meristem.cli.main import main
from meristem_domains.vision.families.runners import load_timm

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
MODELS = {
    "class token": ("vit_tiny_patch16_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "attention pool": ("vit_base_patch16_siglip_224", {}),
    "mean and norm, registers": ("vit_medium_patch16_reg4_gap_256", {}),
}
CONFIG = """
model:
  init_from: ours
  drop_path: 0.2
  ema_decay: 0.5
  objective: {class_path: Supervised, init_args: {targets: [{name: label, pool: own}]}}
  optimizer: {lr: 1e-3, warmup_steps: 1, layer_decay: 0.7}
data: {domain: vision, sources: pets, tokens_per_batch: 200, split: {validation_frac: 0.25}}
trainer: {max_steps: 4, accelerator: cpu, enable_progress_bar: false, logger: false}
watch: {validate_every_n_steps: 4, save_every_n_steps: 4}
"""


def run(*arguments: object) -> None:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = main([str(argument) for argument in arguments])
    assert code == 0, out.getvalue()


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_timm_comes_back_trained(
    name: str, rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MERISTEM_CACHE", str(tmp_path / "cache"))
    files = []
    for number in range(36):
        folder = Path("pets", ("cat", "dog", "owl")[number % 3])
        folder.mkdir(parents=True, exist_ok=True)
        files.append(folder / f"{number:02d}.png")
        pixels = rng.integers(0, 130 + 60 * (number % 3), (rng.integers(40, 70), rng.integers(40, 70), 3), np.uint8)
        Image.fromarray(pixels).save(files[-1])
    architecture, changed = MODELS[name]
    model = timm.create_model(architecture, **{**SMALL, **changed, "num_classes": 5})
    save_for_hf(redraw_image_model(model, rng), "theirs", safe_serialization=True)
    Path("tune.yaml").write_text(CONFIG)
    run("import", "theirs", "ours", "--skip-parity")
    run("fit", "--config", "tune.yaml", "--run_dir", "run")
    run("export", "run/model-last", "back", "--to", "timm", "--skip-parity")
    run("predict", "run/model-last", *files, "--output", "labels.csv", "--precision", "fp32")
    with open("labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))

    theirs = load_timm(tmp_path / "back")
    assert theirs.pretrained_cfg["label_names"] == ["cat", "dog", "owl"]
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=theirs))
    pixels = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
    with torch.inference_mode():
        probabilities = theirs(pixels).softmax(-1).numpy()
    for row, wanted in zip(rows, probabilities, strict=True):
        got = np.array([float(row[f"label:{kind}"]) for kind in ("cat", "dog", "owl")])
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)  # written with six digits
        assert row["label"] == ("cat", "dog", "owl")[wanted.argmax()]
    # and it is not the model that the run began with
    before = load_timm(tmp_path / "theirs").state_dict()
    assert any(not torch.equal(before[key], value) for key, value in theirs.state_dict().items() if "blocks" in key)
    assert any(not torch.equal(before[key], value) for key, value in theirs.state_dict().items() if "pos_embed" in key)
