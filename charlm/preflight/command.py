"""The command line of one run, checked: python train.py NAME=VALUE..., resume=RUN, rerun=RUN."""

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser

from charlm import schema, terminal
from charlm.errors import InputError, printable
from charlm.files import check_tree
from charlm.home import COMMAND
from charlm.internals.torchmetrics import import_lightning
from charlm.preflight.command_line import conf_dirs, options, parse, shows_only, with_standard_input
from charlm.preflight.configs import composer, fallback_corpus, resolved, without_hydra
from charlm.preflight.messages import choices, known_settings, one_line_hydra_errors
from charlm.run.folder import check_folder, held, is_first, own_folder
from charlm.run.overrides import changes, quoted, unquoted
from charlm.run.record import RUN_JSON, read_record
from charlm.run.resume import finished, rerun, resumed
from charlm.run.trust import check_config, check_run

LAUNCHERS = ("local", "slurm", "ray")  # of conf/hydra/launcher
LONGEST_CHOICE = 100  # characters in the name of a file of conf/


def check_command(argv: Sequence[str], config_dir: Path) -> list[str]:
    """Compose the run that a command line describes and check it.

    Returns:
        The command line to run: the same, with the folder of the run and, where the corpus is not available, its
        fallback.

    Raises:
        InputError: if something cannot work; reports the first problem.
    """
    import_lightning()  # before anything else does
    from charlm.preflight.settings import check_settings, check_text

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra would shorten tracebacks; charlm prints mistakes as one line itself
    argv = with_standard_input(argv)
    args = parse(argv[1:])
    overrides: list[str] = list(args.overrides)
    for name in ("resume", "rerun"):
        if folder := named_folder(name, overrides):
            # Other processes of the same run get this command, and must find the same files.
            return [argv[0], *options(argv), *check_recorded(name, args, folder, config_dir)]
    with composer(config_dir, args) as compose:
        with one_line_hydra_errors(overrides):
            check_overrides(overrides)
            check_launcher(overrides)
            cfg = compose(overrides)
            if args.help:
                from charlm.preflight.help import show_help  # with a parser of docstrings, which only it needs

                show_help(cfg, conf_dirs(config_dir, args))
                sys.exit(0)
            if shows_only(args):
                return list(argv)
            if sweepers := [o for o in overrides if o.startswith("hydra/sweeper=")]:
                raise InputError(f"{sweepers[0]} makes many runs: say {COMMAND} -m ...")
            HydraConfig.instance().set_config(cfg)
            run_dir = cfg.hydra.run.dir
        check_processes(overrides)
        chosen = any(o.startswith("hydra.run.dir=") for o in overrides)
        if is_first():
            check_folder(Path(run_dir), new=not chosen)
        check_settings(resolved(without_hydra(cfg)))
        if other := fallback_corpus([without_hydra(cfg)]):
            # The command gets the fallback, so that it gives the same run again on every machine.
            terminal.notice_fallback(cfg.data.corpus, *other)
            given = f"data={other[0]}"
            argv = [*(a for a in argv if not a.startswith("data=")), given]
            HydraConfig.instance().set_config(
                cfg := compose([*(o for o in overrides if not o.startswith("data=")), given])
            )
            run_dir = cfg.hydra.run.dir
        check_text(resolved(without_hydra(cfg)))
    return with_folder(argv, "hydra.run.dir", own_folder(Path(run_dir), new=not chosen)) if is_first() else list(argv)


def named_folder(name: str, overrides: Sequence[str]) -> Path | None:
    """Return the folder that resume=FOLDER or rerun=FOLDER names, if one does."""
    named = [o.removeprefix(f"{name}=") for o in overrides if o.startswith(f"{name}=")]
    return Path(unquoted(named[-1])) if named and named[-1] not in ("", "null") else None


def with_folder(argv: Sequence[str], setting: str, folder: Path) -> list[str]:
    """Return a command line that writes into `folder`."""
    return [*(a for a in argv if not a.startswith(f"{setting}=")), f"{setting}={quoted(folder)}"]


def check_launcher(overrides: Sequence[str]) -> None:
    """Check that a run chooses no launcher other than the default.

    Raises:
        InputError: if it does not exist, or is for sweeps.
    """
    for override in overrides:
        key, _, name = override.partition("=")
        if key == "hydra/launcher" and name not in LAUNCHERS:
            raise InputError(f"{override} is not there: choose one of {', '.join(LAUNCHERS)}")
        if key == "hydra/launcher" and name != LAUNCHERS[0]:
            raise InputError(f"{override} runs the jobs of -m: add that, also for a single job")


