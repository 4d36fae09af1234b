"""Laws of the loop on pairs: where the reference comes from does not matter, resume is exact, misuse is named."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from encoded_pairs import EncodedPairs
from luthier.data.roles import CHOSEN, DESIRABLE, PLAIN, UNDESIRABLE
from luthier.data.views import PairedExamples
from luthier.errors import InputError
from luthier.methods import build
from luthier.models.topology import Topology
from luthier.objectives import objective_of
from luthier.train import Loop, TrainSettings
from luthier.tune import Probe

ALL = ["dpo", "robust", "hinge", "ipo", "kto", "cpo", "simpo", "orpo"]


class Preferences(EncodedPairs):
    """Pairs of which the one at `same` has two equal answers."""

    def __init__(self, count, seed=0, same=None):
        draw = np.random.default_rng(seed)

        def ids(low, high):
            return draw.integers(1, 60, int(draw.integers(low, high))).tolist()

        drawn = [(ids(2, 6), ids(2, 9), ids(2, 9)) for _ in range(count)]
        super().__init__((prompt, win, win if n == same else lose) for n, (prompt, win, lose) in enumerate(drawn))


def model(dropout=0.0):
    torch.manual_seed(1)
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return AutoModelForCausalLM.from_config(LlamaConfig(**shape, num_attention_heads=4, attention_dropout=dropout))


def loop(objective, directory=None, tuning="full", train=None, examples=None, net=None, **more):
    net = model() if net is None else net
    settings = {"effective_batch_size": 8, "max_tokens_per_device": 90, "num_train_epochs": 2, "save_steps": 3}
    chosen = {"method": tuning} | ({"rank": 4} if tuning == "lora" else {}) if isinstance(tuning, str) else tuning
    tuned = build("tune", chosen).attach(net, Probe(Topology.of(net)))
    return Loop(
        tuned,
        objective_of(objective),
        TrainSettings(**(settings | {"learning_rate": 1e-2} | (train or {}))),
        Preferences(24) if examples is None else examples,
        directory=directory,
        device="cpu",
        **more,
    )


def losses(made):
    return [record.loss for record in made.run()]


def dpo(**settings):
    return {"method": "dpo", **settings}


@pytest.mark.parametrize("tuning", ["full", "lora", "hft", "lisa"])
def test_the_reference_is_the_same_wherever_it_comes_from(tmp_path, tuning):
    asked = ["auto", "model", "cached"] + (["adapter_off"] if tuning == "lora" else [])
    found = [losses(loop(dpo(reference=r), tmp_path / r, tuning)) for r in asked]
    assert found[0][0] == pytest.approx(np.log(2), abs=1e-6)
    assert found[0][-1] < 0.69
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-4)


def test_a_model_by_name_is_the_reference(tmp_path):
    model().save_pretrained(tmp_path / "base")
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(tmp_path / "base")
    named = losses(loop(dpo(reference_model=str(tmp_path / "base"))))
    assert named == pytest.approx(losses(loop(dpo())), rel=1e-5)
    other = AutoModelForCausalLM.from_config(LlamaConfig(**(model().config.to_dict() | {"vocab_size": 70})))
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="70 entries"):
        loop(dpo(reference_model=str(tmp_path / "other")))


def _tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="w1", pad_token="w2")


MIX = [{"method": "dpo", "beta": 0.5}, {"method": "sft", "weight": 0.2}]


@pytest.mark.parametrize(
    "objective",
    [
        *(dpo(reference=r) for r in ("model", "cached")),
        {"method": "orpo"},
        [MIX[0] | {"reference": "cached"}, MIX[1]],
    ],
)
def test_resume_is_exact(tmp_path, objective):
    whole = loop(objective, tmp_path / "a", train={"num_train_epochs": 2})
    whole.run()
    cut = loop(objective, tmp_path / "b")
    for _, _ in zip(range(4), cut.steps(), strict=False):
        pass
    again = loop(objective, tmp_path / "b")
    assert len(again.run()) == whole.total - 3
    a, b = whole.tuned.state_dict(), again.tuned.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", [n for n in ALL if n != "kto"])
@pytest.mark.parametrize("packing", [False, True])
def test_micro_batches_do_not_matter(name, packing):
    objective = {"method": name} | ({"label_smoothing": 0.1} if name == "robust" else {})
    train = {"max_steps": 3, "learning_rate": 1e-3}
    whole = losses(loop(objective, train=train | {"max_tokens_per_device": 4096}, packing=packing))
    pieces = losses(loop(objective, train=train | {"max_tokens_per_device": 40}, packing=packing))
    assert pieces == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("packing", [False, True])
def test_micro_batches_do_not_matter_to_a_list(packing):
    train = {"max_steps": 3, "learning_rate": 1e-3}
    whole = losses(loop(MIX, train=train | {"max_tokens_per_device": 4096}, packing=packing))
    pieces = losses(loop(MIX, train=train | {"max_tokens_per_device": 40}, packing=packing))
    assert pieces == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("packing", [False, True])
def test_a_list_finds_the_same_reference_in_a_cache(tmp_path, tuning, packing):
    """With validation rows, whose loss takes the reference of theirs."""

    def records(reference):
        made = loop(
            [MIX[0] | {"reference": reference}, MIX[1]],
            tmp_path / reference,
            tuning,
            {"max_steps": 3, "eval_steps": 1, "learning_rate": 1e-3},
            packing=packing,
            validation=Preferences(7, seed=3),
        )
        return [value for record in made.run() for value in (record.loss, record.validation_loss)]

    assert records("cached") == pytest.approx(records("model"), rel=1e-4)
    assert sorted(p.name for p in (tmp_path / "cached").glob("*.parquet")) == [
        "reference-train.parquet",
        "reference-validation.parquet",
    ]


def test_a_rehearsal_scores_what_it_needs():
    for settings in ({}, {"effective_batch_size": 24}):
        whole, short = (loop(dpo(reference="cached"), train=settings, rehearse=r) for r in (None, 2))
        one, two = ([record.loss for _, record in zip(range(2), m.steps(), strict=False)] for m in (whole, short))
        assert one == two
        assert (short.train.reference != 0).any(axis=1).sum() == (16 if not settings else 24)


def test_a_part_of_weight_zero_changes_no_bit():
    assert losses(loop([*MIX, {"method": "kto", "weight": 0}])) == losses(loop(MIX))
    assert losses(loop([dpo(), {"method": "sft", "weight": 0}])) == losses(loop([dpo()])) == losses(loop(dpo()))


def test_the_reference_is_where_the_phase_began(tmp_path):
    """A second phase on what the first has made: its rewards begin at 0 again, cached or not, in folders of its own."""
    for reference in ("model", "cached"):
        net = model()
        for phase in ("1", "2"):
            made = loop(dpo(reference=reference), tmp_path / reference / phase, net=net, train={"max_steps": 3})
            first, *_, last = made.run()
            assert first.loss == pytest.approx(np.log(2), abs=1e-6)
            assert first.metrics["rewards/chosen"] == pytest.approx(0, abs=1e-5) != last.metrics["rewards/chosen"]
            net = made.tuned.merged()
    with pytest.raises(InputError, match="other weights"):  # not another phase's
        loop(dpo(reference="cached"), tmp_path / "cached" / "1", net=net).run()


def test_kto_never_meets_a_single_pair():
    assert len(losses(loop({"method": "kto"}, train={"max_tokens_per_device": 1}))) == 6
    with pytest.raises(InputError, match="effective_batch_size"):
        loop({"method": "kto"}, train={"effective_batch_size": 23}).run()


def test_a_cache_of_other_pairs_or_weights_is_refused(tmp_path):
    loop(dpo(reference="cached"), tmp_path).run()
    kept = (tmp_path / "reference-train.parquet").read_bytes()
    with pytest.raises(InputError, match="other pairs"):
        loop(dpo(reference="cached"), tmp_path, examples=Preferences(24, seed=1)).run()
    net = model()
    with torch.no_grad():
        net.lm_head.weight[0, 0] += 1
    with pytest.raises(InputError, match="other weights"):
        loop(dpo(reference="cached"), tmp_path, net=net).run()
    assert (tmp_path / "reference-train.parquet").read_bytes() == kept


def test_dropout_is_off_while_comparing_and_back_afterwards():
    net = model(dropout=0.5)
    assert losses(loop(dpo(), net=net))[0] == pytest.approx(np.log(2), abs=1e-6)
    assert net.model.layers[0].self_attn.attention_dropout == 0.5
    noisy = losses(loop(dpo(disable_dropout=False), net=model(dropout=0.5)))
    assert noisy[0] != pytest.approx(np.log(2), abs=1e-6)


def test_validation_takes_the_reference_too(tmp_path):
    made = loop(dpo(reference="cached"), tmp_path)
    again = Loop(
        made.tuned,
        made.objective,
        TrainSettings(effective_batch_size=8, max_steps=2, eval_steps=1, learning_rate=1e-6),
        Preferences(24),
        Preferences(7, seed=3),
        directory=tmp_path,
        device="cpu",
    )
    records = again.run()
    assert records[0].validation_loss == pytest.approx(np.log(2), abs=1e-3)
    assert (tmp_path / "reference-validation.parquet").is_file()


def test_the_default_learning_rate_is_that_of_preferences():
    assert loop(dpo(), train={"learning_rate": None}).learning_rate == pytest.approx(5e-7)
    assert loop(dpo(), tuning="lora", train={"learning_rate": None}).learning_rate == pytest.approx(5e-6)


def test_equal_answers_are_left_out_and_other_rows_refused():
    paired = PairedExamples(Preferences(5, same=2))
    assert (len(paired), paired.left_out) == (4, 1)
    examples = Preferences(5)
    examples.role[2:4] = PLAIN  # two answers of one conversation, say
    with pytest.raises(InputError, match=r"dpo learns from pairs .* row 2 of the data is a single answer"):
        loop(dpo(), examples=examples)
    examples.role[2:4] = DESIRABLE
    with pytest.raises(InputError, match=r"row 2 of the data is a judged answer.*objective: kto"):
        loop({"method": "orpo"}, examples=examples)


class Judged(Preferences):
    """Single answers, two to three of them desirable."""

    def __init__(self, count, seed=0):
        super().__init__(count, seed)
        self.row = np.arange(2 * count)
        self.role = np.where(np.arange(2 * count) % 5 < 2, DESIRABLE, UNDESIRABLE)


@pytest.mark.parametrize("kind", [Preferences, Judged])
def test_sft_learns_the_good_answers_only(kind):
    """Equal, to the last bit, to training on a data set that holds nothing else."""

    class Alone:
        def __init__(self, whole):
            self.rows = [r for r, role in zip(whole.rows, whole.role, strict=True) if role in (CHOSEN, DESIRABLE)]
            self.lengths = np.array([len(r["input_ids"]) for r in self.rows])

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, index):
            return self.rows[index]

    both, alone = loop({"method": "sft"}, examples=kind(12)), loop({"method": "sft"}, examples=Alone(kind(12)))
    assert both.train.left_out == 24 - len(alone.train) > 0
    assert losses(both) == losses(alone)


def test_kto_learns_from_judged_answers(tmp_path):
    made = loop({"method": "kto", "beta": 1.0}, tmp_path, examples=Judged(12), train={"num_train_epochs": 12})
    records = made.run()
    assert records[0].loss == pytest.approx(0.5, abs=1e-6)
    assert records[-1].loss < 0.3
    last = records[-1].metrics
    assert last["rewards/chosen"] > 0.5 and last["rewards/rejected"] < -0.5
    assert not {"rewards/margin", "rewards/accuracy"} & set(last)


def test_kto_on_judged_answers_resumes_exactly(tmp_path):
    objective = {"method": "kto"}
    whole = loop(objective, tmp_path / "a", examples=Judged(12))
    whole.run()
    cut = loop(objective, tmp_path / "b", examples=Judged(12))
    for _, _ in zip(range(4), cut.steps(), strict=False):
        pass
    again = loop(objective, tmp_path / "b", examples=Judged(12))
    assert len(again.run()) == whole.total - 3
    a, b = whole.tuned.state_dict(), again.tuned.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_no_adapter_to_switch_off():
    with pytest.raises(InputError, match="no adapter to switch off"):
        loop(dpo(reference="adapter_off"))


@pytest.mark.parametrize("options", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"bias": "all"}])
def test_an_adapter_that_changes_its_base_is_no_reference_when_off(options, tmp_path):
    tuning = {"method": "lora", "rank": 4, "peft": options}
    with pytest.raises(InputError, match="no adapter to switch off"):
        loop(dpo(reference="adapter_off"), tuning=tuning)
    found = [losses(loop(dpo(reference=r), tmp_path / r, tuning)) for r in ("auto", "cached")]
    assert found[0][0] == pytest.approx(np.log(2), abs=1e-6)
    assert found[1] == pytest.approx(found[0], rel=1e-4)
