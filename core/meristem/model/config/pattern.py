"""Configs of attention patterns: which keys a query may see in its own sequence. `model/patterns.py` has the masks.

`&` and `|` combine them: `Causal() & Window(left=127)` is a causal window, `Causal() | InPrefix()` a prefix LM.
"""

from abc import ABC
from dataclasses import dataclass

from meristem.errors import require
from meristem.model.config.checks import require_all


@dataclass(frozen=True, kw_only=True)
class Pattern(ABC):
    """Which keys a query may see."""

    def __and__(self, other: "Pattern") -> "Pattern":
        return Both(parts=(self, other))

    def __or__(self, other: "Pattern") -> "Pattern":
        return Either(parts=(self, other))


@dataclass(frozen=True, kw_only=True)
class Full(Pattern):
    """Every key of the sequence."""


@dataclass(frozen=True, kw_only=True)
class Causal(Pattern):
    """Keys up to the place of the query. Where there are fewer queries than keys, queries are the last places."""


@dataclass(frozen=True, kw_only=True)
class Window(Pattern):
    """Keys near the query.

    Attributes:
        left: number of keys seen before the query.
        right: number of keys seen behind the query.
    """

    left: int
    right: int = 0

    def __post_init__(self) -> None:
        require(self.left >= 0 and self.right >= 0, "a window reaches 0 or more", f"{self.left}, {self.right}")


@dataclass(frozen=True, kw_only=True)
class Dilated(Pattern):
    """Every `step`-th key near the query (Beltagy 2020, arXiv 2004.05150, section 3.1).

    Attributes:
        left: number of keys seen before the query: at distances `step`, `2 * step` ... `left * step`.
        right: number of keys seen behind the query.
        step: distance in tokens from one key to the next.
    """

    left: int
    right: int = 0
    step: int = 2

    def __post_init__(self) -> None:
        require(self.left >= 0 and self.right >= 0, "a window reaches 0 or more", f"{self.left}, {self.right}")
        require(self.step > 1, "pattern.step must be 2 or more (a step of 1 is a Window)", self.step)


@dataclass(frozen=True, kw_only=True)
class InPrefix(Pattern):
    """Keys of the prefix of the sequence, whose length is `Tokens.prefix_length`."""


@dataclass(frozen=True, kw_only=True)
class GlobalTokens(Pattern):
    """The first tokens see every key and are seen by every query (Beltagy 2020, section 3.1).

    Attributes:
        count: number of tokens, special ones included.
    """

    count: int

    def __post_init__(self) -> None:
        require_all(self, "pattern.", "positive", "count")


@dataclass(frozen=True, kw_only=True)
class BlockSparse(Pattern):
    """Blocks of queries see blocks of keys: near ones, global ones, random ones (Zaheer 2020, arXiv 2007.14062).

    Attributes:
        block: number of tokens in a block.
        num_near: number of blocks seen on each side of the block of the query.
        num_global: number of first blocks that see all and are seen by all.
        num_random: number of blocks drawn for each block of queries.
        seed: seed of the draw, which depends on nothing else but the length of the sequence.
    """

    block: int
    num_near: int = 1
    num_global: int = 1
    num_random: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        require_all(self, "pattern.", "positive", "block")
        counts = (self.num_near, self.num_global, self.num_random)
        require(min(counts) >= 0, "numbers of blocks must be 0 or more", counts)


@dataclass(frozen=True, kw_only=True)
class Both(Pattern):
    """Keys that every one of some patterns sees.

    Attributes:
        parts: the patterns.
    """

    parts: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        require(len(self.parts) > 1, "Both needs two patterns or more", len(self.parts))


@dataclass(frozen=True, kw_only=True)
class Either(Pattern):
    """Keys that at least one of some patterns sees.

    Attributes:
        parts: the patterns.
    """

    parts: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        require(len(self.parts) > 1, "Either needs two patterns or more", len(self.parts))


def sees_the_future(pattern: Pattern) -> bool:
    """Whether some query may see a later key that is not in the prefix."""
    match pattern:
        case Causal() | InPrefix():
            return False
        case Window() | Dilated():
            return pattern.right > 0
        case Both():
            return all(sees_the_future(part) for part in pattern.parts)
        case Either():
            return any(sees_the_future(part) for part in pattern.parts)
        case _:
            return True
