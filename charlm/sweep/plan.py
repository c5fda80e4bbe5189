"""The command line of a sweep, checked: python train.py -m ..., sweep=NAME, resume=SWEEP."""

import importlib.util
import os
import re
import shutil
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from charlm import schema, terminal
from charlm.errors import InputError, printable
from charlm.files import check_tree, unshare
from charlm.preflight.command import LAUNCHERS, check_overrides, check_processes, named_folder, with_folder
from charlm.preflight.command_line import conf_dirs, options, parse, shows_only, with_standard_input
from charlm.preflight.configs import composer, fallback_corpus, resolved, without_hydra
from charlm.preflight.messages import one_line_hydra_errors
from charlm.run.folder import SWEEP_JSON, check_folder, claim, own_folder
from charlm.run.overrides import quoted, unquoted
from charlm.run.trust import check_config
from charlm.sweep import processes
from charlm.sweep.checks import check_runs
from charlm.sweep.composition import composed
from charlm.sweep.ledger import Search, goes_on, read
from charlm.sweep.space import Space, asked, recorded

# The plugin package of Hydra that a launcher needs, and a program.
NEEDS: dict[str, tuple[str, str | None]] = {
    "slurm": ("hydra-submitit-launcher", "sbatch"),
    "ray": ("hydra-ray-launcher", None),
}


def is_sweep(argv: Sequence[str]) -> bool:
    """Return whether a command line means many runs: with -m, sweep=NAME or a sweep to resume."""
    study = any(re.match(r"\+?sweep=(?!(null)?$)", argument) for argument in argv) and "hydra.mode=RUN" not in argv
    return study or "-m" in argv or "--multirun" in argv or begun_sweep(argv) is not None


