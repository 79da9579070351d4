"""Ways to map `run` over tasks. A task is some hundred bytes of values and its result is files, so they are short."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import TypeAlias

import torch

from robustbench_diffaug.engine import Outcome, Task, run, settle

__all__ = ["Executor", "local", "processes", "threads"]

Executor: TypeAlias = Callable[[Iterable[Task]], Generator[Outcome, None, None]]
"""Closing what it returns stops the work."""


def local(device: str) -> Executor:
    """In this process, one task after another."""

    def map_here(tasks: Iterable[Task]) -> Generator[Outcome, None, None]:
        settle(device)
        yield from map(run, tasks)

    return map_here


def processes(device: str, workers: int) -> Executor:
    """In several processes, each with its share of the threads; outcomes come as they are finished."""

    def map_there(tasks: Iterable[Task]) -> Generator[Outcome, None, None]:
        # spawn: a forked child inherits the thread pools of torch, and hangs.
        context = multiprocessing.get_context("spawn")
        watched, held = context.Pipe(duplex=False)
        begin = (device, threads(workers), watched)
        with watched, held, ProcessPoolExecutor(workers, context, _begin, begin) as pool, _letting_go(held) as asked:
            try:
                with _uninterrupted():
                    futures = [pool.submit(run, task) for task in tasks]
                for future in as_completed(futures):
                    yield future.result()
                if asked:
                    raise KeyboardInterrupt
            except BrokenProcessPool:
                if asked:
                    raise KeyboardInterrupt from None
                raise ValueError("a worker process died; what is finished is kept, run again to continue") from None
            except BaseException:
                held.close()  # the workers stop at once, in the middle of their tasks
                raise
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    return map_there


def threads(workers: int) -> int:
    """The threads of each of so many workers: what torch has here, shared."""
    return max(1, torch.get_num_threads() // workers)


@contextmanager
def _letting_go(held: Connection) -> Iterator[list[int]]:
    """Within it Ctrl-C lets go of the workers, which ends them and so the pool, and fills the list.

    An interrupt raised where it falls may fall between two locks of the pool, which then waits for ever.
    """
    asked: list[int] = []

    def let_go(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        held.close()

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield asked
        return
    signal.signal(signal.SIGINT, let_go)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Processes started within it never see Ctrl-C, which a terminal sends to all; here it comes when this ends."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(device: str, count: int, watched: Connection) -> None:
    """What a worker does first."""
    threading.Thread(target=_follow, args=(watched,), daemon=True).start()
    settle(device, count)


def _follow(watched: Connection) -> None:
    """Ends this worker when the process that started it lets go of the pipe, or is killed."""
    wait([watched])
    os._exit(1)
