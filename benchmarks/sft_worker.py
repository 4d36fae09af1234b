"""One training run for `speed.py`, in a process of its own: the same model on the same rows, by Luthier or by TRL.

    python benchmarks/sft_worker.py luthier full-all FOLDER

Writes seconds of the training call, peak resident memory, and the loss over all rows before and after, taken by the
same plain code for all.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

IGNORED = -100
ROWS_PER_STEP = 16
LONGEST = 480
STATES = 32  # of the chain that makes the rows: few enough to be learnt in one pass
# name: (vocabulary, share of each row that is prompt and carries no loss, tuning, rows)
CASES: dict[str, tuple[int, float, dict[str, Any], int]] = {
    "full-all": (4096, 0.0, {"method": "full"}, 640),
    "full-masked": (49152, 0.75, {"method": "full"}, 192),
    "lora-masked": (49152, 0.75, {"method": "lora", "rank": 16}, 192),
    "lora-all": (4096, 0.0, {"method": "lora", "rank": 16}, 640),
}
RATES = {"full": 2e-4, "lora": 1e-3}
# TRL: rows packed not at all, into its default of 8 packed rows a step, or so many that a step has as many rows as
# elsewhere; gradient checkpointing, which is on unless switched off.
TRL = {
    "trl": ("", True),
    "trl-no-checkpointing": ("", False),
    "trl-packing": ("default", True),
    "trl-packing-rows": ("rows", True),
    "trl-packing-no-checkpointing": ("default", False),
    "trl-packing-rows-no-checkpointing": ("rows", False),
}


def rows_of(case: str, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows with log-normal lengths (median 67, at most 480) of a first-order chain, so that there is something to
    learn; the chain is the same for all cases and seeds."""
    _, masked, _, count = CASES[case]
    follows = np.random.default_rng(7).integers(3, STATES, (STATES, 4))
    random = np.random.default_rng(seed)
    lengths = np.clip(np.exp(random.normal(np.log(67), 0.8, count)).astype(int), 8, LONGEST)
    rows = []
    for length in lengths:
        ids = [int(random.integers(3, STATES))]
        for choice in random.integers(0, 4, length - 1):
            ids.append(int(follows[ids[-1], choice]))
        prompt = int(masked * length)
        rows.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]})
    return rows


def base_of(vocabulary: int, folder: Path) -> Path:
    """A model that has seen something of the chain already, made once: its folder."""
    path = folder / f"base-{vocabulary}"
    if not path.is_dir():
        case = next(name for name, (size, *_) in CASES.items() if size == vocabulary)
        rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows_of(case, seed=1)]
        model = new_model(vocabulary)
        for _ in range(2):
            model, _ = with_luthier(model, "full-all", rows, packing=False, learning_rate=3e-3)
        model.save_pretrained(path)
    return path


def new_model(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=6,
            num_attention_heads=4,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


class Examples:
    def __init__(self, rows: list[dict[str, list[int]]]):
        self.rows, self.lengths = rows, np.array([len(row["input_ids"]) for row in rows])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]


def with_luthier(
    model: Any, case: str, rows: list[dict[str, list[int]]], packing: bool, learning_rate: float | None = None
) -> Any:
    from luthier.methods import build
    from luthier.models.topology import Topology
    from luthier.objectives import Sft
    from luthier.train import Loop, TrainSettings
    from luthier.tune import Probe

    tuning = CASES[case][2]
    tuned = build("tune", tuning).attach(model, Probe(Topology.of(model)))
    settings = TrainSettings(
        learning_rate=learning_rate or RATES[tuning["method"]],
        num_train_epochs=1,
        effective_batch_size=ROWS_PER_STEP,
        max_tokens_per_device=1024,  # on a processor activations that fit its cache are faster than more at a time
        lr_scheduler_type="linear",
        warmup_steps=0,
    )
    loop = Loop(tuned, Sft(), settings, Examples(rows), packing=packing, device="cpu")
    began = time.perf_counter()
    loop.run()
    return tuned.model, time.perf_counter() - began


