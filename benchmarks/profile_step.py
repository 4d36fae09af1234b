"""Where the time of training goes: the model and rows of `speed.py`'s case full-all, under torch's profiler.

python benchmarks/profile_step.py       writes benchmarks/results/profile.json
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

import sft_worker

OUT = Path(__file__).parent / "results" / "profile.json"
ROWS = 192
# The first group whose words occur in an operation's name has its own time; the rest is "other".
GROUPS = {
    "matrix products (blocks and head)": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::matmul"),
    "attention kernels": ("scaled_dot_product",),
    "softmax and loss": ("softmax", "nll_loss", "argmax", "logsumexp"),
    "optimiser and clipping": (
        "Optimizer",
        "_foreach",
        "addcmul_",
        "addcdiv_",
        "lerp_",
        "linalg_vector_norm",
        "aten::norm",
    ),
    "norms, rotations, activations, sums": (
        "aten::mul",
        "aten::add",
        "aten::pow",
        "aten::mean",
        "aten::rsqrt",
        "aten::silu",
        "aten::neg",
        "aten::div",
        "aten::sum",
        "aten::sub",
        "aten::sqrt",
        "aten::cat",
    ),
    "copies and zeros": ("aten::copy_", "aten::fill_", "aten::zero", "aten::clone", "aten::index", "embedding"),
}


def main() -> None:
    sft_worker.CASES["full-all"] = (*sft_worker.CASES["full-all"][:3], ROWS)
    rows = sft_worker.rows_of("full-all")
    model = sft_worker.new_model(sft_worker.CASES["full-all"][0])
    model.train()
    sft_worker.with_luthier(model, "full-all", rows[:32], packing=False)  # warm
    began = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        sft_worker.with_luthier(model, "full-all", rows, packing=False)
    seconds = time.perf_counter() - began
    shares = dict.fromkeys(GROUPS, 0.0)
    total = 0.0
    for event in found.key_averages():
        total += event.self_cpu_time_total
        group = next((g for g, words in GROUPS.items() if any(word in event.key for word in words)), None)
        if group:
            shares[group] += event.self_cpu_time_total
    record = {group: spent / total for group, spent in shares.items()}
    record["other"] = 1 - sum(record.values())
    OUT.write_text(json.dumps({"rows": ROWS, "seconds": seconds, "shares": record}, indent=1) + "\n", encoding="utf-8")
    for group, share in record.items():
        print(f"{share:6.1%}  {group}")


if __name__ == "__main__":
    main()
