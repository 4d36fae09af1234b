"""What a tuning under a budget chose when, at what price, and what training has cost so far against full tuning.

All amounts are multiply-adds by the formulas of `flops`. A pass of training counts by the size of its input against
that of the pass whose costs are known, so micro-batches of any size, and accumulated ones, are counted as they come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Entry:
    """One choice.

    Attributes:
        period, step: number of the choice, and the optimiser step that it was made before.
        active: indices of the units that move from here on.
        kept: whether nothing was worth choosing, so that the choice before stays.
        asked: how many tensors were measured.
        value: summed importance of what was chosen, the largest being 1.
        rho: share of full tuning that was allowed.
        share: share of full tuning that a pass costs, without rounding.
        full, forward: of one pass in full tuning, and of its forward part.
        probe: of measuring for this choice.
        passes: of training since then, in units of the pass that was measured.
    """

    period: int
    step: int
    active: list[int]
    kept: bool
    asked: int
    value: float
    rho: float
    share: float
    full: float
    forward: float
    probe: float
    passes: float = 0.0


@dataclass
class Ledger:
    """All choices of a phase. `size` is that of the measured pass's input, in numbers."""

    entries: list[Entry] = field(default_factory=list)
    size: int = 1

    def passed(self, size: int) -> None:
        """A pass of training with an input of `size` numbers is made under the last choice."""
        if self.entries:
            self.entries[-1].passes += size / self.size

    def history(self, names: Sequence[str]) -> dict[str, Any]:
        """Json-able; `names` are those of the units.

        `training`, `full` and `probes` are multiply-adds so far: of the passes that were made, of the same passes in
        full tuning, and of all probes. `share` is training over full, `share_with_probes` counts the probes too.
        """
        training = sum(entry.passes * entry.share * entry.full for entry in self.entries)
        full = sum(entry.passes * entry.full for entry in self.entries)
        probes = sum(entry.probe for entry in self.entries)
        return {
            "training": training,
            "full": full,
            "probes": probes,
            "share": training / full if full else None,
            "share_with_probes": (training + probes) / full if full else None,
            "choices": [asdict(entry) | {"active": [names[index] for index in entry.active]} for entry in self.entries],
        }

    def state(self) -> dict[str, Any]:
        """Json-able."""
        return asdict(self)

    @classmethod
    def of(cls, state: dict[str, Any]) -> Ledger:
        """From what `state` gave."""
        return cls([Entry(**entry) for entry in state["entries"]], state["size"])
