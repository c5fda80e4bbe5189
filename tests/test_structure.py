"""The tree is what it says: one file and one YAML make a model, and names are the same in conf/ and charlm/."""

import ast
import inspect
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir

from charlm.preflight.command import check_command

ROOT = Path(__file__).parent.parent
CONF = ROOT / "conf"
YAMLS = sorted(CONF.rglob("*.yaml"))
MODELS = sorted(f.stem for f in (ROOT / "charlm" / "model").glob("*.py") if f.stem != "__init__")


def targets(node) -> list[str]:
    if isinstance(node, list):
        return [t for item in node for t in targets(item)]
    if isinstance(node, dict):
        own = [node["_target_"]] if "_target_" in node else []
        return own + [t for value in node.values() for t in targets(value)]
    return []


@pytest.mark.parametrize("file", YAMLS, ids=lambda f: str(f.relative_to(CONF)))
def test_a_target_of_charlm_sits_in_the_group_of_its_name(file):
    group = file.parent.name
    for target in targets(yaml.safe_load(file.read_text())):
        assert pkgutil.resolve_name(target)
        if target.startswith("charlm."):
            assert target.split(".")[1] == group


def test_every_package_is_installed():
    installed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {f.parent.relative_to(ROOT).as_posix().replace("/", ".") for f in (ROOT / "charlm").rglob("__init__.py")}
    assert set(installed) - {"hydra_plugins"} == there


def test_every_model_file_has_its_yaml_and_every_yaml_its_file():
    assert sorted(f.stem for f in (CONF / "model").glob("*.yaml")) == MODELS
    assert "bigram" in MODELS


def test_a_model_brings_settings_that_suit_it_and_recipes_and_the_command_line_go_before_them():
    def settings(*overrides: str) -> tuple[int, float]:
        cfg = compose("train", [*overrides])
        return cfg.data.block_size, cfg.optimizer.lr

    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert settings("model=gpt") == (64, 1e-3)
        assert settings("model=gpt", "data=pydoc") == (64, 1e-3)
        assert settings("model=gpt", "optimizer.lr=5") == (64, 5)
        assert settings("model=gpt", "experiment=lecture_bigram") == settings("experiment=lecture_bigram") == (8, 1e-2)


def test_models_are_plain_torch():
    for name in MODELS:
        imports = re.findall(r"^(?:from|import) ([\w.]+)", (ROOT / "charlm" / "model" / f"{name}.py").read_text(), re.M)
        foreign = [i for i in imports if i.partition(".")[0] in ("lightning", "hydra", "omegaconf", "charlm")]
        # A model may be made of another, may count, and may use a kernel of PyTorch that has no public name.
        assert all(f"{i}.".startswith(("charlm.model.", "charlm.counts.", "charlm.internals.torch.")) for i in foreign)


