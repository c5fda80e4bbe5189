"""Loggers of charlm's own; the others are Lightning's."""

import csv
import io
import os
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.hparams.api_pb2 import Status
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo
from torch.utils.tensorboard.summary import hparams

from charlm.data import CharDataModule
from charlm.files import write_atomically
from charlm.internals.lightning import has_written
from charlm.schema import name_of

# Trainer settings that studies vary.
TRAINER_SETTINGS = (
    "accelerator",
    "devices",
    "strategy",
    "precision",
    "max_steps",
    "max_time",
    "accumulate_grad_batches",
    "gradient_clip_val",
)
# Charts of the CUSTOM SCALARS tab; the names are regular expressions.
CHARTS = {"loss": {"train and val, nats per character": ["Multiline", ["train/loss$", "val/loss$"]]}}
SECONDS_BETWEEN_WRITES = 5  # people do not look more often
EVENTS = "events.out.tfevents.*"
FINISHED = "finished"  # the status that `train.py` gives to a run whose final figures are known


class TensorBoard(TensorBoardLogger):
    """Events go into `save_dir` itself, so that the run has the name of its folder.

    Lightning's own writes the metric column of HPARAMS as -1 and every session as successful.
    """

    def __init__(self, save_dir: str):
        super().__init__(save_dir, name="", version="", flush_secs=SECONDS_BETWEEN_WRITES)
        self.open_session = False

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Open the session of the HPARAMS tab: this run and its settings.

        There is no record of the experiment, on purpose. TensorBoard would take its columns from the record of one
        run, whichever it finds first. Without one, columns are the settings of all runs, those that differ first, and
        all scalars, of which a running session shows the newest and a finished one the final.
        """
        values = params if isinstance(params, Mapping) else vars(params)
        _, start, _ = hparams(dict(values), {})
        self.add_summary(start)
        self.experiment.add_custom_scalars(CHARTS)
        self.experiment.flush()
        self.open_session = True

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log without Lightning's epoch of each step, which is no useful curve."""
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)

    def add_summary(self, summary: Summary, step: int | None = None) -> None:
        """Write a summary for which `SummaryWriter` has no method."""
        writer: Any = self.experiment.file_writer
        writer.add_summary(summary, step)

    @rank_zero_only
    def log_picture(self, tag: str, png: bytes, width: int, height: int, step: int) -> None:
        """Log an encoded picture for the IMAGES tab."""
        image = Summary.Image(encoded_image_string=png, width=width, height=height, colorspace=3)
        self.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)

    def position(self) -> dict[str, int]:
        """Return the current length of each event file in bytes."""
        if has_written(self):
            self.experiment.flush()
        return {file.name: file.stat().st_size for file in Path(self.log_dir).glob(EVENTS)}

    @rank_zero_only
    def resume(self, position: dict[str, int]) -> None:
        """Truncate the files to these lengths; the resumed run logs the rest again."""
        for file in Path(self.log_dir).glob(EVENTS):
            if file.name in position:
                os.truncate(file, min(position[file.name], file.stat().st_size))
            else:
                file.unlink()

    @rank_zero_only
    def save(self) -> None:
        """Do nothing. Lightning calls this whenever it logs, and would write a hparams.yaml, as .hydra/config.yaml is.

        What was logged reaches the file after SECONDS_BETWEEN_WRITES, and at each checkpoint and at the end.
        """

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the session with its true status; a session without one was killed, or stopped and may go on.

        Lightning's "success" means that fit has returned, which is not yet the end of a run.
        """
        stopped = isinstance(sys.exception(), SystemExit | KeyboardInterrupt)
        if self.open_session and status in (FINISHED, "failed") and not stopped:
            ended = Status.Value("STATUS_SUCCESS" if status == FINISHED else "STATUS_FAILURE")
            data = HParamsPluginData(session_end_info=SessionEndInfo(status=ended), version=0)
            plugin = SummaryMetadata.PluginData(plugin_name="hparams", content=data.SerializeToString())
            tag = "_hparams_/session_end_info"
            value = Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin))
            self.add_summary(Summary(value=[value]))
            self.open_session = False
        if has_written(self):
            self.experiment.flush()


class CSV(CSVLogger):
    """metrics.csv in the run folder; Lightning's logger would overwrite it in a resumed run."""

    def __init__(self, save_dir: str):
        super().__init__(save_dir, name="", version="")
        self.rows = 0

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.rows += 1
        super().log_metrics(metrics, step)

    def position(self) -> dict[str, int]:
        """Return the number of rows logged so far."""
        self.save()
        return {"rows": self.rows}

    @rank_zero_only
    def resume(self, position: dict[str, int]) -> None:
        """Keep the rows up to the checkpoint; the file aside has them if a kill interrupts this."""
        file = Path(self.log_dir, "metrics.csv")
        aside = file.with_name(".metrics.csv")
        if file.is_file():
            os.replace(file, aside)
        if not aside.is_file():
            return
        rows = list(csv.DictReader(aside.read_text().splitlines()))[: position["rows"]]
        experiment = self.experiment  # removes what it finds under the file's name
        if rows:
            text = io.StringIO()
            experiment.metrics_keys = list(rows[0])
            writer = csv.DictWriter(text, experiment.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)
            write_atomically(file, lambda opened: opened.write(text.getvalue().encode()))
        self.rows = len(rows)
        aside.unlink()


def hyperparameters(config: dict[str, Any], data: CharDataModule) -> dict[str, str | int | float | bool]:
    """A configuration as flat settings: what was chosen in each group, and every value that may change a result.

    The corpus is the one that was read, which may be the fallback. Null values are left
    out, as its column would hold numbers and a word, which TensorBoard cannot sort.
    """
    flat: dict[str, Any] = {"seed": config["seed"], "data": data.corpus.name, "tokenizer": data.tokenizer.name}
    flat |= {group: name_of(config[group]) for group in ("model", "optimizer", "scheduler")}
    for group in ("data", "tokenizer", "model", "optimizer", "scheduler"):
        flat |= {f"{group}.{key}": value for key, value in config[group].items() if not key.startswith("_")}
    for told_already in ("data.corpus", "data.fallback", "data.seed"):
        flat.pop(told_already, None)
    flat["max_tokens"] = config["max_tokens"]
    flat |= {f"trainer.{key}": config["trainer"][key] for key in TRAINER_SETTINGS}
    plain = (str, int, float, bool)
    return {key: value if isinstance(value, plain) else str(value) for key, value in flat.items() if value is not None}


def begin_logs(loggers: Sequence[Logger], config: dict[str, Any], data: CharDataModule, state: Any) -> None:
    """Log the settings of a run; if it was resumed, first remove the rows after its checkpoint."""
    settings = hyperparameters(config, data)
    for logger in loggers:
        if state and isinstance(logger, TensorBoard | CSV):
            logger.resume(state.content["callbacks"]["Checkpoint"]["logged"])
        logger.log_hyperparams(settings)
