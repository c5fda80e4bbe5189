"""The device of a run, as far as a machine without a GPU can show it: CUDA is pretended, or tensors are fake."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from omegaconf import OmegaConf
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from charlm import Bigram, CharDataModule, LanguageModel
from charlm.callbacks import AtSteps
from charlm.cli import check_device
from charlm.counts import no_determinism
from charlm.devices import accelerator_of, cuda_problem, triton_problem
from charlm.errors import InputError
from charlm.evaluate import token_losses
from charlm.generate import sample
from charlm.model.gru import GRU
from charlm.model.lstm import LSTM
from charlm.preflight.configs import resolved
from charlm.preflight.settings import check_cuda_graph, check_hardware, check_settings
from charlm.speed import grouped_steps
from charlm.speed.grouped_steps import GroupedSteps, GroupSize
from charlm.sweep.checks import check_runs
from charlm.sweep.job import visible_gpus
from charlm.sweep.plan import check_launcher
from charlm.terminal import describe_device
from charlm.trainer import STEPS, choose, faster_threads
from tests.test_model import SMALL, build, small

ROOT = Path(__file__).parent.parent
MODELS = sorted(f.stem for f in (ROOT / "charlm" / "model").glob("*.py") if f.stem != "__init__")


@pytest.fixture
def listed(monkeypatch):
    """A machine whose driver lists a GPU that no tensor can be put on, as with a driver that is too old."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cuda_problem.cache_clear()
    yield
    cuda_problem.cache_clear()


