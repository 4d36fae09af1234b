"""A diffusion model that draws handwritten digits: a small U-Net of the package diffusers, made and tuned in a minute.

    network = unet(seed=0)                            a `UNet2DModel` for 8 by 8 pictures, told the digit; not trained
    tuned = Full().attach(network, Probe(Topology.flat(network)))
    train(tuned, *digits("train", range(8)), steps=600, rate=2e-3)       it learns to draw 0 to 7
    tuned = Sara(density=0.2).attach(network, Probe(Topology.flat(network)))
    train(tuned, *digits("train", (8, 9)), steps=200, rate=2e-3)         and then 8 and 9, with any tuning
    noise_loss(network, *digits("test", range(8)))    how well it still tells the noise in a 0 to 7
    draw(network, labels, seed=0)                     new pictures

The network is told a noisy picture, the step of the noise (0 is little, 99 all) and the digit, and says what the noise
is; the loss is the mean squared error. Sampling is DDIM. `train` is also the shortest example of a tuning's hooks in a
loop of one's own, for models that transformers' Trainer cannot train.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from luthier.errors import InputError
from luthier.tune import Tuned

STEPS = 100  # of noise


def unet(seed: int = 0, *, widths: tuple[int, int] = (16, 32), classes: int = 10) -> nn.Module:
    """An untrained U-Net of diffusers with attention at 4 by 4; 178 thousand parameters at these widths."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _diffusers().UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=widths,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8,
            norm_num_groups=8,
            num_class_embeds=classes,
        )


def train(
    tuned: Tuned, pictures: Tensor, labels: Tensor, *, steps: int, rate: float | None = None, seed: int = 0
) -> nn.Module:
    """Step what `tuned` lets move, with AdamW in batches of 64, gradients clipped to 1 and the rate on a cosine.

    Args:
        pictures: (n, 1, 8, 8) in [0, 1]; labels: (n,) int64.
        rate: at the start; None is the tuning's own.

    Returns the model, in evaluation mode.
    """
    draws, scheduler = torch.Generator().manual_seed(seed), _noise()
    groups = tuned.parameter_groups(tuned.settings.default_weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=tuned.own_learning_rate() if rate is None else rate)
    course = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    tuned.on_phase_begin(optimizer, steps, steps)
    tuned.model.train()
    for step in range(steps):
        tuned.on_step_begin(step)
        chosen = torch.randint(0, len(labels), (64,), generator=draws)
        _loss(tuned.model, scheduler, pictures[chosen], labels[chosen], draws).backward()
        tuned.on_grad(step)
        nn.utils.clip_grad_norm_(list(tuned.moving().values()), 1.0)
        tuned.on_clipped(step)
        optimizer.step()
        course.step()
        optimizer.zero_grad(set_to_none=True)
        tuned.on_step_end(step)
    tuned.on_phase_end()
    return tuned.model.eval()


@torch.no_grad()
def noise_loss(network: nn.Module, pictures: Tensor, labels: Tensor, *, rounds: int = 4, seed: int = 0) -> float:
    """Mean squared error of the noise told, over `rounds` draws of noise for each picture; the same draws each time."""
    draws, scheduler = torch.Generator().manual_seed(seed), _noise()
    losses = [float(_loss(network, scheduler, pictures, labels, draws)) for _ in range(rounds)]
    return sum(losses) / rounds


@torch.no_grad()
def draw(network: nn.Module, labels: Tensor, *, steps: int = 20, seed: int = 0) -> Tensor:
    """Pictures (n, 1, 8, 8) in [0, 1] of the digits `labels` (n,), sampled with DDIM in so many steps."""
    caller: Any = network
    scheduler = _diffusers().DDIMScheduler(num_train_timesteps=STEPS, beta_schedule="squaredcos_cap_v2")
    scheduler.set_timesteps(steps)
    pictures = torch.randn(len(labels), 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    for time in scheduler.timesteps:
        noise = caller(pictures, time, class_labels=labels).sample
        pictures = scheduler.step(noise, time, pictures).prev_sample
    return ((pictures + 1) / 2).clamp(0, 1)


def _loss(network: nn.Module, scheduler: Any, pictures: Tensor, labels: Tensor, draws: torch.Generator) -> Tensor:
    caller: Any = network
    noise = torch.randn(pictures.shape, generator=draws)
    times = torch.randint(0, STEPS, (len(labels),), generator=draws)
    told = caller(scheduler.add_noise(2 * pictures - 1, noise, times), times, class_labels=labels).sample
    return F.mse_loss(told, noise)


def _noise() -> Any:
    return _diffusers().DDPMScheduler(num_train_timesteps=STEPS, beta_schedule="squaredcos_cap_v2")


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError:
        raise InputError("the U-Net is diffusers'", fix='pip install "luthier[diffusion]"') from None
    return diffusers
