"""The start of the emulator LoRA that is computed by regression."""

import logging
from contextlib import contextmanager
from itertools import chain

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import ARCHITECTURES, LORA, base_tensors, changed, slow, sums, tiny_model
from peft import LoraConfig

from fedbiot_trainer import EmulatorAlignmentTrainer, FedBiOTConfig
from fedbiot_trainer.server import alignment, closed_form
from fedbiot_trainer.server.capture import capture, causal_lm, run_full_model
from fedbiot_trainer.server.closed_form import (
    RIDGE,
    PartialDecoder,
    Regression,
    find_added_linears,
    start_in_closed_form,
)
from fedbiot_trainer.server.split_model import SplitModel
from fedbiot_trainer.shared.lora_state import CLIENT, EMULATOR, get_lora_state
from fedbiot_trainer.shared.losses import hidden_state_loss


pytestmark = pytest.mark.architectures

CPU = torch.device("cpu")


def texts(num_batches=6, batch_size=8, length=12, seed=0):
    """Batches of random tokens, with padding on the right."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(num_batches):
        tokens = torch.randint(2, 48, (batch_size, length), generator=generator)
        lengths = torch.randint(length // 2, length + 1, (batch_size, 1), generator=generator)
        batches.append({"input_ids": tokens, "attention_mask": (torch.arange(length) < lengths).long()})
    return batches


def split(model, drop_ratio=0.5, lora=LORA, **kwargs):
    return SplitModel(model, 2, drop_ratio, lora, with_output_linears=True, **kwargs)


def start(models, batches):
    return start_in_closed_form(models, find_added_linears(models, CPU), batches, Accelerator(cpu=True))


@torch.no_grad()
def distance(models, batches):
    """Mean relative squared distance of what enters the adapter layers."""
    total = tokens = 0
    models.adap_emu.eval()
    for batch in batches:
        teacher = run_full_model(models, batch)
        with capture(models.adap_emu, models.split.layers_name, models.split.top_position) as student:
            causal_lm(models.adap_emu).base_model(**batch, use_cache=False)
        mask = batch["attention_mask"]
        total += hidden_state_loss(student.entering, teacher.entering, mask).item()
        tokens += mask.sum().item()
    return total / tokens


# ---- the regression


def some_tokens(num_tokens=400, in_features=12, out_features=7):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, in_features, generator=generator)
    y = x @ torch.randn(in_features, out_features, generator=generator)
    return x, y + torch.randn(num_tokens, out_features, generator=generator)


def test_full_rank_is_least_squares():
    x, y = some_tokens()
    regression = Regression(12, 7, CPU)
    for part in range(0, 400, 50):
        regression.add(x[part : part + 50], y[part : part + 50])
    a, b = regression.solve(7, ridge=0.0)
    expected = np.linalg.lstsq(x.double().numpy(), y.double().numpy(), rcond=None)[0].T
    assert np.allclose(b @ a, expected, atol=1e-5)
    assert a.norm().item() == pytest.approx(b.norm().item())


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_smaller_rank_is_the_best_of_that_rank(rank):
    """What is fitted is, of all fits of the rank, the nearest to the targets: that of full rank, cut by its SVD."""
    x, y = some_tokens()
    regression = Regression(12, 7, CPU)
    regression.add(x, y)
    a, b = regression.solve(rank, ridge=0.0)
    fitted = x.double() @ (b @ a).T
    u, s, vh = torch.linalg.svd(x.double() @ torch.linalg.lstsq(x.double(), y.double()).solution, full_matrices=False)
    assert torch.allclose(fitted, u[:, :rank] * s[:rank] @ vh[:rank], atol=1e-4)


def test_the_ridge_is_of_the_inputs_size():
    x, y = some_tokens()
    regression = Regression(12, 7, CPU)
    regression.add(x, y)
    a, b = regression.solve(7)
    gram = (x.T @ x).double()
    expected = torch.linalg.solve(gram + RIDGE * gram.diagonal().mean() * torch.eye(12), (x.T @ y).double()).T
    assert torch.allclose(b @ a, expected, atol=1e-6)


def test_nothing_to_fit_is_no_lora():
    regression = Regression(4, 3, CPU)
    regression.add(torch.randn(10, 4), torch.zeros(10, 3))
    a, b = regression.solve(2)
    assert a.isfinite().all() and b.isfinite().all() and not (b @ a).any()


# ---- which linear

# Behind the linear there is a norm in Gemma and OLMo 2; Bloom's own code takes its weights, so there is no LoRA on it.
NONE = ("gemma2", "gemma3_text", "olmo2", "bloom")
ADDS = {name: changes for name, changes in ARCHITECTURES.items() if name not in NONE}


@pytest.mark.parametrize("architecture", ADDS)
def test_linears_whose_output_is_added(architecture):
    models = split(tiny_model(architecture.partition("-")[0], **ADDS[architecture]))
    found = find_added_linears(models, CPU)
    assert set(found) == set(models.split.emulator_positions)
    for linear in found.values():
        assert linear.factor == pytest.approx(1.0, abs=1e-3)
        assert linear.module.in_features >= 48  # the MLP's, not the attention's


@pytest.mark.parametrize("architecture", NONE)
def test_no_such_linear(architecture):
    assert find_added_linears(split(tiny_model(architecture, **ARCHITECTURES[architecture])), CPU) == {}


def test_a_factor_behind_the_linear():
    found = find_added_linears(split(tiny_model("granite", residual_multiplier=0.22)), CPU)
    assert {round(linear.factor, 3) for linear in found.values()} == {0.22}


def test_the_emulator_lora_is_put_on_the_linear():
    attention = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    models = split(tiny_model(), lora=attention)
    keys = get_lora_state(models.adap_emu, EMULATOR)
    assert {key.split(".")[-3] for key in keys} == {"q_proj", "v_proj", "down_proj"}
    assert {key.split(".")[-3] for key in get_lora_state(models.adap_emu, "client")} == {"q_proj", "v_proj"}
    assert len(find_added_linears(models, CPU)) == 3
    assert find_added_linears(SplitModel(tiny_model(), 2, 0.5, attention), CPU) == {}


# ---- the start


def by_hand(models, batches, ridge=RIDGE):
    """The weights of the first kept layer, from float64 regression on what Hugging Face's own model does."""
    full, (kept, following) = causal_lm(models.adap_fu), (*models.split.kept, models.split.top_index)[:2]
    rows, targets = [], []
    seen = []
    hook = full.model.layers[kept].mlp.down_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    for batch in batches:
        mask = batch["attention_mask"].bool()
        with torch.no_grad():
            states = full(**batch, output_hidden_states=True).hidden_states
        target, output = states[following][mask].double(), states[kept + 1][mask].double()
        scale = target.pow(2).mean(-1, keepdim=True).rsqrt()
        rows.append(seen[-1][mask].double() * scale)
        targets.append((target - output) * scale)
    hook.remove()
    x, y = torch.cat(rows), torch.cat(targets)
    gram = x.T @ x
    return torch.linalg.solve(gram + ridge * gram.diagonal().mean() * torch.eye(len(gram)).double(), x.T @ y).T


