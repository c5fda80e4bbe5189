"""Parts of a user's own package: named in --config-dir, and in a recorded run only with trust=PACKAGE."""

import sys

import pytest

from charlm import load
from charlm.checkpoint.model import build
from charlm.errors import InputError

MODEL = """
from torch import nn

from charlm.model import keeps_arguments


@keeps_arguments
class Unigram(nn.Module):
    block_size = 1

    def __init__(self, vocab_size: int, scale: float = 1.0):
        super().__init__()
        self.table = nn.Embedding(1, vocab_size)
        self.scale = scale

    def forward(self, idx):
        return self.scale * self.table(idx * 0)
"""
SMALL = ["data=pydoc", "data.batch_size=4", "trainer.max_steps=20", "trainer=cpu", "evaluate=[val]", "sample_length=5"]


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A package mylab with a model, and a folder of configs that names it."""
    package, configs = tmp_path / "lab" / "mylab", tmp_path / "configs" / "model"
    package.mkdir(parents=True)
    configs.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "models.py").write_text(MODEL)
    (configs / "unigram.yaml").write_text("_target_: mylab.models.Unigram\nscale: 2.0\n")
    monkeypatch.syspath_prepend(package.parent)
    yield {"PYTHONPATH": str(package.parent)}
    for name in ("mylab.models", "mylab"):
        sys.modules.pop(name, None)


def test_a_model_of_ones_own_package_trains_and_its_run_is_used_with_trust_only(lab, train, call, tmp_path):
    begun = train("--config-dir=configs", "model=unigram", *SMALL, "hydra.run.dir=run", **lab)
    assert begun.code == 0, begun.err
    assert "generate run --trust mylab --length 500" in begun.out
    refused = train("resume=run", "trainer.max_steps=40", **lab)
    assert refused.code == 2
    assert "names 'mylab.models.Unigram' as model" in refused.err
    assert "trust=PACKAGE" in refused.err
    longer = train("resume=run", "trainer.max_steps=40", "trust=mylab", **lab)
    assert longer.code == 0, longer.err
    again = train("rerun=run", "seed=3", "trust=[mylab,other]", "hydra.run.dir=again", **lab)
    assert again.code == 0, again.err
    assert "--trust mylab" in call("generate", "run", "--length", "5").err
    assert call("generate", "run", "--length", "5", "--trust", "mylab").code == 0
    with pytest.raises(InputError, match="trust its package"):
        load(tmp_path / "run")
    assert len(load(tmp_path / "run", trust=["mylab"]).generate("a", 5)) == 6


def test_a_trusted_package_that_cannot_be_imported_is_named():
    with pytest.raises(InputError, match="name the folder that holds it in PYTHONPATH"):
        build({"_target_": "mylab.models.Unigram"}, vocab_size=5, trust=["mylab"])


def test_trust_is_never_taken_from_a_folder(lab, train, tmp_path):
    begun = train("--config-dir=configs", "model=unigram", *SMALL, "trust=mylab", "hydra.run.dir=run", **lab)
    assert begun.code == 0, begun.err
    assert train("rerun=run", "seed=3", **lab).code == 2
