"""The budget of a run: optimizer steps, tokens or time, whichever is spent first."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # which the process of a sweep does without
    import lightning as L
    from lightning.pytorch.callbacks import Timer


@dataclass(frozen=True)
class Budget:
    """The budget of a run.

    Args:
        steps: optimizer steps, if they end it; tokens are counted as the steps that they take.
        seconds: limit on training time, validations included; None: no limit.
        clock: tells how many seconds have passed.
    """

    steps: int | None
    seconds: float | None = None
    clock: Callable[[], float] = lambda: 0.0

    def spent(self, step: int, since: int = 0) -> float:
        """Return the fraction spent after `step` steps, 0 to 1; steps count from `since` on, time from the start."""
        by_steps = (step - since) / (self.steps - since) if self.steps else 0.0
        by_clock = self.clock() / self.seconds if self.seconds else 0.0
        return min(1.0, max(0.0, by_steps, by_clock))

    def seconds_left(self, step: int, steps_per_second: float) -> float | None:
        """Return the seconds left, by the clock or at the given speed; None if unknown."""
        by_steps = (self.steps - step) / steps_per_second if self.steps and steps_per_second else None
        by_clock = self.seconds - self.clock() if self.seconds else None
        return min((left for left in (by_steps, by_clock) if left is not None), default=None)

    def describe(self, tokens_per_step: int, tokens_of_text: int) -> str:
        """Describe the budget for the header of a run."""
        time = f"{timedelta(seconds=round(self.seconds))} of time" if self.seconds else ""
        if not self.steps:
            return f"{time}, in steps of {tokens_per_step:,} tokens"
        times = self.steps * tokens_per_step / tokens_of_text
        shown = f"{times:,.0f}" if times >= 10 else f"{times:.2g}"
        steps = f"{self.steps:,} steps of {tokens_per_step:,} tokens ({shown} times the text)"
        return f"{steps} or {time}, whichever ends first" if time else steps


def steps_of(max_steps: int | Literal["auto"], max_tokens: int | None, max_time: str | None) -> int:
    """Resolve trainer.max_steps=auto: 5,000 steps, or no limit if there is another limit."""
    if max_steps != "auto":
        return max_steps
    return -1 if max_tokens or max_time else 5000


def budget_of(trainer: "L.Trainer") -> Budget:
    """Return the budget set by trainer.max_steps, max_epochs and max_time; each process has its own clock."""
    steps = trainer.max_steps if trainer.max_steps > 0 else None
    if trainer.max_epochs not in (None, -1) and trainer.training:  # the length of an epoch is unknown before
        steps = int(trainer.estimated_stepping_batches)
    timer = timer_of(trainer)
    left = timer.time_remaining() if timer else None
    if timer is None or left is None:
        return Budget(steps)
    return Budget(steps, left + timer.time_elapsed(), timer.time_elapsed)


def timer_of(trainer: "L.Trainer") -> "Timer | None":
    """Return Lightning's Timer, which exists if trainer.max_time is set."""
    from lightning.pytorch.callbacks import Timer

    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, Timer)), None)


def within_tokens(max_steps: int, max_tokens: int | None, tokens_per_step: int) -> int:
    """`max_steps`, -1 for no end, or up to the step that reaches `max_tokens`, if that comes first."""
    if max_tokens is None:
        return max_steps
    steps = -(-max_tokens // tokens_per_step)
    return max_steps if 0 < max_steps <= steps else steps


def tokens_of_step(config: Mapping[str, Any], processes: int) -> int:
    """Return how many tokens one step of an optimizer sees, by the settings of a run, in all its processes."""
    data = config["data"]
    tokens: int = data["batch_size"] * data["block_size"] * config["trainer"]["accumulate_grad_batches"]
    return tokens * processes


def limit_tokens(trainer: "L.Trainer", max_tokens: int | None, tokens_per_batch: int) -> None:
    """Let the trainer stop with the step that reaches `max_tokens`, unless `max_steps` comes first.

    Only the trainer knows how many processes there are, each with a batch of its own.
    """
    if max_tokens is None:
        return
    settings: Any = trainer
    tokens_per_step = tokens_per_batch * settings.accumulate_grad_batches * trainer.world_size
    trainer.fit_loop.epoch_loop.max_steps = within_tokens(trainer.max_steps, max_tokens, tokens_per_step)


def stopped_by(trainer: "L.Trainer", max_steps: int) -> str:
    """Return what ended a run.

    Args:
        max_steps: the requested limit; the trainer has a smaller one if tokens end the run first.
    """
    if trainer.max_steps == 0:
        return "counting"
    timer = timer_of(trainer)
    left = timer.time_remaining() if timer else None
    if trainer.global_step >= trainer.max_steps > 0:
        return "steps" if trainer.max_steps == max_steps else "tokens"
    if left is not None and left <= 0:
        return "time"
    return "epochs" if trainer.current_epoch >= (trainer.max_epochs or -1) > 0 else "early stopping"
