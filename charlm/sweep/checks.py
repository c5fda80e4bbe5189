"""Checks of a sweep's runs that need PyTorch and Lightning, which the process of the sweep does not import."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from charlm.errors import InputError, memory_errors

SMALL = 1e10  # multiplications of a forward pass; a GPU takes less time for them than Python to launch the kernels


class Checked(NamedTuple):
    """The GPUs of this machine, warnings for the user, and whether several of the models can share a GPU."""

    gpus: int
    cautions: list[str]
    small: bool = False


@memory_errors()
def check_runs(runs: Sequence[dict[str, Any]], elsewhere: bool, texts: bool = True) -> Checked:
    """Check the settings of every run of a sweep, and then the text of each: texts take time, and perhaps the network.

    Args:
        runs: their resolved configurations.
        elsewhere: an engine runs them, perhaps on other machines.

    Raises:
        InputError: if something cannot work; reports the first problem.
    """
    import torch

    from charlm.devices import broken_gpu, cuda_problem
    from charlm.preflight.settings import check_settings, check_text

    accelerators = {run["trainer"]["accelerator"] for run in runs}
    gpus = 0 if accelerators == {"cpu"} or cuda_problem() else torch.cuda.device_count()
    sizes = []
    for run in runs:
        sizes.append(check_settings(run, elsewhere))
        devices = run["trainer"]["devices"]
        named = isinstance(devices, list) or "," in str(devices)
        if named and gpus and run["trainer"]["accelerator"] != "cpu" and not elsewhere:
            raise InputError(f"trainer.devices={devices} names GPUs, and a sweep gives them out itself: say how many")
    different = {text_of(run): run for run in runs}
    lines = [line for run in different.values() for line in check_text(run)] if texts else []
    if not elsewhere and "auto" in accelerators and (problem := broken_gpu()):
        lines.append(f"the GPU is not used, and jobs train on the CPU: {problem}")
    return Checked(gpus, list(dict.fromkeys(lines)), all(size is not None and size < SMALL for size in sizes))


def text_of(run: dict[str, Any]) -> str:
    """Return the settings that decide whether the text of a run can be used."""
    begin = [run["init_from"], run["model"]] if run["init_from"] else []
    return str([run["tokenizer"], run["evaluate"], {**run["data"], "batch_size": 0}, *begin])
