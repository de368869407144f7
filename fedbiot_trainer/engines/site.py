"""A data owner's side of a run whose payloads an engine carries: what it answers, and what it refuses."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback

from ..client.client import FederatedClient
from ..client.trainer import ClientSFTTrainer
from ..config.kinds import check_kinds
from ..federation.interruption import Interruption
from ..federation.pool import ClientTimeout, Deadline
from ..output.progress import no_progress_bars
from ..shared.round_trainer import DivergenceError
from ..shared.texts import text_columns
from ..wire.frame import PayloadError, unpack
from ..wire.messages import LocalWork, check_client_name
from ..wire.plan import TrainingPlan
from ..wire.shipment import PackageList, read_piece
from .errors import SiteError
from .package_store import PackageStore


@dataclass(frozen=True)
class SiteLimits:
    """
    What a site does at most, whatever the owner asks for.

    Attributes:
        min_examples (`int`): Examples below which it does not train, as an update of few texts tells much of each.
        max_local_steps (`int`, *optional*): Optimizer steps in a round.
        max_round_seconds (`float`, *optional*): Seconds in a round; checked after each step.
        max_package_gb (`float`): Size of the package.
    """

    min_examples: int = 1
    max_local_steps: int | None = None
    max_round_seconds: float | None = None
    max_package_gb: float = 100.0

    def __post_init__(self):
        check_kinds(self, [SiteLimits])


class Site:
    """
    One data owner on a machine of its own. An engine brings requests to [`answer`], in each of the site's processes, and
    takes back what the first of them returns.

    Args:
        name (`str`): The site's identity in the engine, and the client's name in the run.
        folder (`str` or `Path`): For the package and the trainer.
        train_dataset ([`~datasets.Dataset`]): The private text, in any form that [`~trl.SFTTrainer`] takes.
        limits ([`SiteLimits`], *optional*): What it does at most.
        **settings: Fields of [`FedBiOTConfig`] about the hardware; [`TrainingPlan.arguments`] says which.
    """

    def __init__(
        self, name: str, folder: str | Path, train_dataset: Dataset, limits: SiteLimits | None = None, **settings: Any
    ):
        check_client_name(name)
        self.name, self.folder = name, Path(folder)
        self.train_dataset, self.settings, self.limits = train_dataset, settings, limits or SiteLimits()
        self.store = PackageStore(self.folder / "packages")
        self.package: PackageList | None = None
        self.client: FederatedClient | None = None
        self._loaded: Path | None = None
        self._deadline = Deadline(Interruption())
        self._writes = (
            os.environ.get("RANK", "0") == "0"
        )  # before the first training no library knows of other processes

    def answer(self, kind: str, payload: bytes) -> bytes:
        """
        Do what the owner asks for.

        Args:
            kind (`str`): `"hello"` brings a [`PackageList`] and is answered with what the site has of it, as JSON;
                `"package"` brings a piece of a file; `"fit"` a [`RoundStart`], which is answered with a [`ClientUpdate`].
            payload (`bytes`): What it brings.

        Raises:
            SiteError: If it refuses, or cannot; the owner may be told why.
            Exception: Any other failure. Its text may hold what is private, so the owner may be told its type alone.
        """
        requests = {"hello": self._hello, "package": self._take_piece, "fit": self._fit}
        if kind not in requests:
            raise SiteError(f"This site's version of the library does not know the request {kind!r:.40}.")
        try:
            return requests[kind](payload)
        except (PayloadError, DivergenceError) as error:
            raise SiteError(str(error)) from error

    def _hello(self, payload):
        package = PackageList.from_bytes(payload)
        most = self.limits.max_package_gb
        if package.size > most * 1e9:
            raise SiteError(f"The package has {package.size / 1e9:.1f} GB, and this site takes {most:g} GB at most.")
        self.package = package
        if not self._writes:
            return b""
        had = self.store.had(package)
        self.store.assemble(package)
        return json.dumps(had).encode()

    def _take_piece(self, payload):
        name, offset, content = read_piece(payload)
        file = next((file for file in self._known_package().files if file.name == name), None)
        if file is None:
            raise SiteError(f"A piece is of '{name:.100}', which is no file of the package.")
        if self._writes:
            self.store.write(file, offset, content)
            self.store.assemble(self._known_package())
        return b""

    def _known_package(self) -> PackageList:
        if self.package is None:
            raise SiteError("This site was started anew and has not been told of the package.")
        return self.package

    def _fit(self, payload):
        examples, least = len(self.train_dataset), self.limits.min_examples
        if examples < least:
            raise SiteError(f"This site has {examples:,} examples, and trains on {least:,} at least.")
        manifest, _ = unpack("round start", payload)
        steps, most = LocalWork.parse(manifest.get("work")).local_steps, self.limits.max_local_steps
        if most is not None and steps > most:
            raise SiteError(f"The round has {steps} local steps, and this site takes {most} at most.")
        client = self._client()
        self._deadline.set(self.limits.max_round_seconds)
        try:
            return client.fit(payload)
        except ClientTimeout:
            raise SiteError(f"The round took longer than this site's {self.limits.max_round_seconds:g} s.") from None
        finally:
            self._deadline.set(None)

    def _client(self) -> FederatedClient:
        """The client of the package that the owner told of, loaded once."""
        folder = self.store.path(self._known_package())
        if not folder.is_dir():
            raise SiteError("The package is not here as a whole.")
        if self.client is None or self._loaded != folder:
            self.client = None  # free what is no longer needed before the next is loaded
            plan = TrainingPlan.load(folder)
            self._check_form(plan)
            args = plan.arguments(str(self.folder / "trainer"), **self.settings).quiet()
            with no_progress_bars():
                trainer = ClientSFTTrainer(
                    str(folder), args, self.train_dataset.select([0])
                )  # the client brings its own
                self.client = FederatedClient(self.name, trainer, self.train_dataset, plan.ranks.get(self.name))
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(self._deadline)
            self._loaded = folder
        return self.client

    def _check_form(self, plan: TrainingPlan):
        field = self.settings.get("dataset_text_field", "text")
        columns = text_columns(self.train_dataset, f"client '{self.name}'", field)
        if plan.settings["completion_only_loss"] and columns and "completion" not in columns:
            raise SiteError(
                f"The owner's plan is to train on completions alone, and this site's text has none (it is `{columns[-1]}`). Bring "
                "it into `prompt` and `completion`."
            )
