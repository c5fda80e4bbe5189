"""Optimizers: the same bits as PyTorch's own, and every parameter with exactly one of them."""

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from charlm.model.bigram import Bigram
from charlm.optimizer.adamw import AdamW, adamw, decay_groups
from charlm.optimizer.muon import hidden_matrices, muon

V, C = 7, 6
ADAMW: dict[str, Any] = {"lr": 0.01, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
MUON: dict[str, Any] = ADAMW | {
    "adamw_lr": 0.003,
    "momentum": 0.9,
    "nesterov": True,
    "adjust_lr_fn": "match_rms_adamw",
}


class Net(nn.Module):
    """Everything that a model may have: embeddings, matrices, biases, a gain, a sleeping layer, a frozen one."""

    def __init__(self, tied: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(V, C)
        self.layers = nn.ModuleList(nn.Linear(C, C) for _ in range(2))
        self.norm = nn.LayerNorm(C)
        self.rnn = nn.GRU(C, C, batch_first=True)
        self.unused = nn.Linear(C, C)
        self.frozen = nn.Linear(C, C).requires_grad_(False)
        self.head = nn.Linear(C, V)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, idx: Tensor) -> Tensor:
        x: Tensor = self.embedding(idx)
        for layer in self.layers:
            x = x + self.frozen(layer(x).relu())
        x, _ = self.rnn(self.norm(x))
        logits: Tensor = self.head(x)
        return logits


def step(model: nn.Module, optimizers: list[torch.optim.Optimizer], number: int) -> None:
    idx = torch.randint(0, V, (4, 9), generator=torch.Generator().manual_seed(number))
    loss = F.cross_entropy(model(idx[:, :-1]).flatten(0, 1), idx[:, 1:].flatten())
    model.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()


def pytorchs(model: nn.Module) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = []
    for decays in (True, False):
        chosen = [p for p in model.parameters() if p.requires_grad and (p.dim() >= 2) == decays]
        groups.append({"params": chosen, "weight_decay": 0.1 if decays else 0.0})
    return torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8, fused=True)


def through_a_file(state: dict[str, Any]) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def alike(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("used", [True, False], ids=["all used", "one parameter without a gradient"])
def test_adamw_is_that_of_pytorch_to_the_bit(used):
    ours, theirs = Net(), Net()
    if used:
        for model in (ours, theirs):
            del model.unused
    our_optimizer, their_optimizer = adamw(ours, **ADAMW), pytorchs(theirs)
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, 12) for o in (our_optimizer, their_optimizer)]
    for number in range(12):
        step(ours, [our_optimizer], number)
        step(theirs, [their_optimizer], number)
        for schedule in schedules:
            schedule.step()
        assert alike(ours, theirs)
        assert bool(our_optimizer.kept) == used
        if number == 6:
            our_optimizer.load_state_dict(through_a_file(our_optimizer.state_dict()))
    mine, its = our_optimizer.state_dict(), their_optimizer.state_dict()
    assert mine["param_groups"] == its["param_groups"]
    for parameter, state in its["state"].items():
        assert all(torch.equal(mine["state"][parameter][name], value) for name, value in state.items())


def test_a_gradient_that_is_missing_once_changes_nothing_there():
    ours, theirs = Net(), Net()
    optimizers: list[torch.optim.Optimizer] = [adamw(ours, **ADAMW), pytorchs(theirs)]
    for number in range(6):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            step(model, [], number)
            if number in (2, 3):
                model.norm.weight.grad = None
            elif number > 0:  # the first step of this layer comes later than that of the others
                model.unused.weight.grad, model.unused.bias.grad = torch.ones(C, C), torch.ones(C)
            before = model.norm.weight.clone()
            optimizer.step()
            assert torch.equal(before, model.norm.weight) == (number in (2, 3))
        assert alike(ours, theirs)


def test_a_rate_that_is_a_tensor_counts_as_its_number():
    ours, theirs = Net(), Net()
    our_optimizer, their_optimizer = adamw(ours, **ADAMW), pytorchs(theirs)
    for group in our_optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"])
    for number in range(4):
        step(ours, [our_optimizer], number)
        step(theirs, [their_optimizer], number)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-7)


