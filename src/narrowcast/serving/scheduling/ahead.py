"""Batches that lie ready at a worker for when the one that runs there is through.

They still wait: who went away is taken out, and a batch goes back to the queue when another worker is free, or when
somebody comes whose priority is better.
"""

from __future__ import annotations

from collections.abc import Iterable

from narrowcast.serving.scheduling.queue import Job
from narrowcast.serving.workers.base import Worker

__all__ = ["Ahead"]


class Ahead:
    """The next batch of each worker, where it has one."""

    def __init__(self) -> None:
        self._batches: dict[Worker, list[Job]] = {}
        self._laid: dict[Worker, int] = {}  # how many batches had begun anywhere when it was laid
        self._begun = 0

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def requests(self) -> int:
        """How many requests are in these batches."""
        return sum(map(len, self._batches.values()))

    def lay(self, worker: Worker, jobs: list[Job]) -> None:
        """Take note of a batch that its worker is about to get."""
        self._batches[worker] = jobs
        self._laid[worker] = self._begun

    def count_begun(self) -> None:
        """Take note that a batch has begun at any worker."""
        self._begun += 1

    def overtaken(self, most: int) -> list[Job]:
        """Take back the batches that lie while more than so many others have begun: what runs before them takes too long."""
        late = [worker for worker in self._batches if self._begun - self._laid[worker] > most]
        return [job for worker in late for job in self._taken(worker)]

    def before(self, priority: int) -> int:
        """Return how many batches go before a request of this priority."""
        return sum(jobs[0].priority <= priority for jobs in self._batches.values())

    def pop(self, worker: Worker) -> list[Job] | None:
        """Take the batch of a worker, which has begun or come back."""
        return self._batches.pop(worker, None)

    def has(self, worker: Worker, jobs: list[Job] | None = None) -> bool:
        """Whether a worker has one, or this one."""
        found = self._batches.get(worker)
        return found is not None and (jobs is None or found is jobs)

    def recall(self) -> list[Job]:
        """Take back the batches that have not begun; return their requests in the order in which they came."""
        jobs = [job for worker in list(self._batches) for job in self._taken(worker)]
        return sorted(jobs, key=lambda job: job.number)

    def recall_with(self, job: Job) -> list[Job]:
        """Take back the batch that a request is in; return all its requests, or none where it has begun or there is no such."""
        worker = next((worker for worker, jobs in self._batches.items() if job in jobs), None)
        return [] if worker is None else self._taken(worker)

    def behind(self, priority: int) -> bool:
        """Whether a batch lies ready whose requests come after one of this priority."""
        return any(jobs[0].priority > priority for jobs in self._batches.values())

    def all(self) -> Iterable[Job]:
        """Yield the requests of all batches."""
        for jobs in self._batches.values():
            yield from jobs

    def _taken(self, worker: Worker) -> list[Job]:
        return self._batches.pop(worker) if worker.recall() else []
