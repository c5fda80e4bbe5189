"""The contract of charlm.model, held against every file in it, and each model against a reference of its own."""

import inspect
import math
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F

from charlm import checkpoint
from charlm.generate import generate
from charlm.model import takes_no_steps
from charlm.model.bigram import LARGEST_TABLE, Bigram
from charlm.model.gpt import GPT
from charlm.model.gru import GRU
from charlm.model.lstm import LSTM
from charlm.model.mlp import MLP
from charlm.model.transformerpp import TransformerPP, norm, rotate

ROOT = Path(__file__).parent.parent
MODELS = sorted(f.stem for f in (ROOT / "charlm" / "model").glob("*.py") if f.stem != "__init__")
VOCAB, BLOCK = 11, 8
SMALL = {"block_size": BLOCK, "n_layer": 2, "n_head": 2, "n_embd": 16, "n_hidden": 32, "order": 2}


@cache
def recipe(name: str) -> dict[str, Any]:
    """Build the model of `python train.py model=name`."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        node: Any = OmegaConf.to_container(compose("train", [f"model={name}"]), resolve=False)
    return (
        {**node["model"], "block_size": node["data"]["block_size"]} if "block_size" in node["model"] else node["model"]
    )


def build(case: str, vocab_size: int = VOCAB, **chosen: Any) -> Any:
    """A model from `name` or `name setting=value`, at the sizes of its YAML or those given."""
    name, *choices = case.split()
    node = recipe(name)
    own = {key: value for key, value in chosen.items() if key in node}
    own |= {key: {"True": True, "False": False}.get(value, value) for key, value in (c.split("=") for c in choices)}
    torch.manual_seed(0)
    return checkpoint.build(node | own, vocab_size)


def small(case: str, **chosen: Any) -> Any:
    """In evaluation mode, with weights moved off their start, where some are zero and hide what others do."""
    model = build(case, **SMALL | chosen)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    if takes_no_steps(model):
        model.count(ids(400, seed=2))
    return model.eval()


def variants(name: str) -> list[str]:
    """A model as its YAML has it, and once for each other value of a setting that is one of a few."""
    node, found = recipe(name), [name]
    for setting, hint in get_type_hints(type(build(name)).__init__, include_extras=True).items():
        values = (True, False) if hint is bool else get_args(hint) if get_origin(hint) is Literal else ()
        found += [f"{name} {setting}={value}" for value in values if value != node[setting]]
    return found


CASES = [case for name in MODELS for case in variants(name)]
DECODING = [case for case in CASES if hasattr(build(case, **SMALL), "decode")]
SIZED = [case for case in CASES if build(case, **SMALL).block_size is not None]
# More than block_size characters, the number of positions; a bigram has none.
REFUSING = [case for case in SIZED if case in DECODING and case != "bigram"]
ENDLESS = [case for case in CASES if case not in SIZED]
SHORT = [case for case in CASES if hasattr(build(case, **SMALL), "loss")]
LEARNING = [case for case in CASES if not takes_no_steps(build(case))]
every_model = pytest.mark.parametrize("case", CASES)
every_learning_model = pytest.mark.parametrize("case", LEARNING)
every_decoding_model = pytest.mark.parametrize("case", DECODING)


def ids(*shape: int, seed: int = 0, vocab_size: int = VOCAB) -> Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def test_the_contract_is_tested_for_what_it_is_about():
    assert {"bigram", "mlp", "lstm", "gru", "gpt", "transformerpp"} <= set(MODELS)
    assert {"gpt bias=True", "transformerpp mlp=swiglu"} <= set(CASES)
    assert {"lstm", "gru", "gpt", "transformerpp"} <= set(DECODING)
    assert {"lstm", "gru"} <= set(ENDLESS)


# The contract


@every_model
def test_ids_become_logits_for_any_length_up_to_block_size(case):
    model = small(case)
    for T in range(1, (model.block_size or BLOCK) + 1):
        assert model(ids(2, T)).shape == (2, T, VOCAB)


@every_model
def test_future_characters_never_change_past_logits(case):
    model = small(case)
    idx, other = ids(4, BLOCK), ids(4, BLOCK)
    other[:, 5:] = (other[:, 5:] + 1) % VOCAB
    with torch.no_grad():
        before, after = model(idx), model(other)
    assert torch.equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(-1).all()


@pytest.mark.parametrize("case", SIZED)
def test_a_character_is_seen_for_block_size_positions_and_no_longer(case):
    model = small(case)
    n = model.block_size
    idx = ids(1, 3 * n)
    try:
        model(idx)
    except ValueError:  # no input longer than block_size
        idx = idx[:, :n]
    other = idx.clone()
    other[:, 0] = (other[:, 0] + 1) % VOCAB
    changed = (model(other) != model(idx)).any(-1)[0]
    assert changed[:n].all()
    assert not changed[n:].any()


@pytest.mark.parametrize("case", ENDLESS)
def test_without_a_block_size_the_first_character_is_never_forgotten(case):
    model = small(case).double()
    idx = ids(1, 40)
    other = idx.clone()
    other[:, 0] = (other[:, 0] + 1) % VOCAB
    assert (model(other) != model(idx)).any(-1).all()


def first_loss(case: str) -> float:
    """The loss of an untrained model on random text, minus that of the uniform distribution."""
    model, idx = build(case, 65), ids(512, 9, vocab_size=65)
    return F.cross_entropy(model(idx[:, :-1]).flatten(0, 1), idx[:, 1:].flatten()).item() - math.log(65)


@every_model
def test_an_untrained_model_knows_nothing_and_is_not_absurdly_sure(case):
    """Also with PyTorch's own initialisation: tables of logits from N(0, 1) cost 0.5 nats each."""
    assert -0.05 < first_loss(case) < math.log(65)


