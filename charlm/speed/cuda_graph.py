"""A step as one CUDA graph: its kernels are launched together, and not one by one from Python.

A small model's kernels take a microsecond each, and launching each of them from Python takes ten. PyTorch's notes on
CUDA graphs (Ansel et al. 2024, section 4) allow in a captured step: the same shapes in the same memory, and no Python
numbers, so that the learning rate becomes a tensor too.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from charlm.module import Batch
from charlm.optimizer.adamw import AdamW

WARM_UP = 3  # steps that run as they are, while optimizers, libraries and compilers allocate what they keep


class CUDAGraph:
    """Calls `step` for its first few batches, then captures and replays it; every call trains.

    Args:
        step: takes the batches of one optimizer step and returns a loss. Its batches must always have the same shapes.
        optimizers: the optimizers that `step` uses.
        device: the GPU.

    Raises:
        ValueError: if an optimizer keeps numbers in Python.
    """

    def __init__(
        self, step: Callable[[Sequence[Batch]], Tensor], optimizers: Sequence[Optimizer], device: torch.device
    ):
        for optimizer in optimizers:
            if not isinstance(optimizer, AdamW):
                raise ValueError(f"a CUDA graph cannot hold {type(optimizer).__name__}, only charlm's AdamW")
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(float(group["lr"]), device=device)
                group["capturable"] = True
        self.step = step
        self.calls = 0
        self.stream = torch.cuda.Stream(device)
        self.graph = torch.cuda.CUDAGraph()
        self.inputs: list[Tensor] = []
        self.loss: Tensor

    def __call__(self, batches: Sequence[Batch]) -> Tensor:
        """The same as `step(batches)`."""
        self.calls += 1
        if self.calls <= WARM_UP:
            # Warm up on the stream of the capture, which then owns all allocations.
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                loss = self.step(batches)
            torch.cuda.current_stream().wait_stream(self.stream)
            return loss
        if not self.inputs:
            static = [(x.clone(), y.clone()) for x, y in batches]
            self.inputs = [part for batch in static for part in batch]
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.loss = self.step(static)  # recorded, and not run
        for kept, new in zip(self.inputs, (part for batch in batches for part in batch), strict=True):
            kept.copy_(new)
        self.graph.replay()
        return self.loss
