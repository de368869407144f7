"""What a run reports at its end."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from accelerate import PartialState

from ..client.client import FederatedClient
from ..config import FedBiOTConfig
from ..data.lengths import mean_length
from ..output.run_folder import library_versions
from ..server.server import FederatedServer
from ..shared.lora_state import CLIENT
from ..shared.records import ParameterCounts, PlugIn, PlugInLearning, RoundRecord, RunSummary, Scores


def summarize(
    args: FedBiOTConfig,
    server: FederatedServer,
    clients: Mapping[str, FederatedClient],
    records: Sequence[RoundRecord],
    results: Mapping[str, Scores],
    parameters: ParameterCounts,
    bytes_once: int,
    seconds: float,
    initial_alignment: dict[str, float],
    best_round: int | None,
    plug_in_learning: PlugInLearning | None,
    plug_in: PlugIn | None,
) -> RunSummary:
    """
    The content of `summary.json`.

    Args:
        args ([`FedBiOTConfig`]): Configuration.
        server, clients: The two sides. Clients that are elsewhere are known by their updates.
        records (sequence of [`RoundRecord`]): All rounds.
        results (`dict`): Scores of `zero_shot`, `adap_emu` and `adap_fu`; empty without held-out text.
        parameters ([`ParameterCounts`]), bytes_once (`int`): Sizes.
        seconds (`float`): Wall time.
        initial_alignment (`dict[str, float]`): What came of it.
        best_round (`int`, *optional*): The round whose LoRAs are the result, if that is not the last one.
        plug_in_learning ([`PlugInLearning`], *optional*): What the client LoRA learned in the full model, if it did.
        plug_in ([`PlugIn`], *optional*): How strongly the client LoRA is plugged in, if that was chosen.
    """
    public = [server.trainer.train_dataset] if server.trainer is not None else []
    phases = sorted({phase for record in records for phase in record.seconds})
    return RunSummary(
        zero_shot=results.get("zero_shot"),
        adap_emu=results.get("adap_emu"),
        adap_fu=results.get("adap_fu"),
        split=server.models.split.record(),
        rounds=len(records),
        processes={"number": args.world_size, "type": PartialState().distributed_type.value},
        bytes={
            "once_per_client": bytes_once,
            "down": sum(record.bytes_down for record in records),
            "up": sum(record.bytes_up for record in records),
        },
        seconds={
            "total": seconds,
            **{phase: sum(record.seconds.get(phase, 0) for record in records) for phase in phases},
        },
        parameters=parameters,
        num_examples={name: client.num_examples for name, client in clients.items()} or dict(server.num_examples),
        num_public_examples=len(public[0]) if public else 0,
        tokens_per_example={
            "clients": mean_length(client.train_dataset for client in clients.values()) if clients else None,
            "public": mean_length(public) if public else None,
        },
        initial_alignment=initial_alignment,
        settings=json.loads(json.dumps(args.to_dict(), default=str)),
        peft_config=json.loads(json.dumps(server.models.adap_fu.peft_config[CLIENT].to_dict(), default=list)),
        versions=library_versions(),
        best_round=best_round,
        client_zero_shot_losses=_merged(record.client_zero_shot_losses for record in records),
        uncovered=_merged(record.uncovered for record in records),
        plug_in_learning=plug_in_learning,
        plug_in=plug_in,
    )


def _merged(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: value for part in parts for name, value in part.items()}
