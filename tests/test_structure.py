"""The tree is what it says: one file and one YAML make a model, and names are the same in conf/ and charlm/."""

import ast
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from torch.nn import functional as F

from charlm import checkpoint

ROOT = Path(__file__).parent.parent
CONF = ROOT / "conf"
YAMLS = sorted(CONF.rglob("*.yaml"))
MODELS = sorted(f.stem for f in (ROOT / "charlm" / "model").glob("*.py") if f.stem != "__init__")
VOCAB = 11


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


def test_every_model_file_has_its_yaml_and_every_yaml_its_file():
    assert sorted(f.stem for f in (CONF / "model").glob("*.yaml")) == MODELS
    assert "bigram" in MODELS


@pytest.fixture(params=MODELS)
def model(request) -> torch.nn.Module:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose("train", [f"model={request.param}"]).model
    torch.manual_seed(0)
    return checkpoint.build(dict(node), VOCAB)


def test_a_model_maps_ids_to_logits(model):
    assert model.block_size >= 1
    assert model(torch.zeros(2, 3, dtype=torch.long)).shape == (2, 3, VOCAB)


def test_future_characters_do_not_change_past_logits(model):
    model.eval()
    idx = torch.randint(0, VOCAB, (4, 8))
    other = idx.clone()
    other[:, 5:] = torch.randint(0, VOCAB, (4, 3))
    assert torch.equal(model(idx)[:, :5], model(other)[:, :5])


def test_characters_beyond_block_size_do_not_matter(model):
    model.eval()
    idx = torch.randint(0, VOCAB, (4, model.block_size + 3))
    assert torch.allclose(model(idx[:, -model.block_size :])[:, -1], model(idx)[:, -1]) or model.block_size > 1


def test_one_batch_can_be_learned_by_heart(model):
    idx = torch.arange(VOCAB).repeat(2)[None]
    x, y = idx[:, :-1], idx[:, 1:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    for _ in range(200):
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05


def test_models_are_plain_torch():
    for name in MODELS:
        imports = re.findall(r"^(?:from|import) (\w+)", (ROOT / "charlm" / "model" / f"{name}.py").read_text(), re.M)
        assert not {"lightning", "hydra", "omegaconf", "charlm"} & set(imports)


# The order in which text becomes figures; a module imports only from those before it.
LAYERS = [
    "errors",
    "tokenizer",
    "data",
    "model",
    "optimizer",
    "budget",
    "scheduler",
    "generate",
    "evaluate",
    "checkpoint",
    "report",
]
LAYERS += [
    "trainer",
    "cuda_graph",
    "module",
    "logger",
    "terminal",
    "callbacks",
    "config",
    "preflight",
    "sweep",
    "cli",
    "__main__",
]


@pytest.mark.parametrize("file", sorted((ROOT / "charlm").rglob("*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_point_one_way(file):
    layer = file.relative_to(ROOT / "charlm").parts[0].removesuffix(".py")
    if layer == "__init__":
        return
    for node in ast.walk(ast.parse(file.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom) and node.module == "charlm":
            names = [f"charlm.{a.name}" for a in node.names if a.name in LAYERS]
        for name in names:
            if name.startswith("charlm."):
                assert LAYERS.index(name.split(".")[1]) <= LAYERS.index(layer), f"{layer} imports {name}"


def test_hydra_is_known_to_few():
    knowing = {
        f.relative_to(ROOT).as_posix()
        for f in ROOT.glob("charlm/**/*.py")
        if re.search(r"^\s*(from|import) (hydra|omegaconf)", f.read_text(), re.M)
    }
    assert knowing <= {"charlm/preflight.py", "charlm/terminal.py"}


def test_every_class_says_what_it_is():
    for module in pkgutil.walk_packages([str(ROOT / "charlm")], "charlm."):
        if module.name == "charlm.__main__":
            continue
        loaded = pkgutil.resolve_name(module.name)
        for name, thing in vars(loaded).items():
            ours = getattr(thing, "__module__", "") == module.name and not name.startswith("_")
            if ours and inspect.isclass(thing):
                assert thing.__doc__, f"{module.name}.{name} has no docstring"


def test_the_command_answers_without_loading_torch():
    code = "import sys, charlm.cli; sys.exit(bool({'torch', 'lightning', 'hydra'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_generation_does_not_load_lightning():
    code = "import sys, charlm.generate, charlm.checkpoint; sys.exit('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
