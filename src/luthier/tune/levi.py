"""LEVI: a small model trained from nothing stands beside the pre-trained one and is joined with it at several depths.

    at each of a few layers:   a_i([pooled output of block i ; output of the small model]) -> logits
    prediction:                the mean of these members (or a trained average)
    loss:                      l(mean) + beta * mean of the members' own losses, one stage, all new parts together

A pre-trained model over-uses what its own data made spurious, a model tuned on the new data what those made spurious.
Two views, joined early (general) and late (particular), correct each other, so the predictor tends to hold up better
on shifted data than full tuning, LoRA or a probe. The backbone stays as it is; the parts beside it are a few per cent.
It classifies, or regresses on one number; it does not generate. The mathematics is in `luthier.tune.layer_ensemble`.

    tuned = Levi(num_layers=4).attach(model, Probe(Topology.of(model), batches=lambda: loader))
    tuned.model(**batch)           # loss, logits (rows, C), member_logits (m, rows, C)

The probe's batches are the training rows: they tell classes or, of float labels, mean and scale; and widths of layers.

Source: Roh et al., LEVI, ICML 2024 (arXiv 2402.04644), of which we could read the abstract and accounts by others, and
no code. So these are ours: which layers, pooling, widths and form of all parts, the members' equal weights, beta and
rates; `backbone: lora | full`; `task_model: none` (for comparison).

When not to use it: where the new task is close to the pre-training (a probe does as well), where the small model can
solve the task by a shortcut, or to choose among settings by shifted data, which leaks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from luthier.errors import InputError
from luthier.methods import build
from luthier.models.regions import unwrapped
from luthier.models.shards import like
from luthier.models.topology import Topology
from luthier.tune.backbone import Flags, inputs_of, layer_widths, move_used, plain, weights_hash
from luthier.tune.base import Probe, Tuned, Tuning
from luthier.tune.block_outputs import Reading, to_front, usual_pool
from luthier.tune.feature_cache import FeatureCache
from luthier.tune.layer_ensemble import LayerEnsemble, Target
from luthier.tune.side_models import side_model, with_fixed_width
from luthier.tune.whole import refuse_wrapped

WEIGHTS, CONFIG, BACKBONE = "levi.safetensors", "levi_config.json", "backbone.safetensors"
_BUILT_IN = ("auto", "transformer", "bag", "cnn", "none")


class Levi(Tuning):
    """A layer-wise ensemble of a pre-trained model and a small one.

    Attributes:
        layers: ids of the layers that are used, 1 to the number of blocks; null spreads `num_layers` of them.
        pool: of a block's positions; `auto` is last for causal language models, cls for vision models with a class
            token, mean for others.
        task_model: the small model: `auto` (cnn for images, transformer for text), `transformer`, `bag`, `cnn`,
            `package.module:factory`, or `none`.
        task_width, task_dropout: size of its output per row, and the dropout at its end and inside.
        hidden: width of the adapting layers' hidden layer; 0 makes each one linear map.
        norm: layer norms of both inputs of each adapting layer.
        combine: `mean` of the members, or a `learned` average.
        beta: weight of the members' own losses.
        backbone: `frozen`, tuned by `lora`, or in `full`.
        lora: settings of the tuning `lora`, where that is what the backbone gets; its targets are by default all
            linears of the blocks that are used.
        backbone_learning_rate: of the backbone or its adapter, where it moves.
        num_classes: null is told from the probe's labels.
        cache_features: keep what a frozen backbone says about each row on disk, as float32 (true) or float16.
        cache_folder: where; null is a temporary folder.
    """

    method: Literal["levi"] = "levi"
    paper: ClassVar[int | None] = 35
    default_learning_rate: ClassVar[float] = 1e-3
    predicts: ClassVar[Literal["as the base", "labels"]] = "labels"
    layers: tuple[int, ...] | None = Field(default=None, min_length=1)
    num_layers: int = Field(default=4, ge=1)
    pool: Literal["auto", "mean", "cls", "last"] = "auto"
    task_model: str = "auto"
    task_width: int = Field(default=64, ge=1)
    task_dropout: float = Field(default=0.1, ge=0, lt=1)
    hidden: int = Field(default=128, ge=0)
    norm: bool = True
    combine: Literal["mean", "learned"] = "mean"
    beta: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    backbone: Literal["frozen", "lora", "full"] = "frozen"
    lora: dict[str, Any] = Field(default_factory=dict)
    backbone_learning_rate: float = Field(default=1e-4, gt=0, allow_inf_nan=False)
    num_classes: int | None = Field(default=None, ge=2)
    cache_features: bool | Literal["float32", "float16"] = False
    cache_folder: str | None = None

    @field_validator("task_model")
    @classmethod
    def _known_model(cls, value: str) -> str:
        if value not in _BUILT_IN and ":" not in value:
            raise ValueError(f"task_model is one of {', '.join(_BUILT_IN)} or package.module:factory, got {value!r}")
        return value

    @field_validator("layers")
    @classmethod
    def _each_once(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and (min(value) < 1 or len(set(value)) < len(value)):
            raise ValueError(f"layers are different numbers from 1, got {list(value)}")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Levi:
        if self.cache_features and self.backbone != "frozen":
            raise ValueError(f"cache_features needs backbone: frozen; with {self.backbone} the features change")
        if self.cache_folder is not None and not self.cache_features:
            raise ValueError("cache_folder is given, but cache_features is off")
        if self.lora and self.backbone != "lora":
            raise ValueError(f"lora has settings, but backbone is {self.backbone}")
        build("tune", {**self.lora, "method": "lora"})
        return self

    def attach(self, model: nn.Module, probe: Probe) -> LeviTuned:
        """See `Tuning.attach`. Raises `InputError` if neither the probe's batches nor `num_classes` tell the task, for
        layers that the model does not have, and for a task model that does not fit it."""
        return self._attach(model, probe, None)

    def _attach(self, model: nn.Module, probe: Probe, kept: Kept | None) -> LeviTuned:
        """As `attach`; with `kept`, what a saved folder tells in place of the probe's batches."""
        where = Reading.of(model, probe.topology, self.layers or self.num_layers)
        how = usual_pool(model) if self.pool == "auto" else self.pool
        if self.backbone != "frozen":
            refuse_wrapped(self.method, model)
        target = kept.target if kept else self._target(probe)
        widths = kept.widths if kept else layer_widths(model, probe, where, how)
        before = Flags(model)
        identity = None if self.backbone == "frozen" else weights_hash(model)
        try:
            with torch.random.fork_rng():
                torch.manual_seed(probe.seed)
                side = kept.side if kept else None
                if side is None:
                    side = side_model(self.task_model, unwrapped(model)[0], self.task_width, self.task_dropout)
                ensemble = LayerEnsemble(
                    self._prepared(model, probe, where, kept),
                    where,
                    widths,
                    side,
                    target,
                    how=how,
                    hidden=self.hidden,
                    norm=self.norm,
                    learned=self.combine == "learned",
                    beta=self.beta,
                    frozen=self.backbone == "frozen",
                )
        except BaseException:
            before.restore()
            raise
        ensemble.to_device_of_backbone()
        tuned = LeviTuned(self, ensemble, model, before, identity)
        if self.cache_features:
            tuned.open_cache(self.cache_folder, self.cache_features)
            if probe.batches:
                tuned.fill(probe.batches())
        return tuned

    def planned(self, model: nn.Module, topology: Topology) -> int:
        """As every tuning's; where nothing else tells the number of classes, it is that of the model's labels."""
        classes = self.num_classes or getattr(getattr(model, "config", None), "num_labels", None)
        asked = self.model_copy(update={"num_classes": classes, "cache_features": False})
        return sum(p.numel() for p in asked.attach(model, Probe(topology)).moving().values())

    def _target(self, probe: Probe) -> Target:
        if probe.batches is not None:
            return Target.of(probe.batches(), self.num_classes)
        if self.num_classes is None:
            raise InputError(
                "nothing tells what is to be predicted",
                where="tune.num_classes",
                fix="give the probe batches with labels, or set num_classes",
            )
        return Target(self.num_classes)

    def _prepared(self, model: nn.Module, probe: Probe, where: Reading, kept: Kept | None) -> nn.Module:
        """The backbone with gradients where it is to move, wrapped by PEFT for `lora`."""
        model.requires_grad_(False)
        if self.backbone == "lora":
            if kept:
                from peft import PeftModel

                adapted: Any = PeftModel.from_pretrained(model, kept.directory, is_trainable=True)  # type: ignore[arg-type]
            else:
                used = where.used()
                blocks = [block for block in probe.topology.blocks if block.path in used]
                targets = [path for block in blocks for path in (*block.attention, *block.feed_forward)]
                lora: Any = build("tune", {"targets": targets, **self.lora, "method": "lora"})
                # Without a task PEFT does not tune a classifier's head along, which is not used here.
                lora = lora.model_copy(update={"peft": {"modules_to_save": None, **lora.peft, "task_type": None}})
                adapted = lora.attach(model, Probe(probe.topology, probe.seed)).model
            return adapted
        if self.backbone == "full":
            move_used(model, probe.topology, where)
        return model