@pytest.mark.parametrize("case", ["mlp", "lstm", "gru", "gpt", "transformerpp"])
def test_a_scaled_initialisation_begins_at_the_uniform_loss(case):
    assert first_loss(case) == pytest.approx(0, abs=0.1)


@every_learning_model
def test_one_batch_can_be_learned_by_heart(case):
    """With one of two learning rates: tables need a larger one than networks."""
    text = torch.stack([(torch.arange(BLOCK + 1) + start) % VOCAB for start in range(VOCAB)])  # (V, T + 1)

    def loss_after_training(lr: float) -> float:
        model = build(case, **SMALL)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
        for _ in range(150):
            loss = F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    assert any(loss_after_training(lr) < 0.05 for lr in (0.01, 0.1))


@every_learning_model
def test_gradients_reach_every_parameter(case):
    model = small(case)
    if hasattr(model, "count"):
        model.count(ids(100))
    F.cross_entropy(model(ids(16, BLOCK)).flatten(0, 1), ids(16, BLOCK, seed=1).flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@every_model
def test_weights_survive_a_file(case, tmp_path):
    model, other = small(case), build(case, **SMALL)
    torch.save(model.state_dict(), tmp_path / "weights")
    other.load_state_dict(torch.load(tmp_path / "weights", weights_only=True))
    assert torch.equal(other.eval()(ids(2, BLOCK)), model(ids(2, BLOCK)))


@every_model
def test_a_checkpoint_holds_parameters_and_nothing_else(case):
    model = small(case)
    counted = {"text"} if hasattr(model, "count") else set()
    counted |= {"rule"} if hasattr(model, "networks") else set()  # version of the counting
    assert model.state_dict().keys() == {name for name, _ in model.named_parameters()} | counted


@every_learning_model
def test_double_precision_is_the_same_function(case):
    model = small(case)
    logits = model(ids(2, BLOCK))
    precise = model.double()(ids(2, BLOCK))
    assert precise.dtype == torch.float64
    torch.testing.assert_close(logits.double(), precise, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("case", [case for case in CASES if "dropout" in recipe(case.split()[0])])
def test_dropout_is_for_training_only(case):
    model = small(case, dropout=0.5)
    assert torch.equal(model(ids(2, BLOCK)), model(ids(2, BLOCK)))
    torch.testing.assert_close(model(ids(2, BLOCK)), small(case)(ids(2, BLOCK)))
    model.train()
    assert not torch.equal(model(ids(2, BLOCK)), model(ids(2, BLOCK)))


@every_model
def test_the_same_seed_gives_the_same_weights(case):
    one, other = build(case, **SMALL).state_dict(), build(case, **SMALL).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def outcome(model: nn.Module) -> tuple[Tensor, dict[str, Any]]:
    """Logits, and the gradients of all parameters."""
    model.zero_grad()
    logits = model(ids(4, BLOCK))
    F.cross_entropy(logits.flatten(0, 1), ids(4, BLOCK, seed=1).flatten()).backward()
    return logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def compile_and_compare(case: str, backend: str, **chosen: Any) -> None:
    model = small(case, **chosen).train()
    logits, gradients = outcome(model)
    names = list(model.state_dict())
    # PyTorch leaves its recurrent layers uncompiled: around them a model is compiled in pieces.
    recurrent = any(isinstance(part, nn.RNNBase) for part in model.modules())
    torch.compiler.reset()
    model.compile(backend=backend, fullgraph=not recurrent)
    assert list(model.state_dict()) == names
    compiled_logits, compiled_gradients = outcome(model)
    torch.testing.assert_close(compiled_logits, logits)
    torch.testing.assert_close(compiled_gradients, gradients)


@every_learning_model
def test_compiled_it_is_the_same_function_under_the_same_names(case):
    compile_and_compare(case, "aot_eager", n_layer=1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own, of PyTorch
@every_learning_model
def test_compiled_to_machine_code_it_is_the_same_function(case):
    compile_and_compare(case, "inductor")


@every_decoding_model
@settings(max_examples=15)
@given(pieces=st.lists(st.integers(1, BLOCK), min_size=1, max_size=BLOCK), B=st.integers(1, 3))
def test_decoding_in_pieces_equals_forward(case, pieces, B):
    model = small(case).double()
    idx, state, seen = ids(B, BLOCK), None, 0
    with torch.no_grad():
        expected = model(idx)
        for piece in pieces:
            if seen + piece > BLOCK:
                break
            logits, state = model.decode(idx[:, seen : seen + piece], state)
            seen += piece
            torch.testing.assert_close(logits, expected[:, seen - 1])


@pytest.mark.parametrize("case", REFUSING)
def test_more_than_block_size_characters_are_refused_with_what_to_do(case):
    model = small(case)
    told = f"{BLOCK + 1} characters are more than the {BLOCK} .* the last {BLOCK}, or choose a larger block_size"
    with pytest.raises(ValueError, match=told):
        model(ids(1, BLOCK + 1))
    with pytest.raises(ValueError, match=told):
        model.decode(ids(1, BLOCK + 1), None)
    _, state = model.decode(ids(1, BLOCK), None)
    with pytest.raises(ValueError, match=told):
        model.decode(ids(1, 1), state)


@every_model
@pytest.mark.parametrize("length_of_prompt", [1, BLOCK, BLOCK + 3])
def test_text_is_the_same_with_and_without_a_cache(case, length_of_prompt):
    model = small(case).double()

    def text(use_cache: bool) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        return torch.stack([*generate(model, ids(3, length_of_prompt), 5 * BLOCK, generator, use_cache=use_cache)])

    assert torch.equal(text(use_cache=True), text(use_cache=False))


# Each against a reference


def test_the_mlp_is_a_loop_over_positions():
    model = small("mlp")
    assert isinstance(model, MLP)
    idx, n = ids(2, 2 * BLOCK), model.block_size
    expected = torch.empty(2, 2 * BLOCK, VOCAB)
    for b in range(2):
        for t in range(2 * BLOCK):
            context = [int(idx[b, s]) if s >= 0 else VOCAB for s in range(t - n + 1, t + 1)]
            x = torch.cat([model.token_embedding.weight[i] for i in context])
            expected[b, t] = model.head(torch.tanh(model.hidden.weight @ x + model.hidden.bias))
    torch.testing.assert_close(model(idx), expected)


def recurrent_layers(model: LSTM | GRU, idx: Tensor) -> Tensor:
    """Logits by the equations of the papers, one character at a time."""
    inputs = [*model.token_embedding(idx).unbind(1)]  # T of (B, C)
    for layer in model.layers:
        w_x, w_h, b_x, b_h = (
            layer.get_parameter(f"{kind}_l0") for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        h = c = torch.zeros(len(idx), w_h.shape[1])
        outputs = []
        for x in inputs:
            from_x, from_h = x @ w_x.T + b_x, h @ w_h.T + b_h
            if isinstance(model, LSTM):
                i, f, g, o = (from_x + from_h).chunk(4, dim=-1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
            else:
                (r_x, z_x, n_x), (r_h, z_h, n_h) = from_x.chunk(3, dim=-1), from_h.chunk(3, dim=-1)
                z = (z_x + z_h).sigmoid()
                n = (n_x + (r_x + r_h).sigmoid() * n_h).tanh()
                h = (1 - z) * n + z * h
            outputs.append(h)
        inputs = outputs
    return model.head(torch.stack(inputs, dim=1))


@pytest.mark.parametrize("case", ["lstm", "gru"])
def test_a_recurrent_model_is_its_equations(case):
    model = small(case)
    assert isinstance(model, LSTM | GRU)
    torch.testing.assert_close(model(ids(3, 2 * BLOCK)), recurrent_layers(model, ids(3, 2 * BLOCK)))


def test_the_forget_gate_begins_by_keeping():
    for layer in build("lstm", **SMALL).layers:
        bias = layer.bias_ih_l0 + layer.bias_hh_l0
        assert torch.equal(bias.chunk(4)[1], torch.ones(layer.hidden_size))


@pytest.mark.parametrize("case", ["gpt", "gpt bias=True"])
def test_gpt_is_pytorchs_own_pre_norm_transformer(case):
    model = small(case)
    assert isinstance(model, GPT)
    n_head, C = model.heads[0], model.token_embedding.embedding_dim
    mask = nn.Transformer.generate_square_subsequent_mask(BLOCK)
    x = model.token_embedding(ids(2, BLOCK)) + model.position_embedding.weight
    for block in model.blocks:
        ours = block.state_dict()
        layer = nn.TransformerEncoderLayer(
            C, n_head, 4 * C, 0.0, "gelu", batch_first=True, norm_first=True, bias="bias=True" in case
        )
        names = {
            "attention.qkv.": "self_attn.in_proj_",
            "attention.proj.": "self_attn.out_proj.",
            "mlp.fc.": "linear1.",
            "mlp.proj.": "linear2.",
        }
        theirs = {}
        for name, weight in ours.items():
            for mine, its in names.items():
                name = name.replace(mine, its)
            theirs[name] = weight
        layer.load_state_dict(theirs)
        x = layer(x, src_mask=mask, is_causal=True)
    expected = F.linear(model.norm(x), model.token_embedding.weight)
    torch.testing.assert_close(model(ids(2, BLOCK)), expected)


@pytest.mark.parametrize(
    ("sizes", "count"),
    [
        ({"block_size": 64, "n_layer": 4, "n_head": 4, "n_embd": 128}, 795_904),
        ({"block_size": 256, "n_layer": 6, "n_head": 6, "n_embd": 384}, 10_646_784),
    ],
)
def test_gpt_has_as_many_parameters_as_nanogpt(sizes, count):
    """Of its two recipes for Tiny Shakespeare, on a CPU and on a GPU; it leaves out positions, 0.80 M and 10.65 M."""
    model = build("gpt", 65, **sizes)
    C, n_layer = sizes["n_embd"], sizes["n_layer"]
    assert count == 65 * C + n_layer * (12 * C**2 + 2 * C) + C
    assert sum(p.numel() for p in model.parameters()) - model.position_embedding.weight.numel() == count


def test_gpt_begins_as_gpt_2_does():
    weights = build("gpt", 65, n_layer=8, n_embd=128).state_dict()
    for name, weight in weights.items():
        if weight.dim() == 2:
            std = 0.02 / math.sqrt(2 * 8) if "proj" in name else 0.02
            assert float(weight.std()) == pytest.approx(std, rel=0.05), name
        else:
            assert torch.equal(weight, torch.ones_like(weight)), name


def test_transformerpp_attends_by_distance_alone():
    """A shift of all positions leaves every product of a query and a key as it was; a shift of one does not."""
    model = small("transformerpp", block_size=64).double()
    hs = model.heads[1]
    q, k = torch.randn(2, 1, BLOCK, hs, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def products(q_start: int, k_start: int) -> Tensor:
        q_place, k_place = slice(q_start, q_start + BLOCK), slice(k_start, k_start + BLOCK)
        turned_q = rotate(q, model.cos[q_place], model.sin[q_place])
        turned_k = rotate(k, model.cos[k_place], model.sin[k_place])
        return turned_q @ turned_k.mT

    torch.testing.assert_close(products(0, 0), products(37, 37), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(products(0, 0), products(0, 1), atol=1e-2)
    torch.testing.assert_close(products(0, 0).diagonal(dim1=-2, dim2=-1), (q * k).sum(-1), atol=1e-5, rtol=1e-5)


def test_transformerpp_does_not_depend_on_where_a_text_stands():
    model = small("transformerpp", block_size=64, n_layer=1).double()
    idx = ids(2, BLOCK)
    x = model.token_embedding(idx)
    attention = model.blocks[0].attention
    at_start = attention(x, model.cos[:BLOCK], model.sin[:BLOCK])
    later = attention(x, model.cos[50 : 50 + BLOCK], model.sin[50 : 50 + BLOCK])
    torch.testing.assert_close(at_start, later, atol=1e-5, rtol=1e-5)
    unturned = attention(x, torch.ones_like(model.cos[:BLOCK]), torch.zeros_like(model.sin[:BLOCK]))
    assert not torch.allclose(at_start, unturned, atol=1e-2)


def test_transformerpp_blocks_begin_as_the_identity():
    model = build("transformerpp", **SMALL)
    idx = ids(2, BLOCK)
    x = model.token_embedding(idx)
    for block in model.blocks:
        assert torch.equal(block(x, model.cos, model.sin), x)
    assert torch.equal(model(idx), torch.zeros(2, BLOCK, VOCAB))


@pytest.mark.parametrize("n_embd", [96, 128, 384, 768])
def test_squared_relu_and_swiglu_have_equally_many_parameters(n_embd):
    relu2, swiglu = (
        sum(p.numel() for p in build(f"transformerpp mlp={mlp}", n_embd=n_embd).parameters())
        for mlp in ("relu2", "swiglu")
    )
    assert swiglu == pytest.approx(relu2, rel=0.01)


def test_rms_norm_gives_every_position_the_same_length():
    x = norm(7 * torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(x.square().mean(-1), torch.ones(3, 5))


@pytest.mark.parametrize(
    ("model", "n_embd", "n_head", "multiple"),
    [(GPT, 130, 4, 4), (TransformerPP, 130, 4, 8), (TransformerPP, 132, 4, 8)],
)
def test_widths_that_heads_cannot_share_are_refused_in_one_line(model, n_embd, n_head, multiple):
    with pytest.raises(ValueError, match=rf"^n_embd={n_embd} .*to n_head={n_head} ") as refusal:
        model(VOCAB, block_size=8, n_layer=1, n_head=n_head, n_embd=n_embd)
    assert f"choose a multiple of {multiple} as n_embd" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_every_setting_of_a_yaml_is_one_of_its_model():
    for name in MODELS:
        settings_there = inspect.signature(type(build(name))).parameters.keys() - {"vocab_size"}
        assert {key for key in recipe(name) if not key.startswith("_")} == settings_there


@pytest.mark.parametrize("case", SHORT)
def test_the_short_way_to_a_loss_is_that_of_the_logits(case):
    model, idx, targets = small(case), ids(3, BLOCK), ids(3, BLOCK, seed=1)
    found = []
    targets[0, 2] = -100  # which does not count
    for nll in (model.loss(idx, targets), F.cross_entropy(model(idx).mT, targets, reduction="none")):
        gradients = torch.autograd.grad(nll.mean(), list(model.parameters())) if case in LEARNING else ()
        found.append([nll, *gradients])
    for short, long in zip(*found, strict=True):
        torch.testing.assert_close(short, long)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("b", "t"), [(1, 1), (3, 5), (16, 8), (64, 33)])
def test_the_gradient_of_a_bigrams_loss_is_that_of_autograd_to_the_bit(b, t, dtype):
    model, idx, targets = build("bigram").to(dtype), ids(b, t), ids(b, t, seed=1)
    [table] = model.parameters()
    ours = model.loss(idx, targets)
    log_p = F.log_softmax(table, -1, dtype=torch.promote_types(dtype, torch.float32)).flatten()
    theirs = -log_p.gather(0, torch.add(targets, idx, alpha=VOCAB).flatten()).view_as(idx)
    assert torch.equal(ours, theirs)
    gradients = [torch.autograd.grad(losses.sum() / losses.numel(), table) for losses in (ours, theirs)]
    assert torch.equal(gradients[0][0], gradients[1][0])


def test_a_bigram_of_many_symbols_has_the_loss_of_its_logits():
    model = Bigram(LARGEST_TABLE + 1)
    idx, targets = ids(2, 5, vocab_size=LARGEST_TABLE + 1), ids(2, 5, seed=1, vocab_size=LARGEST_TABLE + 1)
    targets[0, 0] = -100
    expected = F.cross_entropy(model(idx).mT, targets, reduction="none")
    torch.testing.assert_close(model.loss(idx, targets), expected)
