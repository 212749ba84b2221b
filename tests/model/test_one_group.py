"""Sequences of one length are attended to in place: neither forward nor backward copies them into groups."""

import pytest
import torch
from flat import attend

from meristem.model.config import Full
from meristem.model.kernels import grouped
from meristem.types import Layout

COPIES = ("Split", "Cat", "Index")


def _nodes(lengths: list[int]) -> set[str]:
    """Kinds of nodes in the graph of a gradient."""
    layout = Layout.of(lengths)
    parts = [torch.randn(layout.num_rows, 4, 8, requires_grad=True) for _ in range(3)]
    left = [attend(*parts, layout, layout, Full()).grad_fn]
    found = set()
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found.add(node)
            left += [before for before, _ in node.next_functions]
    return {node.name() for node in found}


def test_equal_lengths_are_not_copied():
    assert not [name for name in _nodes([20, 20, 20]) if name.startswith(COPIES)]


def test_other_lengths_are_split_and_joined():
    assert [name for name in _nodes([20, 20, 30]) if name.startswith(COPIES)]


def test_an_empty_group_of_spare_rows_is_caught(monkeypatch):
    """Mutant: no spare rows make a group of their own."""
    plan = grouped._plan.__wrapped__

    def with_empty(q_segments, kv_segments, prefixes):
        groups, _, _ = plan(q_segments, kv_segments, prefixes)
        return (*groups, (0, 0, 0, 1)), None, None

    monkeypatch.setattr(grouped, "_plan", with_empty)
    with pytest.raises(AssertionError):
        test_equal_lengths_are_not_copied()
