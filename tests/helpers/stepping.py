"""Steps of a tuning outside any loop: the hooks in their order, written once for all tests."""

import torch


def drive(tuned, optimizer, loss_of, steps, first=0, parts=1, **watch):
    """Optimiser steps `first` to `first + steps` on `loss_of(model, number of the micro-batch)`.

    Args:
        parts: micro-batches of a step, of which the loss is the mean.
        watch: functions of the step: `begun`, `reached` (gradients, before clipping), `stepped`, `ended`.
    """

    def at(what, step):
        watch.get(what, lambda step: None)(step)

    assert watch.keys() <= {"begun", "reached", "stepped", "ended"}
    for step in range(first, first + steps):
        tuned.on_step_begin(step)
        at("begun", step)
        for part in range(parts):
            tuned.backward(loss_of(tuned.model, step * parts + part) / parts)
        tuned.on_grad(step)
        at("reached", step)
        tuned.on_clipped(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        at("stepped", step)
        tuned.on_step_end(step)
        at("ended", step)
    return optimizer


def stepped(tuned, outputs, steps, rate):
    """AdamW steps on a loss of `outputs(model, step)`'s size and spread; the tuning itself comes back."""
    optimizer = torch.optim.AdamW(tuned.parameter_groups(0.1), lr=rate)
    for step in range(steps):
        logits = outputs(tuned.model, step)
        logits.pow(2).mean().add(logits.std() * 0.1).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return tuned
