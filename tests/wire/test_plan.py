import dataclasses
import json

import pytest
from conftest import sums

from fedbiot_trainer import ClientSFTTrainer, FedBiOTConfig
from fedbiot_trainer.config.training_arguments import TREATMENTS, Used
from fedbiot_trainer.wire.plan import FILE, PLANNED, SITES, TrainingPlan


# Of what is used in a run: what a payload, the package's tokenizer or the cut of the batch says, and what is the owner's alone.
NO_SITES = {
    "gradient_accumulation_steps", "chat_template_path", "eos_token", "pad_token", "remove_unused_columns", "trust_remote_code",
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "report_to", "run_name", "project",
    "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "save_total_limit", "resume_from_checkpoint",
    "push_to_hub", "hub_model_id", "hub_token", "hub_private_repo", "hub_revision",
}  # fmt: skip


def test_each_training_argument_that_is_used_has_one_who_decides():
    used = {name for name, treatment in TREATMENTS.items() if isinstance(treatment, Used)}
    assert len(set(PLANNED) | set(SITES)) == len(PLANNED) + len(SITES)
    assert used - set(PLANNED) - set(SITES) == NO_SITES
    own = (set(PLANNED) | set(SITES)) - used
    assert own == {"num_rounds", "local_steps", "proximal_weight", "freeze_a", "client_zero_shot_examples"}
    assert own <= {f.name for f in dataclasses.fields(FedBiOTConfig)}


@pytest.fixture
def plan(make_args, tmp_path):
    args = make_args(
        per_device_train_batch_size=4, gradient_accumulation_steps=3, lr_scheduler_type="cosine", warmup_steps=0.1,
        lr_scheduler_kwargs={"num_cycles": 2}, optim_args="x=1", adam_beta2=0.9, seed=7, packing=True, aggregation="svd",
        client_ranks=["a=2"],
    )  # fmt: skip
    TrainingPlan.of(args).save(tmp_path)
    return args, TrainingPlan.load(tmp_path)


def test_a_site_trains_as_the_owner_decides(plan):
    owner, plan = plan
    site = plan.arguments("site", use_cpu=True, per_device_train_batch_size=2, dataloader_num_workers=1)
    assert {name: getattr(site, name) for name in PLANNED} == {name: getattr(owner, name) for name in PLANNED}
    assert (site.per_device_train_batch_size, site.gradient_accumulation_steps) == (2, 6)
    assert (site.output_dir, site.dataloader_num_workers, plan.ranks) == ("site", 1, {"a": 2})


@pytest.mark.parametrize(
    "processes, size, cut", [(1, None, (12, 1)), (2, None, (6, 1)), (2, 3, (3, 2)), (3, 2, (2, 2))]
)
def test_the_batch_is_cut_for_the_hardware(plan, monkeypatch, processes, size, cut):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    made = []
    monkeypatch.setattr("fedbiot_trainer.wire.plan.FedBiOTConfig", lambda *_, **settings: made.append(settings))
    plan[1].arguments("site", per_device_train_batch_size=size)
    assert (made[0]["per_device_train_batch_size"], made[0]["gradient_accumulation_steps"]) == cut


@pytest.mark.parametrize(
    "processes, size, advice",
    [
        (1, 5, r"Set it to one of \[1, 2, 3, 4, 6, 12\]"),
        (4, 2, r"Set it to one of \[1, 3\]"),
        (5, None, "Use a number of proc"),
    ],
)
def test_a_batch_that_cannot_be_cut(plan, monkeypatch, processes, size, advice):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(ValueError, match=f"the owner's batch of 12 examples cannot be cut into such parts. {advice}"):
        plan[1].arguments("site", per_device_train_batch_size=size)


@pytest.mark.parametrize(
    "setting, why",
    [
        ({"learning_rate": 1.0}, "`learning_rate` is 1.0, which the owner decides in the training plan"),
        ({"max_length": 8}, "`max_length` is 8, which the owner decides"),
        (
            {"trust_remote_code": True},
            "`trust_remote_code` is True, which is no setting of a site's. A site may set: output_dir",
        ),
        ({"emulator_drop_ratio": 0.2}, "which is no setting of a site's"),
    ],
)
def test_what_is_not_a_sites_to_decide(plan, setting, why):
    with pytest.raises(ValueError, match=why):
        plan[1].arguments("site", **setting)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"schema_version": 2}, "has schema version 2, and this library reads 1; they differ in nothing else"),
        ({"settings": {}}, "they differ in adam_beta1, .*Install the version of fedbiot-trainer that the owner uses"),
        ({"unknown": 1}, "they differ in unknown"),
        ({"batch_size": 0}, "`batch_size` of the training plan .* is 0, which is no number"),
        ({"batch_size": True}, "`batch_size` of the training plan .* is True"),
    ],
    ids=str,
)
def test_a_plan_that_cannot_be_followed(plan, tmp_path, change, reason):
    file = tmp_path / FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=reason):
        TrainingPlan.load(tmp_path)


def test_a_folder_without_a_plan(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="has no training_plan.json. A run writes it into its emulator package"
    ):
        TrainingPlan.load(tmp_path)


def test_a_run_leaves_its_plan_in_the_package(make_runner, tmp_path):
    runner = make_runner(num_rounds=1)
    summary = runner.train()
    plan = TrainingPlan.load(runner.folder.package)
    assert plan == TrainingPlan.of(runner.args, completion_only_loss=True)
    files = [file for file in runner.folder.package.rglob("*") if file.is_file()]
    assert summary.bytes["once_per_client"] == sum(file.stat().st_size for file in files)
    trainer = ClientSFTTrainer(
        str(runner.folder.package), plan.arguments(str(tmp_path / "site"), use_cpu=True), sums(0, 4)
    )
    assert trainer.args.max_steps == runner.args.local_steps
