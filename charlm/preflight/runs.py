"""Runs as they are checked: resolved, and for a sweep where PyTorch and Lightning are imported, as it is without."""

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from charlm.errors import InputError, memory_errors, warn
from charlm.preflight.complaints import told_in_one_line

RUN_DIR = "<run>"  # stands for the folder of a run, which is not known yet


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """A composed configuration, without Hydra's own part, as plain types.

    Raises:
        InputError: for a value that is missing, or that cannot be looked up.
    """
    with told_in_one_line():
        if OmegaConf.is_interpolation(cfg, "run_dir"):
            cfg.run_dir = RUN_DIR
        for missing in sorted(OmegaConf.missing_keys(cfg)):
            raise InputError(f"{missing} is missing: give it a value, {missing}=...")
        plain: Any = OmegaConf.to_container(cfg, resolve=True)
    found: dict[str, Any] = plain
    return found


@memory_errors()
def check_runs(runs: Sequence[dict[str, Any]], elsewhere: bool, texts: bool = True) -> int:
    """Check the settings of every run of a sweep, and then the text of each: texts take time, and perhaps the network.

    Args:
        runs: their resolved configurations.
        elsewhere: an engine runs them, perhaps on other machines.

    Returns:
        How many GPUs there are.

    Raises:
        InputError: for the first thing that cannot work.
    """
    import torch

    from charlm.preflight.settings import check_settings, check_text

    gpus = torch.cuda.device_count()
    for run in runs:
        check_settings(run, elsewhere)
        devices = run["trainer"]["devices"]
        named = isinstance(devices, list) or "," in str(devices)
        if named and gpus and run["trainer"]["accelerator"] != "cpu" and not elsewhere:
            raise InputError(f"trainer.devices={devices} names GPUs, and a sweep gives them out itself: say how many")
    if texts:
        different = {str([run["tokenizer"], run["evaluate"], {**run["data"], "batch_size": 0}]): run for run in runs}
        cautions = {line: None for run in different.values() for line in check_text(run)}  # once, in this order
        for line in cautions:
            warn(line)
    return gpus
