"""A command line, held against what there is: options, overrides, the jobs of a sweep, what is to go on."""

import importlib.util
import os
import re
import shutil
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from charlm import config, processes, terminal
from charlm.composition import composed, without_hydra
from charlm.data.corpus import load_corpus
from charlm.disk import check_tree, unshare
from charlm.errors import CorpusUnavailable, InputError, printable
from charlm.ledger import NAME as LEDGER
from charlm.ledger import Search, goes_on, read
from charlm.preflight.complaints import choices, known_settings, told_in_one_line
from charlm.preflight.folder import check_folder, held, own_folder
from charlm.preflight.runs import check_runs, resolved
from charlm.recorded import check_config, check_run
from charlm.resume import changes, finished, quoted, rerun, resumed, unquoted
from charlm.run import NAME as RECORD
from charlm.run import claim, is_first, read_record
from charlm.space import Space, asked, recorded

LONGEST_CHOICE = 100  # characters in the name of a file of conf/
# What runs the jobs of a sweep: the package of Hydra's plugins that it needs, and a program.
LAUNCHERS: dict[str, tuple[str | None, str | None]] = {
    "local": (None, None),
    "slurm": ("hydra-submitit-launcher", "sbatch"),
    "ray": ("hydra-ray-launcher", None),
}


def check_command(argv: Sequence[str], config_dir: Path) -> list[str]:
    """Compose every run that a command line asks for and check it.

    What it takes PyTorch and Lightning to check of a sweep, its launcher asks for: see `check_runs`.

    Returns:
        The command line to run: the same, or with another corpus where the one asked for cannot be had.

    Raises:
        InputError: for the first thing that cannot work.
    """
    if not is_sweep(argv):  # which does without the seconds that this import takes
        from charlm.preflight.settings import check_settings, check_text
    # Hydra would shorten errors in its own way; charlm tells a person's mistake in one line, and a defect in full.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    args = parse(argv[1:])
    resumed_sweep = sweep_of(args)
    if resumed_sweep:
        argv = [argv[0], "-m", *options(argv), *resumed_sweep]
        args = parse(argv[1:])
    overrides: list[str] = list(args.overrides)
    if args.multirun and (args.cfg or args.info):
        raise InputError("--cfg and --info show one run: leave -m away")
    if is_sweep(argv) and not (args.multirun or args.cfg or args.info):
        argv, args.multirun = [argv[0], "-m", *argv[1:]], True
    for name in ("resume", "rerun"):
        named = [o.removeprefix(f"{name}=") for o in overrides if o.startswith(f"{name}=")]
        if named and named[-1] not in ("", "null"):
            # Other processes of the same run are given this command, and have to find the same files.
            return [argv[0], *options(argv), *check_recorded(name, args, Path(unquoted(named[-1])), config_dir)]
    name = args.config_name or "train"
    # As Hydra does: --config-path counts from train.py, --config-dir from where one stands.
    config_dir = config_dir.parent / (args.config_path or config_dir.name)
    conf = conf_dirs(config_dir, args)
    for folder in conf:
        if not folder.is_dir():
            raise InputError(f"there is no folder {folder}: give one with configuration files, or leave it to conf/")
    search = [f"hydra.searchpath=[file://{os.path.abspath(args.config_dir)}]"] if args.config_dir else []
    with initialize_config_dir(os.path.abspath(config_dir), version_base="1.3"):
        with told_in_one_line(overrides):
            check_overrides(overrides, args.multirun)
            make = cache(lambda given: compose(name, list(given), return_hydra_config=True))
            jobs, space = expand(overrides, search, make) if args.multirun else ([overrides], None)
            cfgs = list(composed([[*job, *search] for job in jobs], make))
            if args.help or args.hydra_help or args.cfg or args.info or args.shell_completion:
                return list(argv)
            HydraConfig.instance().set_config(cfgs[0])
            mode = "sweep" if args.multirun else "run"
            if args.multirun:
                for cfg in cfgs:
                    check_launcher(cfg)
            elif sweepers := [o for o in overrides if o.startswith("hydra/sweeper=")]:
                raise InputError(f"{sweepers[0]} makes many runs: say python train.py -m ...")
            searched = asked(cfgs[0].hydra, space) if space else None
            run_dir = cfgs[0].hydra[mode].dir
        several = "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1
        if several and not any(o.startswith("hydra.run.dir=") for o in overrides):
            raise InputError("several processes have begun one run: give them one folder, hydra.run.dir=outputs/NAME")
        chosen = any(o.startswith(f"hydra.{mode}.dir=") for o in overrides)
        begun = mode == "sweep" and (Path(run_dir) / LEDGER).is_file()
        if is_first():
            check_folder(Path(run_dir), f"hydra.{mode}.dir", new=not chosen or begun)
        elsewhere = not cfgs[0].hydra.launcher._target_.endswith(".LocalLauncher")
        cfgs = [without_hydra(cfg) for cfg in cfgs]
        if resumed_sweep:
            for cfg in cfgs:
                check_config(Path(run_dir, LEDGER), resolved(cfg), conf)
        if not args.multirun:
            check_settings(resolved(cfgs[0]))
        if other := other_corpus(cfgs):  # the command that gives the same run again, wherever Tiny Shakespeare is
            if args.multirun:  # whose settings were to be checked later
                processes.ask(check_runs, [resolved(cfg) for cfg in cfgs], elsewhere, False)
            terminal.notice_fallback(cfgs[0].data.corpus, *other)
            given = f"data={other[0]}"
            argv = [*(a for a in argv if not a.startswith("data=")), given]
            renamed = [*(o for o in jobs[0] if not o.startswith("data=")), given, *search]
            HydraConfig.instance().set_config(cfg := compose(name, renamed, return_hydra_config=True))
            run_dir = cfg.hydra[mode].dir
            cfgs = [without_hydra(cfg)]
        if not args.multirun:
            check_text(resolved(cfgs[0]))
    if not is_first():
        return list(argv)
    again = args.multirun and not chosen
    own = unfinished(Path(run_dir).parent, parse(argv[1:]).overrides, searched) if again else None
    if own:
        how = "for another sweep say hydra.sweep.dir=..."
        print(printable(f"Going on with {own}, which the same command began; {how}"))
    else:
        own = own_folder(Path(run_dir), f"hydra.{mode}.dir", new=not chosen, begun=begun)
    return [*(a for a in argv if not a.startswith(f"hydra.{mode}.dir=")), f"hydra.{mode}.dir={quoted(own)}"]


