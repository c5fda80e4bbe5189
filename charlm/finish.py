"""The final figures of a run: what results.json holds."""

from typing import Any

import lightning as L
import torch
from torch import nn

from charlm import terminal
from charlm.budget import stopped_by
from charlm.callbacks.clock import Clock
from charlm.data import CharDataModule
from charlm.evaluate import figures, splits_to_evaluate
from charlm.generate import continuation
from charlm.logger import FINISHED
from charlm.model import flops_per_token
from charlm.module import VALIDATION
from charlm.schema import name_of


def evaluate_run(
    config: dict[str, Any], data: CharDataModule, model: nn.Module, trainer: L.Trainer, clock: Clock
) -> tuple[dict[str, Any], str]:
    """Evaluate a trained model exactly. Returns the results, which go to the dashboard as well, and a sample."""
    model = model.to(trainer.strategy.root_device)
    splits = splits_to_evaluate(config["evaluate"], len(data.splits["train"]) - 1 - clock.tokens)
    with terminal.tracked("evaluating") as progress:
        found = figures(model, data, splits, report=progress)
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
