"""Train a language model on text: python train.py --help"""

import gc

gc.disable()  # imports make a million objects and no garbage, and looking for it would take a sixth of their time

import os
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_original_cwd, instantiate
from omegaconf import DictConfig, OmegaConf

from charlm import report, terminal
from charlm.errors import one_line_errors
from charlm.preflight import check_command, is_sweep

CONF = Path(__file__).resolve().with_name("conf")  # also where train.py is called by a link to it

if __name__ == "__main__" and is_sweep(sys.argv):
    from charlm.sweep.command import sweep

    gc.enable()
    sweep(sys.argv, CONF)  # which does without the imports below

import lightning as L
import torch
from torch import nn

from charlm import checkpoint
from charlm.budget import limit_tokens, steps_of, stopped_by
from charlm.callbacks import AtomicCheckpointIO, Checkpoint, Losses, Stop, Throughput, Validations
from charlm.checkpoint import Newest
from charlm.data import CharDataModule
from charlm.evaluate import figures
from charlm.generate import write
from charlm.logger import CSV, FINISHED, TensorBoard, hyperparameters
from charlm.module import VALIDATION, LanguageModel
from charlm.resume import begun, tidy
from charlm.run import Run, follows
from charlm.trainer import precision_for

gc.enable()
gc.freeze()


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def main(cfg: DictConfig) -> None:
    """One run, from its first second to its last: its settings, its record, its training."""
    with one_line_errors(), terminal.logged():
        cfg, state = begun(cfg, HydraConfig.get().overrides.task)
        terminal.started_in = get_original_cwd()
        if cfg.data.path:  # counts from where the command was typed, also with hydra.job.chdir=true
            cfg.data.path = os.path.join(terminal.started_in, os.path.expanduser(cfg.data.path))
        with Run(plain(cfg), follows(plain(cfg, resolve=False))) as run:
            finished = train(cfg, state, run)
        if finished:  # results.json and run.json are final, whatever happens to the terminal from here on
            terminal.summary(*finished)
            terminal.next_commands(Path(cfg.run_dir))


def train(cfg: DictConfig, state: Newest | None, run: Run) -> tuple[dict[str, Any], str] | None:
    """Configuration -> parts -> fit -> evaluate. Returns the results and a sample, in the first process only."""
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    data: CharDataModule = instantiate(cfg.data, tokenizer=instantiate(cfg.tokenizer))
    data.setup()
    model = instantiate(cfg.model, vocab_size=data.tokenizer.vocab_size)
    if hasattr(model, "count"):
        model.count(data.splits["train"])
    choose(cfg, model, data)
    torch.set_num_threads(cfg.threads)
    # Where algorithms are deterministic, PyTorch also fills all new memory: a tenth of a GPT's step, for nothing.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    config = plain(cfg)
    record = checkpoint.record(config, data.tokenizer, data.corpus.card())
    module = LanguageModel(model, instantiate(cfg.optimizer), instantiate(cfg.scheduler), record, cfg.compile, cfg.seed)
    throughput, speed = Throughput(), instantiate(cfg.speed)
    # A state is saved when all others are done with its step.
    observers = sorted(instantiate(cfg.callbacks).values(), key=lambda one: isinstance(one, Checkpoint))
    trainer: L.Trainer = instantiate(
        cfg.trainer,
        default_root_dir=cfg.run_dir,
        logger=instantiate(cfg.logger) or False,
        callbacks=[
            Validations(cfg.run_dir, throughput),
            *observers,
            Losses(cfg.run_dir),
            throughput,
            Stop(cfg.stop_at),
            *([speed] if speed else []),
        ],
        plugins=[AtomicCheckpointIO()],
    )
    limit_tokens(trainer, cfg.max_tokens, data.batch_size * data.block_size)
    steps = speed.told(trainer, module, data.batch_size * data.block_size) if speed else "1 at a time: speed=off"
    run.tell(config, data.corpus.card(), trainer, steps)
    if state and trainer.is_global_zero:
        tidy(Path(cfg.run_dir))
    for logger in trainer.loggers:
        if state and isinstance(logger, TensorBoard | CSV):
            logger.resume(state.content["callbacks"]["Checkpoint"]["logged"])
        logger.log_hyperparams(hyperparameters(config, data))
    if trainer.is_global_zero:
        terminal.header(config, data, module.model, trainer, steps)
        for line in data.corpus.cautions():
            terminal.caution(line)
    # A state from before the first step holds nothing that is not made again.
    path = state.path if state and state.content["global_step"] > 0 else None
    trainer.fit(module, data, ckpt_path=path, weights_only=True)
    model = module.whole()
    if not trainer.is_global_zero:
        return None
    results, sample = finish(config, data, model, trainer, throughput)
    run.finish(results)
    return results, sample


