"""Run by test_two_processes.py, alone and under torchrun: trains a tiny model and writes what each step measured."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from luthier.data.roles import CHOSEN, DESIRABLE, REJECTED, UNDESIRABLE
from luthier.methods import build
from luthier.models.topology import Topology
from luthier.objectives import objective_of
from luthier.train import Loop, TrainSettings
from luthier.tune import Probe


class Examples:
    def __init__(self, count):
        random = np.random.default_rng(0)
        rows = [random.integers(1, 60, int(random.integers(4, 20))).tolist() for _ in range(count)]
        self.rows = [{"input_ids": ids, "labels": [-100] * 2 + ids[2:]} for ids in rows]
        self.lengths = np.array([len(ids) for ids in rows])

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class Preferences(Examples):
    """Pairs: every two examples share a row, and a prompt."""

    def __init__(self, count):
        super().__init__(2 * count)
        self.row = np.arange(2 * count) // 2
        self.role = np.array([CHOSEN, REJECTED] * count)


class Judged(Examples):
    """Single answers, one in three of them good."""

    def __init__(self, count):
        super().__init__(count)
        self.row = np.arange(count)
        self.role = np.where(self.row % 3 == 0, DESIRABLE, UNDESIRABLE)


LIST = [  # orpo learns the prompts too, the others do not
    {"method": "dpo"},
    {"method": "sft", "weight": 0.3},
    {"method": "orpo", "nll_over": "all", "weight": 0.5},
]


def loop_in(directory, method):
    objective: dict | list = {"method": "sft"}
    rows: tuple[Examples, Examples] = (Examples(41), Examples(9))
    if method in ("list", "judged"):
        objective = LIST if method == "list" else {"method": "kto"}
        rows = (Preferences(40), Preferences(8)) if method == "list" else (Judged(40), Judged(8))
        method = "full"
    elif method in ("dpo", "cached", "kto", "cpo"):
        rows = (Preferences(40), Preferences(8))
        reference = {"reference": "cached"} if method == "cached" else {}
        objective = {"method": "dpo" if method == "cached" else method} | reference
        method = "lora" if method in ("dpo", "kto") else "full"
    torch.manual_seed(1)
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    if method == "experts":  # of which some see no token in a step
        experts = {"num_local_experts": 8, "num_experts_per_tok": 1, "num_key_value_heads": 4}
        config, method = MixtralConfig(**shape, **experts, num_attention_heads=4), "full"
    else:
        config = LlamaConfig(**shape, num_attention_heads=4)
    model = AutoModelForCausalLM.from_config(config)
    more = {"lisa": {"active_layers": 1, "interval": 3}, "lt_sft": {"density": 0.2, "full": {"share": 0.3}}}
    tuning = {"method": method} | more[method] if method in more else method
    tuned = build("tune", tuning).attach(model, Probe(Topology.of(model)))
    settings = TrainSettings(
        effective_batch_size=8,
        max_tokens_per_device=40,
        num_train_epochs=2,
        learning_rate=1e-3,
        save_steps=5,
        save_total_limit=9,
    )
    return Loop(tuned, objective_of(objective), settings, *rows, directory=directory, device="cpu")


def main(folder, method):
    """Train; then, from the checkpoint after step 5, once more: both ways must measure the same."""
    folder = Path(folder)
    loop = loop_in(folder / "run", method)
    steps = [(r.loss, r.grad_norm, r.validation_loss or 0.0) for r in loop.run()]
    if loop.accelerator.is_main_process:
        for path in (folder / "run" / "checkpoints").glob("step-*"):
            if path.name != "step-00000005":
                shutil.rmtree(path)
    loop.accelerator.wait_for_everyone()
    again = loop_in(folder / "run", method)
    resumed = [(r.loss, r.grad_norm, r.validation_loss or 0.0) for r in again.run()]
    if loop.accelerator.is_main_process:
        found = {"processes": loop.accelerator.num_processes, "steps": steps, "resumed": resumed}
        (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
