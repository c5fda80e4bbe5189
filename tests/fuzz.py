"""Random damage to recorded files, and random command lines: python -m tests.fuzz --files 1000 --commands 1000

Each case is a copy of a real run or sweep in which something recorded is damaged, read by one of the commands, or a
command line of likely and unlikely words. It runs in a process that is forked after one import, under an audit hook
(`--processes` of them as real commands). It must end within 20 seconds, without a traceback and without a control
character on the terminal; it must not open or change anything outside of its folder, nor run code that this names.
"""

import argparse
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from charlm import checkpoint
from charlm.errors import COMMANDS
from tests.conftest import ROOT
from tests.hostile import COMPOSED, ESCAPE, EVIL, MARKER, OVERRIDES, SECRET, outside_of, write_checkpoint

SECONDS = 20
LATE = 99  # the exit code of a case that was ended by its alarm
STEPS = 12
CONF = ROOT / "conf"
OF_RUNS = ["run.json", "results.json", "validations.csv", "val_blocks.csv", "losses.f32"]
FILES = [*OF_RUNS, "checkpoints/last.ckpt", ".hydra/config.yaml"]
FILES_OF_SWEEPS = ["sweep.json", "sweep.json", "seed=1/results.json", "seed=2/run.json"]
READERS = ["report", "evaluate", "generate", "checkpoint", "reproduce", "resume", "rerun"]
STRANGE: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        7,
        2**31,
        2**63,
        10**12,
        10**300,
        1.5,
        -0.0,
        1e-300,
        1e308,
        float("nan"),
        float("inf"),
    ),
    *("", " ", "x" * 5000, "\0", ESCAPE, "a\nb", "../outside", "/dev/zero", "~", "*", "???", "null", "char", "auto"),
    *("${seed}", "${oc.env:TOKEN}", "${hydra:runtime.cwd}", "${run_dir}/../outside", "os.mkdir", "site.addsitedir"),
    *("charlm.logger.CSV", "charlm.model.gpt.GPT", "charlm.callbacks.Best", "lightning.Trainer", "[bold]", "%s{}"),
    *([], {}, [[]], [None], EVIL, [EVIL], {"_target_": "charlm.logger.CSV", "save_dir": "../outside"}, {"a": {"b": 1}}),
]
KEYS = (
    "model data optimizer callbacks experiment sweep seed optimizer.lr data.block_size data.path trainer.max_steps "
    "trainer.max_time trainer.devices model.n_layer model._target_ hydra hydra.run.dir hydra/launcher hydra/sweeper "
    "hydra.job.chdir hydra.searchpath resume rerun run_dir evaluate max_tokens scheduler logger x model@x a.b.c "
    " _target_"
)
VALUES = (
    "gpt bigram gpt,bigram text pydoc [default,ema] 1e-3,1e-2 range(1,3) interval(0,1) choice(1,2) glob(*) {a:1} ' \" "
    "[ tag(log,interval(1e-3,1)) { ( \\ run sweep outside prose.txt missing.txt 1_000 00:00:00:01 slurm optuna $ ${"
)
FLAGS = (
    "-m --multirun --cfg job --info --help --hydra-help -p x --config-name=x -cd=x --config-dir outside --package "
    "--resolve --version --run -h -- -"
)


def seeded(*what: Any) -> random.Random:
    return random.Random(repr(what))


def mutate(node: Any, draw: random.Random) -> None:
    """Put something strange somewhere into nested dictionaries and lists, take something away, or add something."""
    containers, left = [], [node]
    while left:
        one = left.pop()
        if isinstance(one, dict | list) and one:
            containers.append(one)
            left += one.values() if isinstance(one, dict) else one
    place: Any = draw.choice(containers or [node])
    keys = [*place] if isinstance(place, dict) else [*range(len(place))]
    key, kind = draw.choice(keys or ["x"]), draw.random()
    if kind < 0.7:
        place[key] = draw.choice(STRANGE)
    elif kind < 0.85 and keys:
        del place[key]
    elif isinstance(place, dict):
        place[draw.choice([ESCAPE, "_target_", "_args_", "_partial_", "x", "hydra", ""])] = draw.choice(STRANGE)
    else:
        place.append(draw.choice(STRANGE))


