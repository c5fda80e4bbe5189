"""The final figures of a run: what results.json holds."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

from charlm import terminal
from charlm.budget import stopped_by
from charlm.callbacks.clock import Clock
from charlm.data import CharDataModule
from charlm.data.compressors import of_small_text
from charlm.evaluate import Blocks, figures, splits_to_evaluate
from charlm.generate import continuation
from charlm.logger import FINISHED
from charlm.meaning import meaning
from charlm.model import flops_per_token
from charlm.module import VALIDATION
from charlm.run.folder import SWEEP_JSON
from charlm.run.results import write_blocks
from charlm.schema import name_of


def evaluate_run(
    config: dict[str, Any], data: CharDataModule, model: nn.Module, trainer: L.Trainer, clock: Clock
) -> tuple[dict[str, Any], str]:
    """Evaluate a trained model exactly, and write its losses on blocks of val into the run's folder.

    Returns:
        The results, which go to the dashboard as well, and a sample.
    """
    model = model.to(trainer.strategy.root_device)
    splits = splits_to_evaluate(config["evaluate"], len(data.splits["train"]) - 1 - clock.tokens)
    blocks = Blocks(data.splits["val"], data.sizes)
    with terminal.tracked("evaluating") as progress:
        found = figures(model, data, splits, report=progress, blocks=blocks)
    if blocks.fine:
        write_blocks(Path(config["run_dir"]), *blocks.summed())
    # The curves reach the last step. HPARAMS shows the first names of the alphabet: among them should be the verdict.
    logged = {"final/val/loss": found["val/loss"]}
    module: Any = trainer.lightning_module
    if module.validated_at != trainer.global_step:
        logged |= {name: found[name] for name in VALIDATION}
    for logger in trainer.loggers:
        logger.log_metrics(logged, max(0, trainer.global_step - 1))  # Lightning numbers steps from 0
        logger.finalize(FINISHED)
    results = {
        "status": "finished",
        "corpus": data.corpus.name,
        "tokenizer": data.tokenizer.name,
        "model": name_of(config["model"]),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": config["seed"],
        "min_context": data.min_context,
        "device": str(trainer.strategy.root_device),
        "steps": trainer.global_step,
        "stopped_by": stopped_by(trainer, config["trainer"]["max_steps"]),
        "train/tokens": clock.tokens,
        "train/seconds": clock.seconds,
        "train/tokens_per_second": clock.tokens_per_second,
        "train/flops_per_token": flops_per_token(model, data.block_size),
        **found,
    }
    with torch.inference_mode():
        sample = continuation(model, data.tokenizer, config["sample_length"], seed=config["seed"])
    return results, sample


def in_words(results: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """Say what the loss of a run means. A job of a sweep leaves compressors out, because others wait."""
    run_dir = Path(config["run_dir"])
    job = (run_dir.parent / SWEEP_JSON).is_file()
    return meaning(results, config, run_dir, {} if job else of_small_text(config["data"]))
