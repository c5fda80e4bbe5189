"""Names of jobs: what differs between them."""

from collections.abc import Sequence

UNSAFE = str.maketrans(dict.fromkeys("/\\:*?\"'<>| ", "-"))


def settings(overrides: Sequence[str]) -> dict[str, str]:
    """Overrides as names and values."""
    pairs = (override.partition("=") for override in overrides)
    return {key.lstrip("+"): value for key, _, value in pairs}


def varying(job_overrides: Sequence[Sequence[str]]) -> list[str]:
    """The settings that differ between jobs, in the order of the command line."""
    jobs = [settings(overrides) for overrides in job_overrides]
    return [key for key in jobs[0] if len({job.get(key) for job in jobs}) > 1]


def names(job_overrides: Sequence[Sequence[str]]) -> list[str]:
    """A readable name for each job, such as block_size=8,lr=1e-2, with a number where that is not one's own."""
    swept = varying(job_overrides)
    short = {key: key.rpartition(".")[2] for key in swept}
    if len(set(short.values())) < len(swept):
        short = {key: key for key in swept}
    made: list[str] = []
    for number, overrides in enumerate(job_overrides):
        values = settings(overrides)
        # 200 bytes leave room for a suffix under the 255 that file systems allow.
        name = ",".join(f"{short[key]}={values[key]}" for key in swept).translate(UNSAFE)[:200]
        made.append(name if name and name not in made else f"{name or 'job'}_{number}")
    return made
