"""What Lightning's Trainer lacks: fully sharded training on any device."""

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
