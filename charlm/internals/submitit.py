"""Private behaviour of submitit 1.5."""


def do_not_ask_sacct() -> None:
    """Keep submitit from calling sacct, which not every Slurm has; `charlm.sweep.engine.Slurm` asks squeue."""
    import submitit

    submitit.SlurmJob.watcher.update = lambda: None
