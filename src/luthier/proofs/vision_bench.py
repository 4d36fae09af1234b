"""The bench of proofs about tuning image models: a small transformer that reads digits by fixed class vectors.

    bench = VisionBench(seed)
    bench.base                       pre-trained on 900 digits, each clean, inverted, or inverted and turned
    bench.few                        8 pictures a class of the shifted kind: blurred, with noise
    bench.shifted(model), bench.kept(model)      share right on shifted test pictures, and on those of pre-training

The reader is a vision transformer of transformers (2 blocks, 64 wide, 16 patches of 2 by 2), the mean over its
patches, and a projection to 32 numbers; its logits are 10 times the cosines with 10 orthonormal class vectors, which
stand where CLIP has the features of class names. `steps` makes training batches, `train` a plain training,
`tune` one under any tuning.

`PairReader` is the same with a true pair model (CLIP's architecture, tiny), whose class vectors come from its own text
tower.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

from luthier.models.modes import evaluating
from luthier.models.topology import Topology
from luthier.objectives.anchor import anchor_loss
from luthier.objectives.cosine import class_vectors, cosine_logits
from luthier.tune.base import Probe, Tuned, Tuning
from luthier.worlds.digits import accuracy, digits

PRETRAINED, SHOTS, SCALE = 900, 8, 10.0
Labelled = tuple[Tensor, Tensor]


class ClassReader(nn.Module):
    """Pictures (n, 1, 8, 8) -> logits (n, 10): scaled cosines with fixed class vectors."""

    classes: Tensor

    def __init__(self, seed: int):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.config = ViTConfig(
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=8,
                patch_size=2,
                num_channels=1,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
            self.vit = ViTModel(self.config, add_pooling_layer=False)
            self.projection = nn.Linear(64, 32, bias=False)
            self.register_buffer("classes", torch.linalg.qr(torch.randn(32, 10))[0].T.contiguous())

    def features(self, pictures: Tensor) -> Tensor:
        """(n, 32) features, not normalised."""
        return self.projection(self.vit(pixel_values=pictures).last_hidden_state[:, 1:].mean(1))

    def forward(self, pictures: Tensor) -> Tensor:
        return cosine_logits(self.features(pictures), self.classes, SCALE)


def mixed(pictures: Tensor, draw: torch.Generator) -> Tensor:
    """Each picture as it is (30%), inverted (35%), or inverted and turned by a quarter (35%)."""
    kind = torch.rand(len(pictures), generator=draw)[:, None, None, None]
    inverted = 1 - pictures
    return torch.where(kind < 0.3, pictures, torch.where(kind < 0.65, inverted, inverted.rot90(1, (2, 3))))


def blurred(pictures: Tensor, draw: torch.Generator) -> Tensor:
    """The mean over 3 by 3 neighbours (0 beyond the edge), with normal noise of deviation 0.15."""
    return F.avg_pool2d(pictures, 3, 1, 1) + 0.15 * torch.randn(pictures.shape, generator=draw)


def steps(data: Labelled, count: int, batch: int, draw: torch.Generator) -> Iterator[Labelled]:
    """`count` batches drawn from `data` with replacement."""
    for _ in range(count):
        chosen = torch.randint(0, len(data[1]), (batch,), generator=draw)
        yield data[0][chosen], data[1][chosen]


def train(model: nn.Module, batches: Iterable[Labelled], rate: float) -> nn.Module:
    """Train what has a gradient with AdamW, in place; returns the model in evaluation mode."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
    for pictures, labels in batches:
        F.cross_entropy(model(pictures), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval()


def tune(model: nn.Module, tuning: Tuning, batches: Iterable[Labelled], rate: float, seed: int = 0) -> Tuned:
    """Attach a tuning to a classifier and train with Adam at a constant rate, without decay; in evaluation mode after.

    This is how any loop of a classifier's drives a tuning that wants a second loss, the anchor to the base.
    """
    tuned = tuning.attach(model, Probe(Topology.of(model), seed))
    optimizer = torch.optim.Adam(tuned.parameter_groups(0.0), lr=rate)
    tuned.on_phase_begin(optimizer, 1)
    model.train()
    for step, (pictures, labels) in enumerate(batches):
        tuned.on_step_begin(step)
        if tuned.anchor:
            with torch.no_grad(), evaluating(model), tuned.untuned() or nullcontext():
                base = model(pictures)
        logits, anchor = model(pictures), None
        if tuned.anchor:
            anchor = anchor_loss(logits, base, tuned.anchor.temperature, tuned.anchor.alpha).mean()
        tuned.backward(F.cross_entropy(logits, labels), anchor)
        tuned.on_grad(step)
        tuned.on_clipped(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tuned.on_step_end(step)
    tuned.on_phase_end()
    model.eval()
    return tuned


class VisionBench:
    """The pre-trained reader and the pictures of one seed."""

    def __init__(self, seed: int):
        draw = torch.Generator().manual_seed(seed)
        pictures, labels = digits("train")
        order = torch.randperm(len(labels), generator=draw)
        pictures, labels = pictures[order], labels[order]
        test, answers = digits("test")
        seen = mixed(pictures[:PRETRAINED], draw), labels[:PRETRAINED]
        unseen, names = pictures[PRETRAINED:], labels[PRETRAINED:]
        few = torch.cat([(names == digit).nonzero()[:SHOTS, 0] for digit in range(10)])
        self.few: Labelled = blurred(unseen[few], draw), names[few]
        self._kept: Labelled = mixed(test, draw), answers
        self._shifted: Labelled = blurred(test, draw), answers
        self.base = ClassReader(seed)
        train(self.base, steps(seen, 500, 64, draw), 1e-3)
        self.seed = seed

    def batches(self, count: int = 300) -> Iterator[Labelled]:
        """Batches of 32 of the few pictures; the same each time."""
        return steps(self.few, count, 32, torch.Generator().manual_seed(self.seed))

    def shifted(self, model: nn.Module) -> float:
        """Share right on shifted test pictures."""
        return accuracy(model, *self._shifted)

    def kept(self, model: nn.Module) -> float:
        """Share right on test pictures of the kinds of pre-training."""
        return accuracy(model, *self._kept)


TEMPLATES = ((1, 2), (3, 4, 5))  # token ids before the digit's own, of two sentences
DIGIT, END = 6, 16  # id of the digit 0, and of the end of a sentence


def pair_model(seed: int) -> CLIPModel:
    """An untrained image-text pair model: CLIP's two towers, 2 blocks each, 48 wide, for digits and their names."""
    shape = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"vocab_size": 17, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": END, "pad_token_id": END}
    vision = {"image_size": 8, "patch_size": 2, "num_channels": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIPModel(
            CLIPConfig(text_config={**text, **shape}, vision_config={**vision, **shape}, projection_dim=24)
        )


def text_vectors(model: CLIPModel) -> Tensor:
    """(10, 24) unit class vectors: the mean over the sentences about each digit, with gradient."""
    sentences = torch.tensor(
        [[(*words, DIGIT + digit, END) + (END,) * (3 - len(words)) for words in TEMPLATES] for digit in range(10)]
    )
    features = model.get_text_features(input_ids=sentences.flatten(0, 1)).pooler_output
    return class_vectors(features.view(10, len(TEMPLATES), -1))


class PairReader(nn.Module):
    """Pictures (n, 1, 8, 8) -> logits (n, 10) of a pair model, by class vectors from its own text tower.

    `fix` computes the vectors once; before, they are made anew in each pass, so that both towers learn.
    """

    def __init__(self, seed: int):
        super().__init__()
        self.pair = pair_model(seed)
        self.vectors: Tensor | None = None

    def fix(self) -> PairReader:
        with torch.no_grad():
            self.vectors = text_vectors(self.pair)
        return self

    def forward(self, pictures: Tensor) -> Tensor:
        vectors = text_vectors(self.pair) if self.vectors is None else self.vectors
        features = self.pair.get_image_features(pixel_values=pictures).pooler_output
        return cosine_logits(features, vectors, self.pair.logit_scale.exp())
