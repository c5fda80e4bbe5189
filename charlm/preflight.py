"""Everything that can be wrong with a command, found before anything is written and before the first job starts."""

import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from charlm import config, terminal
from charlm.data.corpus import load_corpus
from charlm.errors import CorpusUnavailable, InputError


def check_command(argv: Sequence[str], config_dir: Path) -> list[str]:
    """Compose every run that a command line asks for and check it.

    Returns:
        The command line to run: the same, or with another corpus where the one asked for cannot be had.

    Raises:
        InputError: for the first thing that cannot work.
    """
    # Hydra would shorten errors in its own way; charlm tells a person's mistake in one line, and a defect in full.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    args = get_args_parser().parse_args(argv[1:])
    overrides: list[str] = list(args.overrides)
    name = args.config_name or "train"
    search = [f"hydra.searchpath=[file://{os.path.abspath(args.config_dir)}]"] if args.config_dir else []
    with initialize_config_dir(os.path.abspath(args.config_path or config_dir), version_base="1.3"):
        with told_in_one_line(overrides):
            jobs = expand(name, overrides) if args.multirun else [overrides]
            cfgs = [compose(name, [*job, *search], return_hydra_config=True) for job in jobs]
            if args.help or args.hydra_help or args.cfg or args.info or args.shell_completion:
                return list(argv)
            HydraConfig.instance().set_config(cfgs[0])
            folder = cfgs[0].hydra.sweep.dir if args.multirun else cfgs[0].hydra.run.dir
        if "LOCAL_RANK" not in os.environ:  # the first process; the others join it in its folder
            check_folder(Path(folder))
        corpora = [check_job(OmegaConf.masked_copy(cfg, [k for k in cfg if k != "hydra"])) for cfg in cfgs]
    given = {f"data={corpus}" for corpus in corpora if corpus}
    if not given:
        return list(argv)
    # The command that gives the same run again, wherever Tiny Shakespeare is.
    return [*(a for a in argv if not a.startswith("data=")), *given]


def expand(name: str, overrides: list[str]) -> list[list[str]]:
    """The overrides of each job of a sweep, as Hydra's basic sweeper will make them."""
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    firsts = [first_value(override) for override in parser.parse_overrides(overrides)]
    sweeper = compose(name, firsts, return_hydra_config=True).hydra.sweeper
    params = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    jobs: list[list[str]] = BasicSweeper.split_arguments(parser.parse_overrides([*params, *overrides]), None)[0]
    return jobs


def first_value(override: Override) -> str:
    if override.is_sweep_override():
        return f"{override.get_key_element()}={next(override.sweep_string_iterator())}"
    return str(override.input_line)


def check_job(cfg: DictConfig) -> str | None:
    """Check one composed configuration: settings, then hardware, then corpus.

    Returns:
        The corpus to train on where the one asked for cannot be had and the configuration names another.

    Raises:
        InputError: for the first thing that cannot work.
    """
    with told_in_one_line():
        cfg.run_dir = "outputs"  # not known yet
        for missing in sorted(OmegaConf.missing_keys(cfg)):
            raise InputError(f"{missing} is missing: give it a value, {missing}=...")
        plain: Any = OmegaConf.to_container(cfg, resolve=True)
    config.check(plain)
    check_hardware(plain["trainer"])
    given = available_corpus(cfg.data.corpus, cfg.data.path, cfg.data.fallback)
    if given != cfg.data.corpus:
        cfg.data.corpus, cfg.data.path = given, None
    data = instantiate(cfg.data, tokenizer=instantiate(cfg.tokenizer))
    data.setup()
    for split in cfg.evaluate:
        data.windows(split)
    return given if given != plain["data"]["corpus"] else None


@cache  # a sweep asks the network once
def available_corpus(name: str, path: str | None, fallback: str | None) -> str:
    """The corpus asked for, or the one to train on where that cannot be had."""
    try:
        load_corpus(name, path)
    except CorpusUnavailable as error:
        if fallback is None:
            raise
        terminal.notice_fallback(name, fallback, error)
        return fallback
    return name


