"""How an update runs on a GPU: as one CUDA graph, and what it has time for beside what follows."""

from collections.abc import Callable

import torch


class Replayed:
    """Runs an update as one CUDA graph: one launch in place of hundreds.

    The first call runs the update as it is, which compiles its kernels. The second captures the update, in the pool of
    memory that all graphs share, and every call from then on replays what was captured. The update is handed in at each
    call, not kept: a Bank that kept itself alive would outlive its trial, with its GBs.
    """

    def __init__(self, pool):
        self.pool, self.graph, self.called = pool, None, False

    def __call__(self, update: Callable[[], None]):
        if not self.called:
            self.called = True
            update()
            return
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            # NCCL's watchdog makes calls of its own meanwhile, from its thread
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                update()
            self.graph = graph
        self.graph.replay()


class Beside:
    """Runs work that is not in a hurry beside what follows: in a GPU's stream of its own, or, with None, at once."""

    def __init__(self, stream):
        self.stream = stream

    def __call__(self, work: Callable[[], None]):
        if self.stream is None:
            return work()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            work()

    def wait(self):
        """Let what comes from here on see what the work has done."""
        if self.stream:
            torch.cuda.current_stream().wait_stream(self.stream)