def settings(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return resolved(compose("train", ["data=pydoc", *overrides]))


def test_a_listed_gpu_that_does_not_work_is_refused_in_one_line(listed):
    with pytest.raises(InputError, match=r"^trainer.accelerator=gpu is not possible: .*; use trainer.accelerator=cpu"):
        check_settings(settings("trainer.accelerator=gpu"))


def test_auto_takes_the_cpu_if_the_gpu_does_not_work(listed):
    check_settings(settings())
    assert accelerator_of("auto") == "cpu"
    checked = check_runs([settings()], elsewhere=False)
    assert checked.gpus == 0
    assert any("the GPU is not used" in line for line in checked.cautions)


PRETEND = """
import runpy, sys, torch
torch.cuda.device_count, torch.cuda.is_available = lambda: 1, lambda: True
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(("accelerator", "code"), [("auto", 0), pytest.param("gpu", 2, marks=pytest.mark.slow)])
def test_a_command_survives_a_driver_that_is_too_old(tmp_path, text_file, accelerator, code):
    command = [sys.executable, "-c", PRETEND, str(ROOT / "train.py"), "data=text", f"data.path={text_file}"]
    command += ["trainer.max_steps=5", "hydra.run.dir=run", f"trainer.accelerator={accelerator}", "logger=none"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == code, ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    if code:
        assert "trainer.accelerator=gpu is not possible" in ended.stderr
    else:
        assert "the GPU is not used, and this run trains on the CPU" in ended.stderr
        assert json.loads((tmp_path / "run" / "results.json").read_text())["device"] == "cpu"


@pytest.mark.parametrize(
    ("slots", "visible", "expected"),
    [
        ([0, 1], None, "0,1"),
        ([0, 1], "2,3", "2,3"),
        ([1], "GPU-8932f937, GPU-12345678", "GPU-12345678"),
        ([0], "MIG-GPU-8932f937/1/0,MIG-GPU-8932f937/2/0", "MIG-GPU-8932f937/1/0"),
        ([2, 0], "5,6,7", "7,5"),
    ],
)
def test_jobs_get_gpus_among_those_of_the_sweep(slots, visible, expected):
    assert visible_gpus(slots, visible) == expected


def test_auto_is_no_apple_gpu_and_an_apple_gpu_is_not_deterministic(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    cuda_problem.cache_clear()
    assert (accelerator_of("auto"), accelerator_of("gpu"), accelerator_of("mps")) == ("cpu", "mps", "mps")
    trainer = settings("trainer.accelerator=mps")["trainer"]
    with pytest.raises(InputError, match=r"add trainer.deterministic=false"):
        check_hardware(trainer)
    check_hardware(trainer | {"deterministic": False})


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_validation_and_final_figures_have_one_precision(text_file, precision):
    data = CharDataModule(path=str(text_file), block_size=8, batch_size=4)
    torch.manual_seed(1)
    module = LanguageModel(build("gpt", block_size=8, n_layer=1, n_embd=16, n_head=2, vocab_size=data.vocab_size))
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_steps=20, accelerator="cpu", precision=precision, enable_model_summary=False, **quiet)
    trainer.fit(module, data)
    [validated] = trainer.validate(module, data, verbose=False)
    assert validated["val/loss"] == pytest.approx(module.evaluate(data, "val").loss, rel=1e-6)


def trainer_on(device: str, num_devices: int = 1) -> Any:
    strategy = SingleDeviceStrategy(torch.device(device)) if num_devices == 1 else DDPStrategy()
    return SimpleNamespace(strategy=strategy, num_devices=num_devices, num_nodes=1)


class Looks(L.Callback):
    def on_before_backward(self, *_: Any) -> None:
        pass


class Patient(AtSteps):
    def on_train_batch_end(self, *_: Any) -> None:
        pass


def test_a_cuda_graph_needs_one_gpu_and_callbacks_that_need_no_step():
    plain = settings("speed.cuda_graph=true", "+callbacks.patient._target_=tests.test_devices.Patient")
    check_cuda_graph(plain, trainer_on("cuda:0"))
    for trainer in (trainer_on("cpu"), trainer_on("cuda:0", num_devices=2)):
        with pytest.raises(InputError, match="is for one NVIDIA GPU"):
            check_cuda_graph(plain, trainer)
    plain["callbacks"]["looks"] = {"_target_": "tests.test_devices.Looks"}
    with pytest.raises(InputError, match=r"without on_before_backward of callbacks\.looks"):
        check_cuda_graph(plain, trainer_on("cuda:0"))


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_recurrent_layers_have_no_dropout_inside(name):
    kind = {"lstm": LSTM, "gru": GRU}[name]
    model: Any = kind(7, n_layer=3, n_embd=8, dropout=0.5)
    assert len(model.layers) == 3
    assert all((layer.num_layers, layer.dropout) == (1, 0.0) for layer in model.layers)
    idx = torch.arange(14).view(2, 7) % 7
    assert not torch.equal(model(idx), model(idx))
    assert torch.equal(model.eval()(idx), model(idx))


def test_a_group_is_as_long_as_its_time_allows(monkeypatch):
    monkeypatch.setattr(grouped_steps, "measured_on", lambda device: True)
    clock = iter([0.0, 5.0, 5.19])  # the first group is a warm-up
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    group = GroupSize(10, torch.device("cpu"))
    for _ in range(4):
        with group.measured(10):
            pass
    assert group.most == 5  # 0.019 s a step, 0.1 s a group
    assert GroupSize(10, None).unmeasured == 0


def test_measured_groups_leave_the_weights_bitwise_the_same(monkeypatch, fit_module):
    plain = fit_module([])
    monkeypatch.setattr(grouped_steps, "measured_on", lambda device: True)
    assert "by their measured time" in GroupedSteps().describe(trainer_with_device(), fit_module.module, 32)
    grouped = fit_module([GroupedSteps()])
    assert all(torch.equal(a, b) for a, b in zip(plain, grouped, strict=True))


def test_the_faster_number_of_threads_is_chosen():
    assert faster_threads(2, {1: 0.08, 2: 0.05}.__getitem__) == (2, "1.6 times as fast as 1")
    assert faster_threads(16, {1: 0.05, 16: 0.65}.__getitem__) == (1, "13.0 times as fast as 16")
    assert faster_threads(2, {1: 0.05, 2: 0.05}.__getitem__)[0] == 1


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Normed(torch.nn.Module):
    """A model of 256 symbols whose training draws random numbers and changes a buffer."""

    block_size = 64

    def __init__(self, width: int = 1_600):
        super().__init__()
        self.embed, self.norm = torch.nn.Embedding(256, width), torch.nn.BatchNorm1d(width)
        self.head, self.threads = torch.nn.Linear(width, 256), list[int]()

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        self.threads.append(torch.get_num_threads())
        logits: torch.Tensor = self.head(F.dropout(self.norm(self.embed(idx).mT).mT))
        return logits


@pytest.mark.parametrize("seconds_alone", [1e-3, 10.0])
def test_large_models_are_timed_and_left_as_they_were(two_threads, monkeypatch, text_file, seconds_alone):
    data = CharDataModule(path=str(text_file), block_size=64, batch_size=32)
    data.setup()
    model = Normed()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    clock = {"now": 0.0}

    def now() -> float:  # a step of two threads takes a tenth of a second
        clock["now"] += seconds_alone if torch.get_num_threads() == 1 else 0.1
        return clock["now"]

    monkeypatch.setattr("time.perf_counter", now)
    random = torch.get_rng_state()
    cfg = OmegaConf.create(settings("trainer=cpu"))
    why = choose(cfg, model, data)
    assert (cfg.threads, torch.get_num_threads()) == ((1, 1) if seconds_alone < 0.1 else (2, 2))
    assert why == ("100.0 times as fast as 2" if seconds_alone < 0.1 else "100.0 times as fast as 1")
    shown = "cpu (1 thread, 100.0 times as fast as 2)" if seconds_alone < 0.1 else "cpu (2 threads, 100.0 times as "
    assert describe_device(torch.device("cpu"), why).startswith(shown)
    assert model.threads == [1] * (STEPS if seconds_alone < 0.1 else 1) + [2] * 3  # a quarter of a second is enough
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("overrides", "width", "threads"),
    [
        (["trainer=cpu"], 16, 1),  # small
        (["trainer=cpu", "threads=2"], 16, 2),
        (["trainer=ddp", "trainer.accelerator=cpu"], 1_600, 2),  # the processes would choose apart
    ],
)
def test_other_runs_are_not_timed(two_threads, text_file, overrides, width, threads):
    data = CharDataModule(path=str(text_file), block_size=64, batch_size=32)
    data.setup()
    model, cfg = Normed(width), OmegaConf.create(settings(*overrides))
    assert choose(cfg, model, data) == ""
    assert (cfg.threads, model.threads) == (threads, [])


def trainer_with_device() -> Any:
    return L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)


@pytest.fixture
def fit_module(text_file):
    """Train a bigram for 60 steps; returns its weights."""

    class Fit:
        module: Any = None

        def __call__(self, callbacks: list[L.Callback]) -> list[torch.Tensor]:
            torch.manual_seed(1)
            data = CharDataModule(path=str(text_file), block_size=8, batch_size=4)
            self.module = LanguageModel(Bigram(data.vocab_size))
            quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
            trainer = L.Trainer(
                max_steps=60, accelerator="cpu", callbacks=callbacks, enable_model_summary=False, **quiet
            )
            trainer.fit(self.module, data)
            return [p.detach().clone() for p in self.module.parameters()]

    return Fit()


@pytest.mark.parametrize("missing", ["compiler", "header"])
def test_compiling_for_a_gpu_needs_a_compiler_and_headers(monkeypatch, tmp_path, missing):
    monkeypatch.setattr("shutil.which", lambda name: None if missing == "compiler" else "/usr/bin/cc")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    if missing == "compiler":
        (tmp_path / "Python.h").touch()
    problem = triton_problem()
    assert problem is not None
    assert ("C compiler" if missing == "compiler" else "headers of Python") in problem
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/cc")
    (tmp_path / "Python.h").touch()
    assert triton_problem() is None


class Operations(TorchDispatchMode):
    """Records the device of each operation's first tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        device = next((a.device.type for a in args if isinstance(a, torch.Tensor)), "")
        self.seen.append((func.__name__.partition(".")[0], device))
        return func(*args, **(kwargs or {}))


def test_top_p_sums_on_the_cpu_since_sums_on_a_gpu_are_not_deterministic():
    with FakeTensorMode(), Operations() as operations:
        found = sample(torch.randn(2, 65, device="cuda"), top_p=0.9)
    assert found.device.type == "cuda"
    assert ("cumsum", "cpu") in operations.seen
    assert ("cumsum", "cuda") not in operations.seen


@pytest.mark.parametrize(
    "name", [name for name in MODELS if name not in ("mixture", "ngram")]
)  # they count real numbers
def test_a_model_keeps_no_tensor_on_the_cpu(name):
    """On the meta device, which like a GPU refuses tensors of the CPU; a CPU build has no autograd for fake CUDA."""
    with torch.device("meta"):
        model = build(name, **SMALL).train()
    idx = torch.zeros(2, 8, dtype=torch.long, device="meta")
    loss = token_losses(model, idx, idx).sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.device.type == "meta" for p in model.parameters())
    if hasattr(model, "decode"):
        _, state = model.eval().decode(idx[:, :5], None)
        logits, _ = model.decode(idx[:, :1], state)
        assert sample(logits, top_k=3).device.type == "meta"