def check_hardware(trainer: dict[str, Any]) -> None:
    """Are the accelerator, the devices and the strategy there?

    Raises:
        InputError: if not.
    """
    from lightning.pytorch.strategies import StrategyRegistry

    accelerator, devices, strategy = trainer["accelerator"], trainer["devices"], trainer["strategy"]
    gpus, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    there = {"auto": True, "cpu": True, "gpu": gpus > 0 or mps, "cuda": gpus > 0, "mps": mps}
    if accelerator not in there:
        raise InputError(f"trainer.accelerator={accelerator} is unknown: choose one of {', '.join(there)}")
    if not there[accelerator]:
        raise InputError(
            f"trainer.accelerator={accelerator} is not there: PyTorch {torch.__version__} sees no such device on this "
            f"machine; use trainer.accelerator=cpu, or auto"
        )
    if strategy not in ["auto", *StrategyRegistry.available_strategies()]:
        raise InputError(f"trainer.strategy={strategy} is unknown: choose auto, or trainer=ddp with trainer.devices=N")
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not gpus and not mps)
    wanted = how_many(devices)
    # Two processes may share a core, so that distributed training can be tried anywhere.
    most = max(2, os.cpu_count() or 1) if on_cpu else gpus or 1
    if wanted > most or wanted == 0:
        kind = "processes on the CPU" if on_cpu else f"device{'s' * (most > 1)}"
        raise InputError(f"trainer.devices={devices} is not possible: this machine has room for 1 to {most} {kind}")
    if on_cpu and wanted > 1 and strategy == "auto":
        raise InputError(
            f"trainer.devices={devices} on a CPU means {wanted} processes: say trainer=ddp if you want them"
        )


def how_many(devices: int | str | list[int]) -> int:
    """How many devices a value of trainer.devices needs to be there; all (-1, auto) needs one."""
    if isinstance(devices, str):
        if devices == "auto":
            return 1
        if not re.fullmatch(r"-?\d+(,\d+)*", devices):
            raise InputError(f"trainer.devices={devices} is not possible: give a number, a list such as [0,1], or auto")
        devices = int(devices) if "," not in devices else [int(d) for d in devices.split(",")]
    if isinstance(devices, list):
        return max(devices) + 1
    return 1 if devices == -1 else devices


def check_folder(folder: Path) -> None:
    """A run needs a folder of its own that can be written.

    Raises:
        InputError: if there is a run in it already, or if it cannot be made.
    """
    if (folder / "results.json").exists() or (folder / "checkpoints").exists():
        raise InputError(f"{folder} already holds a run: choose another hydra.run.dir, or move that one away")
    missing = [place for place in (folder.absolute(), *folder.absolute().parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}): choose another hydra.run.dir") from error
    finally:  # other checks follow: a mistake must leave nothing behind
        for place in missing:
            if place.is_dir():
                place.rmdir()


@contextmanager
def told_in_one_line(overrides: Sequence[str] = ()) -> Iterator[None]:
    """Hydra's and OmegaConf's complaints as an InputError.

    Needs an initialized Hydra, to find the nearest name of a setting that there is not.
    """
    try:
        yield
    except MissingConfigException as error:
        group, _, choice = (error.missing_cfg_file or "").rpartition("/")
        choices = [c for c in error.options or [] if c != "base"]
        if not group or not choices:
            raise InputError(one_line(error)) from error
        raise InputError(f"{group}={choice} is not there: choose one of {', '.join(choices)}") from error
    except HydraException as error:
        unknown = re.search(r"Could not (?:override|delete|append to config)[^']*'([^']+)'", str(error))
        if not unknown or "already at" in str(error):
            raise InputError(one_line(error)) from error
        key = unknown[1].split("=")[0].split("@")[0]
        raise InputError(config.unknown_key(key, known_settings(overrides, key))) from error
    except OmegaConfBaseException as error:
        raise InputError(f"{error.full_key}: {one_line(error)}" if error.full_key else one_line(error)) from error


def known_settings(overrides: Sequence[str], wrong: str) -> list[str]:
    """The settings that there are under the groups that the command chose, without the wrong one."""
    choices = [o for o in overrides if re.match(r"[a-z_]+=", o) and "," not in o and o.split("=")[0] != wrong]
    of_hydra = wrong.startswith("hydra.")
    try:
        cfg = compose("train", choices, return_hydra_config=of_hydra)
    except HydraException:
        cfg = compose("train", return_hydra_config=of_hydra)
    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    return list(config.leaves(plain))


def one_line(error: Exception) -> str:
    """A library's message with its lines joined."""
    lines = (line.strip().rstrip(".") for line in str(error).splitlines())
    return "; ".join(line for line in lines if line and not line.startswith(("full_key", "object_type", "See https")))
