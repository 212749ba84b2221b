"""Where chunks are computed: in this process, or in one process a device."""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from meristem.errors import ConfigError
from meristem.inference.engine import PRECISIONS, Advance, Embedder, TrunkRunner
from meristem.model.model import Model
from meristem.model_directory import load_any
from meristem.types import TokenColumn


@dataclass(frozen=True)
class EngineOptions:
    """What an `Embedder` is made from, as plain values that cross to another process.

    Attributes:
        pool: mean, cls, max, own or none.
        layer: whose rows are wanted.
        precision: fp32 or bf16.
        device: cpu or cuda.
        tokens_per_batch: budget of a pack; None for what suits the device.
        is_compiled: blocks are compiled, where the machine has a compiler.
    """

    pool: str
    layer: int
    precision: str
    device: str
    tokens_per_batch: int | None = None
    is_compiled: bool = False

    def build(self, model: Model, num_special: tuple[int, int], device: str | None = None) -> Embedder:
        """The engine, on `device` where one is named."""
        trunk = TrunkRunner(
            model,
            num_special,
            self.layer,
            self.tokens_per_batch,
            PRECISIONS[self.precision],
            device or self.device,
            self.is_compiled,
        )
        return Embedder(trunk, self.pool)


def count_devices(device: str) -> int:
    """Processes that may run side by side."""
    return torch.cuda.device_count() if device == "cuda" else os.cpu_count() or 1


class Workers:
    """One process a device, each with the whole model; chunks come back as they were handed in.

    Raises:
        ConfigError: more are asked for than there are.
    """

    def __init__(self, model: Path, options: EngineOptions, count: int):
        there = count_devices(options.device)
        if count > there:
            what = "GPUs" if options.device == "cuda" else "CPU cores"
            raise ConfigError(f"--devices must be at most the {what} there are, {there}; got {count}")
        context = multiprocessing.get_context("spawn")
        ranks = context.Queue()
        for rank in range(count):
            ranks.put(rank)
        threads = max(1, torch.get_num_threads() // count)
        self._pool = ProcessPoolExecutor(count, context, _start, (str(model), options, ranks, threads, os.getpid()))

    def submit(self, column: TokenColumn, advance: Advance) -> "Future[np.ndarray]":
        """Compute the vectors of a column; `advance` is told when all are done."""
        future = self._pool.submit(_embed, column)
        sizes = len(column), int(column.lengths.sum())
        future.add_done_callback(lambda done: advance(*sizes) if not done.cancelled() else None)
        return future

    def close(self) -> None:
        """Stop; what is under way is finished first."""
        self._pool.shutdown(wait=True, cancel_futures=True)


class InProcess:
    """The same, without a process."""

    def __init__(self, embedder: Embedder):
        self._embedder = embedder

    def submit(self, column: TokenColumn, advance: Advance) -> "Future[np.ndarray]":
        future: Future[np.ndarray] = Future()
        try:
            future.set_result(self._embedder.embed(column, advance))
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        return


_embed_column: Callable[[TokenColumn], np.ndarray] | None = None
"""The engine of a worker process."""


def _start(
    model_path: str, options: EngineOptions, ranks: "multiprocessing.Queue[int]", threads: int, parent: int
) -> None:
    global _embed_column
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)
    card, model = load_any(Path(model_path))
    device = f"cuda:{ranks.get()}" if options.device == "cuda" else options.device
    _embed_column = options.build(model, card.tokenizer.num_special, device).embed


def _leave_with(parent: int) -> None:
    """End when the parent was killed: nobody else would end a worker that waits for work."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _embed(column: TokenColumn) -> np.ndarray:
    assert _embed_column is not None
    return _embed_column(column)