def damaged(raw: bytes, draw: random.Random) -> bytes:
    """Return the bytes of a file as a bad disk, a broken copy or an editor leaves them."""
    place, noise = draw.randrange(len(raw) + 1), draw.randbytes(draw.choice([1, 16, 300]))
    before, after = raw[:place], raw[place:]
    return draw.choice([before, before + noise + after, before + noise + after[len(noise) :], noise, b"", raw * 2])


def spoil(file: Path, outside: Path, draw: random.Random) -> None:
    """Damage one file, as content or as a thing of another kind."""
    kind = draw.random()
    if kind < 0.12:
        file.unlink(missing_ok=True)
        target = draw.choice([outside / "log", outside / "folder", Path("/dev/zero"), Path("nowhere"), file])
        draw.choice([lambda: os.mkfifo(file), file.mkdir, lambda: file.symlink_to(target), lambda: None])()
    elif kind < 0.4 or file.suffix in (".csv", ".f32", ".yaml"):
        file.write_bytes(damaged(file.read_bytes() if file.is_file() else b"", draw))
    elif file.suffix == ".ckpt":
        content = checkpoint.read(file)
        mutate(content if draw.random() < 0.2 else content["charlm"], draw)
        write_checkpoint(content, file)
    else:
        content = json.loads(file.read_text())
        if isinstance(content.get("command"), list) and draw.random() < 0.5:
            content["command"].append(draw.choice([*OVERRIDES, *COMPOSED]))
        else:
            for _ in range(draw.choice([1, 1, 2])):
                mutate(content, draw)
        file.write_text(json.dumps(content))


def command_line(draw: random.Random) -> list[str]:
    """Return words for train.py, a mix of likely and unlikely ones."""
    keys, values, flags = KEYS.split(" "), [*map(str, STRANGE), *VALUES.split(" ")], FLAGS.split(" ")

    def word() -> str:
        if draw.random() < 0.12:
            return draw.choice(flags)
        if draw.random() < 0.05:
            return "".join(draw.choice("ab=.,+~[]{}()'\"\\$: \t\x1b\u4e16") for _ in range(draw.randrange(1, 12)))
        sign, between = draw.choice(["", "", "", "", "+", "++", "~"]), draw.choice(["=", "=", "=", "=", "=", ""])
        return f"{sign}{draw.choice(keys)}{between}{draw.choice(values)}"

    words = ["data=text", "data.path=prose.txt"] if draw.random() < 0.5 else []
    words = [*words, *(word() for _ in range(draw.choice([1, 1, 2, 3])))]
    return [text.replace("\0", "0").encode(errors="replace").decode() for text in words]


@dataclass
class Case:
    """A command to run in a folder of its own, and a description of the damage to that folder."""

    argv: list[str]
    folder: Path
    told: str
    trains: bool = False


def file_case(number: int, seed: int, bases: Path, place: Path) -> Case:
    draw = seeded(seed, "files", number)
    outside_of(place)
    (place / "prose.txt").write_bytes((bases / "prose.txt").read_bytes())
    of_sweep = draw.random() < 0.25
    name, folder = ("sweep", place / "sweep") if of_sweep else ("run", place / "run")
    shutil.copytree(bases / name, folder)
    file = folder / draw.choice(
        ["sweep.json", "sweep.json", "seed=1/results.json", "seed=2/run.json"] if of_sweep else FILES
    )
    spoil(file, place / "outside", draw)
    reader = draw.choice(["report", "resume", "resume"] if of_sweep else READERS)
    if reader in ("resume", "rerun"):
        # A run of any length is no hang: it stops after two more steps.
        more = ["seed=1,2,3"] if of_sweep else [f"stop_at={STEPS + 2}"]
        return Case(["train.py", f"{reader}={name}", *more], place, f"{reader} {file}", trains=not of_sweep)
    return Case(["charlm", reader, name], place, f"{reader} {file}")


def command_case(number: int, seed: int, bases: Path, place: Path) -> Case:
    draw = seeded(seed, "commands", number)
    outside_of(place)
    shutil.copy(bases / "prose.txt", place)
    if draw.random() < 0.3:
        shutil.copytree(bases / "run", place / "run")
    argv = command_line(draw)
    return Case(["train.py", *argv], place, repr(argv))