def test_the_first_layer_is_least_squares():
    models, batches = split(tiny_model(), lora=LoraConfig(r=32, lora_alpha=64, target_modules="all-linear")), texts()
    linear = find_added_linears(models, CPU)[0].module
    start(models, batches)
    ours = linear.scaling[EMULATOR] * linear.lora_B[EMULATOR].weight @ linear.lora_A[EMULATOR].weight
    exact = by_hand(models, batches)
    assert (ours - exact).norm() < 1e-4 * exact.norm()


@pytest.mark.parametrize("drop_ratio", [slow(0.2), 0.5])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "falcon", "phi3"])
def test_it_brings_the_emulator_closer(architecture, drop_ratio):
    models = split(tiny_model(architecture, **ARCHITECTURES[architecture]), drop_ratio)
    frozen = [base_tensors(model) for model in (models.adap_emu, models.adap_fu)]
    fitted, heldout = texts(num_batches=30), texts(seed=1)
    before = distance(models, heldout)
    report = start(models, fitted)
    assert report["closed_form_l2"] == pytest.approx(distance(models, fitted), rel=1e-4)
    assert report["closed_form_tokens"] == sum(batch["attention_mask"].sum() for batch in fitted)
    assert distance(models, heldout) < 0.8 * before
    assert changed(frozen[0], models.adap_emu) == changed(frozen[1], models.adap_fu) == []


