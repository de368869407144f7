import json

import pytest
from conftest import LORA, slow, sums, tiny_model
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedbiot_trainer import METHODS, run_method
from fedbiot_trainer.config.methods import ABLATION, COMPARISON, WITHOUT_EMULATOR
from fedbiot_trainer.shared.records import RunSummary
from fedbiot_trainer.shared.text_loss import evaluate_loss


DATA = {"north": sums(0, 8), "south": sums(8, 12)}


@pytest.fixture
def run(make_args, tokenizer):
    def run(method, model=None, **changes):
        return run_method(
            method,
            model=model or tiny_model(),
            args=make_args(**changes),
            client_datasets=DATA,
            public_dataset=sums(40, 50),
            eval_dataset=sums(50, 55),
            processing_class=tokenizer,
            peft_config=LORA,
        )

    return run


@pytest.fixture(scope="module")
def summaries():
    return {}


@pytest.fixture(scope="module")
def runs_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def finished(run, summaries, runs_folder):
    """The summary and the folder of a run of a method, one for all tests that only look at it."""

    def finished(method):
        folder = runs_folder / method
        if method not in summaries:
            summaries[method] = run(method, output_dir=str(folder), emulator_drop_ratio=0.5, eval_drift=True)
        return summaries[method], folder

    return finished


def test_every_method_is_in_the_comparison_or_the_ablation():
    assert {*COMPARISON, *ABLATION} == METHODS.keys()


QUICK = {"zero_shot", "local_only", "fedbiot", "fedot", "full_lora"}
BOTH_ENDS = {name: [0, 7] for name in ("offsite_tuning", "fedot", "fedbiot_both_ends")}
ADAPTER_LAYERS = {**BOTH_ENDS, "full_lora": list(range(8))}


@pytest.mark.parametrize("method", [name if name in QUICK else slow(name) for name in METHODS])
def test_every_method_runs(finished, method):
    summary, folder = finished(method)
    assert list(summary.split.adapter_layers) == ADAPTER_LAYERS.get(method, [6, 7])
    assert summary.adap_fu["loss"] > 0
    assert RunSummary.read(folder / "summary.json") == summary
    if method == "zero_shot":
        assert summary.adap_fu == summary.zero_shot
    else:
        assert summary.adap_fu["loss"] != summary.zero_shot["loss"]


@pytest.mark.parametrize("aligns", [0, 1])
def test_with_nothing_dropped_one_model_is_measured(make_runner, monkeypatch, aligns):
    settings = {"num_rounds": 1, "emulator_drop_ratio": 0.0, "alignment_steps": aligns, "initial_alignment_steps": 0}
    runner = make_runner(**settings)
    runner.train()
    models, evaluator, measured = runner.server.models, runner.evaluator, []
    evaluator.forget()

    def measure(model, *args):
        measured.append(model)
        return evaluate_loss(model, *args)

    monkeypatch.setattr("fedbiot_trainer.evaluation.evaluator.evaluate_loss", measure)
    scores = evaluator.adapted()
    assert len(measured) == 1
    [tokens] = evaluator._sets.values()
    alone = evaluate_loss(models.adap_emu, tokens, evaluator.data_collator, 8, evaluator.accelerator)
    assert scores["adap_emu"] == pytest.approx(alone)


def test_budgets_are_equal(make_args):
    args = make_args()
    fedbiot, fedot, pooled = (METHODS[name].configure(args, 2) for name in ("fedbiot", "fedot", "offsite_tuning"))
    total = args.initial_alignment_steps + args.num_rounds * args.alignment_steps
    assert (fedot.initial_alignment_steps, fedot.alignment_steps) == (total, 0)
    assert (fedbiot.initial_alignment_steps, fedbiot.alignment_steps) == (3, 2)
    assert pooled.local_steps == 2 * fedot.local_steps == 2 * args.local_steps
    assert fedot.proximal_weight == fedot.alignment_kl_weight == 0
    assert args.teacher == "cached" and fedot.teacher == "online"


