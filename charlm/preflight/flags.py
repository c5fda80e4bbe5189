"""Flags of Lightning's Trainer: the supported ones, and the reasons against the others."""

import inspect
from collections.abc import Mapping
from typing import Any

from charlm.errors import InputError

# Each has a test in tests/test_lightning.py, which shows what it does to a run.
TESTED = frozenset(
    {
        "accelerator",
        "accumulate_grad_batches",
        "benchmark",
        "check_val_every_n_epoch",
        "detect_anomaly",
        "deterministic",
        "devices",
        "enable_model_summary",
        "enable_progress_bar",
        "gradient_clip_algorithm",
        "gradient_clip_val",
        "inference_mode",
        "limit_train_batches",
        "log_every_n_steps",
        "max_epochs",
        "max_steps",
        "max_time",
        "min_epochs",
        "min_steps",
        "num_nodes",
        "num_sanity_val_steps",
        "precision",
        "profiler",
        "reload_dataloaders_every_n_epochs",
        "strategy",
        "val_check_interval",
    }
)
# The values that change nothing, and the reason why a run can have no other.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "limit_val_batches": (
        (None, 1.0),
        "validations of a run are whole, or their losses are not its own: validate less often",
    ),
    "limit_test_batches": ((None, 1.0), "a run tests nothing by Lightning: choose splits with evaluate=[val,test]"),
    "limit_predict_batches": ((None, 1.0), "a run predicts nothing by Lightning: see charlm generate"),
    "fast_dev_run": ((False, 0), "it keeps nothing of a run: say trainer.max_steps=5"),
    "overfit_batches": ((0, 0.0), "its losses are of a few batches: train on a short text, data=text data.path=FILE"),
    "barebones": ((False,), "it takes away loggers and checkpoints: say logger=none callbacks=none"),
    "logger": ((), "a run has those of its own group: say logger=tensorboard, csv, wandb, mlflow or none"),
    "callbacks": ((), "a run has those of its own group: add one with +callbacks.NAME._target_=CLASS"),
    "default_root_dir": ((), "a run has one folder: say hydra.run.dir=FOLDER"),
    "plugins": ((), "charlm passes the one that writes checkpoints without pickle"),
    "enable_checkpointing": (
        (True, False),
        "a run's checkpoints are those of its callbacks: say ~callbacks.checkpoint to have none",
    ),
    "use_distributed_sampler": ((False,), "the data module gives each process batches of its own"),
    "sync_batchnorm": ((False,), "no model of charlm normalizes over a batch"),
    "enable_autolog_hparams": ((True,), "charlm logs the settings of a run by itself: say logger=none to log nothing"),
    "model_registry": ((None,), "it uploads checkpoints of Lightning's kind, and a run writes its own"),
}
SPAWNED = "processes that it starts cannot hand back what the end of a run needs: say trainer=ddp"
DEEPSPEED = "DeepSpeed is a package that charlm does not bring, with checkpoints of its own: say trainer=fsdp"
FSDP1 = "it is FSDP1, which refuses a CPU: say trainer=fsdp, which is FSDP2"
TPU = "charlm was never tested on a TPU"
UNUSED = "all parameters of charlm's models are used in each step: say trainer=ddp"
# Values that Lightning takes and a run cannot have, and the reason; a strategy is found by how its name begins.
STRATEGIES = {
    "ddp_find_unused_parameters": UNUSED,
    "ddp_": SPAWNED,
    "deepspeed": DEEPSPEED,
    "fsdp": FSDP1,
    "single_device": "trainer.strategy=auto is the same on one device",
    "single_": TPU,
    "xla": TPU,
}
NVIDIA = "NVIDIA's Transformer Engine is a package that charlm does not bring: say bf16-mixed"
VALUES: dict[str, dict[Any, str]] = {
    "precision": {
        **{value: f"say {value}-true" for value in (64, "64", 32, "32")},
        **{value: f"say {value}-mixed" for value in (16, "16", "bf16")},
        **dict.fromkeys(("transformer-engine", "transformer-engine-float16"), NVIDIA),
    },
    "accelerator": {"tpu": TPU},
    "profiler": {"xla": TPU},
    "deterministic": {"warn": "a run repeats to the bit, or says that it need not: say true or false"},
}


def check_flags(trainer: Mapping[str, Any]) -> None:
    """Check which flags a run has, and values that Lightning takes and a run does not.

    Raises:
        InputError: if a run cannot have a flag or a value; gives the reason.
    """
    for flag, value in trainer.items():
        reason = VALUES.get(flag, {}).get(value) if isinstance(value, str | int) else None
        if flag == "strategy" and isinstance(value, str) and value not in ("ddp", "fsdp2"):
            reason = next((reason for start, reason in STRATEGIES.items() if value.startswith(start)), None)
        if flag in REFUSED and not any(value == usual and type(value) is type(usual) for usual in REFUSED[flag][0]):
            reason = REFUSED[flag][1]
        if reason:
            raise InputError(f"trainer.{flag}={value} is not possible: {reason}")
        if reason := unsupported(flag):
            raise InputError(f"trainer.{flag}: {reason}")


def refusal(flag: str) -> str | None:
    """Why a run cannot have a flag of Lightning's; None if it can, or if Lightning has no such flag."""
    return REFUSED[flag][1] if flag in REFUSED else unsupported(flag)


def unsupported(flag: str) -> str | None:
    if flag in TESTED or flag in REFUSED or flag not in flags_of_lightning():
        return None
    return "this version of Lightning has it, and charlm was not tested with it yet: leave it out"


def flags_of_lightning() -> set[str]:
    import lightning as L  # slow to import, and needed only for a message

    return {*inspect.signature(L.Trainer).parameters}
