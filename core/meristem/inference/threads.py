"""Threads beside the one that computes: one reads ahead of it, one works behind it, each by a bounded queue."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")


class Behind(Generic[Item]):
    """Works off jobs in order in a thread; what one raises is raised to whoever hands in the next."""

    def __init__(self, work: Callable[[Item], Any], ahead: int):
        self._work = work
        self._error: BaseException | None = None
        self._jobs: queue.Queue[Item | None] = queue.Queue(ahead)
        self._thread = threading.Thread(target=self._loop, name="behind")
        self._thread.start()

    def put(self, job: Item) -> None:
        self._jobs.put(job)
        self._raise()

    def close(self, is_giving_up: bool = False) -> None:
        """Wait until all is written; after an error of someone else's, that error is what matters."""
        self._jobs.put(None)
        self._thread.join()
        if not is_giving_up:
            self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _loop(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self._error is None:
                try:
                    self._work(job)
                except BaseException as error:
                    self._error = error


@contextmanager
def ahead(items: Iterable[Item]) -> Iterator[Iterator[Item]]:
    """Iterates in a thread, one item ahead of whoever takes them."""
    ready: queue.Queue[Item | BaseException | None] = queue.Queue(1)
    is_stopped = threading.Event()

    def put(item: Item | BaseException | None) -> None:
        while not is_stopped.is_set():
            with suppress(queue.Full):
                ready.put(item, timeout=0.2)
                return

    def loop() -> None:
        try:
            for item in items:
                put(item)
                if is_stopped.is_set():
                    return
            put(None)
        except BaseException as error:
            put(error)

    def take() -> Iterator[Item]:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    # a daemon: standard input may never say another word
    threading.Thread(target=loop, name="ahead", daemon=True).start()
    try:
        yield take()
    finally:
        is_stopped.set()
