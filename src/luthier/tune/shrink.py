"""Cut heads and neurons that nothing reads out of a model: smaller matrices that compute the same.

    small = shrink(model)          a new model of the same class, with its config
    small.save_pretrained(...)

A pruning of whole heads or neurons (`dsee_prune` with mode `heads` or `neurons`) leaves zeros: the columns that would
read them are zero. Here these columns go, with the rows that made what they read.

A config has one number of heads and one width of the feed-forward for all blocks. So as many go from each block as are
unread in every one; what is unread beyond that stays as zeros. Grouped heads go with their key and value, when all of a
group are unread. Some configs cannot say that heads are fewer and not narrower (BERT: the width of a head is the hidden
size divided by their number), and some want a number that divides the hidden size. Then it is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from luthier.errors import InputError
from luthier.models.topology import Block, Topology
from luthier.tune.selector.heads import Unit, heads, neurons, slice_of, without
from luthier.tune.whole import refuse_wrapped

_HEADS = (
    *("num_attention_heads", "num_key_value_heads", "num_heads", "n_heads", "n_head"),
    *("encoder_attention_heads", "decoder_attention_heads"),
)
_WIDTHS = ("intermediate_size", "n_inner", "d_ff", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim")


def shrink(model: nn.Module) -> nn.Module:
    """A model without the heads and neurons of `model` (plain, left as it is) that nothing reads.

    Raises `InputError` if there are none, or if the config cannot express what would be left.
    """
    refuse_wrapped("shrink", model)
    topology = Topology.of(model)
    config: Any = copy.deepcopy(model.config)
    gone: dict[str, Tensor] = {}  # of each weight and bias, True stays
    for kind, names in ((_heads, _HEADS), (_neurons, _WIDTHS)):
        groups = [group for block in topology.blocks for group in kind(model, block)]
        masks, share = _unread(model, groups)
        gone |= masks
        for name in names if masks else ():
            count = getattr(config, name, None)
            if isinstance(count, int):
                setattr(config, name, round(count * share))
        if masks and kind is _heads and hasattr(config, "head_dim"):
            config.head_dim = groups[0][0].own[0].stop - groups[0][0].own[0].start
    if not gone:
        raise InputError("no head and no neuron is unread in every block, so there is nothing to cut")
    state = {name: _cut(tensor, gone[name]) if name in gone else tensor for name, tensor in model.state_dict().items()}
    small = _built(type(model), config)
    wrong = [n for n, tensor in small.state_dict().items() if n not in state or tensor.shape != state[n].shape]
    if wrong:
        raise _inexpressible(type(model), f"{wrong[0]} would have another shape")
    small.load_state_dict(state)
    return small.to(next(model.parameters()).dtype).to(next(model.parameters()).device).train(model.training)


def _built(kind: Any, config: Any) -> nn.Module:
    """A model of that config, as it would be loaded: a config that its own class refuses is refused."""
    try:
        with torch.random.fork_rng():
            return kind(type(config).from_dict(config.to_dict()))
    except (ValueError, StrictDataclassError) as error:
        raise _inexpressible(kind, str(error).strip().splitlines()[-1].strip()) from error


def _inexpressible(kind: Any, why: str) -> InputError:
    return InputError(
        f"the config of {kind.__name__} cannot say what is left: {why}",
        fix="keep the zeros, or prune neurons instead of heads",
    )


def _heads(model: nn.Module, block: Block) -> list[list[Unit]]:
    """The heads, those that share a key and value as one unit; none where they cannot be told apart."""
    return [
        [
            Unit(tuple(s for unit in users for s in unit.own) + users[0].shared, (), ())
            for shared in dict.fromkeys(unit.shared for unit in units)
            for users in ([unit for unit in units if unit.shared == shared],)
        ]
        for units in _told(lambda: heads(model, block), [])
    ]


def _neurons(model: nn.Module, block: Block) -> list[list[Unit]]:
    return _told(lambda: [neurons(model, block)], [])


def _told(find: Callable[[], list[list[Unit]]], otherwise: list[list[Unit]]) -> list[list[Unit]]:
    try:
        return find()
    except InputError:
        return otherwise


def _unread(model: nn.Module, groups: list[list[Unit]]) -> tuple[dict[str, Tensor], float]:
    """Masks without the units that nothing reads, equally many of each group, and the share of units that stays."""
    dead = [[n for n, unit in enumerate(units) if not _read(model, unit)] for units in groups]
    count = min((len(numbers) for numbers in dead), default=0)
    masks: dict[str, Tensor] = {}
    if not count or len({len(units) for units in groups}) > 1:
        return {}, 1.0
    for units, numbers in zip(groups, dead, strict=True):
        masks |= without(model, units, set(numbers[:count]))
    return masks, 1 - count / len(groups[0])


def _read(model: nn.Module, unit: Unit) -> bool:
    """Whether any entry that reads it is not zero."""
    readers = (one for one in unit.own if one.inputs)
    return any(bool(slice_of(model.get_parameter(f"{one.path}.weight"), model, one).any()) for one in readers)


def _cut(tensor: Tensor, stays: Tensor) -> Tensor:
    """Without the rows, and without the columns, of which nothing stays."""
    stays = stays.to(tensor.device)
    if tensor.ndim == 1:
        return tensor[stays]
    return tensor[stays.any(1)][:, stays.any(0)]
