"""What server and clients send each other in a round. How it is laid out in bytes: [`frame`]."""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Self

from safetensors.torch import save

from ..shared.lora_state import LoraState
from .frame import PayloadError, encode, frame_size, max_bytes, read_tensors, shown, unpack


SCHEMA_VERSION = 2
MAX_EXAMPLES = 10**12
MAX_NUMBER = 2**53  # what JSON carries exactly
MAX_SEED = 2**32 - 1  # NumPy takes no more
MAX_METRICS = 64
MAX_NAME = 256  # characters


def check_client_name(name: str):
    """
    Check a name that will stand in logs, errors and tables.

    Raises:
        ValueError: If it cannot.
    """
    fault = None
    if not 1 <= len(name) <= MAX_NAME:
        fault = f"has {len(name)} characters"
    elif not name.isprintable():
        fault = "has characters that cannot be printed"
    if fault is not None:
        raise ValueError(
            f"The name of client {shown(name)} {fault}. Give it one of 1 to {MAX_NAME} printable characters."
        )


@dataclass(frozen=True)
class LocalWork:
    """
    All that a client must know of a round besides the LoRAs. Clients keep nothing between rounds.

    Attributes:
        local_steps (`int`): Optimizer steps to take.
        first_step (`int`): Steps that this client has taken in earlier rounds: where in its data it goes on.
        schedule_step (`int`): Where in the learning-rate schedule the round starts, in steps.
        schedule_length (`int`): Steps over which that schedule runs.
        proximal_weight (`float`): Weight of the proximal term.
        seed (`int`): Seed of dropout in these steps.
    """

    local_steps: int
    first_step: int
    schedule_step: int
    schedule_length: int
    proximal_weight: float
    seed: int

    @classmethod
    def parse(cls, value: Any) -> "LocalWork":
        """
        Read it from a manifest.

        Raises:
            PayloadError: If a value is missing or unknown, or cannot be.
        """
        names = [f.name for f in fields(cls)]
        if not isinstance(value, dict) or sorted(value) != sorted(names):
            raise PayloadError(f"The work order must have exactly {', '.join(names)}, got {shown(value)}.")
        for name, number in value.items():
            kinds, least = (int, float) if name == "proximal_weight" else (int,), int(name == "local_steps")
            most = MAX_SEED if name == "seed" else MAX_NUMBER
            if type(number) not in kinds or not least <= number <= most:
                raise PayloadError(
                    f"`{name}` of the work order is {shown(number)}, expected a number from {least} to {most:,}."
                )
        return cls(**value)


def _flat(groups: Mapping[str, LoraState]) -> LoraState:
    return {f"{group}/{key}": tensor.contiguous() for group, state in groups.items() for key, tensor in state.items()}


@dataclass
class _Payload:
    """A manifest of plain values and groups of tensors. Subclasses say which."""

    title: ClassVar[str]
    kind: ClassVar[str]
    manifest_fields: ClassVar[dict[str, type]]
    tensor_fields: ClassVar[tuple[str, ...]]

    server_round: int

    def to_bytes(self) -> bytes:
        """Encode the payload."""
        return encode(self._manifest(), save(self._tensors()))

    def _manifest(self) -> dict[str, Any]:
        manifest = {name: getattr(self, name) for name in self.manifest_fields}
        return {"schema_version": SCHEMA_VERSION, "kind": self.kind, **manifest}

    def _tensors(self) -> LoraState:
        return _flat({group: getattr(self, group) for group in self.tensor_fields})

    @classmethod
    def from_bytes(cls, data: bytes, server_round: int | None = None, **expected: LoraState) -> Self:
        """
        Decode and check a payload.

        Args:
            data (`bytes`): What [`to_bytes`] made.
            server_round (`int`, *optional*): The round that the receiver is in, if it knows.
            **expected (`dict[str, torch.Tensor]`): For each group of tensors, one of the same model.

        Raises:
            PayloadError: If it is too large, damaged, of another kind or schema, from another round, for another model,
                or not finite.
        """
        tensors = {f"{group}/{key}": t for group in cls.tensor_fields for key, t in expected[group].items()}
        limit = max_bytes(tensors)
        if len(data) > limit:
            raise PayloadError(
                f"The {cls.title} has {len(data):,} bytes, but for this model it can have {limit:,} at most."
            )
        manifest, content = unpack(cls.title, data)
        kind, schema = manifest.get("kind"), manifest.get("schema_version")
        if kind != cls.kind or type(schema) is not int or schema != SCHEMA_VERSION:
            raise PayloadError(
                f"The payload is {shown(kind)} of schema {shown(schema)}, expected {cls.kind} of schema "
                f"{SCHEMA_VERSION}."
            )
        unknown = manifest.keys() - {"kind", "schema_version", *cls.manifest_fields}
        if unknown:
            raise PayloadError(f"The {cls.title} has unknown values: {shown(sorted(unknown))}.")
        groups: dict[str, LoraState] = {group: {} for group in cls.tensor_fields}
        values: dict[str, Any] = {name: manifest.get(name) for name in cls.manifest_fields} | groups
        payload = cls(**values)
        payload.check(server_round)
        for name, tensor in read_tensors(cls.title, content, tensors).items():
            group, _, key = name.partition("/")
            groups[group][key] = tensor
        return payload

    def check(self, server_round: int | None):
        """
        Check what stands in the manifest.

        Raises:
            PayloadError: If a value has the wrong type, or the payload is from another round.
        """
        for name, expected in self.manifest_fields.items():
            value = getattr(self, name)
            if type(value) is not expected:
                raise PayloadError(
                    f"`{name}` of the {self.title} is {shown(value)}, expected a value of type {expected.__name__}."
                )
        if not 0 <= self.server_round <= MAX_NUMBER:
            raise PayloadError(f"`server_round` of the {self.title} is {shown(self.server_round)}, which is no round.")
        if server_round is not None and self.server_round != server_round:
            raise PayloadError(
                f"The {self.title} is from round {self.server_round}, but this is round {server_round}."
            )


