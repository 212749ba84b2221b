"""Threads beside the one that computes: one reads ahead of it, one works behind it, each by a bounded queue."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
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


class ahead(Generic[Item]):
    """Iterates in a thread, one item ahead of whoever takes them."""

    def __init__(self, items: Iterable[Item]):
        self._items = items
        self._ready: queue.Queue[Item | BaseException | None] = queue.Queue(1)
        self._is_stopped = threading.Event()
        # a daemon: standard input may never say another word
        self._thread = threading.Thread(target=self._loop, name="ahead", daemon=True)

    def __enter__(self) -> Iterator[Item]:
        self._thread.start()
        return self._take()

    def __exit__(self, *_: object) -> None:
        self._is_stopped.set()

    def _take(self) -> Iterator[Item]:
        while (item := self._ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def _loop(self) -> None:
        try:
            for item in self._items:
                if not self._put(item):
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: "Item | BaseException | None") -> bool:
        while not self._is_stopped.is_set():
            try:
                self._ready.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False
