"""48, LISA: with one of the blocks moving at a time, new facts are learnt as with full tuning, more old ones stay, and
the optimiser's memory is a fraction.

Facts world with 4 blocks, 3 seeds: full tuning, LoRA of rank 8, LISA (1 block, every 10 steps), and LISA without
embedding and head, each with the best of three learning rates (the one with the most new facts, then the least loss on
old ones). Memory is counted in numbers: the most that the optimiser held at the end of any step, and the most that had
a gradient in any step; for LISA also on 8 blocks, where embedding and head weigh less.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from luthier.proofs.base import Claim, Measurements, Proof, count, mean
from luthier.proofs.facts_bench import teach
from luthier.worlds.facts import Facts, new_model

ARMS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "full": ({"method": "full"}, (3e-4, 1e-3, 3e-3)),
    "lora": ({"method": "lora", "rank": 8}, (1e-3, 3e-3, 1e-2)),
    "lisa": ({"method": "lisa", "active_layers": 1, "interval": 10}, (3e-4, 1e-3, 3e-3)),
    "lisa_blocks_only": (
        {"method": "lisa", "active_layers": 1, "interval": 10, "train_embeddings": False, "train_lm_head": False},
        (3e-4, 1e-3, 3e-3),
    ),
}
OLD, NEW = range(7), range(7, 8)


def prove(seed: int) -> Measurements:
    world = Facts(seed)
    base = world.pretrained(OLD)
    found: Measurements = {}
    for arm, (tuning, rates) in ARMS.items():
        tried = []
        for rate in rates:
            model, _ = teach(base, world, NEW, tuning, learning_rate=rate, seed=seed)
            tried.append((world.recall(model, NEW), world.recall(model, OLD), rate))
        (new, _), (old, old_loss), rate = min(tried, key=lambda t: (-t[0][0], t[1][1]))
        found |= {f"new/{arm}": new, f"old/{arm}": old, f"old_loss/{arm}": old_loss, f"rate/{arm}": rate}
        # At one and the same rate, as in the calibration: here only what is forgotten differs.
        (same_new, _), (_, same_loss), _ = next(t for t in tried if t[2] == 1e-3)
        found |= {f"new_at_1e-3/{arm}": same_new, f"old_loss_at_1e-3/{arm}": same_loss}
    for blocks in (4, 8):
        for arm in ("full", "lisa"):
            moments, gradients = _memory(blocks, ARMS[arm][0], world, seed)
            found |= {f"moments_{blocks}/{arm}": moments, f"gradients_{blocks}/{arm}": gradients}
        found[f"bound_{blocks}"] = _bound(new_model(seed, blocks))
    return found


def _memory(blocks: int, tuning: dict[str, Any], world: Facts, seed: int) -> tuple[float, float]:
    """The most numbers that moments, and gradients, held over 25 steps (three draws)."""
    most = [0, 0]
    _, loop = teach(new_model(seed, blocks), world, NEW, tuning, steps=1, seed=seed)
    tuned, optimizer = loop.tuned, loop.optimizer
    loop.total = 25
    before = tuned.on_grad

    def on_grad(step: int) -> None:
        before(step)
        most[1] = max(most[1], sum(p.grad.numel() for p in tuned.model.parameters() if p.grad is not None))

    tuned.on_grad = on_grad  # type: ignore[method-assign]
    for _ in loop.steps():
        state = (v for entry in optimizer.state.values() for v in entry.values())
        most[0] = max(most[0], sum(v.numel() for v in state if isinstance(v, torch.Tensor) and v.ndim))
    return float(most[0]), float(most[1])


def _bound(model: nn.Module) -> float:
    """Two moments for everything outside the blocks and for one block."""
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    outside = sum(size for name, size in sizes.items() if ".layers." not in name)
    return 2.0 * (outside + sum(size for name, size in sizes.items() if ".layers.0." in name))


PROOF = Proof(
    paper=48,
    prove=prove,
    parts=[
        "luthier.tune.lisa",
        "luthier.tune.selector.tensors",
        "luthier.tune.whole",
        "luthier.worlds.facts",
        "luthier.proofs.facts_bench",
    ],
    claims=[
        Claim(
            "new facts: LISA's recall over full tuning's, mean",
            lambda runs: mean(runs, "new/lisa") / mean(runs, "new/full"),
            ">= 0.97",
            "paper",
        ),
        Claim(
            "seeds in which LISA's loss on old facts is below full tuning's at the same rate, both having learnt",
            lambda runs: count(
                runs,
                lambda r: r["old_loss_at_1e-3/lisa"] < r["old_loss_at_1e-3/full"] and r["new_at_1e-3/lisa"] >= 0.97,
            ),
            "== 3",
            "paper",
        ),
        Claim(
            "the same with each at its own best rate",
            lambda runs: count(runs, lambda r: r["old_loss/lisa"] < r["old_loss/full"]),
            "== 3",
            "ours",
        ),
        Claim(
            "moments beyond those of embedding, head and one block (8 blocks)",
            lambda runs: max(r["moments_8/lisa"] - r["bound_8"] for r in runs),
            "<= 0",
            "exact",
        ),
        Claim(
            "LISA's moments over full tuning's (8 blocks)",
            lambda runs: max(r["moments_8/lisa"] / r["moments_8/full"] for r in runs),
            "< 0.25",
            "paper",
        ),
        Claim(
            "LISA's gradients over full tuning's (8 blocks)",
            lambda runs: max(r["gradients_8/lisa"] / r["gradients_8/full"] for r in runs),
            "< 0.25",
            "paper",
        ),
    ],
)
