"""Options of a domain's tokenizer on the command line of verbs that read a model.

A verb does not know them: what it is given and does not know itself is looked up among the tokenizer options of the
installed domains, with dashes for underscores, and travels as `args.tokenizer` to where the model is loaded. An option
of another domain than the model's is refused there.
"""

import argparse
import inspect
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from meristem.errors import ConfigError
from meristem.registry import find, find_all, installed

GROUP = "meristem.domains"

WORDS = {"true": True, "false": False, "null": None, "none": None}
"""Values that are no words."""


def take_tokenizer_options(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Take the tokenizer options out of a command line.

    An option takes all numbers that follow, or else the one word that follows: `--side-px 384 384 --crop border`.

    Args:
        parser: of the verb; options that it knows, or abbreviations of them, stay.

    Returns:
        The other arguments, and the options by name; several values of an option are a list.

    Raises:
        ConfigError: an option that neither the verb nor an installed domain has, or one without a value.
    """
    known = tuple(parser._option_string_actions)
    rest: list[str] = []
    found: dict[str, Any] = {}
    left = list(argv)
    while left:
        word = left.pop(0)
        name, is_joined, joined = word.partition("=")
        if word == "--":
            rest += [word, *left]
            break
        if not name.startswith("--") or any(option.startswith(name) for option in known):
            rest.append(word)
            continue
        option = name[2:].replace("-", "_")
        there = tokenizer_options(argv)
        if not any(option in names for names in there.values()):
            listed = "; ".join(f"{domain} {' '.join(map(as_flag, names))}" for domain, names in there.items() if names)
            raise ConfigError(
                f"unrecognized option {name}: neither {parser.prog} has it (see {parser.prog} --help) "
                "nor the tokenizer of a domain" + (f" ({listed})" if listed else "")
            )
        values = [joined] if is_joined else []
        while not is_joined and left and _is_number(left[0]):
            values.append(left.pop(0))
        if not values and left and not left[0].startswith("--"):
            values.append(left.pop(0))
        if not values:
            raise ConfigError(f"{name} needs a value (see {parser.prog} --help)")
        read = [_value(one) for one in values]
        found[option] = read[0] if len(read) == 1 else read
    return rest, found


def tokenizer_options(words: Sequence[str] = ()) -> dict[str, tuple[str, ...]]:
    """Names of the tokenizer options of the domain that a model directory names, or of each installed domain.

    Args:
        words: of the command line, the model directory among them.
    """
    named = next(filter(None, map(_domain_named_by, words)), "")
    is_there = named in installed(GROUP)
    domains = {named: find(GROUP, named)} if is_there else find_all(GROUP)
    return {name: tuple(inspect.signature(domain.tokenizer).parameters) for name, domain in domains.items()}


def _domain_named_by(word: str) -> str:
    """The domain of a model directory or of a run; empty for another word."""
    for place in (Path(word), Path(word) / "model"):
        with suppress(OSError, ValueError, AttributeError):
            return str(json.loads((place / "config.json").read_text(encoding="utf-8")).get("domain", ""))
    return ""


def as_flag(option: str) -> str:
    """A name, such as that of an option of a tokenizer or a scorer, as the command line says it."""
    return f"--{option.replace('_', '-')}"


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _value(word: str) -> Any:
    if word.lower() in WORDS:
        return WORDS[word.lower()]
    try:
        return json.loads(word)
    except ValueError:
        return word