def is_sweep(argv: Sequence[str]) -> bool:
    """Does a command line ask for many runs? A study, sweep=NAME, does; the jobs of it say that they are one."""
    study = any(re.match(r"\+?sweep=(?!(null)?$)", argument) for argument in argv) and "hydra.mode=RUN" not in argv
    return study or "-m" in argv or "--multirun" in argv or begun_sweep(argv) is not None


def begun_sweep(arguments: Sequence[str]) -> Path | None:
    """The folder of the sweep that is to go on, resume=FOLDER, if it is one of a sweep."""
    named = [a.removeprefix("resume=") for a in arguments if re.match("resume=.", a)]
    try:
        folder = Path(unquoted(named[-1])) if named else None
    except InputError:  # which is told once the command is checked
        return None
    return folder if folder and os.path.isfile(folder / LEDGER) else None


def conf_dirs(config_dir: Path, args: Namespace) -> list[Path]:
    """Where configuration files are: charlm's, and those that a command adds."""
    return [config_dir, *([Path(args.config_dir)] if args.config_dir else [])]


def sweep_of(args: Namespace) -> list[str]:
    """The overrides of a sweep that is to go on, resume=FOLDER, with what is given beside that in place of the old.

    Raises:
        InputError: if its ledger cannot be read, or to ask where to run what ran elsewhere.
    """
    folder = begun_sweep(args.overrides)
    if folder is None:
        return []
    given = [o for o in args.overrides if not o.startswith(("resume=", "hydra.sweep.dir="))]
    keys = {o.partition("=")[0] for o in given}
    content = read(folder / LEDGER)
    if content["launcher"] != "local" and "hydra/launcher" not in keys:
        raise InputError(
            f"{folder} ran with hydra/launcher={content['launcher']}: say so again, with what settings that had, or "
            f"hydra/launcher=local"
        )
    begun = [*content["command"], *(recorded(content["search"], content["command"]) if content["search"] else [])]
    kept = [o for o in begun if o.partition("=")[0] not in keys]
    return [*kept, *given, f"hydra.sweep.dir={quoted(folder)}"]


def unfinished(folder: Path, overrides: Sequence[str], searched: Search | None) -> Path | None:
    """The newest sweep in `folder` that the same command has begun and not brought to its end; it is claimed."""
    command = [o for o in overrides if not o.startswith("hydra")]
    for file in sorted(folder.glob(f"*/{LEDGER}"), reverse=True):
        with suppress(InputError):
            if goes_on(file.parent, command, searched):
                check_tree(file.parent)
                if claim(file.parent):
                    unshare(file.parent)
                    return file.parent
    return None


