"""The gradient of a bigram without autograd, which takes several times as long as the arithmetic."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from charlm.evaluate import mean_loss
from charlm.internals.torch import is_observed, log_softmax_backward
from charlm.model.bigram import LARGEST_TABLE, Bigram
from charlm.module import Batch, LanguageModel


class TableGradient:
    """Computes the mean loss of a batch and its gradient, by the operations of `charlm.model.bigram.TableLoss`.

    Both are bitwise equal to what autograd computes for `Bigram.loss`.

    Args:
        table: the logits, (V, V) float32.
        tokens: B * T of every batch, none of whose targets is ignored.
    """

    def __init__(self, table: Tensor, tokens: int):
        self.table = table
        self.count = torch.tensor(tokens, device=table.device)
        self.of_pairs = (-torch.ones((), device=table.device) / self.count).expand(tokens)

    def __call__(self, batches: Sequence[Batch]) -> Tensor:
        """Put the gradient of one batch into `table.grad`, and return the mean loss."""
        ((x, y),) = batches
        table = self.table
        log_p = table.log_softmax(-1)  # (V, V)
        pairs = torch.add(y, x, alpha=len(table)).view(-1)  # (B * T,): x * V + y
        of_log_p = log_p.new_zeros(log_p.numel()).scatter_add_(0, pairs, self.of_pairs).view_as(log_p)
        table.grad = log_softmax_backward(of_log_p, log_p, torch.float32)
        return log_p.take(pairs).neg_().sum() / self.count


class TablesGradient:
    """Computes what `TableGradient` does for several runs, by one call of each operation, bitwise the same.

    Args:
        tables: the logits, (R, V, V) float32 for R runs.
        tokens: B * T of every batch of a run, none of whose targets is ignored.
    """

    def __init__(self, tables: Tensor, tokens: int):
        R, V, _ = tables.shape
        self.tables = tables
        self.count = torch.tensor(tokens)
        self.of_pairs = (-torch.ones(()) / self.count).expand(R * tokens)
        self.first_pair = (torch.arange(R) * V * V)[:, None]

    def __call__(self, x: Tensor, y: Tensor) -> tuple[list[Tensor], Tensor]:
        """x and y (R, B, T) -> a list of the gradient of all tables, (R, V, V), and mean losses (R,)."""
        R, V, _ = self.tables.shape
        log_p = self.tables.log_softmax(-1)  # (R, V, V)
        pairs = torch.add(y, x, alpha=V).view(R, -1) + self.first_pair  # (R, B * T)
        of_log_p = log_p.new_zeros(log_p.numel()).scatter_add_(0, pairs.view(-1), self.of_pairs).view_as(log_p)
        gradient = log_softmax_backward(of_log_p, log_p, torch.float32)
        return [gradient], log_p.take(pairs).neg_().sum(1) / self.count


def table_gradient(trainer: Any, module: LanguageModel, tokens: int) -> TableGradient | None:
    """Return the shortcut for a plain bigram; None if the gradient needs autograd or hooks observe autograd."""
    model = module.model
    if type(model) is not Bigram or "loss" in vars(model) or module.mean_loss is not mean_loss:
        return None
    table = model.token_embedding_table.weight
    observed = is_observed(table) or torch.is_anomaly_enabled()
    plain = type(table) is torch.nn.Parameter and table.dtype == torch.float32 and table.requires_grad
    whole_steps = trainer.precision == "32-true" and trainer.accumulate_grad_batches == 1
    if observed or not plain or not whole_steps or len(table) > LARGEST_TABLE:
        return None
    return TableGradient(table, tokens)
