"""The course of the rate over segments, against transformers' own schedules one after the other."""

import pytest
import torch
from transformers import get_scheduler

from luthier.train.optimizers import make_schedule
from luthier.train.settings import TrainSettings


def rates(schedule, optimizer, steps):
    found = []
    for _ in range(steps):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


def sgd():
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-3)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"])
@pytest.mark.parametrize("segments", [(17,), (10, 25), (4, 2, 9)])
def test_each_segment_has_the_whole_course(kind, segments):
    settings = TrainSettings(lr_scheduler_type=kind, warmup_ratio=0.2)
    ours = sgd()
    found = rates(make_schedule(ours, settings, segments), ours, sum(segments))
    wanted = []
    for steps in segments:
        theirs = sgd()
        warmup = -(-steps * 2 // 10)
        wanted += rates(get_scheduler(kind, theirs, num_warmup_steps=warmup, num_training_steps=steps), theirs, steps)
    assert found == pytest.approx(wanted, rel=1e-12)
