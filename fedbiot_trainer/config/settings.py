"""
The federation's settings, apart from the [`~trl.SFTConfig`] that they ride on: a dataclass for each room of the house,
which a [`FedBiOTConfig`] has all of.
"""

import math
from dataclasses import dataclass, field

from .aggregation import AggregationSettings


PARTITIONS = ("iid", "dirichlet", "by-column")
TEACHERS = ("cached", "online")
ALIGNMENT_INITS = ("auto", "closed_form", "zero")
ALL_LAYERS = -1


@dataclass
class SplitSettings:
    """
    The split: which decoder layers are where.

    Parameters:
        num_adapter_layers (`int`, *optional*, defaults to `2`):
            Decoder layers nearest to the output that the clients train a LoRA on (the adapter layers). -1 for all
            layers: no emulator, every client holds the full model.
        num_adapter_layers_bottom (`int`, *optional*, defaults to `0`):
            Decoder layers nearest to the input that they train a LoRA on as well, as offsite-tuning does. A client's
            backward pass goes through the whole emulator then, and the teacher has to run online.
        emulator_drop_ratio (`float`, *optional*, defaults to `0.5`):
            Share of the layers below the adapter layers that the emulator leaves out, in `[0, 1)` (the paper's beta,
            0.2 and 0.5 there).
        emulator_lora_r (`int`, *optional*):
            Rank of the emulator LoRA. `None` takes the rank of the client LoRA. The ratio `lora_alpha / r` is kept.
    """

    num_adapter_layers: int = field(
        default=2,
        metadata={"help": "Decoder layers nearest to the output that the clients train a LoRA on. -1: all layers."},
    )
    num_adapter_layers_bottom: int = field(
        default=0, metadata={"help": "Decoder layers nearest to the input that they train a LoRA on as well."}
    )
    emulator_drop_ratio: float = field(
        default=0.5,
        metadata={"help": "Share of the layers below the adapter layers that the emulator drops, in [0, 1) (beta)."},
    )
    emulator_lora_r: int | None = field(
        default=None, metadata={"help": "Rank of the emulator LoRA. Defaults to the rank of the client LoRA."}
    )


@dataclass
class FederationSettings:
    """
    The federation: how many rounds, who takes part, what a client does in one.

    Parameters:
        num_rounds (`int`, *optional*, defaults to `500`):
            Number of rounds. 0 only evaluates, after the initial alignment.
        local_steps (`int`, *optional*, defaults to `30`):
            Optimizer steps of each sampled client in a round. As in the paper's code; fewer steps in more rounds did
            better in our runs and send more bytes.
        fraction_train (`float`, *optional*, defaults to `1.0`):
            Share of the clients sampled in a round, in `(0, 1]`. At least one client is always sampled.
        proximal_weight (`float`, *optional*, defaults to `0.001`):
            Weight of the proximal term that holds a client near the round's starting point (the paper's epsilon).
            0 turns it off. The paper's code has 0.01, which held clients back at learning rates above 1e-3; 0.001 did not.
        min_train_clients (`int`, *optional*, defaults to `1`):
            Fewest clients that are sampled, and fewest valid updates for a round to count: with fewer, the client LoRA
            stays as it is. After three such rounds in a row the run ends with an error.
        client_timeout (`float`, *optional*):
            Seconds that a client has for a round; one that takes longer is left out of it. `None`: no limit.
        client_retries (`int`, *optional*, defaults to `0`):
            How often a client that failed is asked again in the same round.
        save_after_clients (`bool`, *optional*, defaults to `False`):
            Whether the state of the run is put on disk after each client, not only after each round.
    """

    num_rounds: int = field(default=500, metadata={"help": "Number of rounds. 0 only evaluates."})
    local_steps: int = field(
        default=30,
        metadata={
            "help": "Optimizer steps of each sampled client in a round. Fewer in more rounds did better in our runs, and send more."
        },
    )
    fraction_train: float = field(
        default=1.0, metadata={"help": "Share of the clients sampled in a round, in (0, 1]."}
    )
    proximal_weight: float = field(
        default=0.001,
        metadata={
            "help": "Weight of the clients' proximal term (epsilon). 0 turns it off; the paper's 0.01 "
            "held clients back at learning rates above 1e-3."
        },
    )
    min_train_clients: int = field(
        default=1, metadata={"help": "Fewest clients that are sampled, and fewest valid updates for a round to count."}
    )
    client_timeout: float | None = field(
        default=None, metadata={"help": "Seconds that a client has for a round. Default: no limit."}
    )
    client_retries: int = field(
        default=0, metadata={"help": "How often a client that failed is asked again in the same round."}
    )
    save_after_clients: bool = field(
        default=False, metadata={"help": "Put the state on disk after each client, not only after each round."}
    )

    def num_sampled(self, num_clients: int) -> int:
        """Clients in a round, of `num_clients`."""
        share = math.floor(self.fraction_train * num_clients + 0.5 + 1e-9)  # 0.29 * 50 is a little less than 14.5
        return min(num_clients, max(self.min_train_clients, share))