def check_processes(overrides: Sequence[str]) -> None:
    """Check that several processes of one run, started by torchrun or Slurm, know its folder.

    Raises:
        InputError: if not.
    """
    several = "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1
    if several and not any(o.startswith("hydra.run.dir=") for o in overrides):
        raise InputError("several processes have begun one run: give them one folder, hydra.run.dir=outputs/NAME")


def check_recorded(name: str, args: Namespace, recorded: Path, config_dir: Path) -> list[str]:
    """Check a command with resume= or rerun= (`name`) of the run in `recorded`.

    Returns:
        The overrides to run with.

    Raises:
        InputError: if a change is impossible, the text differs, or a part is unknown.
    """
    from charlm.checkpoint import check_training, check_weights, read_newest
    from charlm.preflight.settings import check_settings, check_text

    if not os.path.isdir(recorded):  # unlike pathlib, it returns False for a name that is too long
        raise InputError(f"{name}={recorded} is no folder: give one that python train.py made, as outputs/RUN")
    conf = conf_dirs(config_dir, args)
    given = [o for o in args.overrides if not o.startswith(("hydra.", f"{name}="))]
    of_hydra = [o for o in args.overrides if o.startswith("hydra.")]
    chosen = [o for o in of_hydra if o.startswith("hydra.run.dir=")]
    if name == "resume":
        check_tree(recorded)  # the run writes into it
        if (recorded / RUN_JSON).exists() and not held(recorded):
            raise InputError(f"{recorded} ended before it had saved a state: begin it again with rerun={recorded}")
        run_dir = recorded
        path, content, _ = read_newest(recorded, quiet=True)
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
        of_hydra.append("hydra.output_subdir=null")  # the files there describe the start of the run
    else:
        # The new folder may be next to the recorded one.
        run_dir = Path(str(changes(chosen)["hydra.run.dir"])) if chosen else recorded
        check_run(recorded, read_record(recorded)["config"], conf, changes(given))
        cfg = rerun(recorded, changes(given), str(run_dir))
        # Settings that conf/train.yaml alone does not have need a plus.
        given = ["++" + o.lstrip("+") for o in given]
    with initialize_config_dir(os.path.abspath(config_dir), version_base="1.3"):
        check_config(recorded, run := resolved(cfg), conf, changes(given))  # after its paths have moved
        check_settings(run)
    if name == "rerun":
        check_text(run)
        if is_first():
            check_folder(run_dir, new=not chosen)
    if is_first():
        run_dir = own_folder(run_dir, new=name == "rerun" and not chosen, begun=name == "resume")
    of_hydra = [o for o in of_hydra if not o.startswith("hydra.run.dir=")]
    return [f"{name}={quoted(recorded)}", *given, *of_hydra, f"hydra.run.dir={quoted(run_dir)}"]


def check_overrides(overrides: Sequence[str]) -> None:
    """Refuse overrides that Hydra accepts and no run can use.

    Raises:
        InputError: if a group has no choice, a required setting is deleted, or run_dir is set.
    """
    loader = GlobalHydra.instance().config_loader()
    for override in OverridesParser.create(config_loader=loader).parse_overrides(list(overrides)):
        key, line = override.key_or_group, override.input_line
        if override.is_delete():
            whole_part = key.count(".") == 1 and key.partition(".")[0] in schema.SETS
            if not whole_part and key in known_settings(overrides, key):
                raise InputError(f"{line} takes away what a run needs: that is for callbacks, as in ~callbacks.samples")
            continue
        if key == "hydra":
            raise InputError(f"{line} is not possible: give one of Hydra's settings, as in hydra.run.dir=outputs/NAME")
        if not key:
            raise InputError(f"{line} names no setting: say which, as in optimizer.lr=1e-3")
        if key == "run_dir":
            raise InputError(f"{line} would split the run over two folders: say hydra.run.dir=...")
        for value in override.sweep_iterator() if override.is_discrete_sweep() else [override.value()]:
            options = loader.get_group_options(key) if "." not in key else []
            if not options or (value is None and key not in schema.GROUPS):
                continue
            chosen = value if key in schema.SETS and isinstance(value, list) else [value]
            if any(not isinstance(one, str) or one in ("", "base") or len(one) > LONGEST_CHOICE for one in chosen):
                raise InputError(f"{line} is not there: choose one of {', '.join(choices(options))}")
