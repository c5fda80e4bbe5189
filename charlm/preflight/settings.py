"""Check the settings of one run against each other, the hardware and the text."""

import inspect
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.callbacks import BatchSizeFinder, GradientAccumulationScheduler, LearningRateFinder
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from charlm import schema
from charlm.budget import budget_of, limit_tokens, steps_of
from charlm.checkpoint import initial
from charlm.data.chunks import BATCHES_PER_DRAW
from charlm.devices import accelerator_of, cuda_problem, triton_problem
from charlm.errors import InputError, one_line, out_of_memory
from charlm.evaluate import splits_to_evaluate
from charlm.internals.torch import has_cpp_compiler
from charlm.model import multiplications
from charlm.preflight.flags import check_flags
from charlm.speed.conditions import hook_of_each_step
from charlm.system import memory
from charlm.trainer import FSDP, precision_for

ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
MOST_TENSORS = 5_000  # twelve for each layer of a Transformer
# Callbacks that change a setting which run.json records, and that setting.
CHANGES: dict[type[L.Callback], str] = {
    BatchSizeFinder: "data.batch_size",
    LearningRateFinder: "optimizer.lr",
    GradientAccumulationScheduler: "trainer.accumulate_grad_batches",
}
# Who starts processes on several machines leaves one of these in the environment.
STARTED_BY = {"TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "NODE_RANK", "GROUP_RANK"}


def check_settings(plain: dict[str, Any], elsewhere: bool = False) -> int | None:
    """Check one resolved config and, unless it will train elsewhere, the requested hardware.

    Returns:
        The multiplications of a forward pass, roughly; None if the model can only be built with real tensors.

    Raises:
        InputError: if something cannot work; reports the first problem.
    """
    if isinstance(plain.get("trainer"), dict):
        check_flags(plain["trainer"])
    schema.check(plain)
    trainer = {**plain["trainer"]}
    trainer["max_steps"] = steps_of(trainer["max_steps"], plain["max_tokens"], trainer["max_time"])
    if plain["evaluate"] != "auto" and "val" not in plain["evaluate"]:
        raise InputError(f"evaluate={plain['evaluate']} leaves out val, the split that compares runs: add it")
    if trainer["max_steps"] == -1 and not any((trainer["max_time"], plain["max_tokens"], plain["stop_at"])):
        raise InputError("trainer.max_steps=-1 never ends: give max_tokens, or trainer.max_time as DD:HH:MM:SS")
    kind = schema.resolve("model", plain["model"]["_target_"])
    if getattr(kind, "closed_form", False) and trainer["strategy"] != "auto":
        raise InputError(
            f"trainer.strategy={trainer['strategy']} is not possible: model={kind.__name__.lower()} only counts, in "
            f"one process; leave out trainer=ddp or fsdp"
        )
    check_places(plain)
    check_average(plain)
    check_recorded_settings(plain)
    check_epochs(plain)
    if elsewhere:  # each job checks its own hardware
        trainer |= {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": "32-true"}
    else:
        check_hardware(trainer)
        trainer["accelerator"] = accelerator_of(trainer["accelerator"])
        check_compiler(plain, trainer["accelerator"])
    trainer["precision"] = precision_for(trainer["precision"], trainer["accelerator"])
    data, max_tokens = plain["data"], plain["max_tokens"]
    tokens = data["batch_size"] * data["block_size"] if max_tokens else 0
    checked = check_trainer(json.dumps(trainer), max_tokens, tokens)
    if (plain["speed"] or {}).get("cuda_graph") and not elsewhere:
        check_cuda_graph(plain, checked)
    return check_parts(plain, checked)


@cache  # jobs of a sweep seldom differ in it
def check_trainer(node: str, max_tokens: int | None, tokens_per_batch: int) -> L.Trainer:
    """Build the trainer to find combinations of settings that Lightning refuses.

    Args:
        node: its settings, as JSON.

    Raises:
        InputError: with Lightning's own words.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # the header of a run names the devices
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trainer: L.Trainer = instantiate(json.loads(node), logger=False)
        except InstantiationException as error:
            raise InputError(f"trainer: {one_line(error.__cause__ or error)}") from error
    limit_tokens(trainer, max_tokens, tokens_per_batch)
    return trainer


def check_parts(plain: dict[str, Any], trainer: L.Trainer) -> int | None:
    """Build model and schedule on the meta device to find combinations of settings that they refuse.

    Returns:
        The multiplications of a forward pass, roughly; None if the model can only be built with real tensors.

    Raises:
        InputError: with the words of the ValueError that they raise, or for a model or a batch that is too large.
    """
    own = plain["model"]["_target_"].startswith("charlm.")
    try:
        with torch.device("meta"), limited_tensors():  # shapes only: fast, and without memory
            with schema.arguments_as_settings("model", plain["model"]):
                model = instantiate(plain["model"], vocab_size=2)
            model(torch.zeros(1, plain["data"]["block_size"], dtype=torch.long))
        with schema.arguments_as_settings("scheduler", plain["scheduler"]):
            instantiate(plain["scheduler"])(torch.optim.SGD([torch.zeros(1)]), budget_of(trainer))
    except ValueError as error:
        raise InputError(one_line(error)) from error
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, ValueError):
            raise InputError(one_line(cause)) from error
        if trouble := out_of_memory(cause):
            raise trouble from error
        if own:  # a model of another package may need real tensors
            raise InputError(f"model: no model can be made with these settings ({one_line(cause)})") from error
    except (ArithmeticError, MemoryError, RuntimeError, TypeError) as error:
        if trouble := out_of_memory(error):
            raise trouble from error
        if own:
            raise InputError(f"model: no model can be made with these settings ({one_line(error)})") from error
    else:
        check_memory(plain, model)
        return multiplications(model, plain["data"]["batch_size"] * plain["data"]["block_size"])
    return None


@contextmanager
def limited_tensors() -> Iterator[None]:
    """Refuse models with more than MOST_TENSORS weight tensors, such as those of a mistyped n_layer.

    Raises:
        InputError: at the first that is too many.
    """
    left = MOST_TENSORS

    def count(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise InputError(
                f"the model has more than {MOST_TENSORS:,} weight tensors: choose fewer layers or networks"
            )

    with register_module_parameter_registration_hook(count):
        yield


def check_memory(plain: dict[str, Any], model: nn.Module) -> None:
    """Check that a model and a batch fit into the memory of this machine; refuse only what certainly does not.

    Raises:
        InputError: with the size that they need, the memory there is, and what to change.
    """
    data, on_gpu = plain["data"], accelerator_of(plain["trainer"]["accelerator"]) == "cuda"
    parameters = sum(p.numel() for p in model.parameters())
    chunks, tokens = data["batch_size"], data["batch_size"] * data["block_size"]
    needs = {
        # Weights and, where they are trained, gradients and at least one state of the optimizer, in single precision.
        f"a model of {parameters:,} parameters": (parameters * (4 if on_gpu else 12), "a smaller model"),
        # The places of 256 batches are drawn together; each token has two ids and the logits of two symbols.
        f"data.batch_size={chunks} chunks of data.block_size={data['block_size']}": (
            chunks * 8 * BATCHES_PER_DRAW + (0 if on_gpu else tokens * 24),
            "a smaller data.batch_size or data.block_size",
        ),
    }
    there, words = memory.limit() or (2**63, "")
    for what, (size, advice) in needs.items():
        if size > there:
            sizes = f"at least {memory.size(size)}, and {words} {memory.size(there)}"
            raise InputError(f"{what} need {sizes}: choose {advice}")


def check_text(plain: dict[str, Any]) -> list[str]:
    """Read the text of one resolved configuration and cut it as training will. Return warnings about it.

    Raises:
        InputError: if the text is unavailable or too short, or a split does not exist.
    """
    begin = initial(plain["init_from"]) if plain["init_from"] else None
    if begin:
        begin.check(plain)
    make = (lambda *_: begin.tokenizer) if begin and begin.tokenizer else instantiate(plain["tokenizer"])
    data = instantiate(plain["data"], tokenizer=make)
    with schema.arguments_as_settings("data", plain["data"]):
        data.setup()
        data.train_dataloader()
        for split in splits_to_evaluate(plain["evaluate"]):
            data.windows(split)
    check_counting(plain, len(data.splits["train"]))
    if begin:
        with torch.device("meta"):
            begin.load(instantiate(plain["model"], vocab_size=data.vocab_size), data.tokenizer, assign=True)
    return [*data.corpus.cautions()]


def check_counting(plain: dict[str, Any], n: int) -> None:
    """Check that a model which counts n tokens of text finds the memory for it.

    Raises:
        InputError: if not.
    """
    kind = schema.resolve("model", plain["model"]["_target_"])
    there, words = memory.limit() or (2**63, "")
    if hasattr(kind, "memory_to_count") and (need := kind.memory_to_count(n, **plain["model"])) > there:
        raise InputError(
            f"counting {n:,} tokens may take {memory.size(need)}, and {words} {memory.size(there)}: choose shorter "
            f"contexts, a shorter text, or another model"
        )


def check_hardware(trainer: dict[str, Any]) -> None:
    """Check that the accelerator, the devices and the strategy exist.

    Raises:
        InputError: if not.
    """
    accelerator, devices, strategy = trainer["accelerator"], trainer["devices"], trainer["strategy"]
    if accelerator not in ACCELERATORS:
        raise InputError(f"trainer.accelerator={accelerator} is unknown: choose one of {', '.join(ACCELERATORS)}")
    device, problem = accelerator_of(accelerator), None
    if device == "cuda":
        problem = cuda_problem()
    elif device == "mps" and not torch.backends.mps.is_available():
        problem = f"PyTorch {torch.__version__} sees no Apple GPU on this machine"
    if problem:
        raise InputError(
            f"trainer.accelerator={accelerator} is not possible: {problem}; use trainer.accelerator=cpu, or auto"
        )
    if device == "mps" and trainer["deterministic"]:
        raise InputError(
            f"trainer.accelerator={accelerator} means an Apple GPU, which does not give the same bits twice: "
            f"add trainer.deterministic=false, or use trainer.accelerator=cpu"
        )
    if strategy not in ("auto", "ddp", FSDP.name):
        raise InputError(
            f"trainer.strategy={strategy} is not possible: choose auto, or trainer=ddp or fsdp with trainer.devices=N"
        )
    if trainer["num_nodes"] > 1 and not STARTED_BY & os.environ.keys():
        raise InputError(
            f"trainer.num_nodes={trainer['num_nodes']} needs a process started on each: by torchrun, or by Slurm with "
            f"-m hydra/launcher=slurm"
        )
    on_cpu, gpus = device == "cpu", torch.cuda.device_count()
    wanted = how_many(devices, on_cpu)
    # Two processes may share a core, so that distributed training can be tried anywhere.
    most = max(2, os.cpu_count() or 1) if on_cpu else gpus or 1
    if not 1 <= wanted <= most:
        kind = "processes on the CPU" if on_cpu else f"device{'s' * (most > 1)}"
        raise InputError(f"trainer.devices={devices} is not possible: this machine has room for 1 to {most} {kind}")
    if on_cpu and wanted > 1 and strategy == "auto":
        raise InputError(
            f"trainer.devices={devices} on a CPU means {wanted} processes: say trainer=ddp if you want them"
        )


def check_places(plain: dict[str, Any]) -> None:
    """Check that the run keeps everything it resumes from in its own folder.

    Raises:
        InputError: if not; it would not be found there, and might be another run's.
    """
    places = {f"callbacks.{name}.dirpath": node for name, node in (plain["callbacks"] or {}).items()}
    places |= {f"logger.{name}.save_dir": node for name, node in (plain["logger"] or {}).items()}
    for setting, node in places.items():
        place = node.get(setting.rpartition(".")[2])
        if place and node["_target_"].startswith("charlm.") and not Path(place).is_relative_to(plain["run_dir"]):
            raise InputError(
                f"{setting}={place} is outside of the run's folder, where resume= looks: leave it, and put the whole "
                f"run elsewhere with hydra.run.dir=..."
            )


def check_average(plain: dict[str, Any]) -> None:
    """Check that each process has all weights that a callback averages.

    Raises:
        InputError: if not.
    """
    targets = [node["_target_"] for node in (plain["callbacks"] or {}).values()]
    if "charlm.callbacks.EMA" in targets and plain["trainer"]["strategy"] == FSDP.name:
        raise InputError("callbacks=ema averages whole weights, and trainer=fsdp spreads them: say trainer=ddp")


def check_recorded_settings(plain: dict[str, Any]) -> None:
    """Check that no callback changes settings that run.json records.

    Raises:
        InputError: if one does.
    """
    for name, node in (plain["callbacks"] or {}).items():
        kind = schema.resolve(f"callbacks.{name}", node["_target_"])
        base = next((base for base in CHANGES if isinstance(kind, type) and issubclass(kind, base)), None)
        if base:
            raise InputError(
                f"callbacks.{name}={kind.__name__} changes a setting that run.json records: find its value first, "
                f"in Python or by a sweep, and give it as {CHANGES[base]}"
            )


def check_epochs(plain: dict[str, Any]) -> None:
    """Check that each epoch has its validations.

    Raises:
        InputError: if an interval is longer than an epoch.
    """
    trainer, data = plain["trainer"], plain["data"]
    parameters = inspect.signature(schema.resolve("data", data["_target_"])).parameters
    if trainer["check_val_every_n_epoch"] is None or "batches_per_epoch" not in parameters:
        return
    limit, per_step = trainer.get("limit_train_batches"), trainer["accumulate_grad_batches"]
    batches = data.get("batches_per_epoch", parameters["batches_per_epoch"].default)
    batches = -(-batches // per_step) * per_step
    if limit is not None:
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    if trainer["val_check_interval"] > batches > 0:
        raise InputError(
            f"trainer.val_check_interval={trainer['val_check_interval']} is more than the {batches} batches of an "
            f"epoch: say trainer.val_check_interval={batches}, or trainer.check_val_every_n_epoch=null"
        )


def check_compiler(plain: dict[str, Any], accelerator: str) -> None:
    """Check that this machine has what compile=true needs.

    Raises:
        InputError: if not.
    """
    if not plain["compile"]:
        return
    if accelerator == "cuda" and (problem := triton_problem()):
        raise InputError(f"compile=true on a GPU needs {problem}, or say compile=false")
    if accelerator == "cpu" and not has_cpp_compiler():
        raise InputError("compile=true on a CPU needs a C++ compiler: install one (g++ or clang), or say compile=false")


def check_cuda_graph(plain: dict[str, Any], trainer: L.Trainer) -> None:
    """Check that a run can replay its steps as a CUDA graph.

    Args:
        trainer: built from the settings of the run.

    Raises:
        InputError: if not.
    """
    if hasattr(schema.resolve("model", plain["model"]["_target_"]), "count"):
        raise InputError("speed.cuda_graph=true needs steps of one size, and what was counted has many: leave it false")
    one_device = isinstance(trainer.strategy, SingleDeviceStrategy) and trainer.num_devices == trainer.num_nodes == 1
    if not one_device or trainer.strategy.root_device.type != "cuda":
        raise InputError("speed.cuda_graph=true is for one NVIDIA GPU: leave it false, or say trainer=gpu")
    if plain["trainer"]["accumulate_grad_batches"] > 1:
        raise InputError("speed.cuda_graph=true takes one batch a step: say trainer.accumulate_grad_batches=1")
    if plain["model"].get("checkpointing"):
        raise InputError("speed.cuda_graph=true and model.checkpointing=true exclude each other: choose one of them")
    if plain["trainer"]["precision"] == "16-mixed":
        raise InputError("speed.cuda_graph=true and trainer.precision=16-mixed exclude each other: choose bf16-mixed")
    if plain["optimizer"]["_target_"] != "charlm.optimizer.adamw.adamw":
        raise InputError("speed.cuda_graph=true needs numbers that live on the GPU: choose optimizer=adamw")
    for name, node in (plain["callbacks"] or {}).items():
        kind = schema.resolve(f"callbacks.{name}", node["_target_"])
        if isinstance(kind, type) and issubclass(kind, L.Callback) and (hook := hook_of_each_step(kind)):
            raise InputError(
                f"speed.cuda_graph=true replays steps without {hook} of callbacks.{name}: leave out one of the two"
            )


def how_many(devices: int | str | list[int], on_cpu: bool) -> int:
    """How many devices a value of trainer.devices needs to be there; all (-1, auto) needs one.

    Processes on a CPU have no numbers of their own and no end: there it is 0 for a list, and for -1.
    """
    if isinstance(devices, str):
        if devices == "auto":
            return 1
        if not re.fullmatch(r"-?\d+(,\d+)*", devices):
            raise InputError(f"trainer.devices={devices} is not possible: give a number, a list such as [0,1], or auto")
        devices = int(devices) if "," not in devices else [int(d) for d in devices.split(",")]
    if isinstance(devices, list):
        return 0 if on_cpu else max(devices) + 1
    return 1 if devices == -1 and not on_cpu else devices