@pytest.mark.parametrize("make", [lambda model: adamw(model, **ADAMW), lambda model: muon(model, **MUON)])
@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_has_one_optimizer_and_only_matrices_decay(make, tied):
    model = Net(tied)
    groups = make(model).param_groups
    chosen = [p for group in groups for p in group["params"]]
    assert len(chosen) == len({id(p) for p in chosen})
    assert {id(p) for p in chosen} == {id(p) for p in model.parameters() if p.requires_grad}
    for group in groups:
        assert all(group["weight_decay"] == (0.1 if p.dim() >= 2 else 0.0) for p in group["params"])


@pytest.mark.parametrize("tied", [False, True])
def test_muon_takes_the_hidden_matrices(tied):
    model = Net(tied)
    names = {id(p): name for name, p in model.named_parameters()}
    hidden = {"layers.0.weight", "layers.1.weight", "rnn.weight_ih_l0", "rnn.weight_hh_l0", "unused.weight"}
    assert {names[id(p)] for p in hidden_matrices(model)} == hidden
    optimizer: Any = muon(model, **MUON)
    first, second = optimizer.optimizers
    assert {names[id(p)] for group in first.param_groups for p in group["params"]} == hidden
    assert isinstance(second, AdamW)
    assert [group["lr"] for group in first.param_groups] == [0.01]
    assert {group["lr"] for group in second.param_groups} == {0.003}


def test_a_model_without_hidden_matrices_is_trained_as_by_adamw():
    one, other = Bigram(V), Bigram(V)
    other.load_state_dict(one.state_dict())
    by_muon, by_adamw = muon(one, **MUON | {"adamw_lr": 0.01}), adamw(other, **ADAMW)
    assert isinstance(by_muon, AdamW)
    for number in range(3):
        step(one, [by_muon], number)
        step(other, [by_adamw], number)
    assert alike(one, other)


def test_a_model_of_hidden_matrices_alone_needs_no_adamw():
    assert type(muon(nn.Linear(C, C, bias=False), **MUON)) is torch.optim.Muon


def test_several_optimizers_as_one_keep_their_state_and_follow_a_schedule():
    """Against each of them by itself, and through a file."""
    ours, theirs = Net(), Net()
    one = muon(ours, **MUON)
    by_itself = [
        torch.optim.Muon(
            hidden_matrices(theirs), lr=0.01, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"
        ),
        AdamW(decay_groups(rest_of(theirs), 0.1), lr=0.003, betas=(0.9, 0.95)),
    ]
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, 8) for o in (one, *by_itself)]
    for number in range(8):
        step(ours, [one], number)
        step(theirs, by_itself, number)
        for schedule in schedules:
            schedule.step()
        assert alike(ours, theirs)
        if number == 4:
            one.load_state_dict(through_a_file(one.state_dict()))
    assert len(one.state_dict()["state"]) == sum(len(o.state_dict()["state"]) for o in by_itself)


def rest_of(model: nn.Module) -> list[nn.Parameter]:
    hidden = {id(p) for p in hidden_matrices(model)}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in hidden]


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_a_step_of_muon_is_momentum_made_orthogonal(adjust):
    """Against the singular vectors themselves: PyTorch's iteration brings singular values to between 0.5 and 1.5."""
    model = nn.Linear(8, 5, bias=False)
    optimizer = muon(model, **MUON | {"adjust_lr_fn": adjust, "weight_decay": 0.0})
    before, gradient = model.weight.detach().clone(), torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    model.weight.grad = gradient.clone()
    optimizer.step()
    scale = {"original": 1.0, "match_rms_adamw": 0.2 * 8**0.5}[adjust]
    update = (before - model.weight.detach()) / (0.01 * scale)
    u, _, v = torch.linalg.svd(gradient, full_matrices=False)
    inner = u.T @ update @ v.T
    assert ((inner.diagonal() > 0.4) & (inner.diagonal() < 1.6)).all()
    assert (inner - inner.diagonal().diag()).abs().max() < 0.1


def test_the_hidden_matrices_take_the_steps_of_pytorchs_muon():
    ours, theirs = Net(), Net()
    optimizer = muon(ours, **MUON)
    reference = torch.optim.Muon(
        hidden_matrices(theirs), lr=0.01, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    for number in range(3):
        step(ours, [], number)
        for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
            its.grad = None if mine.grad is None else mine.grad.clone()
        optimizer.step()
        reference.step()
        for mine, its in zip(hidden_matrices(ours), hidden_matrices(theirs), strict=True):
            assert torch.equal(mine, its)
