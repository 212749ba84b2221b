"""`meristem validate` and `test` of objectives with a decoder or a teacher: those that the last checkpoint has."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import encoded, write_folder
from small_runs import run

from meristem.train.task import Task

RUN = """
model:
  architecture: {{width: 16, num_layers: 1, attention: {{num_heads: 2}}, feedforward: {{width: 32}},
    pool: {{kind: Prefix}}, position: {{kind: SinCos2D}}}}
  objective: {objective}
  optimizer: {{lr: 3e-3, warmup_steps: 2}}
  ema_decay: {ema}
data:
  domain: vision
  sources: pictures
  tokenizer: {{image_px: 16, patch_px: 4}}
  tokens_per_batch: 300
  split: {{validation_frac: 0.3, test_frac: 0.2}}
trainer: {{max_steps: 6, accelerator: cpu, enable_progress_bar: false, logger: false}}
watch: {{validate_every_n_steps: 6, save_every_n_steps: 6}}
"""
OBJECTIVES = {
    "MaskedPatches": "{class_path: MaskedPatches, init_args: {decoder_width: 16, decoder_heads: 2, decoder_layers: 1}}",
    "SelfDistillation": "{class_path: SelfDistillation, init_args: {crops: {global_px: 16, local_px: 8, num_local: 2}, "
    "num_prototypes: 16, hidden_width: 16, bottleneck_width: 8, warmup_steps: 2}}",
}


@pytest.fixture
def pictures(rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MERISTEM_CACHE", str(tmp_path / "cache"))
    write_folder(tmp_path / "pictures", {f"{i}.png": encoded(rng, "PNG", 20, 24, i % 3) for i in range(40)})
    return tmp_path


def figures(out: str) -> dict[str, float]:
    """What the verb says, by name."""
    return {words[0]: float(words[1]) for words in map(str.split, out.splitlines()[1:])}


@pytest.mark.parametrize("ema", ["null", "0.9"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_figures_of_a_run_are_found_again(name: str, ema: str, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (pictures / "run.yaml").write_text(RUN.format(objective=OBJECTIVES[name], ema=ema))
    code, _, err = run("fit", "--config", "run.yaml", "--run_dir", "run")
    assert code == 0, err
    with open("run/metrics.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    wanted = {key.removeprefix("val/"): float(value) for key, value in last.items() if key.startswith("val/") and value}
    code, out, err = run("validate", "--config", "run.yaml", "--run_dir", "run")
    assert code == 0, err
    assert out.startswith("validate: run\n")
    assert "validation part, run/checkpoints/last.ckpt\n" in err
    got = figures(out)
    assert {*got} == {*wanted}
    for key, value in wanted.items():
        assert got[key] == pytest.approx(value, rel=1e-4), key  # printed with five digits
    code, out, err = run("test", "--config", "run.yaml", "--run_dir", "run")
    assert code == 0, err
    assert out.startswith("test: run\n")
    assert "test part, run/checkpoints/last.ckpt\n" in err

    # the mutant: another decoder or teacher beside the trained model
    build = Task.on_load_checkpoint

    def forget(self: Task, checkpoint: dict) -> None:
        build(self, checkpoint)
        state = checkpoint["state_dict"]
        owners = {"extra.": self.extra, "average.extra.": None if self.average is None else self.average.extra}
        for prefix, module in owners.items():
            if module is not None:
                state.update({prefix + key: torch.randn_like(value) for key, value in module.named_parameters()})

    monkeypatch.setattr(Task, "on_load_checkpoint", forget)
    code, out, err = run("validate", "--config", "run.yaml", "--run_dir", "run")
    assert code == 0, err
    assert figures(out)["loss"] != pytest.approx(wanted["loss"], rel=1e-4)


def test_without_its_checkpoint_a_run_of_such_an_objective_is_refused(pictures: Path) -> None:
    (pictures / "run.yaml").write_text(RUN.format(objective=OBJECTIVES["MaskedPatches"], ema="null"))
    assert run("fit", "--config", "run.yaml", "--run_dir", "run")[0] == 0
    Path("run/checkpoints/last.ckpt").unlink()
    code, out, err = run("validate", "--config", "run.yaml", "--run_dir", "run")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("meristem: error: objective MaskedPatches is evaluated with what it has ")
    assert "run/checkpoints/last.ckpt would hold" in err