# Floors from the ground up: a module imports only from its own floor and from those below.
FLOORS = [
    ["system", "home", "errors", "files", "seeds", "internals"],  # the operating system, other libraries' private names
    [
        "devices",
        "doctor",
        "schema",
        "tokenizer",
        "data",
        "counts",
        "model",
        "optimizer",
        "budget",
        "scheduler",
        "generate",
        "evaluate",
        "certify",
    ],  # the science
    ["checkpoint"],
    ["module", "trainer"],
    ["run"],
    ["terminal", "meaning"],
    ["logger", "callbacks", "finish"],
    ["speed"],
    ["preflight"],
    ["sweep"],
    ["study"],
    ["board"],
    ["play"],
    ["cli", "__main__"],
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


@pytest.mark.parametrize("file", sorted((ROOT / "charlm").rglob("*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_no_import_points_upwards(file):
    room = file.relative_to(ROOT / "charlm").parts[0].removesuffix(".py")
    if room == "__init__":  # the public API, imported lazily
        return
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("charlm"):
            continue
        names = [f"charlm.{a.name}" for a in node.names] if node.module == "charlm" else [str(node.module)]
        for name in names:
            if name != "charlm.__version__":
                assert FLOOR[name.split(".")[1]] <= FLOOR[room], f"{room} imports {name}"


def test_hydra_is_known_to_few():
    knowing = {
        f.relative_to(ROOT).as_posix()
        for f in ROOT.glob("charlm/**/*.py")
        if re.search(r"^\s*(from|import) (hydra|omegaconf)", f.read_text(), re.M)
    }
    rooms = ("preflight/", "sweep/", "internals/", "run/resume.py", "run/trust.py", "run/overrides.py")
    assert not [file for file in knowing if not file.removeprefix("charlm/").startswith(rooms)]


def test_every_class_says_what_it_is():
    for module in pkgutil.walk_packages([str(ROOT / "charlm")], "charlm."):
        if module.name == "charlm.__main__":  # which does something when it is imported
            continue
        loaded = pkgutil.resolve_name(module.name)
        for name, thing in vars(loaded).items():
            ours = getattr(thing, "__module__", "") == module.name and not name.startswith("_")
            if ours and inspect.isclass(thing):
                assert thing.__doc__, f"{module.name}.{name} has no docstring"


def test_the_command_answers_without_loading_torch():
    code = "import sys, charlm.cli; sys.exit(bool({'torch', 'lightning', 'hydra'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_report_does_not_load_lightning_nor_the_rest_the_plots():
    code = (
        "import sys, charlm.study.text, charlm.terminal; sys.exit(bool({'lightning', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.slow
def test_one_can_do_without_the_fast_path(tmp_path):
    """Nothing of charlm/speed is imported with speed=off: without the folder, a run has the same losses."""
    shutil.copytree(ROOT / "charlm", tmp_path / "charlm", ignore=shutil.ignore_patterns("speed", "__pycache__"))
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    shutil.copy(ROOT / "train.py", tmp_path)
    losses = []
    for tree, speed in ((ROOT, "auto"), (tmp_path, "off")):
        run = tmp_path / f"run-{speed}"
        command = [sys.executable, str(tree / "train.py"), f"speed={speed}", f"hydra.run.dir={run}", "data=pydoc"]
        env = os.environ | {"PYTHONPATH": str(tree)}
        env.pop("COVERAGE_PROCESS_START", None)  # which would count the copy as well
        subprocess.run([*command, "trainer.max_steps=120", "trainer=cpu"], env=env, check=True, capture_output=True)
        losses.append((run / "losses.f32").read_bytes())
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4 * 120


def test_generation_does_not_load_lightning():
    code = "import sys, charlm.generate, charlm.checkpoint; sys.exit('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_process_of_a_sweep_does_without_torch():
    code = (
        "import sys, charlm.sweep.command, charlm.sweep.search, hydra_plugins.charlm_launcher; "
        "sys.exit(bool({'torch', 'lightning', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    "group", ["model", "data", "optimizer", "scheduler", "trainer", "speed", "callbacks", "logger"]
)
def test_help_explains_every_setting_of_every_choice_in_one_line(group, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    for file in sorted((CONF / group).glob("*.yaml")):
        if file.stem == "base":
            continue
        with pytest.raises(SystemExit) as ended:
            check_command(["train.py", f"{group}={file.stem}", "--help"], CONF)
        assert ended.value.code == 0
        told = capsys.readouterr().out
        lines = [line for line in told.splitlines() if re.match(r"  [\w.]+=", line)]
        assert len(lines) > 20
        for line in lines:
            _, meaning = line.strip().split("  ", 1)
            assert len(meaning.strip()) > 3, line
        most_used = re.findall(r"^  ([\w.]+)=", told.partition("Most used")[2], re.M)[:10]
        assert {"model", "data.block_size", "data.batch_size", "optimizer.lr", "seed"} <= {*most_used}
        assert "base" not in re.findall(r"\w+", told.partition("data=")[2].splitlines()[0])
