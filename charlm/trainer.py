"""FSDP2 for Lightning's Trainer on any device, and the values of settings that are `auto`."""

import atexit
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, OptimStateKeyType

from charlm.budget import steps_of
from charlm.data import CharDataModule
from charlm.devices import accelerator_of
from charlm.evaluate import mean_loss
from charlm.internals.lightning import set_data_parallel_size
from charlm.model import multiplications, takes_no_steps

# Multiplications of a forward pass: with fewer, threads wait longer for each other than they compute.
MULTITHREADED = 1e8
TIMED = 4e8  # of the part of a batch that is timed
TOO_LARGE = 3e9  # of one chunk: a step with one thread would take seconds
STEPS = 5  # that are timed; the best counts
PATIENCE = 0.25  # seconds after which no further step is timed


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


def choose(cfg: Any, model: nn.Module, data: CharDataModule) -> str:
    """Replace each `auto` in a run's settings, by the machine and the size of a step, and set up PyTorch.

    Also replaces `data.path` by the absolute path where the text was found, and so with `data.paths`.

    Returns:
        Why the run has its number of threads, if steps were timed; else nothing.
    """
    if not takes_no_steps(model):
        cfg.trainer.max_steps = steps_of(cfg.trainer.max_steps, cfg.max_tokens, cfg.trainer.max_time)
    if cfg.data.path:
        cfg.data.path = data.corpus.source
    if cfg.data.paths:
        cfg.data.paths = data.settings()["paths"]
    if model.block_size == 1:  # a table of logits: larger gathers are faster and take no memory
        data.tokens_at_once = 65_536
    # With deterministic algorithms PyTorch also fills all new memory, which costs a tenth of a GPT's step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    cfg.trainer.precision = precision_for(cfg.trainer.precision, cfg.trainer.accelerator)
    on_cpu = accelerator_of(cfg.trainer.accelerator) == "cpu"
    if on_cpu and cfg.trainer.precision.startswith("bf16") and data.block_size <= 256:
        # For so short contexts, fused attention in bf16 takes a CPU up to four times as long as the plain one.
        torch.backends.cuda.enable_flash_sdp(False)  # despite its name, for CPUs too
    why = ""
    if cfg.threads == "auto":
        large = multiplications(model, data.batch_size * data.block_size) > MULTITHREADED
        cfg.threads = torch.get_num_threads() if large else 1
        # The processes of one run must not choose apart, and on a GPU the threads of the CPU do not matter.
        alone = cfg.trainer.devices == cfg.trainer.num_nodes == 1
        if cfg.threads > 1 and on_cpu and alone and multiplications(model, data.block_size) < TOO_LARGE:
            cfg.threads, why = timed_threads(model, data, cfg.trainer.precision, cfg.threads)
    torch.set_num_threads(cfg.threads)
    return why


def timed_threads(model: nn.Module, data: CharDataModule, precision: str, most: int) -> tuple[int, str]:
    """Time steps of a model, which stays as it is, with 1 and with `most` threads: `faster_threads`.

    Other programs on the same cores can make several threads ten times slower than one.
    """
    x, y = next(iter(data.train_dataloader()))  # (B, T) each
    rows = max(1, int(TIMED / multiplications(model, x.shape[1])))
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def seconds(threads: int) -> float:
        torch.set_num_threads(threads)
        taken: list[float] = []
        while len(taken) < STEPS and sum(taken) < PATIENCE:
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                loss = mean_loss(model, x[:rows], y[:rows])
            if weights:
                torch.autograd.grad(loss, weights, allow_unused=True)  # no weight gets a gradient
            taken.append(time.perf_counter() - start)
        return min(taken)

    with torch.random.fork_rng(devices=[]):
        chosen = faster_threads(most, seconds)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return chosen


def faster_threads(most: int, seconds: Callable[[int], float]) -> tuple[int, str]:
    """Return the number of threads with which a step is faster, 1 or `most`, and why in a few words.

    Args:
        seconds: how long a step takes with a number of threads.
    """
    alone, together = seconds(1), seconds(most)
    if together < alone:
        return most, f"{alone / together:.1f} times as fast as 1"
    return 1, f"{together / alone:.1f} times as fast as {most}"
