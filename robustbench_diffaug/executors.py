"""Ways to map `run` over tasks. A task is some hundred bytes of values and its result is files, so they are short."""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeAlias

from robustbench_diffaug.engine import Outcome, Task, run, settle

__all__ = ["Executor", "local", "processes"]

Executor: TypeAlias = Callable[[Iterable[Task]], Iterator[Outcome]]


def local(device: str) -> Executor:
    """In this process, one task after another."""

    def map_here(tasks: Iterable[Task]) -> Iterator[Outcome]:
        settle(device)
        return map(run, tasks)

    return map_here


def processes(device: str, workers: int) -> Executor:
    """In several processes, each with its share of the cores; outcomes come as they are finished."""

    def map_there(tasks: Iterable[Task]) -> Iterator[Outcome]:
        threads = max(1, (os.cpu_count() or 1) // workers)
        # spawn: a forked child inherits the thread pools of torch, and hangs.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, settle, (device, threads)) as pool:
            futures = [pool.submit(run, task) for task in tasks]
            try:
                for future in as_completed(futures):
                    yield future.result()
            except BrokenProcessPool:
                raise ValueError("a worker process died; what is finished is kept, run again to continue") from None
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    return map_there
