"""Names of jobs, made of the settings that differ."""

from collections.abc import Mapping, Sequence

UNSAFE = str.maketrans(dict.fromkeys("/\\:*?\"'<>| ", "-"))


def settings(overrides: Sequence[str]) -> dict[str, str]:
    """Return overrides as names and values."""
    pairs = (override.partition("=") for override in overrides)
    return {key.lstrip("+"): value for key, _, value in pairs}


def varying(job_overrides: Sequence[Sequence[str]]) -> list[str]:
    """Return the settings that differ between jobs, in the order of the command line."""
    jobs = [settings(overrides) for overrides in job_overrides]
    return [key for key in jobs[0] if len({job.get(key) for job in jobs}) > 1]


def label(values: Mapping[str, str]) -> str:
    """Return settings as part of a file name; keys are shortened to their last part if these differ."""
    short = {key: key.rpartition(".")[2] for key in values}
    if len(set(short.values())) < len(values):
        short = {key: key for key in values}
    # 200 bytes leave room for a number under the 255 that file systems allow.
    return ",".join(f"{short[key]}={value}" for key, value in values.items()).translate(UNSAFE)[:200]


def names(job_overrides: Sequence[Sequence[str]]) -> list[str]:
    """Return a readable name for each job, such as block_size=8,lr=1e-2, with a number if it is not unique."""
    swept = varying(job_overrides)
    made: list[str] = []
    for number, overrides in enumerate(job_overrides):
        values = settings(overrides)
        name = label({key: values[key] for key in swept})
        made.append(name if name and name not in made else f"{name or 'job'}_{number}")
    return made
