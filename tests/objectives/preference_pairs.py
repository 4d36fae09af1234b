"""What the tests of preference objectives share: a small model, pairs, their batches, gradients."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.data.collate import pad_batch
from luthier.methods import build
from luthier.objectives.preference import answer_logprobs

ALL = ["dpo", "robust", "hinge", "ipo", "kto", "cpo", "simpo", "orpo"]
REFERENCED = ["dpo", "robust", "hinge", "ipo", "kto"]


def objective(name, **settings):
    if name == "robust":
        settings.setdefault("label_smoothing", 0.1)
    return build("objectives", {"method": name, **settings})


def model(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    return LlamaForCausalLM(config).double().eval()


def example(prompt, answer):
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def pairs(seed=0, count=4):
    """Pairs whose prompts and answers all differ in length."""
    draw = torch.Generator().manual_seed(seed)

    def ids(length):
        return torch.randint(3, 32, (length,), generator=draw).tolist()

    found = []
    for n in range(count):
        prompt = ids(2 + n)
        found.append((example(prompt, ids(3 + n % 3)), example(prompt, ids(6 - n % 4))))
    return found


def batch_of(chosen_pairs, kind, reference=None, collate=lambda rows: pad_batch(rows, 0)):
    made = {}
    laid_out = [chosen for chosen, _ in chosen_pairs] + [rejected for _, rejected in chosen_pairs]
    for prefix, rows in kind.arrange(laid_out).items():
        made |= {prefix + name: tensor for name, tensor in collate(rows).items()}
    if reference is not None:
        with torch.no_grad():
            for prefix in kind.needs().referenced:
                own = {n: made[prefix + n] for n in ("input_ids", "labels", "position_ids") if prefix + n in made}
                made[f"{prefix}reference_logprobs"] = answer_logprobs(reference, own)
    return made


def gradient(value, net):
    net.zero_grad()
    value.backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()])
