"""The workers of a Ray cluster: an existing one (RAY_ADDRESS, or found by Ray), or one of this machine alone."""

import os
import secrets
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from robustbench_diffaug.attempts import Attempt, Executor, after_death
from robustbench_diffaug.engine import Outcome, Task, run, settle
from robustbench_diffaug.files import atomic

__all__ = ["ray"]


def ray(device: str, workers: int, root: Path) -> Executor:
    """In the processes of a Ray cluster, at most `workers` tasks at a time; each takes one CPU, and one GPU if asked.

    Arguments:
        device: 'cpu' or 'cuda'; Ray chooses which GPU.
        workers: Tasks at a time.
        root: The run folder, which all nodes must see under the same path.

    Raises:
        ValueError: If one GPU is asked for; where the tasks are mapped over, if Ray is not installed, there is no
            cluster at RAY_ADDRESS, or it has no GPU where some are asked for.
    """
    if ":" in device:
        raise ValueError(f"--device {device}: Ray chooses the GPU of a task itself; use --device cuda")

    def map_there(tasks: Iterable[Task]) -> Generator[Outcome, None, None]:
        shared = root.resolve()
        with _cluster(workers) as found, _token(shared) as token:
            if device == "cuda" and not found.cluster_resources().get("GPU"):
                raise ValueError("--executor ray --device cuda: the Ray cluster has no GPU; use --device cpu")
            remote = found.remote(_there).options(num_cpus=1, num_gpus=int(device == "cuda"), max_retries=0)
            queue = deque(Attempt(replace(task, store=replace(task.store, root=shared))) for task in tasks)
            pending: dict[object, Attempt] = {}
            try:
                while queue or pending:
                    while queue and len(pending) < workers:
                        attempt = queue.popleft()
                        pending[remote.remote(attempt.task, device, token)] = attempt
                    (done,), _ = found.wait(list(pending), num_returns=1)
                    again, decided = _heard(found, done, pending.pop(done))
                    queue.extend(again)
                    yield from decided
            finally:
                for reference in pending:
                    found.cancel(reference, force=True)

    return map_there


def _heard(found: ModuleType, done: object, attempt: Attempt) -> tuple[list[Attempt], list[Outcome]]:
    """What came of a task: what must be run again, and what is decided.

    Raises:
        ValueError: If a node cannot work on the run folder, or the tasks cannot reach it.
        Exception: What a task raised, which is more than a failure of its cells, such as a full disk.
    """
    errors = found.exceptions
    try:
        return [], [Outcome(attempt.task, found.get(done))]
    except errors.OutOfMemoryError:
        return after_death(attempt, "out of memory")
    except (errors.WorkerCrashedError, errors.NodeDiedError, errors.ObjectLostError) as error:
        return after_death(attempt, type(error).__name__)
    except errors.RayTaskError as error:
        cause = error.cause if isinstance(error.cause, Exception) else error
        if isinstance(cause, ImportError):
            raise ValueError(f"a node of the Ray cluster lacks what this one has: {cause}") from None
        raise cause from None


def _there(task: Task, device: str, token: Path) -> dict[int, str]:
    """Runs a task on a node, which must see the run folder."""
    if not token.is_file():
        raise ValueError(
            f"a node ({os.uname().nodename}) does not see {token.parent}; all nodes must share the run folder"
        )
    settle(device, 1)
    return dict(run(task).failures)


@contextmanager
def _cluster(workers: int) -> Iterator[ModuleType]:
    """Ray, connected; ended afterwards, if it was started or joined here."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray as found
    except ImportError as error:
        raise ValueError("--executor ray needs Ray; pip install 'robustbench-diffaug[ray]'") from error
    if found.is_initialized():
        yield found
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        found.init(address=os.environ.get("RAY_ADDRESS", "auto"), **quiet)
    except ConnectionError as error:
        if "RAY_ADDRESS" in os.environ:
            raise ValueError(f"there is no Ray cluster at RAY_ADDRESS {os.environ['RAY_ADDRESS']}") from error
        found.init(address="local", num_cpus=workers, include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
    try:
        yield found
    finally:
        found.shutdown()


@contextmanager
def _token(root: Path) -> Iterator[Path]:
    """A file that only those see who see this very folder."""
    path = root / f".ray-{secrets.token_hex(8)}"
    with atomic(path) as file:
        file.write(b"")
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