def test_padding_does_not_count():
    batches = texts()
    scribbled = [{**b, "input_ids": b["input_ids"].where(b["attention_mask"].bool(), 7)} for b in batches]
    states = []
    for given in (batches, scribbled):
        models = split(tiny_model())
        start(models, given)
        states.append(get_lora_state(models.adap_emu, EMULATOR))
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_token_of_hidden_states_zero_does_not_count():
    """Such as one whose embedding is zero, at the start of a text: it has no size that a distance is relative to."""
    model = tiny_model()
    model.get_input_embeddings().weight.data[2] = 0.0
    fitted = [{**batch, "input_ids": batch["input_ids"].clone()} for batch in texts(num_batches=20)]
    for batch in fitted:
        batch["input_ids"][:, 0] = 2
    models = split(model)
    assert not run_full_model(models, fitted[0]).entering[:, 0].any()
    before = distance(models, texts(seed=1))
    assert np.isfinite(start(models, fitted)["closed_form_l2"])
    assert distance(models, texts(seed=1)) < 0.8 * before


def test_adapter_layers_at_the_bottom_stay_out():
    models = split(tiny_model(), num_adapter_layers_bottom=2)
    fitted, before = texts(num_batches=20), distance(models, texts(seed=1))
    start(models, fitted)
    assert distance(models, texts(seed=1)) < 0.8 * before


def test_in_bfloat16():
    models = split(tiny_model(dtype=torch.bfloat16))
    before = distance(models, texts(seed=1))
    start(models, texts(num_batches=20))
    assert distance(models, texts(seed=1)) < 0.8 * before


# ---- in a training


def test_what_runs_is_gathered_and_no_more(monkeypatch):
    active, runs = [], []

    @contextmanager
    def recording(parameters, write=False):
        parameters = list(parameters)
        assert not {*parameters} & {*chain(*active)}  # the inner block would release what the outer one needs
        active.append(parameters)
        yield parameters
        active.pop()

    def watched(decoder, start, stop, *args):
        runs.append(stop - start)
        assert {*chain(*active)} == {*decoder.around, *decoder.layers[start:stop].parameters()}
        return run(decoder, start, stop, *args)

    run = PartialDecoder.run
    monkeypatch.setattr(closed_form, "gathered", recording)
    monkeypatch.setattr(PartialDecoder, "run", watched)
    start(split(tiny_model()), texts())
    assert max(runs) == 3  # a kept layer and two dropped ones


def test_alignment_goes_on_from_it(make_alignment):
    trainer = make_alignment(alignment_init="closed_form", initial_alignment_steps=1)
    public = [trainer.data_collator([{"input_ids": ids} for ids in trainer.train_dataset["input_ids"]])]
    public = [{name: public[0][name] for name in ("input_ids", "attention_mask")}]
    before = distance(trainer.models, public)
    done = []
    report = trainer.initialize(lambda *progress: done.append(progress))
    assert done[-1][0] == done[-1][1] == len(done)
    assert report["closed_form_l2"] < 0.8 * before
    after_start = get_lora_state(trainer.model, EMULATOR)
    assert trainer.initialize() == {}
    trainer.train()
    assert trainer.step_metrics["alignment_l2"][0] == pytest.approx(report["closed_form_l2"], rel=0.5)
    after = get_lora_state(trainer.model, EMULATOR)
    assert all(not torch.equal(after[key], after_start[key]) for key in after if "lora_B" in key)


def test_as_many_texts_as_are_asked_for(make_alignment):
    trainer = make_alignment(alignment_init="closed_form", alignment_init_tokens=20)
    report = trainer.initialize()
    assert 20 <= report["closed_form_tokens"] < 20 + max(map(len, trainer.train_dataset["input_ids"]))


def is_zero(trainer):
    return not any(tensor.any() for key, tensor in get_lora_state(trainer.model, EMULATOR).items() if "lora_B" in key)


def test_zero_starts_without_effect(make_alignment):
    trainer = make_alignment()
    assert trainer.initialize() == {} and is_zero(trainer)


def test_where_it_cannot_be_computed(make_alignment):
    gemma = tiny_model("gemma2", **ARCHITECTURES["gemma2"])
    with pytest.raises(
        ValueError, match="`alignment_init` is 'closed_form', but in Gemma2ForCausalLM .* Use 'auto' or 'zero'"
    ):
        make_alignment(model=gemma, alignment_init="closed_form")


Q_AND_V = {"q_proj", "v_proj"}


def aligned(args, tokenizer, name="llama", **loras):
    model = tiny_model(name, **ARCHITECTURES[name])
    return EmulatorAlignmentTrainer(model, args, sums(40, 60), processing_class=tokenizer, **loras)