def plain(cfg: DictConfig, resolve: bool = True) -> dict[str, Any]:
    """A configuration as plain types."""
    config: Any = OmegaConf.to_container(cfg, resolve=resolve)
    return config


def choose(cfg: DictConfig, model: nn.Module, data: CharDataModule) -> None:
    """Put a value where `auto` is, as this machine and the size of a step suggest; and where the text was found."""
    cfg.trainer.max_steps = steps_of(cfg.trainer.max_steps, cfg.max_tokens, cfg.trainer.max_time)
    if cfg.data.path:
        cfg.data.path = data.corpus.source  # absolute, so that it is found from any folder
    # What a forward pass multiplies; 10^8 take about 10 ms on a CPU, and the backward pass twice as long.
    multiplications = sum(p.numel() for p in model.parameters()) * data.batch_size * data.block_size
    if model.block_size == 1:  # a table: to look up more at once takes no memory, and a batch costs more than that
        data.tokens_at_once = 65_536
    if cfg.threads == "auto":
        # Small steps gain nothing from threads, which wait twenty times as long for each other on busy cores.
        cfg.threads = torch.get_num_threads() if multiplications > 1e8 else 1
    cfg.trainer.precision = precision_for(cfg.trainer.precision, cfg.trainer.accelerator)
    on_cpu = cfg.trainer.accelerator == "cpu" or not torch.cuda.is_available()
    if on_cpu and cfg.trainer.precision.startswith("bf16") and data.block_size <= 256:
        # So short, PyTorch's fused attention takes a CPU up to four times as long in bf16 as the plain one.
        torch.backends.cuda.enable_flash_sdp(False)  # of all devices, for all its name


def finish(
    config: dict[str, Any],
    data: CharDataModule,
    model: nn.Module,
    trainer: L.Trainer,
    throughput: Throughput,
) -> tuple[dict[str, Any], str]:
    """Evaluate the trained model exactly. Returns the results, which go to the dashboard as well, and a sample."""
    model = model.to(trainer.strategy.root_device)
    with terminal.tracked("evaluating") as progress:
        found = figures(model, data, config["evaluate"], report=progress)
    # The curves reach the last step. HPARAMS shows the first names of the alphabet: among them should be the verdict.
    told = {"final/val/loss": found["val/loss"]}
    module: Any = trainer.lightning_module
    if module.validated_at != trainer.global_step:
        told |= {name: found[name] for name in VALIDATION}
    for logger in trainer.loggers:
        logger.log_metrics(told, trainer.global_step - 1)  # Lightning numbers steps from 0
        logger.finalize(FINISHED)
    results = {
        "status": "finished",
        "corpus": data.corpus.name,
        "model": report.name_of(config["model"]),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": config["seed"],
        "min_context": data.min_context,
        "device": str(trainer.strategy.root_device),
        "steps": trainer.global_step,
        "stopped_by": stopped_by(trainer, config["trainer"]["max_steps"]),
        "train/tokens": throughput.tokens,
        "train/seconds": throughput.seconds,
        "train/tokens_per_second": throughput.tokens_per_second,
        **found,
    }
    with torch.inference_mode():
        sample = "".join(write(model, data.tokenizer, config["sample_length"], seed=config["seed"]))
    return results, sample


if __name__ == "__main__":
    with one_line_errors():
        sys.argv = check_command(sys.argv, CONF)
        main()