@dataclass
class AlignmentSettings:
    """
    The alignment of the emulator on public text.

    Parameters:
        initial_alignment_steps (`int`, *optional*, defaults to `500`):
            Optimizer steps of the emulator LoRA before the first round. As in the paper's code; 600 did better than 150
            in our runs.
        alignment_steps (`int`, *optional*, defaults to `10`):
            Optimizer steps of the emulator LoRA at the start of each round. As in the paper's code; without them AdapFu
            was worse in our ablation, with twice as many not better.
        alignment_kl_weight (`float`, *optional*, defaults to `0.9`):
            Weight of the KL divergence next to the hidden-state distance (the paper's lambda). 0 skips the logits. As in
            the paper's code; on reading comprehension with a real model, AdapFu was clearly worse without.
        alignment_learning_rate (`float`, *optional*, defaults to `5e-4`):
            Learning rate of the emulator LoRA. As in the paper's code, for billions of parameters; small models took 2e-3
            to 5e-3, and 1e-2 was too much.
        alignment_lr_scheduler_type (`str`, *optional*, defaults to `"constant"`):
            Learning-rate schedule of the emulator LoRA, over the initial alignment and all rounds.
        alignment_warmup_steps (`int`, *optional*, defaults to `0`):
            Steps over which the emulator LoRA's learning rate rises, at the start of the initial alignment.
        alignment_batch_size (`int`, *optional*, defaults to `8`):
            Public examples per alignment step and device.
        alignment_init (`str`, *optional*, defaults to `"auto"`):
            Where the emulator LoRA starts. `"zero"`: without effect, as in the paper. `"closed_form"`: each kept layer
            takes over, by regression on the public text, what the dropped ones behind it did; the LoRA is put on the linears
            for it too, unless there is an `emulator_peft_config`. `"auto"`: so if there is an initial alignment and it can be.
        alignment_init_tokens (`int`, *optional*, defaults to `100000`):
            Tokens of public text that the regression is fitted on at most.
        teacher (`str`, *optional*):
            `"cached"`: what the full model makes of the public text below the adapter layers is computed once and kept
            on disk, for this run and later ones. `"online"`: the full model runs in every alignment step. `None` takes
            `"cached"` unless there are adapter layers at the bottom.
        teacher_cache_dir (`str`, *optional*):
            Folder for it. Defaults to `fedbiot/hidden_states` in the Hugging Face cache.
        teacher_cache_max_gb (`float`, *optional*, defaults to `100.0`):
            Most that this folder may take, in GB. What was used least recently is deleted for something new.
        offload_full_model (`bool`, *optional*, defaults to `False`):
            Whether the layers that only the full model has stay on the CPU but for the pass that fills the cache and
            for evaluations of the full model. Needs `teacher="cached"`.
    """

    initial_alignment_steps: int = field(
        default=500,
        metadata={
            "help": "Optimizer steps of the emulator LoRA before the first round. 600 did better than 150 in our runs."
        },
    )
    alignment_steps: int = field(
        default=10,
        metadata={
            "help": "Optimizer steps of the emulator LoRA at the start of each round. Without them "
            "AdapFu was worse in our ablation."
        },
    )
    alignment_kl_weight: float = field(
        default=0.9,
        metadata={
            "help": "Weight of the KL divergence in the alignment loss (lambda). 0 skips the logits, which made AdapFu worse "
            "on one of two real tasks."
        },
    )
    alignment_learning_rate: float = field(
        default=5e-4,
        metadata={"help": "Learning rate of the emulator LoRA. Small models took 2e-3 to 5e-3; 1e-2 was too much."},
    )
    alignment_lr_scheduler_type: str = field(
        default="constant", metadata={"help": "Its schedule, over the initial alignment and all rounds."}
    )
    alignment_warmup_steps: int = field(
        default=0, metadata={"help": "Steps over which it rises, at the start of the initial alignment."}
    )
    alignment_batch_size: int = field(default=8, metadata={"help": "Public examples per alignment step and device."})
    alignment_init: str = field(
        default="auto",
        metadata={
            "help": "Compute the emulator LoRA's start by regression on the public text (closed_form), or let it start without "
            "effect (zero). auto: computed if there is an initial alignment and the architecture has linears for it.",
            "choices": list(ALIGNMENT_INITS),
        },
    )
    alignment_init_tokens: int = field(
        default=100_000, metadata={"help": "Tokens of public text that the closed form is fitted on at most."}
    )
    teacher: str | None = field(
        default=None,
        metadata={
            "help": "Compute the full model's hidden states of the public text once and keep them on disk (cached), or "
            "in every alignment step (online). Cached by default, where there are no adapter layers at the bottom.",
            "choices": list(TEACHERS),
        },
    )
    teacher_cache_dir: str | None = field(
        default=None, metadata={"help": "Folder for them. Defaults to one in the Hugging Face cache."}
    )
    teacher_cache_max_gb: float = field(default=100.0, metadata={"help": "Most that this folder may take, in GB."})
    offload_full_model: bool = field(
        default=False,
        metadata={"help": "Keep the layers that only the full model has on the CPU while they are not needed."},
    )


