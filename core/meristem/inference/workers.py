"""Where chunks are computed: in this process, or in one process a device."""

import multiprocessing
import os
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import pyarrow as pa
import torch

from meristem.errors import ConfigError
from meristem.inference.engine import Advance
from meristem.inference.job import Job, Running
from meristem.model_directory import load_any
from meristem.types import TokenColumn


class Workers:
    """One process a device, each with the whole model; chunks come back as they were handed in.

    Raises:
        ConfigError: more are asked for than there are.
    """

    def __init__(self, model: Path, job: Job, device: str):
        is_cuda, count = device == "cuda", job.devices
        there = torch.cuda.device_count() if is_cuda else os.cpu_count() or 1
        if count > there:
            what = "GPUs" if is_cuda else "CPU cores"
            raise ConfigError(f"--devices must be at most the {what} there are, {there}; got {count}")
        context = multiprocessing.get_context("spawn")
        ranks = context.Queue()
        for rank in range(count):
            ranks.put(rank)
        threads = max(1, torch.get_num_threads() // count)
        self._pool = ProcessPoolExecutor(count, context, _start, (model, job, device, ranks, threads, os.getpid()))

    def submit(self, column: TokenColumn, advance: Advance, num_tokens: int) -> "Future[pa.Table]":
        """Compute the rows of a column; `advance` is told of its tokens when all are done."""
        future = self._pool.submit(_compute, column)
        count = len(column)
        future.add_done_callback(lambda done: advance(count, num_tokens) if not done.cancelled() else None)
        return future

    def close(self) -> None:
        """Stop; what is under way is finished first."""
        self._pool.shutdown(wait=True, cancel_futures=True)


class InProcess:
    """The interface of `Workers`, in this process."""

    def __init__(self, running: Running):
        self._running = running

    def submit(self, column: TokenColumn, advance: Advance, num_tokens: int) -> "Future[pa.Table]":
        future: Future[pa.Table] = Future()
        try:
            future.set_result(self._running.rows(column, advance))
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        return


_running: Running | None = None
"""The job of a worker process."""


def _start(
    model_path: Path, job: Job, device: str, ranks: "multiprocessing.Queue[int]", threads: int, parent: int
) -> None:
    global _running
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)
    card, model = load_any(model_path, job.tokenizer)
    _running = job.running(job, card, model, f"cuda:{ranks.get()}" if device == "cuda" else device)


def _leave_with(parent: int) -> None:
    """End when the parent was killed: nobody else would end a worker that waits for work."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _compute(column: TokenColumn) -> pa.Table:
    assert _running is not None
    return _running.rows(column)
