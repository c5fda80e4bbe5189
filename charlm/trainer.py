"""FSDP2 for Lightning's Trainer on any device, and the values of settings that are `auto`."""

import atexit
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, OptimStateKeyType

from charlm.budget import steps_of
from charlm.data import CharDataModule
from charlm.devices import accelerator_of
from charlm.internals.lightning import set_data_parallel_size
from charlm.model import multiplications, takes_no_steps


class FSDP(ModelParallelStrategy):
    """Parameters, gradients and optimizer states spread over all processes (FSDP2), on GPUs or CPUs.

    `LanguageModel.configure_model` spreads them. Lightning's FSDPStrategy is FSDP1, which refuses a CPU.
    """

    name = "fsdp2"

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        set_data_parallel_size(self, self.num_nodes * self.num_processes)
        super().setup_environment()

    # Lightning's strategy reads checkpoints by itself, with torch.load and after `on_fit_start`. Here the plugin reads
    # the file, as for other strategies, and each process takes its part of the weights and states in it.

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(checkpoint_path)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.model is not None
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self.model, checkpoint["state_dict"], options=options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        assert self.model is not None
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            named = FullyShardedDataParallel.rekey_optim_state_dict(state, OptimStateKeyType.PARAM_NAME, self.model)
            set_optimizer_state_dict(self.model, optimizer, named, options=StateDictOptions(full_state_dict=True))


StrategyRegistry.register(FSDP.name, FSDP)


@atexit.register
def leave_group() -> None:
    """Close the connections among CPU processes: one that ends while gloo's threads run may be aborted.

    Lightning does so only for GPUs.
    """
    if distributed.is_available() and distributed.is_initialized() and distributed.get_backend() == "gloo":
        distributed.destroy_process_group()


def precision_for(precision: str, accelerator: str) -> str:
    """`auto` is bf16-mixed on a GPU that computes in it (NVIDIA's since Ampere, 2020), else single precision."""
    if precision != "auto":
        return precision
    on_gpu = accelerator_of(accelerator) == "cuda"
    return "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"


def choose(cfg: Any, model: nn.Module, data: CharDataModule) -> None:
    """Replace each `auto` in a run's settings, by the machine and the size of a step, and set up PyTorch.

    Also replaces `data.path` by the absolute path where the text was found, and so with `data.paths`.
    """
    if not takes_no_steps(model):
        cfg.trainer.max_steps = steps_of(cfg.trainer.max_steps, cfg.max_tokens, cfg.trainer.max_time)
    if cfg.data.path:
        cfg.data.path = data.corpus.source
    if cfg.data.paths:
        cfg.data.paths = data.settings()["paths"]
    if model.block_size == 1:  # a table of logits: larger gathers are faster and take no memory
        data.tokens_at_once = 65_536
    if cfg.threads == "auto":
        # Small steps gain nothing from threads, which wait twenty times as long for each other on busy cores.
        cfg.threads = torch.get_num_threads() if multiplications(model, data.batch_size * data.block_size) > 1e8 else 1
    torch.set_num_threads(cfg.threads)
    # With deterministic algorithms PyTorch also fills all new memory, which costs a tenth of a GPT's step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    cfg.trainer.precision = precision_for(cfg.trainer.precision, cfg.trainer.accelerator)
    on_cpu = accelerator_of(cfg.trainer.accelerator) == "cpu"
    if on_cpu and cfg.trainer.precision.startswith("bf16") and data.block_size <= 256:
        # For so short contexts, fused attention in bf16 takes a CPU up to four times as long as the plain one.
        torch.backends.cuda.enable_flash_sdp(False)  # despite its name, for CPUs too
