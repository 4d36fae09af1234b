"""Work on tiles ahead of who takes them: a map over a stream, in order, on a few threads, a few results at a time."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from luthier.later import torch, torch_is_there

T = TypeVar("T")
R = TypeVar("R")
WAITING = 2  # results for each thread that may wait to be taken
_worker = threading.local()


def ahead(items: Iterable[T], work: Callable[[T], R]) -> Iterator[R]:
    """`work(item)` for each item, in order. Items are taken on the caller's thread, `work` runs on others.

    torch lets other threads run while it computes, so tiles are worked on by all cores at once; each thread computes
    alone, since a tile is too small to be shared out. Work inside of work is done on the thread that it is on. What
    `work` raises is raised here.
    """
    threads = os.cpu_count() or 1
    if threads == 1 or getattr(_worker, "busy", False):
        yield from map(work, items)
        return
    with one_thread_each(), ThreadPoolExecutor(threads, "tiles", initializer=_begin) as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > WAITING * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def beside(steps: Iterable[object]) -> Iterator[Future[None]]:
    """While open, `steps` are gone through on a thread of their own; the future ends with the last one."""
    closed = threading.Event()

    def run() -> None:
        for _ in steps:
            if closed.is_set():
                return

    with ThreadPoolExecutor(1, "beside", initializer=_begin) as pool:
        try:
            yield pool.submit(run)
        finally:
            closed.set()


def _begin() -> None:
    _worker.busy = True


@contextmanager
def one_thread_each() -> Iterator[None]:
    """While open, an operation of torch uses one thread. Where torch is not loaded yet, none will be used."""
    if not torch_is_there():
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
