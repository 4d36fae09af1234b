"""Laws of the tied gradient: the same bits as torch's own sums, one matrix of the embedding's size, nothing left."""

import contextlib

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

from luthier.methods import build
from luthier.models.topology import Topology
from luthier.objectives import Sft
from luthier.objectives.logprobs import token_logprobs
from luthier.train import Loop, TrainSettings
from luthier.train.probing import probe_of
from luthier.train.tied_gradient import one_tied_gradient

VOCABULARY, WIDTH = 48, 32


class Rows:
    """Rows of few different tokens, so that most come more than once."""

    def __init__(self, count=24):
        generator = np.random.default_rng(0)
        self.rows = [generator.integers(0, 20, int(generator.integers(4, 20))).tolist() for _ in range(count)]
        self.lengths = np.array([len(row) for row in self.rows])

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": [-100, *self.rows[index][1:]]}


def llama(tied=True, pad=None):
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        tie_word_embeddings=tied,
        pad_token_id=pad,
    )
    return AutoModelForCausalLM.from_config(config)


def fitted(model, tuning, **train):
    """The weights after some steps of several micro-batches each."""
    torch.manual_seed(2)
    settings = {"effective_batch_size": 8, "max_tokens_per_device": 48, "num_train_epochs": 2, "learning_rate": 1e-2}
    settings, rows = TrainSettings(**settings | train), Rows()
    tuned = build("tune", tuning).attach(model, probe_of(Topology.of(model), Sft(), settings, rows))
    Loop(tuned, Sft(), settings, rows, device="cpu").run()
    return {name: value.clone() for name, value in model.state_dict().items()}


def tokens_and_loss(model):
    ids = torch.tensor([[3, 5, 3, 7, 5, 3, 0]])
    return model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize(
    ("tuning", "train"),
    [
        ({"method": "full"}, {}),
        ({"method": "full"}, {"optim": "sgd"}),
        ({"method": "full"}, {"gradient_checkpointing": True}),
        ({"method": "lisa", "active_layers": 1, "interval": 2}, {}),
        ({"method": "hft"}, {}),
        ({"method": "greentrainer", "rho": 1.0}, {}),
    ],
    ids=["full", "sgd", "checkpointing", "lisa", "hft", "greentrainer"],
)
@pytest.mark.parametrize("pad", [None, 3], ids=["", "padding"])
@pytest.mark.parametrize("pieces", [True, False], ids=["pieces", "late"])
def test_the_weights_are_those_that_torchs_own_sums_give(tuning, train, pad, pieces, monkeypatch):
    if pieces:
        monkeypatch.setattr("luthier.objectives.logprobs.CHUNK_BYTES", 4 * VOCABULARY * 16)  # of the head
    else:
        train = train | {"max_tokens_per_device": 24}  # fewer labels than the width
    ours = fitted(llama(pad=pad), tuning, **train)
    monkeypatch.setattr("luthier.train.loop.one_tied_gradient", lambda model: contextlib.nullcontext())
    torchs = fitted(llama(pad=pad), tuning, **train)
    start = llama(pad=pad).state_dict()
    assert not torch.equal(start["model.embed_tokens.weight"], ours["model.embed_tokens.weight"])
    for name, value in torchs.items():
        assert torch.equal(value, ours[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_pass_adds_the_whole_gradient_once_and_hooks_see_it(dtype):
    model, twin = llama().to(dtype), llama().to(dtype)
    weight, seen = model.get_input_embeddings().weight, []
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    with one_tied_gradient(model):
        for _ in range(3):
            tokens_and_loss(model).backward()
    wanted = []
    for _ in range(3):
        tokens_and_loss(twin).backward()
        wanted.append(twin.get_input_embeddings().weight.grad.clone())
    assert len(seen) == 3
    for ours, torchs in zip(seen, wanted, strict=True):
        assert torch.equal(ours, torchs)


def test_a_pass_that_goes_round_the_head_is_whole_too():
    model, twin = llama(), llama()
    ids = torch.tensor([[3, 5, 3]])
    with one_tied_gradient(model):
        for _ in range(2):
            model.model(input_ids=ids).last_hidden_state.sum().backward()
    for _ in range(2):
        twin.model(input_ids=ids).last_hidden_state.sum().backward()
    assert torch.equal(model.get_input_embeddings().weight.grad, twin.get_input_embeddings().weight.grad)


def test_a_pass_that_ends_before_the_lookup_is_whole_too():
    model, twin = llama(), llama()

    def loss(one):
        seen = one.model(input_ids=torch.tensor([[3, 5, 3]])).last_hidden_state.detach().requires_grad_()
        return one.lm_head(seen[0]).square().sum()

    with one_tied_gradient(model):
        for _ in range(2):
            loss(model).backward()
    for _ in range(2):
        loss(twin).backward()
    assert torch.equal(model.get_input_embeddings().weight.grad, twin.get_input_embeddings().weight.grad)


class Made(TorchDispatchMode):
    """Counts the operations that make a tensor of the embedding's size."""

    def __init__(self):
        super().__init__()
        self.count = 0
        self.blocks_after = 0  # operations of attention since the first of them

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        storages = {a.untyped_storage()._cdata for a in args if isinstance(a, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.numel() == VOCABULARY * WIDTH:
            self.count += out.untyped_storage()._cdata not in storages
        self.blocks_after += bool(self.count) and "attention" in str(function)
        return out


def test_backward_makes_one_matrix_of_the_embeddings_size():
    counts = []
    for context in (contextlib.nullcontext, one_tied_gradient):
        model = llama()
        with context(model):
            loss = tokens_and_loss(model)
            with Made() as made:
                loss.backward()
        counts.append(made.count)
    assert counts == [3, 1]


def test_a_head_of_few_labels_gets_its_gradient_behind_all_blocks():
    after = []
    for context in (contextlib.nullcontext, one_tied_gradient):
        model = llama()
        ids = torch.tensor([[3, 5, 3, 7, 5, 3, 0]])
        with context(model):
            loss = -token_logprobs(model, {"input_ids": ids, "labels": ids}).logprobs.sum()
            with Made() as made:
                loss.backward()
        after.append(made.blocks_after)
    assert after == [3, 0]


def test_other_embeddings_are_left_alone_and_nothing_stays_behind():
    frozen, scaled = llama(), llama()
    frozen.get_input_embeddings().weight.requires_grad_(False)
    scaled.get_input_embeddings().__class__ = type("Scaled", (torch.nn.Embedding,), {})
    for model in (llama(tied=False), frozen, scaled, torch.nn.Linear(2, 2)):
        with one_tied_gradient(model):
            assert not any("forward" in module.__dict__ for module in model.modules())
    model = llama()
    with one_tied_gradient(model):
        assert "forward" in model.get_input_embeddings().__dict__
    assert "forward" not in model.get_input_embeddings().__dict__
    assert not model.get_input_embeddings().weight._backward_hooks