@pytest.mark.parametrize("name", ["gpt", "transformerpp"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_gives_the_same_gradients(name, dropout):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        model = small(name, dropout=dropout, checkpointing=checkpointing).train()
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
        idx = torch.randint(7, (2, 8))
        F.cross_entropy(model(idx).flatten(0, 1), idx.flatten()).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


IMPORTS = """
import ast, pathlib, sys, torch
def refuse(*arguments, **settings):
    raise AssertionError("touches CUDA")
for name in ("device_count", "is_available", "init", "current_device", "get_device_name", "mem_get_info"):
    setattr(torch.cuda, name, refuse)
tree = ast.parse(pathlib.Path(sys.argv[1]).read_text())
names = [c.value for node in tree.body if isinstance(node, ast.Assign | ast.AugAssign) and "NAMES" in ast.dump(node)
         for c in ast.walk(node.value) if isinstance(c, ast.Constant)]
assert len(names) > 10, names
for name in names:
    __import__(name)
__import__("charlm.run.record", fromlist=["environment"]).environment()
"""


@pytest.mark.slow
def test_the_fork_server_touches_no_gpu():
    """A process that has touched CUDA cannot be forked."""
    preload = str(ROOT / "charlm" / "sweep" / "preload.py")
    ended = subprocess.run(
        [sys.executable, "-c", IMPORTS, preload], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr


def test_the_gpu_benchmark_says_what_it_would_measure(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    cuda_problem.cache_clear()
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "benchmarks" / "gpu.py"), run_name="__main__")
    assert ended.value.code == 1
    first, *rest = capsys.readouterr().out.splitlines()
    assert "GPU" in first
    assert len(rest) == 14


def test_small_models_share_a_gpu_in_a_sweep():
    small_runs = check_runs([settings(), settings("model=gpt")], elsewhere=False, texts=False)
    large = settings("experiment=nanogpt_gpu", "trainer=cpu", "compile=false")
    assert small_runs.small
    assert not check_runs([settings(), large], elsewhere=False, texts=False).small
    for jobs_per_gpu, small_models, slots in (("auto", True, 3), ("auto", False, 1), (2, True, 2)):
        launcher: Any = resolve_name("hydra_plugins.charlm_launcher.LocalLauncher")(
            n_jobs="auto", jobs_per_gpu=jobs_per_gpu, timeout=None
        )
        launcher.small = small_models
        assert len(launcher.pool(gpus=2).gpus) == 2 * slots


@pytest.mark.parametrize("devices", ["auto", "-1", "[0,1]"])
def test_an_engine_gets_a_number_of_gpus(devices):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        overrides = ["hydra/launcher=ray", "trainer=gpu", f"trainer.devices={devices}"]
        cfg = compose("train", overrides, return_hydra_config=True)
    with pytest.raises(InputError, match="give a number, as in 2"):
        check_launcher(cfg)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_evaluating_on_a_gpu_is_as_deterministic_as_training(monkeypatch, device):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr("charlm.devices.accelerator_of", lambda accelerator: device)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device: zeros(*size))  # as if there was the GPU
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        assert check_device(None, None, "auto") == device  # type: ignore[arg-type]
        assert torch.are_deterministic_algorithms_enabled() == (device == "cuda")
        assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if device == "cuda" else None)
    finally:
        torch.use_deterministic_algorithms(before)


def test_looking_up_counts_sorts_no_indices():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with no_determinism():
            assert not torch.are_deterministic_algorithms_enabled()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(before)


def test_the_doctor_names_what_works_and_how_to_get_what_does_not(call, tmp_path):
    found = {one["name"]: one for one in json.loads(call("doctor", "--json").out)}
    assert {"charlm", "Python", "CPU", "outputs", "cache", "GPU", "bf16", "compile", "Slurm", "Ray"} <= found.keys()
    assert found["CPU"]["ready"] is True
    assert "free" in found["outputs"]["text"]
    for one in found.values():
        if one["ready"] is False:
            assert re.search("needs|install|choose|little", one["text"])
    shown = call("doctor").out
    assert "hydra/launcher=slurm" in shown
    assert f"torch {torch.__version__.partition('+')[0]}" in shown


def test_the_doctor_sees_a_full_and_a_forbidden_disk(tmp_path, monkeypatch):
    from charlm import doctor

    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**20))
    assert "which is little" in doctor.disk("outputs", tmp_path / "a" / "b").text
    monkeypatch.undo()
    monkeypatch.setattr("os.access", lambda *_: False)
    assert "cannot be written" in doctor.disk("outputs", tmp_path / "a").text
