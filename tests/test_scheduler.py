"""Learning rates over a run: as their papers and nanoGPT have them, whatever ends the run."""

import io
import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from charlm.budget import Budget, limit_tokens
from charlm.scheduler import constant, linear, warmup_cosine, warmup_stable_decay

LR = 0.3
SCHEDULES: dict[str, Callable[..., LRScheduler]] = {
    "cosine": partial(warmup_cosine, min_lr_ratio=0.1),
    "linear": partial(linear, min_lr_ratio=0.0),
    "stable": partial(warmup_stable_decay, decay_fraction=0.2, min_lr_ratio=0.05),
}
FINAL = {"cosine": 0.1, "linear": 0.0, "stable": 0.05}
EACH = st.sampled_from(sorted(SCHEDULES))


def sgd(groups: int = 1, lr: float = LR) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [torch.zeros(1, requires_grad=True)]} for _ in range(groups)], lr=lr)


def rates(scheduler: LRScheduler, steps: int, each: Any = lambda step: None) -> list[float]:
    """The rate of step 0 to step `steps`, as an optimizer takes them."""
    found = []
    for step in range(steps + 1):
        found.append(float(scheduler.optimizer.param_groups[0]["lr"]))
        each(step)
        scheduler.optimizer.step()
        scheduler.step()
    return found


def nanogpt(it: int, learning_rate: float, warmup_iters: int, lr_decay_iters: int, min_lr: float) -> float:
    """get_lr of nanoGPT's train.py (Karpathy, 2023)."""
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it > lr_decay_iters:
        return min_lr
    decay_ratio = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    coeff = 0.5 * (1.0 + math.cos(math.pi * decay_ratio))
    return min_lr + coeff * (learning_rate - min_lr)


@given(steps=st.integers(1, 60), warmup=st.integers(0, 59), final=st.floats(0, 1))
def test_warmup_cosine_is_that_of_nanogpt(steps, warmup, final):
    warmup = min(warmup, steps - 1)
    found = rates(warmup_cosine(sgd(), Budget(steps), warmup, final), steps + 3)
    assert found == pytest.approx([nanogpt(it, LR, warmup, steps, final * LR) for it in range(steps + 4)], rel=1e-12)


def test_without_warm_up_cosine_and_linear_are_those_of_pytorch():
    cosine, line = sgd(), sgd()
    expected = rates(CosineAnnealingLR(cosine, T_max=40, eta_min=0.1 * LR), 40)
    assert rates(warmup_cosine(sgd(), Budget(40), 0, 0.1), 40) == pytest.approx(expected, rel=1e-9)
    expected = rates(LinearLR(line, 1.0, 0.0, total_iters=40), 40)
    assert rates(linear(sgd(), Budget(40), 0, 0.0), 40) == pytest.approx(expected, abs=1e-12)


def test_a_warm_up_and_a_line_are_pytorchs_one_after_the_other():
    optimizer = sgd()
    up, down = LinearLR(optimizer, 1 / 11, 1.0, total_iters=10), LinearLR(optimizer, 1.0, 0.0, total_iters=30)
    expected = rates(SequentialLR(optimizer, [up, down], milestones=[10]), 39)
    assert rates(linear(sgd(), Budget(40), 10, 0.0), 39) == pytest.approx(expected, rel=1e-9)


def test_the_stable_phase_is_flat_and_the_decay_is_one_minus_a_root():
    found = rates(warmup_stable_decay(sgd(), Budget(100), 10, decay_fraction=0.2, min_lr_ratio=0.0), 100)
    assert found[10:81] == pytest.approx([LR] * 71, rel=1e-6)
    expected = [LR * (1 - math.sqrt((step - 80) / 20)) for step in range(80, 101)]
    assert found[80:] == pytest.approx(expected, rel=1e-6, abs=1e-12)