def check_recorded(name: str, args: Namespace, recorded: Path, config_dir: Path) -> list[str]:
    """Check a run that begins from another: resume or rerun, as `name` says, of the one in `recorded`.

    Returns:
        The overrides to run with.

    Raises:
        InputError: for a change of what has begun, another text, or parts that charlm does not have.
    """
    from charlm.checkpoint import check_training, check_weights, newest
    from charlm.preflight.settings import check_settings, check_text

    if args.multirun:
        raise InputError(f"{name}= begins from one run, and makes one: leave -m away")
    if not os.path.isdir(recorded):  # unlike pathlib, it says no where a name is too long to be one
        raise InputError(f"{name}={recorded} is no folder: give one that python train.py made, as outputs/RUN")
    conf = conf_dirs(config_dir, args)
    given = [o for o in args.overrides if not o.startswith(("hydra.", f"{name}="))]
    of_hydra = [o for o in args.overrides if o.startswith("hydra.")]
    chosen = [o for o in of_hydra if o.startswith("hydra.run.dir=")]
    if name == "resume":
        check_tree(recorded)  # into which all is written
        if (recorded / RECORD).exists() and not held(recorded):
            raise InputError(f"{recorded} ended before it had saved a state: begin it again with rerun={recorded}")
        run_dir = recorded
        path, content, _ = newest(recorded)
        check_run(recorded, content["charlm"]["config"], conf, changes(given))
        if content["charlm"]["config"]["model"]["_target_"].startswith("charlm."):
            check_weights(path, content)
        check_training(path, content)
        cfg = resumed(recorded, content, changes(given))
        if finished(recorded, content, cfg):
            more = f"To go further: resume={recorded} trainer.max_steps=N"
            print(printable(f"{recorded} is at its end: nothing to do. {more}"))
            sys.exit(0)
        of_hydra = [o for o in of_hydra if not o.startswith("hydra.output_subdir=")]
        of_hydra.append("hydra.output_subdir=null")  # what stands there is of the run's beginning
    else:
        # Beside the one that is recorded, there is place.
        run_dir = Path(str(changes(chosen)["hydra.run.dir"])) if chosen else recorded
        check_run(recorded, read_record(recorded)["config"], conf, changes(given))
        cfg = rerun(recorded, changes(given), str(run_dir))
        # What a run has that conf/train.yaml by itself would not.
        given = ["++" + o.lstrip("+") for o in given]
    with initialize_config_dir(os.path.abspath(config_dir), version_base="1.3"):
        check_config(recorded, run := resolved(cfg), conf, changes(given))  # after its places have moved
        check_settings(run)
    if name == "rerun":
        check_text(run)
        if is_first():
            check_folder(run_dir, new=not chosen)
    if is_first():
        run_dir = own_folder(run_dir, new=name == "rerun" and not chosen, begun=name == "resume")
    of_hydra = [o for o in of_hydra if not o.startswith("hydra.run.dir=")]
    return [f"{name}={quoted(recorded)}", *given, *of_hydra, f"hydra.run.dir={quoted(run_dir)}"]


def parse(arguments: Sequence[str]) -> Namespace:
    """A command line, taken apart by Hydra's own parser.

    Raises:
        InputError: for an option that there is not.
    """

    def refuse(message: str) -> NoReturn:
        raise InputError(f"{message}: see python train.py --help")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    return parser.parse_args(arguments)


def options(argv: Sequence[str]) -> list[str]:
    """Where a command line says that its configuration is, for each job of a sweep to say the same."""
    args = parse(argv[1:])
    places = {"--config-dir": args.config_dir, "--config-path": args.config_path, "--config-name": args.config_name}
    return [f"{name}={place}" for name, place in places.items() if place]


def check_overrides(overrides: list[str], multirun: bool) -> None:
    """What Hydra would take, and what no run can do with.

    Raises:
        InputError: for a group without a choice, a setting taken away, a run_dir, or a launcher that is not charlm's.
    """
    loader = GlobalHydra.instance().config_loader()
    for override in OverridesParser.create(config_loader=loader).parse_overrides(overrides):
        key, line = override.key_or_group, override.input_line
        if override.is_delete():
            whole_callback = key.startswith("callbacks.") and key.count(".") == 1
            if not whole_callback and key in known_settings(overrides, key):
                raise InputError(f"{line} takes away what a run needs: that is for callbacks, as in ~callbacks.samples")
            continue
        if key == "hydra":
            raise InputError(f"{line} is not possible: give one of Hydra's settings, as in hydra.run.dir=outputs/NAME")
        if not key:
            raise InputError(f"{line} names no setting: say which, as in optimizer.lr=1e-3")
        if key == "hydra/launcher":
            check_engine(str(override.value()), multirun)
        if key == "run_dir":
            raise InputError(f"{line} would split the run over two folders: say hydra.run.dir=...")
        for value in override.sweep_iterator() if override.is_discrete_sweep() else [override.value()]:
            options = loader.get_group_options(key) if "." not in key else []
            if not options or (value is None and key not in config.GROUPS):
                continue
            chosen = value if key == "callbacks" and isinstance(value, list) else [value]
            if any(not isinstance(one, str) or one in ("", "base") or len(one) > LONGEST_CHOICE for one in chosen):
                raise InputError(f"{line} is not there: choose one of {', '.join(choices(options))}")


