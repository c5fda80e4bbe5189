"""Check everything that needs a GPU, in one table: pass or fail, with figures; at most 15 minutes on one GPU.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --nanogpt FOLDER_OF_A_CLONE      also nanoGPT's compiled step, side by side
    python benchmarks/gpu.py --only bigram,graph              some of the checks

Each check trains with `python train.py` in processes of its own. The exit code is 0 if all checks passed, and 1 if one
failed or if there is no GPU.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from charlm import checkpoint
from charlm.callbacks import AtSteps
from charlm.data.corpora import load_corpus
from charlm.devices import cuda_problem

ROOT = Path(__file__).parent.parent
TRAIN = ROOT / "train.py"
BIGRAM = 2.486  # nats per character of val, by the default recipe on a CPU
NANOGPT = 1.4697  # nats per character of val, as nanoGPT quotes for its recipe on an A100
MODELS = ("bigram", "mlp", "lstm", "gru", "gpt", "transformerpp", "mixture")
WITH_DROPOUT = ("lstm", "gru", "gpt", "transformerpp", "mixture")
SHORT = ["trainer=gpu", "trainer.max_steps=60", "trainer.val_check_interval=30", "evaluate=[val]", "sample_length=0"]


class Failed(Exception):
    """A check did not pass; the text says why."""


class Syncs(AtSteps):
    """Counts how often a group of steps makes the CPU wait for the GPU; train.py loads it by its name."""

    def __init__(self) -> None:
        self.steps = self.waits = 0

    def before_steps(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.caught = warnings.catch_warnings(record=True)
        self.seen: Any = self.caught.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")

    def after_steps(self, trainer: L.Trainer, pl_module: L.LightningModule, losses: Sequence[Tensor]) -> None:
        torch.cuda.set_sync_debug_mode("default")
        self.caught.__exit__(None, None, None)
        if trainer.global_step > 20:  # after the warm-up
            self.waits += sum("synchroniz" in str(warning.message) for warning in self.seen)
            self.steps += len(losses)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        print(f"syncs per step: {self.waits / max(1, self.steps):.2f}", flush=True)


class Machine:
    """Runs commands in a folder.

    Args:
        folder: an empty folder.
        corpus: the file with Tiny Shakespeare.
        nanogpt: the folder of a clone of nanoGPT, if it is to be compared.
    """

    def __init__(self, folder: Path, corpus: str, nanogpt: Path | None):
        self.folder, self.corpus, self.nanogpt = folder, corpus, nanogpt

    def run(self, command: list[str], **env: str) -> str:
        """Run a command and return its output.

        Raises:
            Failed: with its last line, if its exit code is not 0.
        """
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | env
        ended = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise Failed((ended.stderr.strip() or ended.stdout.strip() or str(ended.returncode)).splitlines()[-1])
        return ended.stdout

    def train(self, name: str, *settings: str, **env: str) -> dict[str, Any]:
        """Train a run called `name` and return its results."""
        text = [] if any(s.startswith("experiment=") for s in settings) else ["data=text", f"data.path={self.corpus}"]
        self.run([sys.executable, str(TRAIN), *text, *settings, f"hydra.run.dir={name}"], **env)
        results: dict[str, Any] = json.loads((self.folder / name / "results.json").read_text())
        return results

    def charlm(self, *arguments: str) -> str:
        return self.run([sys.executable, "-m", "charlm", *arguments])

    def difference(self, one: str, other: str) -> float:
        """Return the largest difference between the weights of two runs."""
        weights = [
            checkpoint.read(self.folder / name / "checkpoints" / "last.ckpt")["state_dict"] for name in (one, other)
        ]
        pairs = zip(*(state.values() for state in weights), strict=True)
        return max(float((a.double() - b.double()).abs().max()) for a, b in pairs if a.is_floating_point())


def environment(machine: Machine) -> str:
    """PyTorch, CUDA, the GPU, and whether it computes in bf16"""
    properties = torch.cuda.get_device_properties(0)
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    memory = properties.total_memory / 2**30
    return f"torch {torch.__version__}, CUDA {torch.version.cuda}, {properties.name}, {memory:.0f} GiB, bf16 {bf16}"


def bigram(machine: Machine) -> str:
    """the bigram on the CPU, the GPU, and the GPU with a CUDA graph: tokens/s, and its val loss"""
    ways = {"CPU": ["trainer=cpu"], "GPU": ["trainer=gpu"], "graph": ["trainer=gpu", "speed.cuda_graph=true"]}
    found = {name: machine.train(f"bigram_{name}", *way) for name, way in ways.items()}
    for name, results in found.items():
        if abs(results["val/loss"] - BIGRAM) > 0.005:
            raise Failed(f"{name}: val loss {results['val/loss']:.4f}, expected {BIGRAM}")
    return ", ".join(f"{name} {r['train/tokens_per_second']:,.0f} tokens/s" for name, r in found.items())


def bitwise(machine: Machine) -> str:
    """each model, with dropout where it has it: twice, and interrupted and resumed, bitwise equal"""

    def one(model: str) -> None:
        settings = [*SHORT, f"model={model}", *["model.dropout=0.1"] * (model in WITH_DROPOUT)]
        for name in ("a", "b"):
            machine.train(f"{model}_{name}", *settings)
        with_stop = [sys.executable, str(TRAIN), "data=text", f"data.path={machine.corpus}", *settings, "stop_at=31"]
        machine.run([*with_stop, f"hydra.run.dir={model}_c"])
        machine.run([sys.executable, str(TRAIN), f"resume={model}_c"])
        for name in ("b", "c"):
            if difference := machine.difference(f"{model}_a", f"{model}_{name}"):
                raise Failed(
                    f"{model}: {'a repetition' if name == 'b' else 'a resumed run'} differs by {difference:.2g}"
                )

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, MODELS))
    return ", ".join(MODELS)


def graph(machine: Machine) -> str:
    """a step as a CUDA graph against the ordinary step: the largest difference of weights, at most 1e-5"""
    found = {}
    for model in ("bigram", "gpt", "lstm"):
        settings = [
            *SHORT,
            f"model={model}",
            "trainer.precision=32-true",
            "scheduler=linear",
            "scheduler.warmup_steps=5",
        ]
        machine.train(f"eager_{model}", *settings, "trainer.gradient_clip_val=0.5")
        machine.train(f"graph_{model}", *settings, "trainer.gradient_clip_val=0.5", "speed.cuda_graph=true")
        found[model] = machine.difference(f"eager_{model}", f"graph_{model}")
        if found[model] > 1e-5:
            raise Failed(f"{model}: weights differ by {found[model]:.2g}")
    return ", ".join(f"{model} {difference:.1g}" for model, difference in found.items())


def syncs(machine: Machine) -> str:
    """how often a step makes the CPU wait for the GPU: 0, except in the mixture, whose counts vary in number"""
    found = {}
    for model in ("bigram", "gpt", "mixture"):
        command = [sys.executable, str(TRAIN), "data=text", f"data.path={machine.corpus}", *SHORT, f"model={model}"]
        command += ["+callbacks.syncs._target_=benchmarks.gpu.Syncs", f"hydra.run.dir=syncs_{model}"]
        command += ["speed.steps_per_execution=20", "trainer.log_every_n_steps=60"]
        told = re.search(r"syncs per step: ([\d.]+)", machine.run(command))
        found[model] = float(told[1]) if told else float("nan")
        if not found[model] <= (3 if model == "mixture" else 0):
            raise Failed(f"{model}: {found[model]} a step")
    return ", ".join(f"{model} {n:g}" for model, n in found.items())


def evaluation(machine: Machine) -> str:
    """`charlm evaluate` equals results.json within 1e-7 on the GPU and 1e-5 on the CPU; precision bf16-mixed"""
    results = machine.train("evaluated", *SHORT, "model=gpt", "trainer.precision=bf16-mixed")
    losses = {}
    for device in ("cuda", "cpu"):
        found = json.loads(machine.charlm("evaluate", "evaluated", "--split", "val", "--device", device, "--json"))
        losses[device] = found["val/loss"] - results["val/loss"]
    if abs(losses["cuda"]) > 1e-7 or abs(losses["cpu"]) > 1e-5:
        raise Failed(f"differences: GPU {losses['cuda']:.2g}, CPU {losses['cpu']:.2g}")
    return f"CPU differs by {losses['cpu']:.1g}"


def reproduce(machine: Machine) -> str:
    """`charlm reproduce` of a GPT with dropout: bitwise equal"""
    machine.train("reproduced", *SHORT, "model=gpt", "model.dropout=0.1")
    machine.charlm("reproduce", "reproduced")
    return "bitwise equal"


def sweep(machine: Machine) -> str:
    """a sweep of three small models that share one GPU, which is named by its UUID"""
    uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    command = [sys.executable, str(TRAIN), "-m", "data=text", f"data.path={machine.corpus}", *SHORT, "seed=1,2,3"]
    start = time.perf_counter()
    machine.run([*command, "hydra.sweep.dir=sweep"], CUDA_VISIBLE_DEVICES=uuid)
    devices = [json.loads(file.read_text())["device"] for file in machine.folder.glob("sweep/*/results.json")]
    if devices != ["cuda:0"] * 3:
        raise Failed(f"jobs trained on {devices}")
    return f"{time.perf_counter() - start:.1f} s"


def pack(machine: Machine) -> str:
    """16 small GPTs trained together on one GPU, against three at a time: at least four times as many per minute"""
    jobs = ["model=gpt", "model.n_layer=2", "model.n_head=2", "model.n_embd=64", "seed=range(1,17)", "trainer=gpu"]
    jobs += ["trainer.max_steps=2000", "trainer.val_check_interval=1000", "evaluate=[val]", "sample_length=0"]
    seconds: dict[int, float] = {}
    losses: dict[int, list[float]] = {}
    for size in (1, 16):
        command = [sys.executable, str(TRAIN), "-m", "data=text", f"data.path={machine.corpus}", *jobs]
        start = time.perf_counter()
        machine.run([*command, f"hydra.launcher.pack={size}", f"hydra.sweep.dir=pack_{size}"])
        seconds[size] = time.perf_counter() - start
        files = sorted(machine.folder.glob(f"pack_{size}/*/results.json"))
        losses[size] = [json.loads(file.read_text())["val/loss"] for file in files]
    difference = max(abs(one - other) for one, other in zip(losses[1], losses[16], strict=True))
    ratio = seconds[1] / seconds[16]
    told = f"{seconds[1]:.0f} s and {seconds[16]:.0f} s: {ratio:.1f} times; losses differ by {difference:.1g}"
    if ratio < 4:
        raise Failed(told)
    return told


def precisions(machine: Machine) -> str:
    """a GPT in 16-mixed, bf16-mixed and single precision: the val losses"""
    kinds = ("32-true", "bf16-mixed", "16-mixed")
    losses = [
        machine.train(f"precision_{kind}", *SHORT, "model=gpt", f"trainer.precision={kind}")["val/loss"]
        for kind in kinds
    ]
    if max(losses) - min(losses) > 0.05:
        raise Failed(f"val losses {losses}")
    return ", ".join(f"{kind} {loss:.4f}" for kind, loss in zip(kinds, losses, strict=True))


def distributed(machine: Machine) -> str:
    """trainer=ddp and trainer=fsdp on one GPU, and on two where there are two"""
    counts = [1, 2][: torch.cuda.device_count()]
    losses = {}
    for kind in ("ddp", "fsdp"):
        for n in counts:
            settings = [s for s in SHORT if s != "trainer=gpu"] + [
                f"trainer={kind}",
                "trainer.accelerator=gpu",
                "model=gpt",
            ]
            losses[kind, n] = machine.train(f"{kind}_{n}", *settings, f"trainer.devices={n}")["val/loss"]
    if abs(losses["ddp", 1] - losses["fsdp", 1]) > 0.02:
        raise Failed(f"val losses {losses}")
    return ", ".join(f"{kind} on {n}: {loss:.4f}" for (kind, n), loss in losses.items())


def recipes(machine: Machine) -> str:
    """the recipes for a GPU, shortened: milliseconds per step, and seconds to compile"""
    told = []
    for recipe, few, many in (("gpu_1min", 100, 500), ("gpu_nanogpt_budget", 50, 150), ("nanogpt_gpu", 50, 150)):
        seconds = []
        for steps in (few, many):
            limits = [f"trainer.max_steps={steps}", "trainer.max_time=null", "trainer.val_check_interval=1000"]
            limits += ["evaluate=[val]", "data.val_fraction=0.01"]
            run = machine.train(f"{recipe}_{steps}", f"experiment={recipe}", *limits)
            seconds.append(run["train/seconds"])
        step = (seconds[1] - seconds[0]) / (many - few)
        told.append(f"{recipe} {1000 * step:.1f} ms, {max(0.0, seconds[0] - few * step):.0f} s to start")
    return "; ".join(told)


def nanogpt(machine: Machine) -> str:
    """nanoGPT's compiled step (--nanogpt) against that of experiment=nanogpt_gpu: at most 0.8 of its time"""
    if machine.nanogpt is None:
        raise LookupError("needs --nanogpt FOLDER_OF_A_CLONE")
    clone = machine.folder / "nanoGPT"
    shutil.copytree(machine.nanogpt, clone)
    shutil.copy(machine.corpus, clone / "data" / "shakespeare_char" / "input.txt")
    subprocess.run(
        [sys.executable, "prepare.py"], cwd=clone / "data" / "shakespeare_char", check=True, capture_output=True
    )
    flags = ["--max_iters=150", "--eval_interval=1000", "--eval_iters=1", "--log_interval=10"]
    command = [sys.executable, "train.py", "config/train_shakespeare_char.py", *flags]
    ended = subprocess.run(command, cwd=clone, check=True, capture_output=True, text=True)
    times = [float(found) for found in re.findall(r"time ([\d.]+)ms", ended.stdout)][5:]
    theirs = statistics.median(times)
    seconds = [
        json.loads((machine.folder / f"nanogpt_gpu_{steps}" / "results.json").read_text())["train/seconds"]
        for steps in (50, 150)
    ]
    ours = 1000 * (seconds[1] - seconds[0]) / 100
    if ours > 0.8 * theirs:
        raise Failed(f"{ours:.1f} ms against nanoGPT's {theirs:.1f} ms: {ours / theirs:.2f}")
    return f"{ours:.1f} ms against nanoGPT's {theirs:.1f} ms: {ours / theirs:.2f}"


