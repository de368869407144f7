from types import SimpleNamespace
from unittest import mock

from fedbiot_trainer.federation.pool import LocalClients
from fedbiot_trainer.shared.round_trainer import DivergenceError


def test_a_failure_is_traced_once(caplog):
    """For each client and kind of error; then, and where a training diverges, a line each."""
    errors = [OSError("no disk\nat all"), OSError("still none"), MemoryError("too large"), DivergenceError("inf")]
    trainer = mock.MagicMock()
    trainer.accelerator.num_processes = 1
    clients = [SimpleNamespace(name=name, trainer=trainer, fit=mock.Mock(side_effect=errors)) for name in "ab"]
    pool = LocalClients(clients, mock.Mock())
    replies = [reply.error for _ in errors for reply in pool.fit({"a": b"", "b": b""}, None)]
    assert replies[::2] == replies[1::2] == [f"{type(error).__name__}: {error}" for error in errors]
    lines = ["OSError: no disk", "OSError: still none", "MemoryError: too large", "DivergenceError: inf"]
    assert [record.getMessage() for record in caplog.records] == [
        f"Client '{name}' failed: {line}" for line in lines for name in "ab"
    ]
    assert [bool(record.exc_info) for record in caplog.records[::2]] == [True, False, True, False]
    assert [bool(record.exc_info) for record in caplog.records[1::2]] == [True, False, True, False]
