"""What all of charlm's callbacks are."""

from typing import Any

import lightning as L


class Observer(L.Callback):
    """Watches a run and changes nothing in it.

    Around every step Lightning enters six hooks of each callback, empty or not, and a small model is done in the time
    of a few hundred of them. A hook that is None is not entered; an observer defines those that it needs.
    """

    on_train_batch_start: Any = None
    on_before_zero_grad: Any = None
    on_before_backward: Any = None
    on_after_backward: Any = None
    on_before_optimizer_step: Any = None
    on_train_batch_end: Any = None