def minute(machine: Machine) -> str:
    """experiment=gpu_1min in full: val loss and seconds; nanoGPT quotes 1.4697 after 3 minutes of an A100"""
    start = time.perf_counter()
    loss = machine.train("minute", "experiment=gpu_1min", "evaluate=[val]")["val/loss"]
    told = f"val loss {loss:.4f} in {time.perf_counter() - start:.0f} s, start to end"
    if loss > NANOGPT:
        raise Failed(told)
    return told


class Check(NamedTuple):
    name: str
    run: Callable[[Machine], str]

    @property
    def meaning(self) -> str:
        return str(self.run.__doc__)


CHECKS = [
    Check(check.__name__, check)
    for check in (
        environment,
        bigram,
        evaluation,
        graph,
        sweep,
        pack,
        bitwise,
        syncs,
        precisions,
        reproduce,
        distributed,
        recipes,
        nanogpt,
        minute,
    )
]


def results(machine: Machine, names: Sequence[str], minutes: float) -> Iterator[tuple[str, str, str, float]]:
    """Run the checks; yields the name, pass, fail or skip, the figures, and the seconds of each."""
    end = time.perf_counter() + 60 * minutes
    for check in CHECKS:
        if check.name not in names:
            continue
        start = time.perf_counter()
        if start > end:
            yield check.name, "skip", "no time left", 0.0
            continue
        try:
            state, figures = "pass", check.run(machine)
        except LookupError as missing:
            state, figures = "skip", str(missing)
        except Exception as error:  # a check that breaks must not hide the others
            state, figures = "fail", f"{error}" if isinstance(error, Failed) else f"{type(error).__name__}: {error}"
        yield check.name, state, figures, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, help="the folder of a clone of github.com/karpathy/nanoGPT")
    parser.add_argument("--corpus", help="a file with Tiny Shakespeare; default: where charlm finds it")
    parser.add_argument("--only", default=",".join(check.name for check in CHECKS), help="names of checks, with commas")
    parser.add_argument("--minutes", type=float, default=15, help="start no check after so many minutes")
    args = parser.parse_args()
    console = Console(soft_wrap=True)
    if problem := cuda_problem():
        console.print(f"no GPU to check: {problem}. With one, this measures:")
        for check in CHECKS:
            console.print(f"  {check.name:12} {check.meaning}")
        sys.exit(1)
    table = Table("check", "", "figures", "seconds")
    failed = False
    corpus = args.corpus or load_corpus("tinyshakespeare").source
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine(Path(folder), str(Path(corpus).absolute()), args.nanogpt and args.nanogpt.absolute())
        for name, state, figures, seconds in results(machine, args.only.split(","), args.minutes):
            console.print(f"{state}  {name}: {figures} ({seconds:.0f} s)", markup=False)
            table.add_row(name, state, figures, f"{seconds:.0f}")
            failed |= state == "fail"
    Console(width=140).print(table)
    sys.exit(failed)


if __name__ == "__main__":
    main()