def check_command(argv: Sequence[str], config_dir: Path) -> list[str]:
    """Compose every job of a sweep and check it.

    `check_runs` checks what needs PyTorch and Lightning: here for a fallback corpus, otherwise from the launcher.

    Returns:
        The command line to run: the same, with the folder of the sweep and, where the corpus is not available, its
        fallback.

    Raises:
        InputError: if something cannot work; reports the first problem.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra would shorten tracebacks; charlm prints mistakes as one line itself
    argv = with_standard_input(argv)
    args = parse(argv[1:])
    continued = continued_overrides(args)
    if continued:
        argv = [argv[0], "-m", *options(argv), *continued]
        args = parse(argv[1:])
    overrides: list[str] = list(args.overrides)
    if args.multirun and (args.cfg or args.info):
        raise InputError("--cfg and --info show one run: leave -m away")
    if not (args.multirun or args.cfg or args.info):
        argv, args.multirun = [argv[0], "-m", *argv[1:]], True
    for name in ("resume", "rerun"):
        if named_folder(name, overrides):
            raise InputError(f"{name}= begins from one run, and makes one: leave -m away")
    with composer(config_dir, args) as compose:
        with one_line_hydra_errors(overrides):
            check_overrides(overrides)
            check_launchers(overrides)
            make = cache(compose)
            jobs, space = expand(overrides, make) if args.multirun else ([overrides], None)
            cfgs = list(composed(jobs, make))
            if args.help:
                from charlm.preflight.help import show_help  # with a parser of docstrings, which only it needs

                show_help(cfgs[0], conf_dirs(config_dir, args))
                sys.exit(0)
            if shows_only(args):
                return list(argv)
            HydraConfig.instance().set_config(cfgs[0])
            for cfg in cfgs:
                check_launcher(cfg)
            searched = asked(cfgs[0].hydra, space) if space else None
            sweep_dir = Path(cfgs[0].hydra.sweep.dir)
        check_processes(overrides)
        chosen = any(o.startswith("hydra.sweep.dir=") for o in overrides)
        begun = (sweep_dir / SWEEP_JSON).is_file()
        check_folder(sweep_dir, "hydra.sweep.dir", new=not chosen or begun)
        elsewhere = not cfgs[0].hydra.launcher._target_.endswith(".LocalLauncher")
        cfgs = [without_hydra(cfg) for cfg in cfgs]
        if continued:
            for cfg in cfgs:
                check_config(sweep_dir / SWEEP_JSON, resolved(cfg), conf_dirs(config_dir, args), {"trust": cfg.trust})
        if other := fallback_corpus(cfgs):
            # Report other mistakes before the fallback; the launcher checks the rest later.
            processes.ask(check_runs, [resolved(cfg) for cfg in cfgs], elsewhere, False)
            terminal.notice_fallback(cfgs[0].data.corpus, *other)
            given = f"data={other[0]}"
            argv = [*(a for a in argv if not a.startswith("data=")), given]
            sweep_dir = Path(compose([*(o for o in jobs[0] if not o.startswith("data=")), given]).hydra.sweep.dir)
    own = None if chosen else unfinished(sweep_dir.parent, parse(argv[1:]).overrides, searched)
    if own:
        how = "for another sweep say hydra.sweep.dir=..."
        print(printable(f"Going on with {own}, which the same command began; {how}"))
    else:
        own = own_folder(sweep_dir, "hydra.sweep.dir", new=not chosen, begun=begun)
    return with_folder(argv, "hydra.sweep.dir", own)


def begun_sweep(arguments: Sequence[str]) -> Path | None:
    """Return the folder that resume=FOLDER names, if it holds a sweep."""
    named = [a.removeprefix("resume=") for a in arguments if re.match("resume=.", a)]
    try:
        folder = Path(unquoted(named[-1])) if named else None
    except InputError:  # the check of the command reports it
        return None
    return folder if folder and os.path.isfile(folder / SWEEP_JSON) else None


def continued_overrides(args: Namespace) -> list[str]:
    """Return the overrides of the sweep that resume=FOLDER names; overrides of the command line replace old ones.

    Raises:
        InputError: if sweep.json cannot be read, or if the jobs ran elsewhere and no launcher is named.
    """
    folder = begun_sweep(args.overrides)
    if folder is None:
        return []
    given = [o for o in args.overrides if not o.startswith(("resume=", "hydra.sweep.dir="))]
    keys = {o.partition("=")[0] for o in given}
    content = read(folder / SWEEP_JSON)
    if content["launcher"] != "local" and "hydra/launcher" not in keys:
        raise InputError(
            f"{folder} ran with hydra/launcher={content['launcher']}: repeat that with its settings, or give "
            f"hydra/launcher=local"
        )
    begun = [*content["command"], *(recorded(content["search"], content["command"]) if content["search"] else [])]
    kept = [o for o in begun if o.partition("=")[0] not in keys]
    return [*kept, *given, f"hydra.sweep.dir={quoted(folder)}"]


def unfinished(folder: Path, overrides: Sequence[str], searched: Search | None) -> Path | None:
    """Claim and return the newest sweep in `folder` that the same command began and that is not finished."""
    command = [o for o in overrides if not o.startswith("hydra")]
    for file in sorted(folder.glob(f"*/{SWEEP_JSON}"), reverse=True):
        with suppress(InputError):
            if goes_on(file.parent, command, searched):
                check_tree(file.parent)
                if claim(file.parent):
                    unshare(file.parent)
                    return file.parent
    return None


def expand(
    overrides: Sequence[str], compose: Callable[[tuple[str, ...]], DictConfig]
) -> tuple[list[list[str]], Space | None]:
    """Return the overrides of each job of a grid; a search returns its corners and its space."""
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    firsts = [first_value(override) for override in parser.parse_overrides(list(overrides))]
    [cfg] = composed([firsts], compose)
    sweeper = cfg.hydra.sweeper
    if sweeper._target_.endswith(".OptunaSweeper"):
        params = [f"{key}={value}" for key, value in (sweeper.params or {}).items()]
        space = Space(parser.parse_overrides([*params, *overrides]))
        return space.corners(), space
    return union(sweeper.get("params"), sweeper.get("grids"), overrides, parser), None


def union(
    params: Mapping[str, Any] | None,
    grids: Sequence[Mapping[str, Any]] | None,
    overrides: Sequence[str],
    parser: OverridesParser,
) -> list[list[str]]:
    """Return the overrides of each job of several grids, each job once.

    Args:
        params: the settings that all grids share, as hydra.sweeper.params holds them.
        grids: the settings of each grid, as hydra.sweeper.grids holds them; None: one grid, of `params`.
        overrides: the command line, which overrides both.

    Raises:
        InputError: if `grids` is no list of settings, or if its grids set different settings.
    """
    example = "[{model.n_embd: 32, optimizer.lr: 1e-2}, {model.n_embd: 64, optimizer.lr: 5e-3}]"
    if grids is not None and not (is_list(grids) and grids and all(isinstance(grid, Mapping) for grid in grids)):
        raise InputError(f"hydra.sweeper.grids={grids} is no list of grids: give settings for each, as in {example}")
    grids = grids or [{}]
    for number, settings in enumerate(grids):
        if other := sorted(settings.keys() ^ grids[0].keys()):
            raise InputError(
                f"hydra.sweeper.grids[{number}] and grids[0] do not set the same settings: give {other[0]} in both"
            )
    jobs: dict[tuple[str, ...], None] = {}  # a command line may leave no difference between two grids
    for settings in grids:
        given = [f"{key}={value}" for key, value in {**(params or {}), **settings}.items()]
        jobs |= dict.fromkeys(map(tuple, grid(parser.parse_overrides([*given, *overrides]))))
    return [list(job) for job in jobs]


def is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def grid(overrides: Sequence[Override]) -> Iterator[list[str]]:
    """Yield the overrides of each job: every combination of the swept values, the last setting varying fastest.

    Raises:
        InputError: if one is an interval, which has no values to list.
    """
    values = []
    for override in {o.get_key_element(): o for o in overrides}.values():  # the last override of a setting counts
        if override.is_interval_sweep():
            raise InputError(
                f"{override.input_line} is for a search: add hydra/sweeper=optuna, or give values, as in "
                f"{override.key_or_group}=1e-3,1e-2"
            )
        key = override.get_key_element()
        if override.is_discrete_sweep():
            values.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            values.append([str(override.input_line)])
    yield from map(list, product(*values))


def first_value(override: Override) -> str:
    """Return an override with the first of its swept values."""
    value: Any = override.value()
    if override.is_sweep_override():
        first = value.start if override.is_interval_sweep() else next(override.sweep_string_iterator())
        return f"{override.get_key_element()}={first}"
    return str(override.input_line)


def check_launchers(overrides: Sequence[str]) -> None:
    """Check that the launcher of a sweep is installed.

    Raises:
        InputError: if not, or for a launcher other than charlm's, which would keep no sweep.json.
    """
    for override in overrides:
        key, _, name = override.partition("=")
        if key != "hydra/launcher":
            continue
        if name not in LAUNCHERS:
            raise InputError(f"hydra/launcher={name} is not there: choose one of {', '.join(LAUNCHERS)}")
        package, program = NEEDS.get(name, (None, None))
        if package and importlib.util.find_spec(f"hydra_plugins.{package.replace('-', '_')}") is None:
            raise InputError(f"hydra/launcher={name} needs a package that is not there: pip install {package}")
        if program and not shutil.which(program):
            raise InputError(f"hydra/launcher={name} needs {program}, which is not here: run it on the cluster")
        # conf/hydra/launcher/ray.yaml replaces the config of the same name that hydra-ray-launcher registers.
        warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/ray' is validated against ConfigStore schema")


def check_launcher(cfg: DictConfig) -> None:
    """Check the launcher's settings.

    Raises:
        InputError: if not.
    """
    launcher: Any = OmegaConf.to_container(cfg.hydra.launcher, resolve=False)
    devices = cfg.trainer.devices
    if launcher["_target_"].endswith(".LocalLauncher"):
        schema.check_node("hydra.launcher", launcher)
        return
    if not isinstance(devices, int) or devices < 1:
        raise InputError(f"trainer.devices={devices} tells too little of what a job needs: give a number, as in 2")
    if launcher["_target_"].endswith(".RayLauncher") and cfg.trainer.num_nodes > 1:
        raise InputError("hydra/launcher=ray has each job on one machine: leave trainer.num_nodes, or use slurm")
    OmegaConf.to_container(cfg.hydra.launcher, resolve=True)  # checks the types of the plugin's schema
