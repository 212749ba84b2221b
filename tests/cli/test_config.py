"""`meristem config --print` lists every key with its type, its default and its help."""

import inspect
import re
from dataclasses import fields, is_dataclass
from typing import get_type_hints

import pytest
from docstring_parser import parse

from meristem.cli.main import main
from meristem.model import config
from meristem.registry import find_all
from meristem.train.spec import RunSpec


def keys_of(kind: type, prefix: str = "") -> set[str]:
    hints = get_type_hints(kind)
    found: set[str] = set()
    for one in fields(kind):
        is_part = is_dataclass(hints[one.name])
        found |= keys_of(hints[one.name], f"{prefix}{one.name}.") if is_part else {f"{prefix}{one.name}"}
    return found


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, tuple[str, str]]:
    """What is said behind each key, and its help."""
    assert main(["config", "--print", *arguments]) == 0
    text = capsys.readouterr().out
    joined = re.sub(r"\n {4}(?! )", " ", text)
    return {key: (said, help) for key, said, help in re.findall(r"^  (\S+): (.*)\n {6}(.*)", joined, re.M)}


def test_every_key_is_listed_with_its_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    found = printed(capsys)
    assert keys_of(RunSpec) - set(found) == set()
    assert len(keys_of(RunSpec)) > 55
    assert all(help.strip() for _, help in found.values())
    assert found["model.optimizer.lr"][0] == "float, default 0.0004"
    assert found["data.domain"][0] == "str, required"
    assert found["model.architecture.position"][0].startswith("kind Rotary | ")
    main(["config", "--print"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 70


def test_a_config_shows_what_it_sets_and_the_arguments_of_its_objective(capsys):
    found = printed(capsys, "--config", "protein/sample")
    assert found["model.optimizer.lr"][0] == "float, default 0.0004, here 0.002"
    assert found["model.optimizer.eps"][0] == "float, default 1e-08"
    assert found["model.objective.init_args.mean_span"][0] == "float, default 1.0"
    assert "model.objective.init_args.mean_span" not in printed(capsys)


def test_every_setting_of_every_kind_of_part_has_a_help():
    """What `config --print` shows of a part, and what an editor shows of a class."""
    kinds = [kind for kind in vars(config).values() if is_dataclass(kind) and kind is not config.LayerParts]
    pieces = [piece for group in ("objectives", "suites") for piece in find_all(f"meristem.{group}").values()]
    assert len(kinds) > 25
    assert len(pieces) > 8
    for kind in (*kinds, *pieces):
        found = parse(kind.__doc__).params
        helps = {name.strip() for one in found if one.description for name in one.arg_name.split(",")}
        assert set(inspect.signature(kind).parameters) - helps == set(), kind


def test_nothing_is_printed_that_was_not_asked_for(capsys):
    assert main(["config"]) == 2
    assert "--print" in capsys.readouterr().err
