"""Fast paths for small models; removable, since speed=off imports none of it.

Lightning spends a millisecond on each step of a bigram that itself takes a tenth of that. Here steps at which nothing
else is due are taken in groups, in a plain loop; the step that ends a group is Lightning's own, with all hooks.
"""

from charlm.speed.grouped_steps import GroupedSteps

__all__ = ["GroupedSteps"]
