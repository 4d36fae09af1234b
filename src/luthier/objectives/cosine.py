"""Classifying by the nearest of fixed directions, as CLIP does with the features of class names.

    logits = scale  f / ||f|| . t_c            t_c: a unit vector for each class

`class_vectors` makes the unit vectors from the features of several sentences a class ("a photo of a 3.", "the number
3."); they are to be made anew, with the frozen text tower, when class names change. `F.cross_entropy` of the logits is
the loss; `scale` is the model's own exp(logit_scale), which stays frozen.

Source: Radford et al., CLIP, ICML 2021, figure 3.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from luthier.errors import InputError


def class_vectors(features: Tensor) -> Tensor:
    """(classes, templates, width) text features -> (classes, width) unit vectors: each feature to length one, their
    mean to length one. Raises `InputError` if the mean of a class is zero, or there is no template.
    """
    if features.ndim != 3 or not features.shape[1]:
        raise InputError(f"features are (classes, templates, width), not {list(features.shape)}", where="features")
    mean = F.normalize(features, dim=-1).mean(1)
    if not bool((mean.norm(dim=-1) > 0).all()):
        raise InputError("the features of a class cancel out", where="features", fix="take other templates")
    return F.normalize(mean, dim=-1)


def cosine_logits(features: Tensor, classes: Tensor, scale: Tensor | float) -> Tensor:
    """(rows, width) features and (classes, width) unit vectors -> (rows, classes) logits in [-scale, scale]."""
    return scale * F.normalize(features, dim=-1) @ classes.to(features.dtype).T
