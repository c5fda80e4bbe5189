"""Fast paths for small models; removable, since speed=off imports none of it.

Lightning spends a millisecond on each step of a bigram that itself takes a tenth of that. Here a plain loop takes the
steps between validations, logs and checkpoints; Lightning takes the last step of each group, with all hooks. Several
runs of a sweep can take their steps together (`charlm.speed.pack`).
"""

from charlm.speed.grouped_steps import GroupedSteps

__all__ = ["GroupedSteps"]
