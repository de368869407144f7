import dataclasses

import pytest
from conftest import CHECKPOINTING
from trl import SFTConfig

from fedbiot_trainer import FedBiOTConfig
from fedbiot_trainer.config.settings import GROUPS


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("emulator_drop_ratio", 1.0, r"`emulator_drop_ratio` is 1.0, .* in \[0, 1\)"),
        ("emulator_drop_ratio", -0.1, r"`emulator_drop_ratio` is -0.1, .* in \[0, 1\)"),
        ("fraction_train", 0.0, r"`fraction_train` is 0.0, .* in \(0, 1\]"),
        ("fraction_train", 1.1, r"`fraction_train` is 1.1, .* in \(0, 1\]"),
        ("num_adapter_layers", 0, "`num_adapter_layers` is 0, but it must be at least 1"),
        ("num_adapter_layers", -2, "`num_adapter_layers` is -2, but it must be at least 1, or -1 for all layers"),
        ("num_adapter_layers_bottom", -1, "`num_adapter_layers_bottom` is -1, but it cannot be negative"),
        ("num_rounds", -1, "`num_rounds` is -1, but it cannot be negative"),
        ("local_steps", 0, "`local_steps` is 0, but it must be at least 1"),
        ("num_clients", 0, "`num_clients` is 0, but it must be at least 1"),
        ("emulator_lora_r", 0, "`emulator_lora_r` is 0, but a rank must be at least 1"),
        ("proximal_weight", -1.0, "`proximal_weight` is -1.0, but it cannot be negative"),
        ("alignment_kl_weight", -1.0, "`alignment_kl_weight` is -1.0, but it cannot be negative"),
        ("alignment_steps", -1, "`alignment_steps` is -1, but it cannot be negative"),
        ("eval_rounds", -1, "`eval_rounds` is -1, but it cannot be negative"),
        ("alignment_learning_rate", 0.0, "`alignment_learning_rate` is 0.0, but it must be positive"),
        ("dirichlet_alpha", 0.0, "`dirichlet_alpha` is 0.0, but it must be positive"),
        ("partition", "random", "`partition` is 'random', but it must be one of iid, dirichlet, by-column"),
        ("partition", "by-column", "`partition` is 'by-column', .* `partition_column` is not set"),
        ("teacher", "offline", "`teacher` is 'offline', but it must be one of cached, online"),
        ("teacher_cache_max_gb", 0, "`teacher_cache_max_gb` is 0, but it must be positive"),
        ("plug_in_scales", [], r"`plug_in_scales` is \[\], but it must be factors of the client LoRA"),
        ("plug_in_scales", [1.0, -0.5], r"`plug_in_scales` is \[1.0, -0.5\], .* none of them negative"),
        ("plug_in_scales", [float("inf")], r"`plug_in_scales` is \[inf\], but it must be factors"),
        ("max_steps", 100, "`max_steps` is 100, but a federated run counts `num_rounds`"),
        ("lr_scheduler_type", "greedy", "`lr_scheduler_type` is 'greedy'"),
        (
            "alignment_lr_scheduler_type",
            "cosine_with_min_lr",
            "`alignment_lr_scheduler_type` is .* needs `lr_scheduler_kwargs`",
        ),
        ("train_sampling_strategy", "group_by_length", "`train_sampling_strategy` is 'group_by_length'"),
        ("auto_find_batch_size", True, "`auto_find_batch_size` is True"),
        ("neftune_noise_alpha", 5.0, "`neftune_noise_alpha` is 5.0"),
    ],
)
def test_values_that_cannot_work(make_args, name, value, message):
    with pytest.raises(ValueError, match=message):
        make_args(**{name: value})


def test_works_on_this_machine_without_further_settings(tmp_path):
    args = FedBiOTConfig(output_dir=str(tmp_path))
    assert (args.adam_beta1, args.adam_beta2) == (0.9, 0.95) and not getattr(args, CHECKPOINTING)


def test_every_setting_is_documented_and_helps():
    inherited = {field.name for field in dataclasses.fields(SFTConfig)}
    ours = ("fedbiot_trainer.config.settings", "fedbiot_trainer.config.aggregation")
    groups = [group for group in FedBiOTConfig.__mro__ if group.__module__ in ours]
    assert tuple(groups) == GROUPS  # which is what the command line checks before any library is imported
    for field in dataclasses.fields(FedBiOTConfig):
        if field.name not in inherited:
            [group] = [group for group in groups if field.name in group.__annotations__]
            assert f"{field.name} (`" in group.__doc__, field.name
            assert field.metadata["help"]
            assert "%" not in field.metadata["help"]


def test_derived_arguments_leave_the_original_alone(make_args):
    args = make_args(report_to="tensorboard")
    assert args.client_arguments().max_steps == args.local_steps
    assert args.alignment_arguments().learning_rate == args.alignment_learning_rate
    assert args.quiet().report_to == []
    assert (args.max_steps, args.learning_rate, args.report_to) == (-1, 1e-2, ["tensorboard"])


def test_offloading_needs_a_cached_teacher(tmp_path):
    with pytest.raises(ValueError, match="`offload_full_model` is True, but an online teacher runs the full model"):
        FedBiOTConfig(str(tmp_path), offload_full_model=True, teacher="online", use_cpu=True)


def test_teacher_follows_the_adapter_layers(make_args):
    assert make_args().teacher == "cached"
    assert make_args(num_adapter_layers_bottom=1).teacher == "online"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher": "cached"}, "`teacher` is 'cached', but `num_adapter_layers_bottom` is 1"),
        ({"num_adapter_layers": -1}, "`num_adapter_layers_bottom` is 1, but `num_adapter_layers` is -1"),
        ({"offload_full_model": True}, "`offload_full_model` is True, but an online teacher .* Leave it out"),
    ],
    ids=["cached", "all layers", "offload"],
)
def test_adapter_layers_at_the_bottom_that_cannot_work(make_args, settings, message):
    with pytest.raises(ValueError, match=message):
        make_args(num_adapter_layers_bottom=1, **settings)