@dataclass
class RoundStart(_Payload):
    """
    Server to client, at the start of a round.

    Attributes:
        server_round (`int`): The round, counted from 1.
        work ([`LocalWork`]): What this client is to do.
        client_lora (`dict[str, torch.Tensor]`): The averaged client LoRA.
        emulator_lora (`dict[str, torch.Tensor]`): The emulator LoRA after this round's alignment.
    """

    server_round: int
    work: LocalWork
    client_lora: LoraState = field(repr=False)
    emulator_lora: LoraState = field(repr=False)

    title = "round start"
    kind = "round_start"
    manifest_fields = {"server_round": int, "work": LocalWork}
    tensor_fields = ("client_lora", "emulator_lora")

    def _manifest(self):
        return super()._manifest() | {"work": asdict(self.work)}

    def check(self, server_round):
        if not isinstance(self.work, LocalWork):
            self.work = LocalWork.parse(self.work)
        super().check(server_round)


class RoundStarts(Mapping[str, bytes]):
    """
    The payloads of one round for its clients, each encoded when it is asked for: their tensors are the same.

    Args:
        server_round (`int`): The round, counted from 1.
        works (`dict[str, LocalWork]`): What each client is to do, by name.
        client_lora, emulator_lora (`dict[str, torch.Tensor]`): The LoRAs.
        other_loras (`dict[str, dict]`, *optional*): Client LoRAs of clients that get another one, by name.
    """

    def __init__(
        self,
        server_round: int,
        works: Mapping[str, LocalWork],
        client_lora: LoraState,
        emulator_lora: LoraState,
        other_loras: Mapping[str, LoraState] | None = None,
    ):
        self.works = dict(works)
        others = other_loras or {}
        self._of = lambda name: RoundStart(
            server_round, self.works[name], others.get(name, client_lora), emulator_lora
        )
        self._tensors = save(_flat({"client_lora": client_lora, "emulator_lora": emulator_lora}))
        self._other_tensors = {name: save(self._of(name)._tensors()) for name in others if name in self.works}

    def size(self, name: str) -> int:
        """Bytes of the payload for a client."""
        return frame_size(self._of(name)._manifest(), self._other_tensors.get(name, self._tensors))

    def __getitem__(self, name: str) -> bytes:
        return encode(self._of(name)._manifest(), self._other_tensors.get(name, self._tensors))

    def __iter__(self) -> Iterator[str]:
        return iter(self.works)

    def __len__(self) -> int:
        return len(self.works)


@dataclass
class ClientUpdate(_Payload):
    """
    Client to server, at the end of a round. It holds nothing else of the client's.

    Attributes:
        server_round (`int`): The round, counted from 1.
        client (`str`): Name of the client.
        num_examples (`int`): Training examples that the client holds: its weight in the average.
        metrics (`dict[str, float]`): Numbers to report: `loss`, `proximal_term` if there is one and, at the client's first
            steps, the emulator's `zero_shot_loss` on its text.
        client_lora (`dict[str, torch.Tensor]`): The client LoRA after the local steps.
    """

    server_round: int
    client: str
    num_examples: int
    metrics: dict[str, float]
    client_lora: LoraState = field(repr=False)

    title = "client update"
    kind = "client_update"
    manifest_fields = {"server_round": int, "client": str, "num_examples": int, "metrics": dict}
    tensor_fields = ("client_lora",)

    def check(self, server_round):
        super().check(server_round)
        try:
            check_client_name(self.client)
        except ValueError as error:
            raise PayloadError(f"The client update cannot be used: {error}") from None
        if not 1 <= self.num_examples <= MAX_EXAMPLES:
            raise PayloadError(
                f"`num_examples` of the client update is {shown(self.num_examples)}, expected 1 to {MAX_EXAMPLES:,}."
            )
        if "loss" not in self.metrics:
            raise PayloadError("Metric `loss` of the client update is missing.")
        if len(self.metrics) > MAX_METRICS:
            raise PayloadError(f"The client update has {len(self.metrics)} metrics, {MAX_METRICS} at most.")
        for name, value in self.metrics.items():
            if len(name) > MAX_NAME or not name.isprintable():
                raise PayloadError(
                    f"Metric {shown(name)} of the client update has a name that is too long or cannot be printed."
                )
            most = MAX_NUMBER if type(value) is int else sys.float_info.max
            if type(value) not in (int, float) or not abs(value) <= most:
                raise PayloadError(
                    f"Metric `{name}` of the client update is {shown(value)}, expected a finite number."
                )
