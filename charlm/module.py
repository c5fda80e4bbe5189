"""The LightningModule: training, validation, test and prediction of a model of the next character."""

import copy
import math
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from charlm.budget import Budget, budget_of
from charlm.checkpoint import dtype_of, model_of, read, read_newest, record_of, tokenizer_of
from charlm.data import CharDataModule
from charlm.data.chunks import IGNORE, Windows
from charlm.errors import Diverged, InputError, one_line
from charlm.evaluate import Score, evaluate, mean_loss, token_losses
from charlm.generate import continuation
from charlm.internals.torch import mps_generator
from charlm.optimizer.adamw import adamw
from charlm.scheduler import constant
from charlm.seeds import derive_seed
from charlm.tokenizer import Tokenizer

# Figures that each validation logs.
VALIDATION = ("val/loss", "val/bits_per_char", "val/perplexity")

Batch = tuple[Tensor, Tensor]  # inputs and targets, (B, T) int64 each
MakeOptimizer = Callable[[nn.Module], Optimizer]
MakeScheduler = Callable[[Optimizer, Budget], LRScheduler | Mapping[str, Any] | None]


class LanguageModel(L.LightningModule):
    """Trains a model to predict the next character.

    Args:
        model: forward(idx (B, T)) -> logits (B, T, V), and what else `charlm.model` says of models.
        optimizer: makes an optimizer from the model; or, as Lightning users pass it, an optimizer, a class of torch's,
            or a partial of one.
        scheduler: makes from an optimizer and the budget its learning-rate schedule, which is stepped once a step, or
            a dictionary for Lightning ("scheduler", "interval", "frequency", "monitor"), or None for a constant rate.
        record: what a later command needs to know of this run, in plain types; saved in every checkpoint.
        compile: torch.compile for the model and its loss.
        seed: seed of random draws within a step, such as dropout.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: MakeOptimizer | Optimizer = adamw,
        scheduler: MakeScheduler = constant,
        record: dict[str, Any] | None = None,
        compile: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        self.save_hyperparameters({"seed": seed, "compile": compile}, logger=False)
        self.model = model
        self.optimizer, self.make_scheduler = optimizer, scheduler
        self.record = record or {}
        self.compile_it, self.seed = compile, seed
        # Lightning's LearningRateFinder sets the rate here; None: that of the optimizer.
        self.lr: float | None = None
        self.mean_loss = mean_loss
        self.validated_at = -1
        self.tokenizer: Tokenizer | None = None  # set by `setup` from the data module
        self.sizes: Tensor | None = None  # characters and bytes of each token, if they are not one

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, CharDataModule):
            self.tokenizer, self.sizes = data.tokenizer, data.sizes

    def forward(self, idx: Tensor) -> Tensor:
        """idx (B, T) int64 -> logits (B, T, V)."""
        logits: Tensor = self.model(idx)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x, y = batch  # (B, T) each
        loss = self.mean_loss(self.model, x, y)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self.seed_batch(self.trainer.fit_loop.total_batch_idx)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.log("train/lr", float(optimizer.param_groups[0]["lr"]))

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Raise Diverged for a loss that is not finite, where the trainer logs: to look at it makes a GPU wait."""
        step, loss = self.global_step, outputs.get("loss")
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if loss is None or (step % every and step != self.trainer.max_steps):
            return
        if not self.trainer.strategy.reduce_boolean_decision(bool(loss.isfinite())):
            raise Diverged(
                f"{Diverged.words}: the loss of step {step:,} is infinite or not a number; try a lower learning rate, "
                f"or Trainer(gradient_clip_val=1)"
            )

    def on_train_start(self) -> None:
        self.generator = generator_of(self.device)

    def seed_batch(self, k: int) -> None:
        """Seed the random draws of batch k, such as dropout, whatever was drawn before."""
        self.generator.manual_seed(derive_seed(self.seed, self.global_rank, k))

    def on_validation_epoch_start(self) -> None:
        self.scored = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.sizes = None if self.sizes is None else self.sizes.to(self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Score a batch without mixed precision, as the final figures and `charlm evaluate` do."""
        x, y = batch
        with torch.autocast(self.device.type, enabled=False):
            losses = token_losses(self.model, x, y).sum(1)  # (B,)
        counts = (y != IGNORE).sum()
        characters = counts if self.sizes is None else (self.sizes[y.clamp_min(0), 0] * (y != IGNORE)).sum()
        self.scored += torch.stack((losses.double().sum(), counts, characters))

    def on_validation_epoch_end(self) -> None:
        self.log_scored("val", self.trainer.num_val_batches, self.trainer.val_dataloaders)
        if not self.trainer.sanity_checking:
            self.validated_at = self.global_step

    on_test_epoch_start, test_step = on_validation_epoch_start, validation_step

    def on_test_epoch_end(self) -> None:
        self.log_scored("test", self.trainer.num_test_batches, self.trainer.test_dataloaders)

    def log_scored(self, split: str, batches: Any, loader: Any) -> None:
        """Log the mean loss of all targets that were scored, by all processes.

        If some batches were left out, as by `limit_val_batches`, the curves are named `val_partial/...`.
        """
        total, n, characters = self.trainer.strategy.reduce(self.scored, reduce_op="sum").tolist()
        loss = total / n if n else math.nan
        metrics = {
            f"{split}/loss": loss,
            f"{split}/bits_per_char": loss * (n / characters if n else 1) / math.log(2),
            f"{split}/perplexity": math.exp(min(loss, 700)),
        }
        whole = not hasattr(loader, "__len__") or batches == [len(loader)]
        whole = whole and not (isinstance(loader, Windows) and loader.partial)
        self.log_dict(metrics, logger=None if whole else False, sync_dist=True)
        if not whole:
            partial = {f"{name.replace('/', '_partial/')}": value for name, value in metrics.items()}
            self.log_dict(partial, sync_dist=True)

    def predict_step(self, batch: Batch | Tensor, batch_idx: int) -> Tensor:
        """idx (B, T), or a batch of it and its targets -> logits (B, T, V)."""
        return self(batch if isinstance(batch, Tensor) else batch[0])

    def generate(self, prompt: str, length: int, tokenizer: Tokenizer | None = None, **settings: Any) -> str:
        """Continue `prompt` by `length` characters.

        Args:
            tokenizer: the tokenizer of the training text; None: that of the `CharDataModule` it was fitted to.
            settings: `seed`, `temperature`, `top_k` and `top_p` of `charlm.generate.sample_text`.

        Raises:
            InputError: without a tokenizer, or for a prompt with a symbol that it does not have.
        """
        tokenizer = tokenizer or self.tokenizer
        if tokenizer is None:
            raise InputError(
                "the module was not fitted to a CharDataModule, and has no tokenizer: give one, "
                "generate(prompt, length, tokenizer=CharTokenizer.from_text(text))"
            )
        return prompt + continuation(self.model, tokenizer, length, prompt, **settings)

    def evaluate(self, data: CharDataModule, split: str = "val") -> Score:
        """The loss over a split of `data`, exact up to `data.final_targets` targets, with its standard error.

        Raises:
            InputError: if the split does not exist.
        """
        data.setup()
        return evaluate(self.model, data.windows(split, self.device, most=data.final_targets))

    def configure_optimizers(self) -> Any:
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            # Lightning's caution is for a module that was meant to have some.
            warnings.filterwarnings("ignore", ".*configure_optimizers` returned `None`")
            return None
        optimizer = make_optimizer(self.optimizer, self.model)
        for group in optimizer.param_groups if self.lr is not None else []:
            group["lr"] = self.lr
        scheduler = self.make_scheduler(optimizer, self.budget())
        if scheduler is None:
            return optimizer
        if not isinstance(scheduler, Mapping):
            scheduler = {"scheduler": scheduler, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def budget(self) -> Budget:
        """Return the budget. All processes use the clock of the first, so that they compute the same learning rate."""
        budget, strategy = budget_of(self.trainer), self.trainer.strategy
        return replace(budget, clock=lambda: strategy.broadcast(budget.clock())) if budget.seconds else budget

    def configure_model(self) -> None:
        """Compile the model if requested, and shard it under FSDP."""
        strategy = self.trainer.strategy
        if self.compile_it and isinstance(strategy, SingleDeviceStrategy):
            self.mean_loss = torch.compile(mean_loss)
        elif self.compile_it:
            self.model.compile()
        if isinstance(strategy, ModelParallelStrategy):
            self.shard(strategy.device_mesh["data_parallel"])

    def shard(self, mesh: DeviceMesh) -> None:
        """Spread the parameters over the processes, layer by layer (FSDP2: Zhao et al. 2023, in its newer form)."""
        self._unsharded = [copy.deepcopy(self.model)]  # in a list, as it is no part of this module
        for layers in reversed([module for module in self.model.modules() if isinstance(module, nn.ModuleList)]):
            for layer in layers:  # those within others first
                fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        if hasattr(self.model, "loss"):
            register_fsdp_forward_method(self.model, "loss")

    def unsharded_model(self) -> nn.Module:
        """Return the model with all of its weights. If they are sharded, all processes must call this together."""
        if not isinstance(self.model, FSDPModule):
            return self.model
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        weights = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True))
        model = self._unsharded[0]
        model.load_state_dict(weights)
        return model.train(self.model.training)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        found = self.record or record_of(self.model, data if isinstance(data, CharDataModule) else None)
        checkpoint["charlm"], checkpoint["validated_at"] = found, self.validated_at

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.validated_at = checkpoint.get("validated_at", -1)

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = True,
        **arguments: Any,
    ) -> Self:
        """Make a module from a checkpoint of charlm, or from a file of `trainer.save_checkpoint`; runs no code from it.

        Args:
            map_location: the device for the module; None: the CPU.
            hparams_file: not used, since the checkpoint has all.
            strict: whether the names of weights must be those of the model; None: yes.
            weights_only: True, or None for the same: nothing is unpickled.
            arguments: of the constructor; `model` is needed for a model that is not charlm's, and otherwise made from
                the name and the arguments in the file.

        Raises:
            InputError: if the file is missing, damaged or of another kind, or its model is not charlm's.
        """
        if hparams_file is not None or weights_only is False:
            raise InputError("load_from_checkpoint reads no hparams_file, and unpickles nothing: leave both away")
        path = Path(checkpoint_path)
        module = cls.from_content(path, read(path, needs_text=False), strict, arguments)
        return module.to(map_location or "cpu")

    @classmethod
    def from_content(
        cls,
        path: Path,
        content: dict[str, Any],
        strict: bool | None,
        arguments: dict[str, Any],
        trust: Collection[str] = (),
    ) -> Self:
        """Make a module from what was read from `path`; see `load_from_checkpoint`."""
        tokenizer, known = tokenizer_of(path, content), content.get("hyper_parameters")
        if "model" not in arguments:
            arguments["model"] = model_of(path, content, tokenizer, trust)
        for name, kind in {"seed": int, "compile": bool}.items():
            if isinstance(known, dict) and type(known.get(name)) is kind:
                arguments.setdefault(name, known[name])
        module = cls(**arguments)
        try:
            module.load_state_dict(content["state_dict"], strict=strict is not False)
        except RuntimeError as error:
            raise InputError(f"{path} has the weights of another model: {one_line(error)}") from error
        module.on_load_checkpoint(content)
        module.tokenizer = tokenizer
        return module


def load(path: str | Path, device: str | torch.device = "cpu", trust: Collection[str] = ()) -> LanguageModel:
    """Load a trained model, ready to `generate` and `evaluate`.

    Args:
        path: a run folder, whose newest intact checkpoint is taken; a checkpoint of charlm; or a file of
            `trainer.save_checkpoint`.
        trust: packages outside of charlm whose models may be built.

    Raises:
        InputError: if there is none, or none that can be read.
    """
    newest = read_newest(path, needs_text=False)
    module = LanguageModel.from_content(newest.path, newest.content, None, {}, trust)
    return module.to(device, dtype_of(newest.content)).eval()


def make_optimizer(given: MakeOptimizer | Optimizer, model: nn.Module) -> Optimizer:
    """Return an optimizer for a model from any form that `LanguageModel` takes."""
    if isinstance(given, Optimizer):
        return given
    made_of_parameters = getattr(given, "func", given)
    if isinstance(made_of_parameters, type) and issubclass(made_of_parameters, Optimizer):
        parameters: Any = [p for p in model.parameters() if p.requires_grad]
        return given(parameters)
    return given(model)


def generator_of(device: torch.device) -> torch.Generator:
    """Return the random generator of dropout on `device`."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return mps_generator() if device.type == "mps" else torch.default_generator
