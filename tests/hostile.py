"""Folders as strangers may send them: copies of a real run or sweep, with one thing that is not as charlm writes it.

Beside the copy lies a folder `outside`, which no command may read from, write to or delete from.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from charlm import checkpoint
from charlm.checkpoint import archive

ESCAPE = "\x1b[2J\x9b31m\u202e"  # clears the screen, turns to red, and writes from right to left
SECRET = "secret-of-the-environment"
OUTSIDE = ("log", "events", "losses", "checkpoints/.partial-old", "folder/file")
MARKER = "code_was_run"

Change = Callable[[Path, Path], None]


def outside_of(tmp_path: Path) -> Path:
    """Make files that are nobody's business but the user's."""
    for name in OUTSIDE:
        file = tmp_path / "outside" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"mine\n" * 100)
    return tmp_path / "outside"


def rewrite(file: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def record(change: Callable[[dict[str, Any]], Any]) -> Change:
    """Change run.json."""
    return lambda run, outside: rewrite(run / "run.json", change)


def settings(change: Callable[[dict[str, Any], Path], Any]) -> Change:
    """Change the settings that are recorded, in run.json and in each checkpoint."""

    def apply(run: Path, outside: Path) -> None:
        rewrite(run / "run.json", lambda content: (change(content["config"], run), content["follows"].clear()))
        for file in (run / "checkpoints").glob("*.ckpt"):
            content = checkpoint.read(file)
            change(content["charlm"]["config"], run)
            write_checkpoint(content, file)

    return apply


def write_checkpoint(content: dict[str, Any], file: Path) -> None:
    """Write over a checkpoint, without keeping the one before."""
    with file.open("w+b") as opened:
        archive.dump(content, opened)


def inside_checkpoint(change: Callable[[dict[str, Any]], Any]) -> Change:
    def apply(run: Path, outside: Path) -> None:
        for file in (run / "checkpoints").glob("*.ckpt"):
            content = checkpoint.read(file)
            change(content)
            write_checkpoint(content, file)

    return apply


def instead(name: str, make: Callable[[Path, Path], Any]) -> Change:
    """Put something else in the place of a file or a folder. `make` is given its path and the folder `outside`."""

    def apply(run: Path, outside: Path) -> None:
        [place] = list(run.glob(name)) or [run / name]
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
        make(place, outside)

    return apply


def link(target: str) -> Change:
    return lambda place, outside: place.symlink_to(outside / target)


def fifo(place: Path, outside: Path) -> None:
    os.mkfifo(place)


def zeros(place: Path, outside: Path) -> None:
    place.symlink_to("/dev/zero")


def folder(place: Path, outside: Path) -> None:
    place.mkdir()


def holding(content: bytes) -> Change:
    def write(place: Path, outside: Path) -> None:
        place.write_bytes(content)

    return write


def hard_link(place: Path, outside: Path) -> None:
    os.link(outside / "log", place)


def deep(levels: int) -> Any:
    node: Any = {}
    for _ in range(levels):
        node = {"a": node}
    return node


EVIL = {"_target_": "os.mkdir", "path": MARKER}
SITE = {"_target_": "site.addsitedir", "sitedir": "."}

# Settings that run code, reach outside, or are none; all have to be refused by what would train with them.
SETTINGS: dict[str, Change] = {
    "a target outside of conf": settings(lambda c, run: c["callbacks"].update(evil=EVIL)),
    "a model outside of conf": settings(lambda c, run: c.update(model=EVIL)),
    "a target of another group": settings(
        lambda c, run: c["callbacks"].update(
            x={"_target_": "charlm.logger.CSV", "save_dir": str(run / ".." / "outside")}
        )
    ),
    "a target within a part": settings(lambda c, run: c["optimizer"].update(lr=EVIL)),
    "a target in a list": settings(lambda c, run: c["optimizer"].update(betas=[EVIL, EVIL])),
    "args of a model": settings(lambda c, run: c["model"].update(_args_=[1, 2, 3])),
    "a partial that is none": settings(lambda c, run: c["tokenizer"].update(_partial_=False)),
    "a convert": settings(lambda c, run: c["model"].update(_convert_="all")),
    "an unknown group": settings(lambda c, run: c.update(hydra={"callbacks": {"x": SITE}})),
    "no settings": settings(lambda c, run: c.clear()),
    "no scheduler": settings(lambda c, run: c.update(scheduler=None)),
    "a trainer that is a text": settings(lambda c, run: c.update(trainer="cpu")),
    "callbacks that are a list": settings(lambda c, run: c.update(callbacks=[EVIL])),
    "a resolver": settings(lambda c, run: c["data"].update(path="${oc.env:TOKEN}")),
    "a hidden resolver": settings(lambda c, run: c["data"].update(path="$${seed}{oc.env:TOKEN}")),
    "a reference": settings(lambda c, run: c["data"].update(path="${hydra.runtime.cwd}")),
    "checkpoints elsewhere": settings(lambda c, run: c["callbacks"]["checkpoint"].update(dirpath="/tmp/outside")),
    "checkpoints by ..": settings(
        lambda c, run: c["callbacks"]["checkpoint"].update(dirpath=c["run_dir"] + "/../outside/checkpoints")
    ),
    "a logger by ..": settings(lambda c, run: c["logger"]["tensorboard"].update(save_dir=c["run_dir"] + "/../outside")),
    "a run folder that is all": settings(
        lambda c, run: (c.update(run_dir="/"), c["logger"]["tensorboard"].update(save_dir=str(run.parent / "outside")))
    ),
    "a run folder that is nothing": settings(lambda c, run: c.update(run_dir="")),
    "a run folder that is a package": settings(lambda c, run: c.update(run_dir="charlm")),
    "a server to report to": settings(
        lambda c, run: c.update(
            logger={"x": {"_target_": "lightning.pytorch.loggers.MLFlowLogger", "tracking_uri": "http://127.0.0.1:9/"}}
        )
    ),
    "a setting of a logger": settings(
        lambda c, run: c.update(
            logger={
                "x": {"_target_": "lightning.pytorch.loggers.WandbLogger", "save_dir": str(run), "dir": "/tmp/outside"}
            }
        )
    ),
    "a plugin": settings(lambda c, run: c["trainer"].update(plugins=[EVIL])),
    "a registry": settings(lambda c, run: c["trainer"].update(model_registry="me/mine")),
    "a million layers": settings(
        lambda c, run: c.update(
            model={"_target_": "charlm.model.gpt.GPT", "block_size": 8, "n_head": 1, "n_embd": 8, "bias": False}
            | {"n_layer": 10**6, "dropout": 0.0}
        )
    ),
    "ten million channels": settings(
        lambda c, run: c.update(
            model={"_target_": "charlm.model.gpt.GPT", "block_size": 8, "n_head": 1, "n_layer": 1, "bias": False}
            | {"n_embd": 10**7, "dropout": 0.0}
        )
    ),
    "a batch of a billion": settings(lambda c, run: c["data"].update(batch_size=10**12)),
    "a block of a billion": settings(lambda c, run: c["data"].update(block_size=10**12)),
    "a number without end": settings(lambda c, run: c["data"].update(block_size=10**400)),
    "a number as text": settings(lambda c, run: c["trainer"].update(max_steps="21")),
    "infinity": settings(lambda c, run: c["optimizer"].update(lr=float("inf"))),
    "deep settings": settings(lambda c, run: c["callbacks"].update(x=deep(60))),
}

# A run.json that is not charlm's. A run is continued by its checkpoint, so that `resume=` need not refuse these.
RECORDS: dict[str, Change] = {
    "a secret that is followed": record(lambda r: r["follows"].update({"data.path": "${oc.env:TOKEN}"})),
    "Hydra that is followed": record(lambda r: r["follows"].update({"data.path": "${hydra:runtime.cwd}"})),
    "a node that is followed": record(lambda r: r["follows"].update({"data.path": "${hydra.runtime.cwd}"})),
    "a folder that follows": record(lambda r: r["follows"].update({"run_dir": "${data.path}"})),
    "a target that follows": record(lambda r: r["follows"].update({"model._target_": "${data.path}"})),
    "a part that follows": record(lambda r: r["follows"].update({"model": "${data}"})),
    "a circle": record(lambda r: r["follows"].update({"seed": "${data.seed}", "data.seed": "${seed}"})),
    "follows that is a list": record(lambda r: r.update(follows=["seed"])),
    "no config": record(lambda r: r.pop("config")),
    "a deep record": record(lambda r: r["environment"].update(x=deep(700))),
    "a record of numbers": record(lambda r: r.update(status=5, seed="x")),
    "a fifo as record": instead("run.json", fifo),
    "zeros as record": instead("run.json", zeros),
    "a linked record": instead("run.json", lambda place, outside: place.symlink_to(outside / "log")),
    "a folder as record": instead("run.json", folder),
    "an empty record": instead("run.json", holding(b"")),
    "a binary record": instead("run.json", holding(os.urandom(1000))),
    "a list as record": instead("run.json", holding(b"[]")),
    "a nested record": instead("run.json", holding(b"[" * 100_000)),
}

# Files that are written into, or read, where they are not what they seem.
FILES: dict[str, Change] = {
    "linked losses": instead("losses.f32", link("losses")),
    "a fifo as losses": instead("losses.f32", fifo),
    "zeros as losses": instead("losses.f32", zeros),
    "no losses": instead("losses.f32", holding(b"")),
    "linked events": instead("events.out.tfevents.*", link("events")),
    "more events": instead("events.out.tfevents.9", link("events")),
    "a linked log": instead("train.log", link("log")),
    "a log that has two names": instead("train.log", hard_link),
    "a fifo as log": instead("train.log", fifo),
    "linked checkpoints": instead("checkpoints", link("checkpoints")),
    "a linked checkpoint": instead("checkpoints/last.ckpt", link("log")),
    "a fifo as checkpoint": instead("checkpoints/last.ckpt", fifo),
    "zeros as checkpoint": instead("checkpoints/last.ckpt", zeros),
    "a linked lock": instead(".lock", link("log")),
    "a fifo as lock": instead(".lock", fifo),
    "linked blocks": instead("val_blocks.csv", link("log")),
    "garbage as blocks": instead("val_blocks.csv", holding(b"characters,nats\n1,2,3\n\xff\n0,nan\n1,1e999\n")),
    "linked validations": instead("validations.csv", link("log")),
    "a fifo as validations": instead("validations.csv", fifo),
    "garbage as validations": instead("validations.csv", holding(b"step\n1,2,3,4\n\xff\xfe\n1,nan,1e999\n")),
    "linked results": instead("results.json", link("log")),
    "a fifo as results": instead("results.json", fifo),
    "no results": instead("results.json", holding(b"")),
    "binary results": instead("results.json", holding(b"\x80\x81" * 50)),
    "a list as results": instead("results.json", holding(b"[]")),
    "NaN as results": instead("results.json", holding(b'{"status": "finished", "val/loss": NaN}')),
    "a stray link": instead("notes", link("folder")),
}

# Shown text that contains commands to a terminal.
SHOWN: dict[str, Change] = {
    "a corpus that commands": record(
        lambda r: (r["corpus"].update(name=ESCAPE, source=ESCAPE), r["environment"].update({ESCAPE: ESCAPE}))
    ),
    "a status that commands": record(lambda r: r.update(status="failed", reason=ESCAPE, command=f"a b {ESCAPE}=1")),
    "settings that command": settings(lambda c, run: c["data"].update({ESCAPE: ESCAPE})),
    "a target that commands": settings(lambda c, run: c["model"].update(_target_=ESCAPE)),
    "an alphabet that commands": inside_checkpoint(
        lambda c: c["charlm"]["tokenizer"]["points"].__setitem__(slice(0, 3), [0x0D, 0x1B, 0x9B])
    ),
    "a checkpoint that commands": inside_checkpoint(
        lambda c: (c["charlm"]["corpus"].update(name=ESCAPE, source=ESCAPE), c["state_dict"].update({ESCAPE: None}))
    ),
    "tensors that command": inside_checkpoint(
        lambda c: c["state_dict"].update({f"model.{ESCAPE}": next(iter(c["state_dict"].values()))})
    ),
    "results that command": lambda run, outside: rewrite(
        run / "results.json", lambda content: content.update(stopped_by=ESCAPE, corpus=ESCAPE, **{ESCAPE: ESCAPE})
    ),
}

# Overrides in a sweep.json that charlm does not record.
OVERRIDES = [
    "++hydra.callbacks.x._target_=site.addsitedir",
    "+hydra.callbacks.x._target_=site.addsitedir",
    "~hydra.callbacks",
    "hydra.callbacks.x._target_=site.addsitedir",
    "++hydra.job_logging.handlers.file.filename=outside/log",
    "++hydra.output_subdir=/tmp/outside",
    "hydra.searchpath=[file:///tmp/outside]",
    "++hydra.job.env_set.PYTHONPATH=/tmp/outside",
    "hydra/job_logging=none",
    "+hydra/job_logging@hydra.x=none",
    "hydra=1,2,3",
    "'hydra'.run.dir=x",
    "run_dir=/tmp/outside",
    "resume=/tmp/outside",
    "+rerun=/tmp/outside",
    "model=../../outside/model",
    "model=/tmp/outside/model",
    "model@hydra.callbacks.x=gpt",
    "experiment=[../x]",
    "callbacks=[default,../../outside]",
    "model._args_=[1]",
    "data.path=${oc.env:TOKEN}",
    "data.path='${oc.env:TOKEN}'",
    "data.path=$\\{oc.env:TOKEN\\}",
    "data.path=choice(prose.txt,'${oc.env:TOKEN}')",
    "data.path=${hydra.runtime.cwd}",
    "data.path=${hydra:runtime.cwd}",
    "+data.x={a:'${oc.env:TOKEN}'}",
    "~model",
    "-m",
    "--config-dir=/tmp/outside",
    "-cd",
    "seed",
    "seed=[",
    "",
    f"{ESCAPE}=1",
    f"seed={ESCAPE}",
]


def command(override: str) -> Change:
    """Record an override in a sweep."""
    return lambda sweep, outside: rewrite(sweep / "sweep.json", lambda content: content["command"].append(override))


def searched(key: str, words: str) -> Change:
    search: dict[str, Any] = {"n_trials": 2, "seed": 1, "n_startup_trials": 1, "prune": True, "prune_startup_trials": 1}
    search |= {"prune_warmup_steps": 0, "space": {key: words}}
    return lambda sweep, outside: rewrite(sweep / "sweep.json", lambda content: content.update(search=search))


# Overrides with parts in them, which only their composition shows to be outside of conf/.
COMPOSED = ["+callbacks.x._target_=os.mkdir", "+callbacks.x={_target_:os.mkdir,path:code_was_run}"]
COMPOSED += ["++model._target_=os.getcwd", "+callbacks.x={_target_:charlm.logger.CSV,save_dir:outside}"]
SWEEPS: dict[str, Change] = {
    f"command {o!r}": command(o) for o in [*OVERRIDES[:1], "model=../../outside/model", *COMPOSED]
}
SWEEPS |= {
    f"space {key}": searched(key, words)
    for key, words in (
        ("++hydra.callbacks.x._target_", "choice(site.addsitedir,os.mkdir)"),
        ("hydra.searchpath", "[file:///tmp/outside]"),
        ("data.path", "choice('${oc.env:TOKEN}',b)"),
        ("+callbacks.x", "{_target_: os.mkdir, path: code_was_run}"),
        ("model", "choice(../../outside,gpt)"),
    )
}
SWEEPS |= {
    "a job outside": lambda sweep, outside: rewrite(
        sweep / "sweep.json", lambda content: content["jobs"].update({"../outside": content["jobs"]["seed=1"]})
    ),
    "a job of Hydra": lambda sweep, outside: rewrite(
        sweep / "sweep.json", lambda content: content["jobs"]["seed=1"]["overrides"].append("hydra.run.dir=x")
    ),
    "a state that commands": lambda sweep, outside: rewrite(
        sweep / "sweep.json", lambda content: content["jobs"]["seed=1"].update(state=ESCAPE)
    ),
    "a launcher that commands": lambda sweep, outside: rewrite(
        sweep / "sweep.json", lambda content: content.update(launcher=ESCAPE)
    ),
    "a linked ledger": instead("sweep.json", link("log")),
    "zeros as ledger": instead("sweep.json", zeros),
    "an empty ledger": instead("sweep.json", holding(b"")),
    "a linked job": instead("seed=1", link("folder")),
    "a linked log of a job": instead("seed=1/terminal.log", link("log")),
    "a linked table": instead("results.csv", link("log")),
    "a linked multirun.yaml": instead("multirun.yaml", link("log")),
    "a linked lock of a sweep": instead(".lock", link("log")),
    "a journal": instead("optuna.journal", link("log")),
}
