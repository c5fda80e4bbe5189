"""TensorBoard on many runs: short names that differ at the front, and a table of the loss and of what was varied."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tensorboard import program
from tensorboard.util.tb_logging import get_logger
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from charlm.errors import InputError
from charlm.logger import EVENTS
from charlm.study.runs import Run
from charlm.study.study import Study, read_study

LONGEST = 60  # characters of a name
COLUMNS = "table of HPARAMS"  # a folder with no curves
MOST_COLUMNS = 4  # settings of HPARAMS that leave room for the loss
METRICS = ("final/val/loss", "val/loss")
SECONDS_BETWEEN_LOOKS = 5.0


class Board:
    """A folder of links to runs, under short names.

    Args:
        places: folders that hold runs, at any depth.
        links: the folder, which must be empty.
    """

    def __init__(self, places: Sequence[Path], links: Path):
        self.places, self.links = places, links
        self.names: dict[str, str] = {}  # by the real path of a run's folder
        self.settings: list[str] = []

    def look(self) -> None:
        """Link the runs that are new, and choose the columns of HPARAMS the first time.

        Raises:
            InputError: if there is no run.
        """
        study = read_study(self.places)
        for run in study.runs:
            folder = os.path.realpath(run.folder) if run.folder else ""
            if folder and folder not in self.names and any(Path(folder).glob(EVENTS)):
                self.names[folder] = free(short_name(study, run), Path(folder).name, self.names.values())
                os.symlink(folder, self.links / self.names[folder], target_is_directory=True)
        if not self.settings:
            seeds = {run.seed for run in study.runs}
            names = [*most_varied(study), *["seed"] * (len(seeds) > 1)] or ["model"]
            self.settings = names[:MOST_COLUMNS]
            self.write_columns(study)

    def write_columns(self, study: Study) -> None:
        """Write which settings and metrics HPARAMS shows. Without it, the loss comes after all settings of a run."""
        kinds: dict[str, Any] = {}
        for name in self.settings:
            values = [run.seed if name == "seed" else run.settings.get(name) for run in study.runs]
            kinds[name] = next((value for value in values if value is not None), "")
        experiment, _, _ = hparams(kinds, dict.fromkeys(METRICS, 0.0))
        with SummaryWriter(str(self.links / COLUMNS)) as writer:
            file: Any = writer.file_writer
            file.add_summary(experiment)


def most_varied(study: Study) -> list[str]:
    """Return the settings in which runs differ, those with the most values first."""
    values = {name: len({run.settings.get(name) for run in study.runs}) for name in study.swept}
    return sorted(values, key=lambda name: -values[name])


def short_name(study: Study, run: Run) -> str:
    """Return what a run has of what was varied, what was varied most first: "lr=0.01, gpt, seed=2"."""
    parts = []
    for name in (name for name in most_varied(study) if name in run.settings):
        value = study.formatted[name].get(run.settings[name], "")
        parts.append(value if name == "model" else f"{study.labels[name]}={value}")
    parts += [f"seed={run.seed}"] * (len({other.seed for other in study.runs}) > 1)
    return ", ".join(parts).replace(os.sep, "-")[:LONGEST]


def free(name: str, folder: str, taken: Any) -> str:
    """Return a name that no other run has."""
    name = name or folder
    tries = [name, f"{name} ({folder})", *(f"{name} ({folder}, {i})" for i in range(2, 10_000))]
    return next(one for one in tries if one not in taken)


@contextmanager
def serving(places: Sequence[Path], port: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """Serve TensorBoard on this machine. Yields its address, and a function that waits, and shows runs that begin.

    Raises:
        InputError: if there is no run, or the port is taken.
    """
    get_logger().setLevel("ERROR")
    with tempfile.TemporaryDirectory(prefix="charlm-board-") as folder:
        board = Board(places, Path(folder))
        board.look()
        if not board.names:
            raise InputError(
                f"no run in {', '.join(map(str, places))} has logged to TensorBoard: train with logger=tensorboard"
            )
        server = program.TensorBoard()
        fast = str(find_spec("tensorboard_data_server") is not None).lower()  # else it says that it tries
        where = ["--host", "127.0.0.1", "--port", str(port)]
        server.configure(argv=["", "--logdir", folder, *where, "--load_fast", fast])
        try:
            address = server.launch()
        except program.TensorBoardServerException as error:
            raise InputError(f"--port {port} is not free: choose another, or 0 for any ({error.msg})") from error

        def wait() -> None:
            while True:
                time.sleep(SECONDS_BETWEEN_LOOKS)
                with suppress(InputError, OSError):
                    board.look()

        yield address, wait
