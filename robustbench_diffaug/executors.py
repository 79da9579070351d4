"""Ways to map `run` over tasks. A task is some hundred bytes of values and its result is files, so they are short."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from robustbench_diffaug.attempts import Attempt, Executor, after_death, cause_of
from robustbench_diffaug.batch import Limits
from robustbench_diffaug.engine import Outcome, Task, reason, run, settle
from robustbench_diffaug.shards import WHOLE, Shard

__all__ = ["Options", "devices", "local", "processes", "threads"]


def local(device: str) -> Executor:
    """In this process, one task after another."""

    def map_here(tasks: Iterable[Task]) -> Generator[Outcome, None, None]:
        settle(device)
        yield from map(run, tasks)

    return map_here


def devices(device: str, workers: int) -> list[str]:
    """The device of each worker: 'cuda' means all GPUs that there are, in turn; any other name means itself."""
    if device != "cuda":
        return [device] * workers
    count = max(1, torch.cuda.device_count())
    return [f"cuda:{worker % count}" for worker in range(workers)]


def threads(workers: int) -> int:
    """The threads of each of so many workers: what torch has here, shared."""
    return max(1, torch.get_num_threads() // workers)


def processes(device: str, workers: int) -> Executor:
    """In several processes, each with its GPU and its share of the threads; outcomes come as they are finished."""

    def map_there(tasks: Iterable[Task]) -> Generator[Outcome, None, None]:
        queue = deque(map(Attempt, tasks))
        places = devices(device, workers)
        crew: dict[int, _Worker] = {}
        try:
            while queue or any(worker.attempt for worker in crew.values()):
                for worker in [worker for worker in crew.values() if worker.free]:
                    worker.take(queue)
                _recruit(crew, places, len(queue))
                for line in wait([worker.line for worker in crew.values()]):
                    place = next(place for place, worker in crew.items() if worker.line is line)
                    again, decided = crew[place].heard()
                    queue.extend(again)
                    if crew[place].ended:
                        del crew[place]
                    yield from decided
        finally:
            with _uninterrupted():
                for worker in crew.values():
                    worker.end()

    return map_there


@dataclass
class _Worker:
    """A process of ours, which has at most one task at a time: so it is known of what it died.

    Arguments:
        process: The process.
        line: To it.
        device: Of its tasks.
        attempt: What it is working on.
        ready: Whether it has begun.
        ended: Whether it is gone.
    """

    process: BaseProcess
    line: Connection
    device: str
    attempt: Attempt | None = None
    ready: bool = False
    ended: bool = False

    @classmethod
    def start(cls, device: str, count: int) -> "_Worker":
        """Starts one; the caller keeps Ctrl-C from falling before it is known."""
        # spawn: a forked child inherits the thread pools of torch, and hangs.
        context = multiprocessing.get_context("spawn")
        line, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, device, count))
        process.start()
        theirs.close()  # so that its death closes the last one
        return cls(process, line, device)

    @property
    def free(self) -> bool:
        """Whether it can have a task."""
        return self.ready and self.attempt is None

    def take(self, queue: deque[Attempt]) -> None:
        """Hands it the next task, if there is one; a task that does not reach it stays in the queue."""
        if queue:
            try:
                self.line.send(queue[0].task)
            except ConnectionError:  # it died of none of them, which its line will say next
                return
            self.attempt = queue.popleft()

    def heard(self) -> tuple[list[Attempt], list[Outcome]]:
        """Takes what it has to say: what must be run again, and what is decided.

        Raises:
            ValueError: If it could not begin.
            Exception: What a task raised, which is more than a failure of its cells, such as a full disk.
        """
        try:
            said = self.line.recv()
        except (EOFError, ConnectionError):
            return self._bury()
        if isinstance(said, Exception):
            raise said
        attempt, self.attempt, self.ready = self.attempt, None, True
        return [], [Outcome(attempt.task, said)] if attempt else []

    def _bury(self) -> tuple[list[Attempt], list[Outcome]]:
        """It has died: what becomes of its task."""
        self.process.join(1)  # one that is dying has a cause of its own
        self.end()
        cause = cause_of(self.process.exitcode)
        if not self.ready:
            raise ValueError(
                f"a worker process cannot be started on {self.device} ({cause}); one process (--executor local, "
                "workers=1) says more; a script that asks for workers must do so below if __name__ == '__main__'"
            )
        attempt, self.attempt = self.attempt, None
        return after_death(attempt, cause) if attempt else ([], [])

    def end(self) -> None:
        """Ends it, in the middle of its task; files are whole or not there."""
        self.ended = True
        self.process.kill()  # before the line is closed, of which it would complain
        self.process.join()
        self.line.close()


def _recruit(crew: dict[int, _Worker], places: Sequence[str], wanted: int) -> None:
    """Starts as many workers as there are tasks that nobody will take, where there is a place for them."""
    wanted -= sum(not worker.ready for worker in crew.values())
    for place, device in enumerate(places):
        if place not in crew and wanted > 0:
            with _uninterrupted():
                crew[place] = _Worker.start(device, threads(len(places)))
            wanted -= 1


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Processes started within it never see Ctrl-C, which a terminal sends to all; here it comes when this ends."""
    resource_tracker.ensure_running()  # which, if it starts now, lets Ctrl-C in again behind our back
    asked: list[int] = []
    handler = signal.getsignal(signal.SIGINT)
    # Blocked in this thread it would fall into another one, and Python would raise it in this one all the same.
    held = handler is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    if held:
        signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if held:
            signal.signal(signal.SIGINT, handler)
    if asked:
        raise KeyboardInterrupt


def _work(line: Connection, device: str, count: int) -> None:
    """What a worker does: a task after another, until the process that started it is gone."""
    threading.Thread(target=_follow, daemon=True).start()
    try:
        settle(device, count)
        answer: object = None
    except Exception as error:
        answer = ValueError(f"a worker process cannot use {device}: {reason(error)}")
    while True:
        try:
            line.send(answer)
        except OSError:
            return
        except Exception as error:  # an error that cannot be sent
            line.send(RuntimeError(f"{type(answer).__name__}: {answer} ({error})"))
        try:
            answer = dict(run(line.recv()).failures)
        except EOFError:
            return
        except Exception as error:
            answer = error


def _follow() -> None:
    """Ends this worker when the process that started it does, however it does."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


@dataclass(frozen=True)
class Options:
    """How a suite is run; nothing of it changes what is recorded, but the device and `compile`, by rounding.

    Arguments:
        root: The run folder.
        device: 'cpu' or 'cuda[:N]'.
        batch: Samples read together.
        workers: Processes; 1 runs in this one.
        trust: Whether the suite may name code, for the manifest.
        compile: Whether networks go through torch.compile.
        ray: Whether the workers are those of a Ray cluster.
        shard: Which share of the plan is run.
    """

    root: Path
    device: str = "cpu"
    batch: int = 128
    workers: int = 1
    trust: bool = False
    compile: bool = False
    ray: bool = False
    shard: Shard = WHOLE

    @property
    def limits(self) -> Limits:
        """For the engine."""
        return Limits(batch=self.batch, device=self.device, compile=self.compile)

    @property
    def executor(self) -> Executor:
        """What maps over the tasks."""
        if self.ray:
            from robustbench_diffaug.ray_executor import ray

            return ray(self.device, self.workers, self.root)
        return local(self.device) if self.workers == 1 else processes(self.device, self.workers)
