"""Part 1 of "Let's build GPT", replayed with charlm's own parts: every figure that it prints."""

import pytest
import torch
from torch.nn import functional as F

from charlm.data.chunks import gather_chunks
from charlm.data.datamodule import CharDataModule
from charlm.evaluate import mean_loss
from charlm.generate import generate
from charlm.model.bigram import Bigram
from charlm.optimizer.adamw import adamw
from charlm.tokenizer import CharTokenizer

ALPHABET = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
FIRST_NINE = [18, 47, 56, 57, 58, 1, 15, 47, 58]
INPUTS = [
    [24, 43, 58, 5, 57, 1, 46, 43],
    [44, 53, 56, 1, 58, 46, 39, 58],
    [52, 58, 1, 58, 46, 39, 58, 1],
    [25, 17, 27, 10, 0, 21, 1, 54],
]
TARGETS = [
    [43, 58, 5, 57, 1, 46, 43, 39],
    [53, 56, 1, 58, 46, 39, 58, 1],
    [58, 1, 58, 46, 39, 58, 1, 46],
    [17, 27, 10, 0, 21, 1, 54, 39],
]
UNTRAINED = """
SKIcLT;AcELMoTbvZv C?nq-QE33:CJqkOKH-q;:la!oiywkHjgChzbQ?u!3bLIgwevmyFJGUGp
wnYWmnxKWWev-tDqXErVKLgJ"""
TRAINED = """
oTo.JUZ!!zqe!
xBP qbs$Gy'AcOmrLwwt
p$x;Seh-onQbfM?OjKbn'NwUAW -Np3fkz$FVwAUEa-wzWC -wQo-R!v -Mj?,SPiTyZ;o-opr$mOiPJEYD-CfigkzD3p3?zvS;ADz;.y?o,ivCuC'zqHxcVT cHA
rT'Fd,SBMZyOslg!NXeF$sBe,juUzLq?w-wzP-h
ERjjxlgJzPbHxf$ q,q,KCDCU fqBOQT
SV&CW:xSVwZv'DG'NSPypDhKStKzC -$hslxIVzoivnp ,ethA:NCCGoi
tN!ljjP3fwJMwNelgUzzPGJlgihJ!d?q.d
pSPYgCuCJrIFtb
jQXg
pA.P LP,SPJi
DBcuBM:CixjJ$Jzkq,OLf3KLQLMGph$O 3DfiPHnXKuHMlyjxEiyZib3FaHV-oJa!zoc'XSP :CKGUhd?lgCOF$;;DTHZMlvvcmZAm;:iv'MMgO&Ywbc;BLCUd&vZINLIzkuTGZa
D.?"""  # noqa: E501


@pytest.fixture(scope="module")
def tokenizer(shakespeare: str) -> CharTokenizer:
    return CharTokenizer.from_text(shakespeare)


@pytest.fixture(scope="module")
def train_ids(shakespeare: str, tokenizer: CharTokenizer) -> torch.Tensor:
    data = CharDataModule("tinyshakespeare", block_size=8, batch_size=4)
    data.setup()
    return tokenizer.encode(shakespeare)[: data.cuts(data.corpus)[0]]


def get_batch(ids: torch.Tensor, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The lecture draws from PyTorch's global generator."""
    return gather_chunks(ids, torch.randint(len(ids) - 8, (batch_size,)), 8)


def test_the_alphabet_has_65_characters(shakespeare, tokenizer):
    assert len(shakespeare) == 1_115_394
    assert tokenizer.vocab_size == 65
    assert tokenizer.chars == ALPHABET


def test_hii_there_goes_both_ways(tokenizer):
    ids = tokenizer.encode("hii there")
    assert ids.tolist() == [46, 47, 47, 1, 58, 46, 43, 56, 43]
    assert tokenizer.decode(ids) == "hii there"


def test_nine_characters_are_eight_contexts_and_targets(train_ids):
    assert len(train_ids) == 1_003_854
    x, y = gather_chunks(train_ids, torch.tensor([0]), 8)
    lines = [(x[0, : t + 1].tolist(), int(y[0, t])) for t in range(8)]
    assert lines == [(FIRST_NINE[: t + 1], FIRST_NINE[t + 1]) for t in range(8)]


def test_the_first_batch_under_seed_1337(train_ids):
    torch.manual_seed(1337)
    x, y = get_batch(train_ids, 4)
    assert x.tolist() == INPUTS
    assert y.tolist() == TARGETS


def test_loss_and_text_before_and_after_a_hundred_steps(train_ids, tokenizer):
    torch.manual_seed(1337)
    x, y = get_batch(train_ids, 4)
    torch.manual_seed(1337)
    model = Bigram(tokenizer.vocab_size)
    logits = model(x)
    assert logits.flatten(0, 1).shape == (32, 65)
    assert f"{F.cross_entropy(logits.flatten(0, 1), y.flatten()):.4f}" == "4.8786"
    assert f"{mean_loss(model, x, y):.4f}" == "4.8786"
    assert sample(model, tokenizer, 100) == UNTRAINED

    optimizer = adamw(model, lr=1e-3, betas=[0.9, 0.999], eps=1e-8, weight_decay=0.01)
    for _ in range(100):
        x, y = get_batch(train_ids, 32)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert f"{loss:.4f}" == "4.6563"
    assert sample(model, tokenizer, 500) == TRAINED


def sample(model: Bigram, tokenizer: CharTokenizer, length: int) -> str:
    """The prompt is id 0, the newline, as in the lecture; so is the generator, the global one."""
    prompt = torch.zeros((1, 1), dtype=torch.long)
    return tokenizer.decode(torch.cat([prompt[0], *generate(model, prompt, length)]))
