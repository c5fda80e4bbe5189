"""Train a language model on text: python train.py --help"""

import os
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_original_cwd, instantiate
from omegaconf import DictConfig, OmegaConf

from charlm import terminal
from charlm.data.corpora import CORPORA
from charlm.errors import one_line_errors, raise_received
from charlm.home import CONF
from charlm.preflight.command import check_command
from charlm.run.record import Run, follows
from charlm.run.resume import prepare_run, remove_results
from charlm.run.trust import foreign
from charlm.sweep.command import sweep
from charlm.sweep.plan import is_sweep


def train(cfg: DictConfig, state: Any, run: Run) -> tuple[dict[str, Any], str] | None:
    """Configuration -> parts -> fit -> evaluate.

    Args:
        state: the newest checkpoint of a run to resume.

    Returns:
        The results and a sample; None in all processes but the first.
    """
    # Imported here, because the process of a sweep does not need these slow imports.
    import lightning as L

    from charlm import checkpoint
    from charlm.budget import limit_tokens
    from charlm.callbacks import AtomicCheckpointIO, Recorder
    from charlm.devices import accelerator_of
    from charlm.finish import evaluate_run
    from charlm.logger import begin_logs
    from charlm.model import takes_no_steps
    from charlm.module import LanguageModel
    from charlm.trainer import choose

    L.seed_everything(cfg.seed, workers=True, verbose=False)
    begun = state is not None and state.content["global_step"] > 0
    initial = checkpoint.initial(cfg.init_from) if cfg.init_from and not begun else None
    known = checkpoint.tokenizer_of(state.path, state.content) if state else initial and initial.tokenizer
    data = instantiate(cfg.data, tokenizer=(lambda *_: known) if known else instantiate(cfg.tokenizer))
    model = instantiate(cfg.model, vocab_size=data.vocab_size)
    if initial:
        initial.load(model, data.tokenizer)
    if hasattr(model, "count"):
        terminal.console.print(f"counting the contexts of {len(data.splits['train']):,} tokens")
        with terminal.tracked("counting") as progress:
            model.count(data.splits["train"], progress)
    why_threads = choose(cfg, model, data)
    config, corpus = plain(cfg), data.corpus.card()
    record = checkpoint.record(config, data.tokenizer, corpus)
    module = LanguageModel(model, instantiate(cfg.optimizer), instantiate(cfg.scheduler), record, cfg.compile, cfg.seed)
    speed, recorder = instantiate(cfg.speed), Recorder(cfg.run_dir, cfg.stop_at)
    observers = [*(instantiate(cfg.callbacks) or {}).values()]
    trainer = instantiate(
        cfg.trainer,
        accelerator=accelerator_of(cfg.trainer.accelerator),
        default_root_dir=cfg.run_dir,
        logger=[*(instantiate(cfg.logger) or {}).values()] or False,
        callbacks=[*observers, *([speed] if speed else []), recorder],
        plugins=[AtomicCheckpointIO()],
        enable_checkpointing=True,  # charlm.callbacks.Checkpoint writes them
        **({"max_steps": 0, "max_time": None} if takes_no_steps(model) else {}),
    )
    limit_tokens(trainer, cfg.max_tokens, data.batch_size * data.block_size)
    steps = speed.describe(trainer, module, data.batch_size * data.block_size) if speed else "1 at a time: speed=off"
    run.tell(config, corpus, trainer, steps, initial.sha256 if initial else None)
    if trainer.is_global_zero:
        if state:
            remove_results(Path(cfg.run_dir))
        if hasattr(model, "counts") and not begun:
            checkpoint.write_counts(model, Path(cfg.run_dir) / "checkpoints")
        terminal.header(config, data, model, trainer, steps, why_threads)
    begin_logs(trainer.loggers, config, data, state)
    # A checkpoint from before the first step holds nothing that the run does not create again.
    trainer.fit(module, data, ckpt_path=state.path if begun else None, weights_only=True)
    model = module.unsharded_model()
    if not trainer.is_global_zero:
        return None
    found, sample = evaluate_run(config, data, model, trainer, recorder.clock)
    run.finish(found)
    return found, sample


def plain(cfg: DictConfig, resolve: bool = True) -> dict[str, Any]:
    """Return a configuration as plain types."""
    config: Any = OmegaConf.to_container(cfg, resolve=resolve)
    return config


def absolute(path: str) -> str:
    """Return a path that was typed, from where that was."""
    return os.path.join(get_original_cwd(), os.path.expanduser(path))


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def main(cfg: DictConfig) -> None:
    """Train one run and keep its record."""
    with one_line_errors(), terminal.logged():
        cfg, state = prepare_run(cfg, HydraConfig.get().overrides.task)
        terminal.started_in = get_original_cwd()
        if cfg.data.path:  # counts from where the command was typed, also with hydra.job.chdir=true
            cfg.data.path = absolute(cfg.data.path)
        if cfg.data.paths:
            cfg.data.paths = [path if path in CORPORA else absolute(path) for path in cfg.data.paths]
        if cfg.init_from:
            cfg.init_from = absolute(cfg.init_from)
        with Run(plain(cfg), follows(plain(cfg, resolve=False))) as run:
            raise_received()
            finished = train(cfg, state, run)
        if finished:  # results.json and run.json are final, whatever happens to the terminal from here on
            from charlm.finish import in_words

            terminal.summary(*finished, in_words(finished[0], plain(cfg)))
            terminal.next_commands(Path(cfg.run_dir), foreign(plain(cfg)))


if __name__ == "__main__":
    if is_sweep(sys.argv):
        sweep(sys.argv, CONF)
    with one_line_errors():
        sys.argv = check_command(sys.argv, CONF)
        main()
