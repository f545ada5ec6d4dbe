"""Workers of one identity: those that may hand sequences over to one another."""

from collections.abc import Set

from router.core.columns import WorkerTable
from router.core.costs import Figures, figures_of
from router.core.fleet import Demand, Worker, WorkerState

NOBODY: Set[int] = frozenset()


class Group:
    """The members, and tables of those that may get requests now: serving, and in touch."""

    def __init__(self, prefill_window_tokens: int) -> None:
        self.decoders = WorkerTable(prefill_window_tokens)
        self.prefillers = WorkerTable(prefill_window_tokens)
        self._members: dict[int, Worker] = {}
        self._figures: Figures | None = None

    def __len__(self) -> int:
        return len(self._members)

    def add(self, worker: Worker) -> None:
        self._members[worker.slot] = worker
        self.settle(worker)

    def remove(self, worker: Worker) -> None:
        del self._members[worker.slot]
        self._take_out(worker)

    def settle(self, worker: Worker) -> None:
        """The worker's state, connection or speeds may have changed."""
        is_in = any(table.place_of(worker.slot) is not None for table in (self.decoders, self.prefillers))
        if is_in and not worker.is_serving:
            self._take_out(worker)
        elif worker.is_serving and not is_in:
            if worker.decodes:
                self.decoders.add(worker)
            if worker.prefills:
                self.prefillers.add(worker)
        else:
            self.decoders.write(worker)
            self.prefillers.write(worker)
        self._figures = None

    def charged(self, worker: Worker) -> None:
        """What is charged to the worker changed."""
        self.decoders.charged(worker)
        self.prefillers.charged(worker)

    def refresh(self) -> None:
        """Brings the tables up to the workers' figures."""
        self.decoders.refresh()
        self.prefillers.refresh()

    def figures(self, num_placed: int) -> Figures:
        """Speeds as of the last report, with what is unknown filled in; `num_placed` prompts were placed by now."""
        if self._figures is None:
            self._figures = figures_of(self.decoders, self.prefillers, num_placed)
        return self._figures

    def serving(self) -> list[Worker]:
        """Those that would get requests, in touch or not."""
        return [worker for worker in self._members.values() if worker.state is WorkerState.SERVING]

    def avoidable(self, slots: Set[int], demand: Demand) -> tuple[Set[int], Set[int]]:
        """Of workers to avoid, those that others could decode for, and those that others could prefill for."""
        others = [worker for worker in self.serving() if worker.slot not in slots]
        can_decode = any(worker.decodes and worker.could_decode(demand) for worker in others)
        can_prefill = any(worker.prefills and worker.could_prefill(demand) for worker in others)
        return slots if can_decode else NOBODY, slots if can_prefill else NOBODY

    def _take_out(self, worker: Worker) -> None:
        self.decoders.remove(worker)
        self.prefillers.remove(worker)
        self._figures = None
