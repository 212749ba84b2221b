"""An architecture is resolved once: what `config.yaml` says, what `inspect` counts and what is built agree."""

import json

import lightning as L
import pytest

from meristem.cli.configs import shipped_configs
from meristem.cli.main import main
from meristem.cli.run_config import parse
from meristem.model.init import without_weights
from meristem.model.plain import to_json
from meristem.train.run import build
from meristem.train.spec import values_of


def test_shipped_configs_are_found() -> None:
    assert len(shipped_configs()) >= 17


@pytest.mark.parametrize("name", shipped_configs())
def test_config_inspect_and_model_agree(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = parse(["--config", name, "--data.sources", "@sample"])
    if run.model.init_from:
        pytest.skip("its architecture is that of another model")
    assert main(["inspect", name, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    task, _ = build(run)
    task.trainer = L.Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False)
    with without_weights():  # heads of labels come with the data, and inspect does not count them
        task.configure_model()
    dropped = {"residual": to_json(task.architecture)["residual"]}  # model.dropout goes over the architecture's
    assert values_of(run)["model"]["architecture"] == facts["architecture"]
    assert facts["architecture"] | dropped == to_json(task.architecture)
    assert facts["parameters"]["total"] == sum(parameter.numel() for parameter in task.model.parameters())


def test_the_head_that_an_objective_needs_is_in_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "protein/sample", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["architecture"]["head"] is not None
    assert facts["parameters"]["head tokens"] > 0
