"""Where the answers of a round come from: clients in this process, or whatever else carries the same bytes."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from transformers import TrainerCallback
from transformers.utils import logging

from ..client.client import FederatedClient
from ..shared.round_trainer import DivergenceError
from .interruption import Interruption


logger = logging.get_logger(__name__)


@dataclass
class Reply:
    """
    What came of asking a client.

    Attributes:
        client (`str`): Its name.
        payload (`bytes`, *optional*): Its answer, unchecked.
        error (`str`, *optional*): Why there is none.
        seconds (`float`): Wall time until it came.
    """

    client: str
    payload: bytes | None = field(default=None, repr=False)
    error: str | None = None
    seconds: float = 0.0


class ClientPool(Protocol):
    """
    The clients of a federation. This is all that another engine has to bring.

    Attributes:
        on_client (callable): Set by the runner; to be called with the name of the client that a reply is awaited of, or
            has come from.
    """

    on_client: Callable[[str], None]

    def names(self) -> list[str]:
        """Clients that can be asked now."""

    def fit(self, starts: Mapping[str, bytes], timeout: float | None) -> Iterator[Reply]:
        """
        Ask clients for one round.

        Args:
            starts (`dict[str, bytes]`): The payload for each client, by name.
            timeout (`float`, *optional*): Seconds that a client has.

        Yields:
            [`Reply`]: One for each client, in any order. A client that fails or is late has an error in its reply.
        """


class ClientTimeout(Exception):
    """A client's training that took longer than it may."""


class LocalClients:
    """
    Simulated clients, which train one after the other in this process (or, with a launcher, in these processes).

    Args:
        clients (sequence of [`FederatedClient`]): They share one trainer.
        interruption ([`Interruption`]): Asked after each step.
    """

    def __init__(self, clients: Sequence[FederatedClient], interruption: Interruption):
        self.on_client: Callable[[str], None] = lambda name: None  # told who trains next
        self.clients = {client.name: client for client in clients}
        self._deadline = Deadline(interruption)
        self._failures: set[tuple[str, type[Exception]]] = set()  # what was logged with its traceback
        clients[0].trainer.add_callback(self._deadline)

    def names(self) -> list[str]:
        return list(self.clients)

    def fit(self, starts: Mapping[str, bytes], timeout: float | None) -> Iterator[Reply]:
        for name, start in starts.items():
            client, started = self.clients[name], time.perf_counter()
            reply = Reply(name)
            self.on_client(name)
            self._deadline.set(timeout)
            try:
                reply.payload = client.fit(start)
            except ClientTimeout:
                reply.error = f"TimeoutError: it took longer than `client_timeout` ({timeout:g} s)"
            except Exception as error:
                # Other processes wait in the middle of a step for one that has failed, and cannot be called back.
                # They notice together that one diverges.
                if client.trainer.accelerator.num_processes > 1 and not isinstance(error, DivergenceError):
                    raise
                self._log(name, error)
                reply.error = f"{type(error).__name__}: {error}"
            finally:
                self._deadline.set(None)
            reply.seconds = time.perf_counter() - started
            yield reply

    def _log(self, name: str, error: Exception):
        """Say that a client failed: with the traceback when it is the first of its kind there, in one line after that."""
        is_new = (name, type(error)) not in self._failures
        self._failures.add((name, type(error)))
        first_line, *_ = f"{type(error).__name__}: {error}".splitlines()
        # That a training diverges is no fault of the code.
        traceback = is_new and not isinstance(error, DivergenceError)
        logger.warning(f"Client '{name}' failed: {first_line}", exc_info=traceback)


class Deadline(TrainerCallback):
    """
    Ends a client's training after the step in which its time is up. The first process's clock counts.

    Raises (after that step):
        ClientTimeout: In all processes.
    """

    def __init__(self, interruption: Interruption):
        self.interruption = interruption
        self.at: float | None = None

    def set(self, seconds: float | None):
        self.at = None if seconds is None else time.perf_counter() + seconds

    def on_step_end(self, args, state, control, **kwargs):
        if self.at is None:
            return
        if self.interruption.anywhere(args.process_index == 0 and time.perf_counter() > self.at):
            raise ClientTimeout
