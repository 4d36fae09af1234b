"""What may move: full tuning, low-rank adapters, and every other choice of the parameters that training changes.

A tuning is attached to a loaded model and gives a `Tuned`: the model to call, the parameters to step, hooks around
each step, and a way to save the outcome. The loop in `luthier.train` knows nothing else about it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from luthier.lazy import fetched

METHODS = {
    "coact": "luthier.tune.coact:Coact",
    "cofitune": "luthier.tune.cofitune:CofiTune",
    "dsee": "luthier.tune.dsee:Dsee",
    "dsee_prune": "luthier.tune.dsee_prune:DseePrune",
    "full": "luthier.tune.full:Full",
    "greentrainer": "luthier.tune.greentrainer:GreenTrainer",
    "hft": "luthier.tune.hft:Hft",
    "levi": "luthier.tune.levi:Levi",
    "lift": "luthier.tune.lift:Lift",
    "lisa": "luthier.tune.lisa:Lisa",
    "lora": "luthier.tune.lora:Lora",
    "lt_sft": "luthier.tune.lt_sft:LtSft",
    "mask_tuning": "luthier.tune.mask_tuning:MaskTuning",
    "sara": "luthier.tune.sara:Sara",
}

_WHERE = {
    "Coact": "luthier.tune.coact",
    "CofiTune": "luthier.tune.cofitune",
    "Dsee": "luthier.tune.dsee",
    "DseePrune": "luthier.tune.dsee_prune",
    "EMATeacher": "luthier.tune.teacher",
    "Full": "luthier.tune.full",
    "GreenTrainer": "luthier.tune.greentrainer",
    "Hft": "luthier.tune.hft",
    "Levi": "luthier.tune.levi",
    "Lift": "luthier.tune.lift",
    "Lisa": "luthier.tune.lisa",
    "Lora": "luthier.tune.lora",
    "LtSft": "luthier.tune.lt_sft",
    "MaskTuning": "luthier.tune.mask_tuning",
    "Probe": "luthier.tune.base",
    "PrototypeClassifier": "luthier.tune.teacher",
    "Sara": "luthier.tune.sara",
    "SessionStream": "luthier.tune.sessions",
    "Tuned": "luthier.tune.base",
    "Tuning": "luthier.tune.base",
}
__all__ = [
    "METHODS",
    "Coact",
    "CofiTune",
    "Dsee",
    "DseePrune",
    "EMATeacher",
    "Full",
    "GreenTrainer",
    "Hft",
    "Levi",
    "Lift",
    "Lisa",
    "Lora",
    "LtSft",
    "MaskTuning",
    "Probe",
    "PrototypeClassifier",
    "Sara",
    "SessionStream",
    "Tuned",
    "Tuning",
]

if TYPE_CHECKING:
    from luthier.tune.base import Probe, Tuned, Tuning
    from luthier.tune.coact import Coact
    from luthier.tune.cofitune import CofiTune
    from luthier.tune.dsee import Dsee
    from luthier.tune.dsee_prune import DseePrune
    from luthier.tune.full import Full
    from luthier.tune.greentrainer import GreenTrainer
    from luthier.tune.hft import Hft
    from luthier.tune.levi import Levi
    from luthier.tune.lift import Lift
    from luthier.tune.lisa import Lisa
    from luthier.tune.lora import Lora
    from luthier.tune.lt_sft import LtSft
    from luthier.tune.mask_tuning import MaskTuning
    from luthier.tune.sara import Sara
    from luthier.tune.sessions import SessionStream
    from luthier.tune.teacher import EMATeacher, PrototypeClassifier

__getattr__ = fetched(__name__, _WHERE)
