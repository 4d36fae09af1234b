"""The one training loop: batches in, an objective's loss, a tuning's parameters, checkpoints out.

No method owns a loop of its own; what a method must do around a step it does through the hooks of `Tuned`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from luthier.lazy import fetched

_WHERE = {
    "TrainSettings": "luthier.train.settings",
    "CopilotSettings": "luthier.train.settings",
    "Loop": "luthier.train.loop",
    "StepRecord": "luthier.train.records",
    "Interrupted": "luthier.train.loop",
    "Checkpoints": "luthier.train.checkpoints",
    "TuningCallback": "luthier.train.callback",
    "Span": "luthier.train.span",
    "SessionRun": "luthier.train.sessions",
    "EarlyDynamics": "luthier.train.early_dynamics",
    "rank_runs": "luthier.train.early_dynamics",
    "stop_dominated": "luthier.train.early_dynamics",
}
__all__ = [
    "Checkpoints",
    "CopilotSettings",
    "EarlyDynamics",
    "Interrupted",
    "Loop",
    "SessionRun",
    "Span",
    "StepRecord",
    "TrainSettings",
    "TuningCallback",
    "rank_runs",
    "stop_dominated",
]

if TYPE_CHECKING:
    from luthier.train.callback import TuningCallback
    from luthier.train.checkpoints import Checkpoints
    from luthier.train.early_dynamics import EarlyDynamics, rank_runs, stop_dominated
    from luthier.train.loop import Interrupted, Loop
    from luthier.train.records import StepRecord
    from luthier.train.sessions import SessionRun
    from luthier.train.settings import CopilotSettings, TrainSettings
    from luthier.train.span import Span

__getattr__ = fetched(__name__, _WHERE)
