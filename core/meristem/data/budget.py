"""Packs within a budget of tokens, which is halved when a pack does not fit in memory."""

import ctypes
import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import torch

from meristem.data.order import plan_in_order
from meristem.errors import DataError, require

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

WORDS_OF_A_CPU = ("can't allocate memory", "could not create a primitive", "bad_alloc")
"""How torch, oneDNN and the C++ library say that there was no memory: none of them has an error of its own for it."""


class Budget:
    """Runs sequences in packs.

    Args:
        tokens: that a pack holds at most, but for a single longer sequence. It is halved when a pack does not fit.
        device: that packs run on.

    Raises:
        ConfigError: a budget below 1.
    """

    def __init__(self, tokens: int = 4096, device: torch.device | str = "cpu"):
        require(tokens >= 1, "tokens_per_batch must be at least 1", tokens)
        self.tokens, self.device = tokens, torch.device(device)

    def run(self, lengths: np.ndarray, run: Callable[[np.ndarray], Result]) -> Iterator[Result]:
        """Yield the result of each pack. The longest sequences come first, so that lack of memory shows at once.

        From a pack that does not fit on, packs are half as large; nothing is lost.

        Args:
            run: runs a pack, given the numbers of its sequences.

        Raises:
            DataError: a single sequence does not fit.
        """
        left = np.arange(len(lengths))
        while len(left):
            plan = plan_in_order(lengths[left], self.tokens)
            for index in reversed(range(len(plan))):
                pack = left[plan[index]]
                done = self._try(run, pack)
                if not done:
                    break
                yield done[0]
            else:
                return
            self._halve(lengths[pack])
            left = np.sort(left[plan.records[: plan.stops[index]]])

    def _try(self, run: Callable[[np.ndarray], Result], pack: np.ndarray) -> list[Result]:
        """The result of a pack in a list; an empty list if memory ran out. No exception keeps tensors alive."""
        try:
            return [run(pack)]
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return []

    def _halve(self, lengths: np.ndarray) -> None:
        if len(lengths) == 1:
            raise DataError(f"a sequence of {lengths[0]:,} tokens does not fit in the memory of {self.device}")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        give_back_memory()
        tokens = int(lengths.sum())
        self.tokens = max(min(tokens, self.tokens) // 2, 1)
        logger.warning(f"out of memory with {tokens:,} tokens at once on {self.device}; going on with {self.tokens:,}")


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in WORDS_OF_A_CPU)


def give_back_memory() -> None:
    """Return freed memory to the system: packs of ever other shapes leave holes, which glibc's heap keeps.

    Without it an ESM-2 8M grows by 50 MB with each 2,000 records; it costs milliseconds a chunk.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
