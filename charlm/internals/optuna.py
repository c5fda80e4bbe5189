"""Private names of Optuna 5."""

from optuna import Study
from optuna.trial import FrozenTrial, Trial


def reopen(study: Study, trial: FrozenTrial) -> Trial:
    """Return the live trial of a recorded one that still runs, so that an interrupted search can continue it."""
    return Trial(study, trial._trial_id)