def test_fedbiot_as_in_the_papers_code(make_args):
    """What the method chooses is the paper's, whatever the run's own choice; how long it trains is the run's."""
    ours = make_args(
        proximal_weight=1e-4, alignment_init="closed_form", alignment_kl_weight=0.0, alignment_warmup_steps=2
    )
    paper = METHODS["fedbiot_paper"].configure(ours, 2)
    assert (paper.proximal_weight, paper.alignment_kl_weight, paper.alignment_init) == (0.01, 0.9, "zero")
    assert (paper.initial_alignment_steps, paper.alignment_steps, paper.alignment_warmup_steps) == (500, 10, 0)
    assert (paper.num_rounds, paper.local_steps) == (ours.num_rounds, ours.local_steps)
    assert ours.proximal_weight == 1e-4


def test_the_ceiling_differs_from_fedbiot_by_the_emulator_alone(run, finished):
    whole = run("fedbiot", emulator_drop_ratio=0.0, initial_alignment_steps=0, alignment_steps=0)
    ceiling, _ = finished("ceiling")
    assert ceiling.adap_fu == pytest.approx(whole.adap_fu)


def test_fedbiot_is_the_plain_run(finished, make_runner):
    summary, _ = finished("fedbiot")
    plain = make_runner(peft_config=LORA).train()
    assert summary.adap_fu == plain.adap_fu and summary.adap_emu == plain.adap_emu


def test_clients_alone_see_nothing_of_each_other(finished, make_runner):
    summary, _ = finished("local_only")
    assert summary.clients.keys() == DATA.keys()
    losses = [results["adap_fu"]["loss"] for results in summary.clients.values()]
    assert summary.adap_fu["loss"] == pytest.approx(sum(losses) / 2)
    alone = make_runner(client_datasets={"south": DATA["south"]}, peft_config=LORA).train()
    assert alone.adap_fu == summary.clients["south"]["adap_fu"]
    assert losses[0] != losses[1]


def test_lora_on_all_layers_is_a_plain_peft_folder(finished, tmp_path):
    summary, folder = finished("full_lora")
    assert summary.parameters.client_share == 1
    tiny_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tuned = PeftModel.from_pretrained(base, folder / "client_lora")
    assert len([name for name, _ in tuned.named_parameters() if "lora_A" in name]) == 8 * 7
    assert not (folder / "emulator_package" / "emulator_lora").exists()


def test_drift_is_zero_without_drops(run, finished, tmp_path):
    run("fedbiot", emulator_drop_ratio=0.0, eval_drift=True)
    _, half = finished("fedbiot")
    for folder, drifts in ((tmp_path / "run", False), (half, True)):
        records = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
        assert len(records) == 2
        for record in records:
            assert (record["drift_l2"] > 1e-6) == (record["drift_kl"] > 1e-6) == drifts


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("fedavg", {}, "`method` is 'fedavg', but it must be one of zero_shot, offsite_tuning, fedot"),
        ("local_only", {"push_to_hub": True}, "`push_to_hub` is True, but `method` is 'local_only'"),
        ("fedot", {"num_adapter_layers": 8}, "is 4 and `num_adapter_layers_bottom` is 4.*Use at most 7 together"),
        (
            "fedot",
            {"num_adapter_layers": 1},
            "`num_adapter_layers` is 1, but the method has adapter layers at both ends",
        ),
    ],
)
def test_what_cannot_work(run, method, changes, message):
    with pytest.raises(ValueError, match=message):
        run(method, **changes)


def test_clients_alone_are_refused_under_deepspeed(make_args):
    args = make_args()
    args.deepspeed_plugin = object()
    with pytest.raises(ValueError, match="`method` is 'local_only', .* DeepSpeed for one run only"):
        run_method("local_only", tiny_model(), args, DATA)


def test_methods_without_an_emulator_do_not_depend_on_the_drop_ratio(run, finished):
    for method in WITHOUT_EMULATOR:
        half, _ = finished(method)
        assert run(method, emulator_drop_ratio=0.2, overwrite_output_dir=True).adap_fu["loss"] == half.adap_fu["loss"]