def expand(
    overrides: list[str], search: list[str], compose: Callable[[tuple[str, ...]], DictConfig]
) -> tuple[list[list[str]], Space | None]:
    """The overrides of each job of a sweep, as Hydra's basic sweeper will make them; of a search, which makes its own
    later, those that stand for all, and what it searches."""
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    firsts = [first_value(override) for override in parser.parse_overrides(overrides)]
    [cfg] = composed([[*firsts, *search]], compose)
    sweeper = cfg.hydra.sweeper
    params = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    parsed = parser.parse_overrides([*params, *overrides])
    if sweeper._target_.endswith(".OptunaSweeper"):
        space = Space(parsed)
        return space.corners(), space
    for override in parsed:
        if override.is_interval_sweep():
            raise InputError(
                f"{override.input_line} is for a search: add hydra/sweeper=optuna, or give values, as in "
                f"{override.key_or_group}=1e-3,1e-2"
            )
    jobs: list[list[str]] = BasicSweeper.split_arguments(parsed, None)[0]
    return jobs, None


def first_value(override: Override) -> str:
    value: Any = override.value()
    if override.is_sweep_override():
        first = value.start if override.is_interval_sweep() else next(override.sweep_string_iterator())
        return f"{override.get_key_element()}={first}"
    return str(override.input_line)


def check_engine(name: str, multirun: bool) -> None:
    """Is what runs the jobs of a sweep there?

    Raises:
        InputError: if not, or for a launcher that keeps no ledger, and that a job on several devices would break.
    """
    if name not in LAUNCHERS:
        raise InputError(f"hydra/launcher={name} is not there: choose one of {', '.join(LAUNCHERS)}")
    package, program = LAUNCHERS[name]
    if not multirun and package:
        raise InputError(f"hydra/launcher={name} runs the jobs of -m: add that, also for a single job")
    if package and importlib.util.find_spec(f"hydra_plugins.{package.replace('-', '_')}") is None:
        raise InputError(f"hydra/launcher={name} needs a package that is not there: pip install {package}")
    if program and not shutil.which(program):
        raise InputError(f"hydra/launcher={name} needs {program}, which is not here: run it on the cluster")
    # conf/hydra/launcher/ray.yaml has the name, and the settings, of what hydra-ray-launcher brings for itself.
    warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/ray' is validated against ConfigStore schema")


def other_corpus(cfgs: Sequence[DictConfig]) -> tuple[str, CorpusUnavailable] | None:
    """The corpus to train on where the one asked for cannot be had, and why it cannot; None where it can."""
    data = cfgs[0].data
    fallback: str | None = data.get("fallback")
    if fallback is None or len({str(cfg.data.corpus) for cfg in cfgs}) > 1:  # a sweep over corpora means each of them
        return None
    try:
        load_corpus(str(data.corpus), data.path)
    except CorpusUnavailable as error:
        return fallback, error
    except InputError:  # which is told with the rest of what is wrong with a text
        pass
    return None


def check_launcher(cfg: DictConfig) -> None:
    """Can the jobs of a sweep be run as is asked for?

    Raises:
        InputError: if not.
    """
    launcher: Any = OmegaConf.to_container(cfg.hydra.launcher, resolve=False)
    devices = cfg.trainer.devices
    if launcher["_target_"].endswith(".LocalLauncher"):
        config.check_node("hydra.launcher", launcher)
        return
    if not isinstance(devices, int) or devices < 1:
        raise InputError(f"trainer.devices={devices} tells too little of what a job needs: give a number, as in 2")
    if launcher["_target_"].endswith(".RayLauncher") and cfg.trainer.num_nodes > 1:
        raise InputError("hydra/launcher=ray has each job on one machine: leave trainer.num_nodes, or use slurm")
    OmegaConf.to_container(cfg.hydra.launcher, resolve=True)  # whose types are those of its package
