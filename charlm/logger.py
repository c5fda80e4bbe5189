"""Loggers of charlm's own; the others are Lightning's."""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.hparams.api_pb2 import Status
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo
from torch.utils.tensorboard.summary import hparams

from charlm.report import name_of

# The columns of the HPARAMS tab; they are read from the ordinary scalars of these names.
METRICS = ("val/loss", "val/bits_per_char", "train/loss", "train/tokens_per_second")
# Those of the trainer's settings that are choices of a study.
TRAINER_SETTINGS = ("accelerator", "devices", "strategy", "precision", "max_steps", "accumulate_grad_batches")
# Charts that the CUSTOM SCALARS tab shows, each with several curves.
CHARTS = {
    "loss": {"nats per character": ["Multiline", ["train/loss", "val/loss"]]},
    "bits": {"bits per character": ["Multiline", ["train/bits_per_char", "val/bits_per_char"]]},
}


class TensorBoard(TensorBoardLogger):
    """One run, one folder: events go into `save_dir` itself, so that the run is called as its folder.

    Lightning's own writes the metric column of HPARAMS as -1 and every session as successful.
    """

    def __init__(self, save_dir: str):
        super().__init__(save_dir, name="", version="")
        self.open_session = False

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Open the session of the HPARAMS tab: this run and its settings, flat, of the same names in every run."""
        values = params if isinstance(params, Mapping) else vars(params)
        experiment, start, _ = hparams(dict(values), dict.fromkeys(METRICS, 0.0))
        writer = self.experiment._get_file_writer()
        writer.add_summary(experiment)
        writer.add_summary(start)
        self.experiment.add_custom_scalars(CHARTS)
        self.experiment.flush()
        self.open_session = True

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the session with its true status. The writer stays open for the figures that end the run."""
        if self.open_session:
            ended = Status.Value("STATUS_SUCCESS" if status == "success" else "STATUS_FAILURE")
            data = HParamsPluginData(session_end_info=SessionEndInfo(status=ended), version=0)
            plugin = SummaryMetadata.PluginData(plugin_name="hparams", content=data.SerializeToString())
            tag = "_hparams_/session_end_info"
            value = Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin))
            self.experiment._get_file_writer().add_summary(Summary(value=[value]))
            self.open_session = False
        if self._experiment is not None:
            self.experiment.flush()


def hyperparameters(config: dict[str, Any]) -> dict[str, str | int | float | bool]:
    """A configuration as flat settings: what was chosen in each group, and every value that may change a result."""
    flat: dict[str, Any] = {"seed": config["seed"]}
    for group in ("data", "tokenizer", "model", "optimizer", "scheduler"):
        flat[group] = name_of(config[group]) if group != "data" else config["data"]["corpus"]
        flat |= {f"{group}.{key}": value for key, value in config[group].items() if not key.startswith("_")}
    flat |= {f"trainer.{key}": config["trainer"][key] for key in TRAINER_SETTINGS}
    plain = (str, int, float, bool)
    return {key: value if isinstance(value, plain) else str(value) for key, value in flat.items()}