@given(name=EACH, steps=st.integers(2, 300), warmup=st.integers(0, 299), seconds=st.floats(0.01, 1e3))
def test_every_schedule_rises_then_falls_to_its_end_whatever_ends_the_run(name, steps, warmup, seconds):
    warmup = min(warmup, steps - 1)
    now = SimpleNamespace(time=0.0)

    def pass_time(step: int) -> None:
        now.time = (step + 1) * seconds / steps

    budgets = {
        "steps": Budget(steps),
        "clock": Budget(None, seconds, lambda: now.time),
        "whichever": Budget(3 * steps, seconds, lambda: now.time),
    }
    for ended_by, budget in budgets.items():
        now.time = 0.0
        found = rates(SCHEDULES[name](sgd(), budget, warmup), steps, pass_time)
        highest = found.index(max(found))
        assert 0 < found[0] <= LR
        assert max(found) <= LR * (1 + 1e-12)
        assert found[: highest + 1] == sorted(found[: highest + 1])
        assert found[highest:] == sorted(found[highest:], reverse=True)
        assert found[-1] == pytest.approx(FINAL[name] * LR, abs=1e-6 * LR)
        if ended_by == "steps" and name != "stable":
            assert found[warmup] == pytest.approx(LR)


@given(name=EACH, steps=st.integers(2, 50), clock=st.floats(0, 2))
def test_groups_and_repeated_questions_see_one_reading_of_the_clock(name, steps, clock):
    readings = iter(clock + i / 100 for i in range(1000))
    optimizer = sgd(groups=3)
    scheduler = SCHEDULES[name](optimizer, Budget(None, 2.0, lambda: next(readings)), 0)
    for _ in range(steps):
        assert len({group["lr"] for group in optimizer.param_groups}) == 1
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_goes_on_from_a_checkpoint_that_holds_plain_types(name):
    def start() -> tuple[torch.optim.Optimizer, LRScheduler]:
        optimizer = sgd()
        return optimizer, SCHEDULES[name](optimizer, Budget(50), 10)

    unbroken = rates(start()[1], 49)
    optimizer, scheduler = start()
    first = rates(scheduler, 19)
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), scheduler.state_dict()], file)
    file.seek(0)
    kept = torch.load(file, weights_only=True)
    optimizer, scheduler = start()
    optimizer.load_state_dict(kept[0])
    scheduler.load_state_dict(kept[1])
    assert first + rates(scheduler, 29) == unbroken


def test_a_rate_that_is_a_tensor_stays_in_its_place():
    """As a CUDA graph needs it."""
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=torch.tensor(LR), capturable=True)
    place = optimizer.param_groups[0]["lr"]
    scheduler = linear(optimizer, Budget(10), 0, 0.0)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] is place
    assert place.item() == pytest.approx(0.9 * LR)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup", [50, 51])
def test_a_warm_up_must_leave_something_of_the_run(name, warmup):
    with pytest.raises(ValueError, match="leaves nothing of a run of 50 steps"):
        SCHEDULES[name](sgd(), Budget(50), warmup)


def test_a_constant_rate_has_nothing_to_step():
    assert constant(sgd(), Budget(50)) is None


def test_what_is_sooner_is_what_is_left():
    assert Budget(100).seconds_left(40, 10.0) == 6
    assert Budget(None, 60.0, lambda: 45.0).seconds_left(40, 10.0) == 15
    assert Budget(100, 60.0, lambda: 45.0).seconds_left(40, 10.0) == 6
    assert Budget(1000, 60.0, lambda: 45.0).seconds_left(40, 10.0) == 15
    assert Budget(None).seconds_left(40, 10.0) is None
    assert Budget(100).seconds_left(0, 0.0) is None


@given(
    tokens=st.integers(1, 10**6),
    batch=st.integers(1, 1000),
    accumulate=st.integers(1, 4),
    processes=st.integers(1, 8),
    asked=st.just(-1) | st.integers(1, 10**6),
)
def test_tokens_end_with_the_step_that_reaches_them(tokens, batch, accumulate, processes, asked):
    loop = SimpleNamespace(max_steps=asked)
    trainer: Any = SimpleNamespace(accumulate_grad_batches=accumulate, world_size=processes, max_steps=asked)
    trainer.fit_loop = SimpleNamespace(epoch_loop=loop)
    limit_tokens(trainer, tokens, batch)
    per_step = batch * accumulate * processes
    if asked != -1 and asked * per_step < tokens:
        assert loop.max_steps == asked
    else:
        assert (loop.max_steps - 1) * per_step < tokens <= loop.max_steps * per_step
    limit_tokens(trainer, None, batch)
