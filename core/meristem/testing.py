"""The pytest plugin: a fixture that runs the contract of domains.

pytest loads this module at every start, so nothing heavy is imported at the top.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from meristem.contract import Stage


@pytest.fixture
def check_domain() -> "Callable[[str], list[Stage]]":
    """Runs the contract on a domain by name or dotted path; the test fails with the stage that is broken."""
    from meristem.contract import run_contract

    return lambda name: list(run_contract(name))