CHANGES = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.truncate", "os.chmod"}
RUNS = {"os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "pty.spawn"}


class Guard:
    """An audit hook that notes what reaches outside of a folder, or runs something."""

    def __init__(self, folder: Path, outside: Path):
        self.folder, self.outside, self.found = os.path.realpath(folder), os.path.realpath(outside), list[str]()
        self.temporary = os.path.realpath(tempfile.gettempdir())
        self.server = f"{self.temporary}/pymp-"  # a folder of multiprocessing's, for the fork server of a sweep
        self.free = (f"{self.temporary}/charlm-", self.server, "/dev/", "/proc/")

    def inside(self, path: Any) -> bool:
        if isinstance(path, int) or path is None:
            return True
        real = os.path.realpath(os.path.join(os.path.dirname(os.fsdecode(path)), os.path.basename(os.fsdecode(path))))
        mine = (real + "/").startswith(self.folder + "/") and not (real + "/").startswith(self.outside + "/")
        return mine or (real + "/").startswith(self.free) or "__pycache__" in real

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = bool((flags or 0) & (os.O_WRONLY | os.O_RDWR)) or any(c in str(mode or "") for c in "wax+")
            writes &= path != self.temporary  # a file there that never has a name
            outside = not isinstance(path, int) and os.path.realpath(os.fsdecode(path)).startswith(self.outside + "/")
            if outside or (writes and not self.inside(path)):
                self.found.append(f"open {path!r} {mode} {flags}")
        elif event in CHANGES:
            paths = [one for one in arguments[:2] if isinstance(one, str | bytes | Path)]
            paths = [one for one in paths if not os.fsdecode(one).startswith(self.free)]
            away = [one for one in paths if not self.inside(os.path.dirname(os.fsdecode(one)) or ".")]
            self.found += [f"{event} {one!r}" for one in away]
        elif event in RUNS and not self.usual(event, arguments):
            self.found.append(f"{event} {arguments!r}")

    def usual(self, event: str, arguments: tuple[Any, ...]) -> bool:
        """Return whether charlm always does this: git, uname, train.py to reproduce a run, a sweep's fork server."""
        if event == "socket.connect":
            return str(arguments[1]).startswith(self.server)
        words = [str(word) for word in (arguments[1] if len(arguments) > 1 and isinstance(arguments[1], list) else [])]
        ours = bool(words) and (words[0] in ("git", "uname") or "train.py" in " ".join(words[:2]))
        return event == "subprocess.Popen" and ours


def act(case: Case) -> None:
    """In the process of a case: be the command."""
    os.environ |= {"TOKEN": SECRET, "CHARLM_DATA": "", "XDG_CACHE_HOME": str(case.folder / "cache"), "COLUMNS": "100"}
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.argv = list(case.argv)
    if case.argv[0] == "charlm":
        from charlm.cli import main

        main()
    elif case.trains:
        sys.argv[0] = str(ROOT / "train.py")
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        from charlm.errors import one_line_errors
        from tests.conftest import check_command

        with one_line_errors():
            check_command(case.argv, CONF)


def late(*_: object) -> None:
    os._exit(LATE)


def forked(case: Case) -> tuple[int, list[str]]:
    """Run a case in a child. Returns its exit code, and what the audit hook found."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        with os.fdopen(read) as pipe:
            found = pipe.read().splitlines()
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), found
    code = 70
    try:
        os.setsid()
        os.close(read)
        os.chdir(case.folder)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(case.folder / name, os.O_WRONLY | os.O_CREAT), number)
        signal.signal(signal.SIGALRM, late)
        signal.alarm(SECONDS)
        guard = Guard(case.folder, case.folder / "outside")
        sys.addaudithook(guard)
        try:
            act(case)
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(write, "\n".join(guard.found).encode(errors="replace"))
    finally:
        os._exit(code)


def real(case: Case) -> tuple[int, list[str]]:
    """Run a case as a command that a person types."""
    words = [sys.executable, str(ROOT / "train.py")] if case.argv[0] == "train.py" else [sys.executable, "-m", "charlm"]
    env = os.environ | {"TOKEN": SECRET, "CHARLM_DATA": "", "XDG_CACHE_HOME": str(case.folder / "cache")}
    with (case.folder / "out").open("wb") as out, (case.folder / "err").open("wb") as err:
        try:
            more = ["trainer.max_steps=2"] if not case.trains and case.argv[0] == "train.py" else []
            command = [*words, *case.argv[1:], *more]
            ended = subprocess.run(command, cwd=case.folder, env=env, stdout=out, stderr=err, timeout=120, check=False)
        except subprocess.TimeoutExpired:
            return LATE, []
    return ended.returncode, []


def wrong(case: Case, run: Callable[[Case], tuple[int, list[str]]]) -> str | None:
    """Run a case. Returns what must not be, if anything is."""
    before = {file: file.read_bytes() for file in sorted((case.folder / "outside").rglob("*")) if file.is_file()}
    code, found = run(case)
    out, err = ((case.folder / name).read_text(errors="surrogateescape") for name in ("out", "err"))
    after = {file: file.read_bytes() for file in sorted((case.folder / "outside").rglob("*")) if file.is_file()}
    if code == LATE:
        return "it does not end"
    if "Traceback" in out + err or code not in (0, 1, 2):
        return f"exit code {code}: {err[-1500:]}"
    if code and not any(line.startswith("charlm: ") for line in err.splitlines()) and "reproduce" not in case.told:
        return f"exit code {code} without a word: {err[-500:]}"
    if controls := {*COMMANDS.findall(out + err)} - {"\n", "\t"}:
        return f"control characters on the terminal: {controls}"
    # A recorded ${oc.env:...} is never resolved; one that the user types is the user's own.
    if SECRET in out + err and not any("oc.env" in word for word in case.argv):
        return "a secret of the environment is told"
    if before != after or any(case.folder.rglob(MARKER)):
        return "something outside was changed, or code was run"
    return f"it reached outside: {found[:3]}" if found else None


def make_bases(folder: Path) -> None:
    """A run and a sweep, to be damaged."""
    from charlm.data.corpora import load_corpus

    (folder / "prose.txt").write_text(load_corpus("pydoc").text[:20_000])
    common = ["data=text", f"data.path={folder / 'prose.txt'}", f"trainer.max_steps={STEPS}", "trainer=cpu"]
    common.append("callbacks.checkpoint.every_n_steps=5")
    for given in (["hydra.run.dir=run"], ["-m", "seed=1,2", "hydra.sweep.dir=sweep"]):
        command = [sys.executable, str(ROOT / "train.py"), *given, *common]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)


def fuzz(files: int, commands: int, processes: int, seed: int, keep: Path | None = None) -> list[str]:
    """Run so many cases of each. Returns a line for each that ended as none may."""
    import lightning  # noqa: F401

    import charlm.callbacks
    import charlm.cli
    import charlm.evaluate
    import charlm.preflight.settings
    import charlm.study.page
    import charlm.study.text  # noqa: F401

    torch.set_num_threads(1)
    faults: list[str] = []
    ends: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as bases:
        make_bases(Path(bases))
        kinds = [(file_case, files, forked), (command_case, commands, forked)]
        kinds += [(file_case, processes // 2, real), (command_case, processes - processes // 2, real)]
        for offset, (make, number_of_cases, run) in enumerate(kinds):
            for number in range(number_of_cases):
                start = time.monotonic()
                with tempfile.TemporaryDirectory() as place:
                    case = make(number, seed + 1000 * (offset > 1), Path(bases), Path(place))
                    fault = wrong(case, run)
                    told = f"{make.__name__} {number} ({case.told.replace(place, '')}): {fault}"
                    ends[f"{make.__name__} {run.__name__}: {'FAULT' if fault else 'as it should'}"] += 1
                    if fault:
                        faults.append(told)
                        print(told, flush=True)
                        if keep:
                            shutil.copytree(place, keep / f"{make.__name__}-{number}", symlinks=True)
                if (seconds := time.monotonic() - start) > SECONDS / 2:
                    print(f"{told} took {seconds:.1f} s", flush=True)
    print(dict(ends))
    return faults


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1000, help="cases of damaged files (default 1000)")
    parser.add_argument("--commands", type=int, default=1000, help="cases of command lines (default 1000)")
    parser.add_argument("--processes", type=int, default=50, help="of each half, as real commands (default 50)")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    sys.exit(bool(fuzz(arguments.files, arguments.commands, arguments.processes, arguments.seed)))
