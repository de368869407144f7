"""What a run reports: a record for each round (`rounds.jsonl`) and a summary at its end (`summary.json`)."""

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any


Scores = dict[str, float]
SCORED = ("zero_shot", "adap_emu", "adap_fu")
LOSS_METRICS = ("loss", "token_accuracy")  # what is measured without generating


@dataclass
class ParameterCounts:
    """
    Parameters of the parts of a split model, as numbers of scalars.

    Attributes:
        full (`int`): The full model.
        adap_emu (`int`): Emulator + adapter layers, without any LoRA: what a client sees.
        adapter_layers (`int`): The adapter layers alone.
        trainable_client, trainable_server (`int`): Client LoRA and emulator LoRA.
    """

    full: int
    adap_emu: int
    adapter_layers: int
    trainable_client: int
    trainable_server: int

    @property
    def client_share(self) -> float:
        """Part of the full model's parameters that a client sees."""
        return self.adap_emu / self.full


@dataclass
class SplitRecord:
    """Indices of the full model's decoder layers: how many, which the emulator keeps, drops, and which are trained."""

    num_layers: int
    kept: list[int]
    dropped: list[int]
    adapter_layers: list[int]


@dataclass
class RoundRecord:
    """
    One round. Losses are means in nats per token; what was not measured is `None`.

    Attributes:
        server_round (`int`): The round, counted from 1.
        zero_shot_loss, adap_emu_loss, adap_fu_loss (`float`, *optional*): On the held-out text.
        adap_emu_token_accuracy, adap_fu_token_accuracy (`float`, *optional*): On the same text.
        evaluations (`dict[str, dict[str, float]]`): By `adap_emu` and `adap_fu`, the scores of each of several held-out
            sets (`<name>_loss`, `<name>_token_accuracy`), whose mean over all tokens is above.
        drift_l2, drift_kl (`float`, *optional*): Distance of the emulator from the full model on that text.
        drift_label_l2, drift_label_kl (`float`, *optional*): The same at its label positions alone.
        drift_public_l2, drift_public_kl, drift_public_label_l2, drift_public_label_kl (`float`, *optional*): The same on
            held-out public text.
        alignment_l2, alignment_kl (`float`, *optional*): Means of the last ten alignment steps of this round.
        client_losses (`dict[str, float]`): Mean training loss of each client whose update was used.
        client_zero_shot_losses (`dict[str, float]`): The emulator's loss on each client's text before its first step, from
            those that took part for the first time.
        uncovered (`dict[str, str]`): Those of them whose text the public text does not cover, and what tells.
        proximal_terms (`dict[str, float]`): Their last proximal terms, without its weight; `None` without one.
        weights (`dict[str, float]`): Their shares of the average.
        refused (`dict[str, str]`): Clients whose answer was not used, and why.
        failed (`dict[str, str]`): Clients that did not answer, and why.
        counted (`bool`, *optional*):
            Whether enough clients answered. If not, the client LoRA stayed as it was. `None` until that is known.
        aggregation (`dict[str, float]`): What the aggregation rule reports.
        bytes_down, bytes_up (`int`): Payloads to and from all clients.
        seconds (`dict[str, float]`): Wall time by phase.
    """

    server_round: int
    zero_shot_loss: float | None = None
    adap_emu_loss: float | None = None
    adap_fu_loss: float | None = None
    adap_emu_token_accuracy: float | None = None
    adap_fu_token_accuracy: float | None = None
    evaluations: dict[str, dict[str, float]] = field(default_factory=dict)
    drift_l2: float | None = None
    drift_kl: float | None = None
    drift_label_l2: float | None = None
    drift_label_kl: float | None = None
    drift_public_l2: float | None = None
    drift_public_kl: float | None = None
    drift_public_label_l2: float | None = None
    drift_public_label_kl: float | None = None
    alignment_l2: float | None = None
    alignment_kl: float | None = None
    client_losses: dict[str, float] = field(default_factory=dict)
    client_zero_shot_losses: dict[str, float] = field(default_factory=dict)
    uncovered: dict[str, str] = field(default_factory=dict)
    proximal_terms: dict[str, float | None] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    counted: bool | None = None
    aggregation: dict[str, float] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def answered(self) -> set[str]:
        """Clients that are done with this round, well or not."""
        return {*self.client_losses, *self.refused, *self.failed}

    def scores(self) -> dict[str, float]:
        """What was measured on held-out text, as trackers name it (`eval_adap_fu_loss`). Empty without an evaluation."""
        if self.adap_fu_loss is None:
            return {}
        values = {f"{who}_{name}": getattr(self, f"{who}_{name}", None) for who in SCORED for name in LOSS_METRICS}
        values |= {f"{who}_{name}": value for who, found in self.evaluations.items() for name, value in found.items()}
        return {f"eval_{name}": value for name, value in values.items() if value is not None}

    def without_scores(self) -> "RoundRecord":
        """A copy as of a round without an evaluation."""
        names = ("zero_shot_loss", *(f"{who}_{name}" for who in ("adap_emu", "adap_fu") for name in LOSS_METRICS))
        nothing: dict[str, Any] = dict.fromkeys(names)
        return replace(self, evaluations={}, **nothing)

    def to_json(self) -> str:
        """One line of `rounds.jsonl`, without the line break."""
        return json.dumps(asdict(self))

    @classmethod
    def read_all(cls, file: Path) -> list["RoundRecord"]:
        """The records of a `rounds.jsonl`, without a last line that was cut off; none if there is no such file."""
        lines = file.read_text().splitlines() if file.is_file() else []
        if lines:
            try:
                json.loads(lines[-1])
            except ValueError:  # a full disk or a power cut
                lines.pop()
        return [cls(**json.loads(line)) for line in lines]


