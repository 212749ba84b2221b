"""Options of the command line that are the fields of a dataclass."""

from dataclasses import dataclass, field
from typing import Any, Literal, Optional

import pytest

from meristem.cli.main import Parser
from meristem.cli.options import add_options, flags_of, options_of
from meristem.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Options:
    layer_idx: int = field(default=-1, metadata={"help": "which layer"})
    scale: float = 0.5
    name: str = "x"
    count: int | None = None
    query: Literal["class", "mean"] | None = None
    other: Optional[float] = None  # noqa: UP045 (another spelling of the same)
    is_on: bool = False
    is_off: bool = True


def parse(*argv: str) -> Any:
    parser = Parser(prog="p")
    parser.add_argument("inputs", nargs="*")
    add_options(parser, Options, "options")
    return options_of(parser.parse_args(argv), Options)


def test_without_arguments_every_field_has_its_default() -> None:
    assert parse("a", "b") == Options()


def test_every_kind_of_field_is_read() -> None:
    argv = "--layer-idx 3 --scale 1e-3 --name y --count 0 --query mean --other 2 --is-on --no-is-off"
    assert parse("a", *argv.split()) == Options(
        layer_idx=3, scale=1e-3, name="y", count=0, query="mean", other=2.0, is_on=True, is_off=False
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--layer-idx", "x"], "--layer-idx: invalid int value: 'x'"),
        (["--count", "1.5"], "--count: invalid int value: '1.5'"),
        (["--query", "all"], "--query: invalid choice: 'all'"),
        (["--nothing"], "unrecognized arguments: --nothing"),
    ],
)
def test_a_wrong_value_is_a_users_error(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(*argv)


def test_flags_are_named_like_fields() -> None:
    assert flags_of(Options)[:2] == ["--layer-idx", "--scale"]


@dataclass(frozen=True, kw_only=True)
class Required:
    layer: int


@dataclass(frozen=True, kw_only=True)
class Unreadable:
    layers: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Mixed:
    layer: int | str = 0


@dataclass(frozen=True, kw_only=True)
class Taken:
    inputs_from: str = ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Required, "Required.layer must have a default"),
        (Unreadable, "Unreadable.layers must have a default and be a bool"),
        (Mixed, "Mixed.layer must have a default and be a bool"),
        (Taken, "Taken.inputs_from needs another name"),
    ],
)
def test_fields_that_cannot_be_options_are_refused(options: type, message: str) -> None:
    parser = Parser(prog="p")
    parser.add_argument("--inputs-from")
    with pytest.raises(ConfigError, match=message):
        add_options(parser, options, "options")
