"""Optimizers: a model's parameters in, a `torch.optim.Optimizer` out. One file each."""