def with_trl(model: Any, case: str, rows: list[dict[str, list[int]]], packing: str, checkpointing: bool) -> Any:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from luthier.worlds import tiny

    tuning = CASES[case][2]
    tokenizer = AutoTokenizer.from_pretrained(tiny.folder())
    columns = {"input_ids": [row["input_ids"] for row in rows]}
    if CASES[case][1]:
        columns["completion_mask"] = [[int(label != IGNORED) for label in row["labels"]] for row in rows]
    mean = float(np.mean([len(row["input_ids"]) for row in rows]))
    batch = 8
    if packing == "rows":  # packed rows hold 1,024 tokens by default; so many that a step has as many rows as elsewhere
        batch = max(1, round(ROWS_PER_STEP * mean / 1024))
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=1 if packing else ROWS_PER_STEP // 8,
            num_train_epochs=1,
            learning_rate=RATES[tuning["method"]],
            lr_scheduler_type="linear",
            warmup_steps=0,
            packing=bool(packing),
            gradient_checkpointing=checkpointing,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        peft = None
        if tuning["method"] == "lora":
            from peft import LoraConfig

            peft = LoraConfig(
                r=tuning["rank"], lora_alpha=2 * tuning["rank"], target_modules="all-linear", task_type="CAUSAL_LM"
            )
        trainer = SFTTrainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_dict(columns),
            processing_class=tokenizer,
            peft_config=peft,
        )
        began = time.perf_counter()
        trainer.train()
        return trainer.model, time.perf_counter() - began


@torch.no_grad()
def loss_over(model: Any, rows: list[dict[str, list[int]]]) -> float:
    """Mean over all labelled tokens, row by row: no batching, no packing, no head tricks."""
    total, count = 0.0, 0
    for row in rows[:160]:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total += float(F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"))
        count += int((labels != IGNORED).sum())
    return total / count


def matmul_rates(seconds: float = 1.0) -> dict[str, float]:
    """Float32 operations per second of this machine's matrix product, kept up for `seconds` each: at a large square
    and at the model's shapes. Not the best of many: training has to keep it up too."""
    found = {}
    for name, (m, k, n) in {"square_1024": (1024, 1024, 1024), "feed_forward": (1024, 256, 688)}.items():
        a, b, out = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
        count, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            torch.mm(a, b, out=out)
            count += 1
        found[name] = 2 * m * k * n * count / (time.perf_counter() - began)
    return found


def operations(model: Any, case: str, rows: list[dict[str, list[int]]]) -> float:
    """What full tuning on these rows needs and no more: 6 per weight and token in the blocks (and labelled token in
    the head), 6 x length^2 x width per block for causal attention; nothing for padding or recomputation."""
    tokens = sum(len(row["input_ids"]) for row in rows)
    labelled = sum(label != IGNORED for row in rows for label in row["labels"][1:])
    matrices = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2)
    squares = sum(len(row["input_ids"]) ** 2 for row in rows)
    width, blocks = model.config.hidden_size, model.config.num_hidden_layers
    return 6.0 * (tokens * matrices + labelled * width * CASES[case][0] + blocks * squares * width)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "framework",
        choices=("base", "luthier", "luthier-packing", *TRL),
    )
    parser.add_argument("case", choices=CASES)
    parser.add_argument("folder", type=Path, help="of the bases, which are made when missing, and of the outcome")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    case, rows = arguments.case, rows_of(arguments.case)
    if arguments.framework == "base":
        base_of(CASES[case][0], arguments.folder)
        return
    model: Any = LlamaForCausalLM.from_pretrained(base_of(CASES[case][0], arguments.folder))
    before = loss_over(model.eval(), rows)
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model.train()
    before_rates, needed = matmul_rates(), operations(model, case, rows)
    if arguments.framework.startswith("luthier"):
        model, seconds = with_luthier(model, case, rows, arguments.framework == "luthier-packing")
    else:
        packing, checkpointing = TRL[arguments.framework]
        model, seconds = with_trl(model, case, rows, packing, checkpointing)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rates = {name: (rate + before_rates[name]) / 2 for name, rate in matmul_rates().items()}
    found = {
        "seconds": seconds,
        "tokens": sum(len(row["input_ids"]) for row in rows),
        "peak_bytes": peak,
        "start_bytes": start,
        "operations": needed,
        "matmul_rates": rates,
        "loss_before": before,
        "loss_after": loss_over(model.eval(), rows),
    }
    (arguments.folder / "found.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
