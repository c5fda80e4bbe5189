"""What Lightning's Trainer lacks: fully sharded training on any device, and a precision that suits the device."""

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry


class FSDP(ModelParallelStrategy):
    """Parameters, gradients and optimizer states spread over all processes (FSDP2), on GPUs or CPUs.

    `LanguageModel.configure_model` spreads them. Lightning's FSDPStrategy is FSDP1, which refuses a CPU.
    """

    name = "fsdp2"

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes  # all there are
        super().setup_environment()


StrategyRegistry.register(FSDP.name, FSDP)


def precision_for(precision: str, accelerator: str) -> str:
    """`auto` is bf16-mixed on a GPU that computes in it (NVIDIA's since Ampere, 2020), else single precision."""
    if precision != "auto":
        return precision
    on_gpu = (
        accelerator != "cpu" and torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    )
    return "bf16-mixed" if on_gpu else "32-true"