def emulator_lora(trainer):
    return set(trainer.model.peft_config[EMULATOR].target_modules)


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_auto_computes_it_where_it_can_be(targets, make_args, tokenizer):
    assert FedBiOTConfig.alignment_init == "auto"
    reports, states = [], []
    for init in ("auto", "closed_form"):
        torch.manual_seed(0)
        lora = LoraConfig(r=4, target_modules=targets)
        trainer = aligned(make_args(alignment_init=init), tokenizer, peft_config=lora)
        reports.append(trainer.initialize())
        states.append(get_lora_state(trainer.model, EMULATOR))
        if targets is None:
            assert emulator_lora(trainer) == {*Q_AND_V, "down_proj"}
            assert set(trainer.model.peft_config[CLIENT].target_modules) == Q_AND_V
    assert reports[0] == reports[1] != {}
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], tensor) for key, tensor in states[1].items())


@pytest.mark.parametrize(
    "name, loras",
    [
        ("llama", {"emulator_peft_config": LoraConfig(r=4, target_modules=sorted(Q_AND_V))}),
        ("gemma2", {"peft_config": LoraConfig(r=4, target_modules="all-linear")}),
    ],
    ids=["a LoRA of its own on other linears", "no such linear"],
)
def test_auto_is_zero_and_says_so_where_it_cannot_be(name, loras, make_args, tokenizer, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    trainer = aligned(make_args(alignment_init="auto", log_level="warning"), tokenizer, name, **loras)
    assert trainer.initialize() == {} and is_zero(trainer)
    assert "starts without effect: in " in caplog.text
    if name == "llama":
        assert emulator_lora(trainer) == Q_AND_V


@pytest.mark.parametrize("settings", [{"initial_alignment_steps": 0}, {"emulator_drop_ratio": 0.0}], ids=str)
def test_auto_is_zero_where_there_is_nothing_to_start(make_args, tokenizer, settings, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    trainer = aligned(make_args(alignment_init="auto", log_level="warning", **settings), tokenizer)
    assert trainer.initialize() == {} and is_zero(trainer)
    assert emulator_lora(trainer) == Q_AND_V
    assert "without effect" not in caplog.text


def test_the_matrices_are_where_float64_is():
    """Apple's GPUs have none."""
    regression = Regression(4, 3, torch.device("mps"))
    assert (regression.gram.device, regression.products.device, regression.gram.dtype) == (CPU, CPU, torch.float64)


def test_a_resumed_run_does_not_compute_it_again(make_runner, monkeypatch):
    settings = {"alignment_init": "closed_form", "initial_alignment_steps": 0}
    make_runner(num_rounds=1, **settings).train()
    monkeypatch.setattr(alignment, "start_in_closed_form", lambda *args: pytest.fail("computed again"))
    summary = make_runner(num_rounds=2, resume_from_checkpoint=True, **settings).train()
    assert summary.rounds == 2 and summary.initial_alignment["closed_form_l2"] > 0


def test_a_checkpoint_has_its_start(make_alignment, monkeypatch):
    settings = {"alignment_init": "closed_form", "save_strategy": "steps", "save_steps": 2}
    trainer = make_alignment(**settings)
    trainer.train()
    monkeypatch.setattr(alignment, "start_in_closed_form", lambda *args: pytest.fail("computed again"))
    resumed = make_alignment(**settings)
    resumed.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-2")
    states = [get_lora_state(each.model, EMULATOR) for each in (trainer, resumed)]
    assert all(torch.equal(states[1][key], tensor) for key, tensor in states[0].items())


def test_a_run_without_alignment_steps(make_runner):
    runner = make_runner(
        num_rounds=1,
        initial_alignment_steps=0,
        alignment_steps=0,
        alignment_init="closed_form",
        eval_dataset=sums(9, 12),
    )
    summary = runner.train()
    assert summary.initial_alignment["closed_form_tokens"] > 0
    assert summary.initial_alignment["closed_form_seconds"] > 0
    assert any(tensor.any() for key, tensor in runner.server.emulator_lora.items() if "lora_B" in key)


def test_the_sums_are_not_in_half_precision():
    x = torch.full((4096, 4), 300.0)
    regression = Regression(4, 4, CPU)
    with torch.autocast("cpu", torch.bfloat16):
        regression.add(x, x + 1)
    torch.testing.assert_close(regression.gram, torch.full_like(regression.gram, 4096 * 300.0**2), rtol=2e-4, atol=0)


def test_a_rank_above_the_number_of_outputs():
    models = split(tiny_model(), lora=LoraConfig(r=40, lora_alpha=40, target_modules="all-linear"))
    before = distance(models, texts())
    start(models, texts())
    assert distance(models, texts()) < 0.8 * before