class LeviTuned(Tuned):
    """The ensemble as `model`, the pre-trained model as `base_model`."""

    model: LayerEnsemble

    def __init__(
        self, settings: Levi, model: LayerEnsemble, base_model: nn.Module, before: Flags, identity: str | None
    ):
        super().__init__(settings, model, base_model)
        self._before, self._identity = before, identity

    @property
    def backbone_hash(self) -> str:
        """Of the pre-trained weights as they were when this was attached."""
        if self._identity is None:  # frozen: they are still the same
            self._identity = weights_hash(self.base_model)
        return self._identity

    # What moves

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """As every tuning's, with the backbone's own learning rate where it moves."""
        settings: Any = self.settings
        groups = []
        for backbone in (False, True):
            own = [p for name, p in self.moving().items() if name.startswith("backbone.") == backbone]
            rate = {"lr": settings.backbone_learning_rate} if backbone else {}
            groups.append({"params": [p for p in own if p.ndim >= 2], "weight_decay": weight_decay, **rate})
            groups.append({"params": [p for p in own if p.ndim < 2], "weight_decay": 0.0, **rate})
        return [group for group in groups if group["params"]]

    # The cache

    def open_cache(self, folder: str | None, stored: bool | str) -> None:
        """From now on what the backbone says about a row is kept, as float32 (true) or the named type."""
        model = self.model
        told = [self.backbone_hash, model.where.trunk, model.where.layers, model.how, model.widths]
        model.cache = FeatureCache(
            Path(folder) if folder is not None else None,
            identity=hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32],
            width=sum(model.widths),
            dtype=stored if isinstance(stored, str) else "float32",
        )

    def fill(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Run the backbone on every row of `batches` that the cache does not hold yet."""
        if self.model.cache is None:
            raise InputError("there is no cache to fill", where="tune.cache_features", fix="set it to true")
        with torch.no_grad():
            for batch in batches:
                self.model.features(to_front(inputs_of(batch, self.base_model)))

    # What is kept

    def state_dict(self) -> dict[str, Tensor]:
        """What moves, and the buffers beside it (running means of a task model's own norms)."""
        buffers = {name for name, _ in self.model.named_buffers()}
        if self.model.frozen:
            buffers = {name for name in buffers if not name.startswith("backbone.")}
        kept = self.moving().keys() | buffers
        return {name: tensor.detach() for name, tensor in self.model.state_dict().items() if name in kept}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        own = self.state_dict()
        if own.keys() != state.keys():
            names = ", ".join(sorted(own.keys() ^ state.keys())[:6])
            raise InputError(f"the checkpoint holds other parameters than this tuning moves: {names}")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(like(state[name], tensor))

    def delta(self) -> dict[str, Tensor]:
        """The backbone's own weights that training may have changed, by their names in it; empty if it is frozen, and
        with `lora`, whose change is the adapter's."""
        if self.settings.backbone != "full":  # type: ignore[attr-defined]
            return {}
        return {n.removeprefix("backbone."): p.detach() for n, p in self.moving().items() if n.startswith("backbone.")}

    def save(self, directory: Path) -> str:
        """Write `levi.safetensors` and `levi_config.json`; for `lora` PEFT's adapter beside them, for `full` the
        backbone's weights that moved as `backbone.safetensors`. A frozen backbone is not copied, only named."""
        settings: Any = self.settings
        held = {name for name, _ in self.model.named_parameters() if name.startswith("backbone.")}
        own = {name: tensor for name, tensor in self.state_dict().items() if name not in held}
        save_file(plain(own), directory / WEIGHTS)
        if settings.backbone == "lora":
            self.model.backbone.save_pretrained(directory, safe_serialization=True)  # type: ignore[operator]
        elif changed := self.delta():
            save_file(plain(changed), directory / BACKBONE)
        base: Any = self.base_model
        told = {
            "settings": settings.model_copy(update={"cache_features": False, "cache_folder": None}).model_dump(
                mode="json"
            ),
            "target": asdict(self.model.target),
            "widths": self.model.widths,
            "backbone": {
                "name": getattr(getattr(base, "config", None), "_name_or_path", ""),
                "class": type(unwrapped(base)[0]).__name__,
                "hash": self.backbone_hash,
            },
        }
        (directory / CONFIG).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        return "levi"

    def merged(self) -> nn.Module:
        raise InputError(
            "levi adds a model beside the backbone, which cannot be folded into its weights",
            where="tune",
            fix="save it and load it with luthier.tune.levi.load, or use `model` as it is",
        )

    def detach(self) -> nn.Module:
        """The backbone alone, as it was before: untouched if frozen or under `lora`, with `full` as it was trained.
        This object is of no use afterwards."""
        if self.settings.backbone == "lora":  # type: ignore[attr-defined]
            self.model.backbone.unload()  # type: ignore[operator]
        if self.model.cache is not None:
            self.model.cache.close()
        self._before.restore()
        self.base_model.zero_grad(set_to_none=True)
        return self.base_model


def load(
    directory: Path | str, model: nn.Module, *, topology: Topology | None = None, task_model: nn.Module | None = None
) -> LeviTuned:
    """What `LeviTuned.save` wrote, on the backbone that it was made on.

    Args:
        model: the pre-trained model; changed in place as by `attach`.
        topology: where its blocks are not found by structure.
        task_model: the module itself where the folder names one of the user's own: nothing is imported because a
            file says so.

    Raises `InputError` if the folder is not whole, or was made on other weights.
    """
    directory = Path(directory)
    try:
        told = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        own = load_file(directory / WEIGHTS)
        settings, target = Levi.model_validate(told["settings"]), Target(**told["target"])
        widths, made_on = tuple(told["widths"]), told["backbone"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(f"this is no whole folder of levi ({error})", where=str(directory)) from None
    if weights_hash(model) != made_on["hash"]:
        raise InputError(
            f"it was made on other weights than those of this {type(model).__name__}",
            where=str(directory),
            fix=f"load the backbone {made_on['name'] or made_on['class']!r} as it was",
        )
    needed = {"lora": "adapter_model.safetensors", "full": BACKBONE}.get(settings.backbone)
    if needed and not (directory / needed).is_file():  # PEFT would look for a pickle instead
        raise InputError(f"{needed} is missing", where=str(directory))
    if ":" in settings.task_model and task_model is None:
        raise InputError(
            f"the task model is the user's own {settings.task_model}",
            where=str(directory),
            fix="hand it over: load(..., task_model=module)",
        )
    side = None if task_model is None else with_fixed_width(task_model, settings.task_model)
    kept = Kept(target, widths, side, directory)
    tuned = settings._attach(model, Probe(topology or Topology.of(model)), kept)
    if settings.backbone == "full":
        own |= {f"backbone.{name}": tensor for name, tensor in load_file(directory / BACKBONE).items()}
    if settings.backbone == "lora":
        own |= {n: t for n, t in tuned.moving().items() if n.startswith("backbone.")}  # PEFT has read them
    tuned.load_state_dict(own)
    tuned.model.eval()
    return tuned


@dataclass(frozen=True)
class Kept:
    """What a saved folder tells."""

    target: Target
    widths: tuple[int, ...]
    side: nn.Module | None
    directory: Path
