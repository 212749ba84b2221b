"""A checkpoint is read into the memory of one model and not of two, whatever form it comes in."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from meristem.interop.families.bert import BERT
from meristem.model.config import Attention, Embedding, FeedForward, LayerNorm, Learned, Residual, TransformerConfig
from meristem.model.model import Model

NUM_SHARDS = 6

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs the peak that Linux keeps")

MEASURE = """
import json, sys
from pathlib import Path
import torch._dynamo  # torch loads it when the meta device is first used; it is not the model's memory
import meristem.interop.directory as directory
from meristem.interop import weights
from meristem.interop.family import installed_families

installed_families()  # nor are the libraries that families of other domains import

def memory(name):  # that of getrusage would be inherited from the process of the tests
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

if sys.argv[2] == "greedy":  # the mutant: every tensor is read before the model is filled
    opened, kept = weights.open_weights, []
    def read_all(folder):
        found = opened(folder)
        kept.append({name: found[name] for name in found})
        return found
    directory.open_weights = read_all
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = memory("VmRSS")
model, _ = directory.read_model(Path(sys.argv[1]))
size = sum(p.numel() * p.element_size() for p in model.parameters())
assert all(p.dtype.itemsize == 4 for p in model.parameters())
print(json.dumps([(memory("VmHWM") - before) / size, size]))
"""


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    """About 100 MB of them."""
    config = TransformerConfig(
        width=512,
        num_layers=8,
        embedding=Embedding(vocab_size=4096, token_types=2, is_normed=True),
        position=Learned(max_positions=512),
        attention=Attention(num_heads=8),
        feedforward=FeedForward(width=2048),
        norm=LayerNorm(eps=1e-12),
        residual=Residual(placement="after"),
        final_norm=False,
    )
    return BERT.table.write(Model(config).state_dict(), config)


CONFIG = {"model_type": "bert", "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8,
          "intermediate_size": 2048, "vocab_size": 4096, "architectures": ["BertModel"]}  # fmt: skip


def write(folder: Path, tensors: dict[str, torch.Tensor], form: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    if form == "safetensors":
        save_file(tensors, folder / "model.safetensors")
        return folder
    ending, index = ("bin", "pytorch_model.bin.index.json")
    if form == "safetensors shards":
        ending, index = ("safetensors", "model.safetensors.index.json")
    names, count = list(tensors), -(-len(tensors) // NUM_SHARDS)
    files = {name: f"part-{i // count}.{ending}" for i, name in enumerate(names)}
    for file in sorted(set(files.values())):
        part = {name: tensors[name].clone() for name in names if files[name] == file}
        if ending == "bin":
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file)
    (folder / index).write_text(json.dumps({"weight_map": files}))
    return folder


def peak_over_size(folder: Path, how: str = "lazy") -> float:
    """Growth of the process while a model is read, over the size of the model."""
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), how], check=True, capture_output=True, text=True, timeout=120
    )
    share, size = json.loads(out.stdout)
    print(f"{folder.name} {how}: {share:.2f} x {size / 1e6:.0f} MB")
    return share


# a fused tensor and its parts are there at once, and a shard of .bin is mapped while it is read
@pytest.mark.parametrize(("form", "limit"), [("safetensors", 1.25), ("safetensors shards", 1.25), ("bin shards", 1.5)])
def test_the_peak_is_one_model(form: str, limit: float, tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    assert peak_over_size(write(tmp_path / "hf", tensors, form)) <= limit


def test_reading_all_tensors_first_would_be_caught(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    assert peak_over_size(write(tmp_path / "hf", tensors, "safetensors"), "greedy") >= 1.8
