"""Overrides -> composed configs -> resolved settings as plain types."""

import os
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from charlm.data.corpora import corpus_of
from charlm.errors import CorpusUnavailable, InputError
from charlm.preflight.command_line import conf_dirs
from charlm.preflight.messages import one_line_hydra_errors

RUN_DIR = "<run>"  # stands for the folder of a run, which is not known yet


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """Return a composed config as plain types, without Hydra's own part.

    Raises:
        InputError: if a value is missing or cannot be resolved.
    """
    with one_line_hydra_errors():
        if OmegaConf.is_interpolation(cfg, "run_dir"):
            cfg.run_dir = RUN_DIR
        for missing in sorted(OmegaConf.missing_keys(cfg)):
            raise InputError(f"{missing} is missing: give it a value, {missing}=...")
        plain: Any = OmegaConf.to_container(cfg, resolve=True)
    found: dict[str, Any] = plain
    return found


def without_hydra(cfg: DictConfig) -> DictConfig:
    """Return a copy of a config without Hydra's own part."""
    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])


@contextmanager
def composer(config_dir: Path, args: Namespace) -> Iterator[Callable[[Sequence[str]], DictConfig]]:
    """Initialize Hydra; yields a function from overrides to a config, Hydra's own part included.

    Raises:
        InputError: if a folder of configuration files is missing.
    """
    for folder in conf_dirs(config_dir, args):
        if not folder.is_dir():
            raise InputError(f"there is no folder {folder}: give one with configuration files, or leave it to conf/")
    search = [f"hydra.searchpath=[file://{os.path.abspath(args.config_dir)}]"] if args.config_dir else []
    name = args.config_name or "train"
    with initialize_config_dir(os.path.abspath(conf_dirs(config_dir, args)[0]), version_base="1.3"):
        yield lambda overrides: compose(name, [*overrides, *search], return_hydra_config=True)


def fallback_corpus(cfgs: Sequence[DictConfig]) -> tuple[str, CorpusUnavailable] | None:
    """Return the fallback corpus and the reason, if the requested corpus is unavailable; otherwise None."""
    data = cfgs[0].data
    fallback: str | None = data.get("fallback")
    if fallback is None or len({str(cfg.data.corpus) for cfg in cfgs}) > 1:  # a sweep over corpora needs each of them
        return None
    if any(cfg.data.get("fold") is not None for cfg in cfgs):  # it is a document of this corpus
        return None
    try:
        corpus_of(data)
    except CorpusUnavailable as error:
        return fallback, error
    except InputError:  # a later check reports it
        pass
    return None
