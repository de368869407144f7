"""The whole federation between two rounds, or between two clients of one, on disk."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import logging

from ..shared.lora_state import LoraState
from ..shared.records import RoundRecord, Scores


logger = logging.get_logger(__name__)

SCHEMA_VERSION = 1
TENSOR = "$tensor"  # stands for a tensor in JSON, with its name in the file


@dataclass
class BestRound:
    """
    The best of the rounds that were evaluated.

    Attributes:
        server_round (`int`): The round.
        metric (`float`): What it is the best by.
        client_lora, emulator_lora (`dict[str, torch.Tensor]`): The LoRAs as they were after it.
    """

    server_round: int
    metric: float
    client_lora: LoraState = field(repr=False)
    emulator_lora: LoraState = field(repr=False)


@dataclass
class FederationState:
    """
    All that a run needs to go on. Clients keep nothing, so this is the server's.

    Attributes:
        server_round (`int`): Rounds that have ended. 0: the initial alignment has.
        client_lora, emulator_lora (`dict[str, torch.Tensor]`): The LoRAs.
        aggregator (`dict`): What the aggregation rule keeps.
        alignment_steps (`int`): Alignment steps taken.
        client_steps (`dict[str, int]`): Local steps that each client has taken.
        settings (`dict`): What makes this run this run, as plain values.
        num_examples (`dict[str, int]`): Examples that each client has said it holds.
        initial_alignment (`dict[str, float]`): Last metrics and seconds of the alignment before the first round.
        zero_shot (`dict[str, float]`, *optional*): Scores of the full model without any LoRA.
        held_out (`str`, *optional*): Digest of the text that all scores are of.
        records (`list[RoundRecord]`): Rounds that have ended.
        open_round ([`RoundRecord`], *optional*): The round that was going on, with the answers that had come.
        best ([`BestRound`], *optional*): The best round, in a run that ends with it.
    """

    server_round: int
    client_lora: LoraState = field(repr=False)
    emulator_lora: LoraState = field(repr=False)
    aggregator: dict[str, Any] = field(repr=False)
    alignment_steps: int
    client_steps: dict[str, int]
    settings: dict[str, Any] = field(repr=False)
    num_examples: dict[str, int] = field(default_factory=dict)
    initial_alignment: dict[str, float] = field(default_factory=dict)
    zero_shot: Scores | None = None
    held_out: str | None = None
    records: list[RoundRecord] = field(default_factory=list, repr=False)
    open_round: RoundRecord | None = None
    best: BestRound | None = field(default=None, repr=False)

    def save(self, folder: Path, keep: int) -> Path:
        """
        Write the state, whole or not at all, and delete all but the newest.

        Of the records, the last one is written: those before it are in `rounds.jsonl`.

        Args:
            folder (`Path`): Folder for states alone.
            keep (`int`): States to keep, at least 1.

        Returns:
            `Path`: The file.
        """
        folder.mkdir(parents=True, exist_ok=True)
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("records", "open_round")}
        values["last_record"] = asdict(self.records[-1]) if self.records else None
        values["open_round"] = asdict(self.open_round) if self.open_round else None
        values["best"] = vars(self.best) if self.best else None
        tensors: dict[str, torch.Tensor] = {}
        # In their order, which a sum over a LoRA's tensors depends on.
        text = json.dumps({"schema_version": SCHEMA_VERSION, **_take_out(values, "", tensors)})
        file = folder / self._file_name
        part = file.with_suffix(".part")
        save_file(tensors, part, metadata={"state": text, "sha256": _digest(text, tensors)})
        _sync(part)
        part.rename(file)
        _sync(folder)
        for old in sorted(folder.glob("round-*.safetensors"))[:-keep]:
            old.unlink()
        return file

    def comparable_records(self) -> list[RoundRecord]:
        """The rounds, with scores only if they are of the text that rounds are evaluated on now."""
        return self.records if self.zero_shot is not None else [record.without_scores() for record in self.records]

    @property
    def _file_name(self) -> str:
        """Sorts as the states of a run do."""
        answers = len(self.open_round.answered) if self.open_round else 0
        return f"round-{self.server_round:06}-{answers:04}.safetensors"

    def delete_later(self, folder: Path):
        """Delete the states of the same run that came after this one: they are of rounds that will be run anew."""
        for file in folder.glob("round-*.safetensors"):
            if file.name > self._file_name:
                file.unlink()

    @classmethod
    def load(cls, file: Path) -> "FederationState":
        """
        Read a state.

        Raises:
            ValueError: If it is damaged, or another version of this library wrote it.
        """
        try:
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata()
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            text = metadata["state"]
            if metadata["sha256"] != _digest(text, tensors):
                raise ValueError("its digest does not match its content")
            values = _put_back(json.loads(text), tensors)
        # RuntimeError: a shape that PyTorch cannot make a tensor of.
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"The state '{file}' is damaged: {error}.") from error
        version = values.pop("schema_version")
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"The state '{file}' has schema version {version}, this library reads {SCHEMA_VERSION}. Install the "
                "version of fedbiot-trainer that wrote it."
            )
        try:
            last, opened, best = values.pop("last_record"), values.pop("open_round"), values.pop("best", None)
            return cls(
                **values,
                records=[RoundRecord(**last)] if last else [],
                open_round=RoundRecord(**opened) if opened else None,
                best=BestRound(**best) if best else None,
            )
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"The state '{file}' has other fields than this library's ({error}). Install the version of fedbiot-trainer "
                "that wrote it."
            ) from error

    @classmethod
    def load_newest(cls, folder: Path) -> "FederationState | None":
        """The newest state in a folder that is not damaged, with a warning for each that is. `None`: there is none."""
        for file in sorted(folder.glob("round-*.safetensors"), reverse=True):
            try:
                return cls.load(file)
            except ValueError as error:
                logger.warning(f"{error} The one before it is used.")
        return None


def _take_out(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Plain values as they are, tensors by name."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value.contiguous()
        return {TENSOR: name}
    if isinstance(value, Mapping):
        return {key: _take_out(part, f"{name}/{key}", tensors) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_take_out(part, f"{name}/{i}", tensors) for i, part in enumerate(value)]
    return value


def _put_back(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, dict):
        return tensors[value[TENSOR]] if TENSOR in value else {k: _put_back(v, tensors) for k, v in value.items()}
    return [_put_back(part, tensors) for part in value] if isinstance(value, list) else value


def _digest(text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sync(path: Path):
    """Have the disk, not only the operating system, know it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