@dataclass
class PartitionSettings:
    """
    How one training set is split among simulated clients.

    Parameters:
        num_clients (`int`, *optional*, defaults to `3`):
            Number of clients to make of `train_dataset`. Not used when `client_datasets` are given.
        partition (`str`, *optional*, defaults to `"iid"`):
            `"iid"`, `"dirichlet"` (label skew over `partition_column`) or `"by-column"` (one client per value of
            `partition_column`; `num_clients` is not used).
        partition_column (`str`, *optional*):
            Column that holds the label, domain or language of an example.
        dirichlet_alpha (`float`, *optional*, defaults to `0.5`):
            Concentration of the Dirichlet distribution; smaller is more skewed.
    """

    num_clients: int = field(default=3, metadata={"help": "Number of clients to make of the training set."})
    partition: str = field(
        default="iid", metadata={"help": "How the training set is split among clients.", "choices": list(PARTITIONS)}
    )
    partition_column: str | None = field(
        default=None, metadata={"help": "Column with the label or domain, for partition dirichlet and by-column."}
    )
    dirichlet_alpha: float = field(
        default=0.5, metadata={"help": "Concentration of the Dirichlet partition; smaller is more skewed."}
    )


@dataclass
class EvaluationSettings:
    """
    Evaluation and output.

    Parameters:
        eval_rounds (`int`, *optional*, defaults to `1`):
            Evaluate AdapEmu and AdapFu every this many rounds (and always after the last). 0 evaluates only then.
        eval_metric (`str`, *optional*):
            Metric of the final evaluation, which then generates greedily from the prompts of the evaluation set:
            `"exact_match"`, `"gsm8k_accuracy"` (the final number), `"pass_at_k"` (runs what was generated, in a sandbox;
            needs the environment variable `HF_ALLOW_CODE_EVAL=1`), or whatever else `evaluate.load` takes, such as the
            folder of a module of yours, if it compares `predictions` with `references`.
        eval_reference_column (`str`, *optional*, defaults to `"completion"`):
            Column of the evaluation set with the references of `eval_metric`; for `"pass_at_k"`, with the tests (Python). Where an
            `entry_point` column names the function to write, as in HumanEval, the prompt is the start of the program, which ends
            before the first line that the completion does not indent, and the tests end with `check(<entry point>)`.
        eval_max_new_tokens (`int`, *optional*, defaults to `64`):
            Tokens to generate at most per prompt for `eval_metric`.
        eval_drift (`bool`, *optional*, defaults to `False`):
            Whether evaluations also measure the two terms of the alignment loss on the evaluation set and on held-out public
            text (`public_eval_size`), at all tokens and at those that are trained on, as `drift_...` in `rounds.jsonl`.
        public_eval_size (`int`, *optional*, defaults to `0`):
            Public examples to hold out of the alignment, for `eval_drift` and to compare the clients' text with.
        client_zero_shot_examples (`int`, *optional*, defaults to `100`):
            Examples, at most, on which each client measures the emulator's mean loss before its first step and reports it,
            which tells whether the public text covers its own. 0: clients report nothing of the kind.
        plug_in_steps (`int`, *optional*, defaults to `0`):
            Steps on public text, after the last round, in which the client LoRA learns to do in the full model what it does in
            the emulator ([`PlugInTrainer`]). With an evaluation set, what was learned is kept only if AdapFu is better by it.
        plug_in_scales (`list[float]`, *optional*):
            Strengths at which the client LoRA is tried in the full model at the end; the result has the one at which
            AdapFu is best on the evaluation set by `metric_for_best_model` (AdapFu's loss by default). Of two sets, name
            one there (`"adap_fu_<name>_loss"`), and what the other one measures is not what was chosen by. `None`: 1.
        overwrite_output_dir (`bool`, *optional*, defaults to `False`):
            Whether to delete the files that an earlier run left in `output_dir`; else such a folder is refused.
    """

    eval_rounds: int = field(
        default=1, metadata={"help": "Evaluate every this many rounds and after the last; 0: only after the last."}
    )
    eval_metric: str | None = field(
        default=None,
        metadata={
            "help": "Generate greedily at the end and compare with the references: exact_match, gsm8k_accuracy, pass_at_k "
            "(runs the generated code, needs HF_ALLOW_CODE_EVAL=1), or what evaluate.load takes, such as a folder."
        },
    )
    eval_reference_column: str = field(
        default="completion",
        metadata={"help": "Column with the references of eval_metric; for pass_at_k, with the tests."},
    )
    eval_max_new_tokens: int = field(default=64, metadata={"help": "Tokens to generate at most per prompt."})
    eval_drift: bool = field(
        default=False,
        metadata={
            "help": "Measure how far the emulator is from the full model on the evaluation set and on held-out public text, "
            "too."
        },
    )
    public_eval_size: int = field(
        default=0, metadata={"help": "Public examples to hold out of the alignment, for eval_drift. 0: none."}
    )
    client_zero_shot_examples: int = field(
        default=100,
        metadata={
            "help": "Examples on which each client measures the emulator before its first step, to report the mean loss: "
            "whether the public text covers its own. 0 reports nothing."
        },
    )
    plug_in_steps: int = field(
        default=0,
        metadata={
            "help": "Optimizer steps on public text, at the end, in which the client LoRA learns to do in the full model what "
            "it does in the emulator. 0: it is plugged in as it is."
        },
    )
    plug_in_scales: list[float] | None = field(
        default=None,
        metadata={
            "help": "Strengths at which the client LoRA is tried in the full model at the end, to keep the best by "
            "metric_for_best_model: 0.25 0.5 0.75 1, say."
        },
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete what an earlier run left in output_dir instead of refusing it."}
    )


# All of them, for what reads settings without the training arguments that they ride on.
GROUPS = (
    EvaluationSettings,
    PartitionSettings,
    AlignmentSettings,
    AggregationSettings,
    FederationSettings,
    SplitSettings,
)


def heading(group: type) -> str:
    """What a group of settings is about: the first sentence of its docstring."""
    return " ".join((group.__doc__ or "").split()).partition(".")[0]