@dataclass
class PlugInLearning:
    """
    What the client LoRA learned in the full model, at the end.

    Attributes:
        steps (`int`): Optimizer steps on public text.
        first_kl, last_kl (`float`): KL divergence in nats per token, at the first step and over the last ten.
        kept (`bool`): Whether it is in the result.
        metric (`str`, *optional*): What that was decided by, as trackers name it. `None` without held-out text.
        before, after (`float`, *optional*): The metric without and with it.
    """

    steps: int
    first_kl: float
    last_kl: float
    kept: bool
    metric: str | None = None
    before: float | None = None
    after: float | None = None


@dataclass
class PlugIn:
    """
    How strongly the client LoRA was plugged in, and why.

    Attributes:
        scale (`float`): Factor of its matrices B in the full model and in `client_lora/`.
        metric (`str`): What it was chosen by, as trackers name it.
        values (`dict[str, float]`): The metric at each scale that was tried.
    """

    scale: float
    metric: str
    values: dict[str, float]


@dataclass
class RunSummary:
    """
    A whole run.

    Attributes:
        zero_shot, adap_emu, adap_fu (`dict[str, float]`, *optional*):
            Final scores on the held-out text by metric; `None` without such text.
        split ([`SplitRecord`]): Which layers are where.
        rounds (`int`): Rounds that were run.
        processes (`dict`): Their `number` and `type`.
        bytes (`dict[str, float]`): `once_per_client`, `down` and `up`, in all rounds.
        seconds (`dict[str, float]`): `total` and by phase.
        parameters ([`ParameterCounts`]): Sizes of the parts.
        num_examples (`dict[str, int]`): Training examples of each client.
        num_public_examples (`int`): Texts for the alignment.
        tokens_per_example (`dict[str, float | None]`): Mean lengths of the `clients`' and the `public` text.
        initial_alignment (`dict[str, float]`): Last metrics and seconds of the alignment before the first round, and after it
            the losses on public text of emulator and full model (`public_emulator_loss`, `public_full_loss`).
        client_zero_shot_losses (`dict[str, float]`): The emulator's loss on each client's text before its first step.
        uncovered (`dict[str, str]`): Clients whose text the public text does not cover, and what tells.
        settings, peft_config, versions (`dict`): What the run was made with.
        clients (`dict`, *optional*): Scores of each client's own run, where clients train alone.
        best_round (`int`, *optional*): The round that the result is of, with `load_best_model_at_end`. `None`: the last.
        plug_in_learning ([`PlugInLearning`], *optional*): With `plug_in_steps`, what came of them.
        plug_in ([`PlugIn`], *optional*): With `plug_in_scales`, what was chosen.
    """

    split: SplitRecord
    rounds: int
    processes: dict[str, Any]
    bytes: dict[str, float]
    seconds: dict[str, float]
    parameters: ParameterCounts
    num_examples: dict[str, int]
    num_public_examples: int
    tokens_per_example: dict[str, float | None]
    initial_alignment: dict[str, float]
    settings: dict[str, Any]
    peft_config: dict[str, Any]
    versions: dict[str, str]
    zero_shot: Scores | None = None
    adap_emu: Scores | None = None
    adap_fu: Scores | None = None
    client_zero_shot_losses: dict[str, float] = field(default_factory=dict)
    uncovered: dict[str, str] = field(default_factory=dict)
    clients: dict[str, dict[str, Scores]] | None = None
    best_round: int | None = None
    plug_in_learning: PlugInLearning | None = None
    plug_in: PlugIn | None = None

    def write(self, file: Path):
        """Write it as JSON."""
        content = {
            **asdict(self),
            "parameters": {**asdict(self.parameters), "client_share": self.parameters.client_share},
        }
        file.write_text(json.dumps(content, indent=2) + "\n")

    @classmethod
    def read(cls, file: Path) -> "RunSummary":
        """Read what [`write`] wrote."""
        content = json.loads(file.read_text())
        content["split"] = SplitRecord(**content["split"])
        content["parameters"].pop("client_share")
        content["parameters"] = ParameterCounts(**content["parameters"])
        for name, kind in (("plug_in", PlugIn), ("plug_in_learning", PlugInLearning)):
            content[name] = kind(**content[name]) if content.get(name) else None
        return cls(**{f.name: content[f.name] for f in fields(cls) if f.name in content})
