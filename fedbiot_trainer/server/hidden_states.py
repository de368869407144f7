"""The h_T store: what the full emulator makes of the public text, computed once and kept on disk."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import xxhash
from accelerate import Accelerator
from datasets import Dataset
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..shared.processes import deal, gathered


SCHEMA_VERSION = 1
SHARD_BYTES = 256 * 2**20  # of float32: what is held in memory at once while the store is written
GB = 10**9
LOCK = ".lock"


class HiddenStateStore:
    """
    Hidden states of a list of texts, in safetensors files that are mapped into memory.

    Texts are grouped in shards of whole texts. A shard's file carries the digest of its content in its name, so a file
    that was damaged or only half written is recognized, and made again without the others.

    Args:
        folder (`Path`, *optional*): Where the shards are. Another folder for other content: see [`store_folder`].
            `None` for a store that is only measured.
        lengths (`list[int]`): Tokens of each text.
        hidden_size (`int`): Size of a hidden state, and of what else is kept for a token.
        dtype (`torch.dtype`): Its dtype.
    """

    def __init__(self, folder: Path | None, lengths: Sequence[int], hidden_size: int, dtype: torch.dtype):
        self._folder, self.lengths, self.hidden_size, self.dtype = folder, list(lengths), hidden_size, dtype
        self.shards: list[range] = []
        start = tokens = 0
        for row, length in enumerate(self.lengths):
            if tokens and (tokens + length) * hidden_size * 4 > SHARD_BYTES:
                self.shards.append(range(start, row))
                start, tokens = row, 0
            tokens += length
        self.shards.append(range(start, len(self.lengths)))
        self._slices: dict[int, Any] = {}

    @property
    def folder(self) -> Path:
        """Where the shards are."""
        assert self._folder is not None, "a store that is only measured has no files"
        return self._folder

    def num_bytes(self, num_texts: int) -> int:
        """Size of the shards that hold the first `num_texts` texts in bytes, without the files' headers."""
        return sum(map(self._shard_bytes, self._shards_of(num_texts)))

    def _shard_bytes(self, shard: int) -> int:
        rows = self.shards[shard]
        return sum(self.lengths[rows.start : rows.stop]) * self.hidden_size * self.dtype.itemsize

    def has(self, num_texts: int) -> bool:
        """Whether the first `num_texts` texts are there and open."""
        return all(shard in self._slices for shard in self._shards_of(num_texts))

    def _shards_of(self, num_texts: int) -> list[int]:
        return [shard for shard, rows in enumerate(self.shards) if rows.start < num_texts]

    @cached_property
    def _places(self) -> list[tuple[int, int]]:
        """Shard and first token within it of each text."""
        places = []
        for shard, rows in enumerate(self.shards):
            starts = accumulate((self.lengths[row] for row in rows), initial=0)
            places += [(shard, start) for _, start in zip(rows, starts, strict=False)]
        return places

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep other runs from deleting the store in the block. What is open at its end can be read on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / LOCK).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            yield

    def missing(self, num_texts: int) -> list[int]:
        """Open the shards of the first `num_texts` texts, delete those that are damaged, and list what to write."""
        self.folder.mkdir(parents=True, exist_ok=True)
        os.utime(self.folder)  # the store used last is the last to be deleted
        return [shard for shard in self._shards_of(num_texts) if not (shard in self._slices or self._open(shard))]

    def write(self, shard: int, states: torch.Tensor):
        """
        Write a shard.

        Args:
            shard (`int`): Its number.
            states (`torch.Tensor`): The hidden states of its texts, one after the other, `(num_tokens, hidden_size)`.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f"{shard:05}.{os.getpid()}.part"
        save_file({"hidden_states": states.to("cpu", self.dtype).contiguous()}, part)
        part.rename(self.folder / f"{shard:05}-{_file_digest(part)}.safetensors")

    def _open(self, shard: int) -> bool:
        rows = self.shards[shard]
        expected = [sum(self.lengths[rows.start : rows.stop]), self.hidden_size]
        for file in self.folder.glob(f"{shard:05}-*.safetensors"):
            try:
                if file.stem.partition("-")[2] == _file_digest(file):
                    states = safe_open(file, framework="pt").get_slice("hidden_states")
                    if states.get_shape() == expected:
                        self._slices[shard] = states
                        return True
            except SafetensorError:
                pass  # made again, as any other damaged file
            file.unlink(missing_ok=True)
        return False

    def __getitem__(self, row: int) -> torch.Tensor:
        """Hidden states of a text, `(num_tokens, hidden_size)`, on the CPU."""
        shard, start = self._places[row]
        return self._slices[shard][start : start + self.lengths[row]]

    def make_room(self, num_texts: int, max_bytes: float):
        """
        Delete the stores beside this one that no run uses, the least recently used first, until all have at most `max_bytes`
        together with what this one will have once the first `num_texts` texts are in it.

        Raises:
            OSError: If the disk is too full for this one.
        """
        others = [path.parent for path in self.folder.parent.glob("*/store.json") if path.parent != self.folder]
        others.sort(key=_last_used)
        sizes = list(map(_num_bytes, others))
        missing = sum(map(self._shard_bytes, self.missing(num_texts)))
        excess = sum(sizes) + _num_bytes(self.folder) + missing - max_bytes
        for folder, size in zip(others, sizes, strict=True):
            if excess <= 0:
                break
            if _delete_unused(folder):
                excess -= size
        free = shutil.disk_usage(self.folder).free
        if free < missing:
            raise OSError(
                f"The hidden states of the public text take {missing / GB:.2g} GB, but only {free / GB:.2g} GB "
                f"are free in `teacher_cache_dir` ('{self.folder.parent}'). Choose another folder, pass less public "
                "text, or set `teacher='online'`."
            )


def fill_store(
    store: HiddenStateStore,
    num_texts: int,
    compute: Callable[[list[int]], torch.Tensor],
    batch_size: int,
    accelerator: Accelerator,
    on_progress: Callable[[int, int], None],
):
    """
    Compute what a store lacks. Processes share the work in step, so that a sharded model can be run.

    Args:
        store ([`HiddenStateStore`]): The store.
        num_texts (`int`): How many of its texts are needed, from the first.
        compute (callable): Gives the hidden states of texts one after the other, `(num_tokens, hidden_size)`.
        batch_size (`int`): Texts per call of `compute`.
        accelerator (`Accelerator`): Tells the processes. The first of each machine writes.
        on_progress (callable): Called with the numbers of texts done and to do.
    """
    lacking = torch.zeros(len(store.shards), device=accelerator.device)
    lacking[store.missing(num_texts)] = 1
    missing = accelerator.reduce(lacking).nonzero().flatten().tolist()
    done, total = 0, sum(len(store.shards[shard]) for shard in missing)
    on_progress(done, total)
    for shard in missing:
        # Texts of similar length together, the longest first, so that memory peaks early.
        order = sorted(store.shards[shard], key=lambda row: -store.lengths[row])
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        states: dict[int, torch.Tensor] = {}
        for i, (mine, _) in enumerate(deal(batches, accelerator)):
            group = batches[i * accelerator.num_processes : (i + 1) * accelerator.num_processes]
            whole = accelerator.gather(accelerator.pad_across_processes(compute(mine))[None])
            for batch, part in zip(group, whole, strict=False):
                lengths = [store.lengths[row] for row in batch]
                states |= zip(batch, part[: sum(lengths)].cpu().split(lengths), strict=True)
            done += sum(map(len, group))
            on_progress(done, total)
        if accelerator.is_local_main_process:
            store.write(shard, torch.cat([states[row] for row in store.shards[shard]]))
    accelerator.wait_for_everyone()
    if missing and (left := store.missing(num_texts)):
        raise OSError(
            f"{len(left)} of {len(store.shards)} files of hidden states cannot be read in '{store.folder}' after they "
            "were written. Check the disk, or set `teacher_cache_dir` to another one."
        )


def store_folder(cache_dir: str | None, **content) -> Path:
    """
    The folder for the hidden states of some content.

    Args:
        cache_dir (`str`, *optional*): Defaults to a folder in the Hugging Face cache.
        **content: All that the hidden states depend on, as plain values.
    """
    content = {"schema_version": SCHEMA_VERSION, **content}
    text = json.dumps(content, sort_keys=True, indent=2)
    folder = Path(cache_dir or Path(HF_HOME) / "fedbiot" / "hidden_states")
    folder = folder / hashlib.sha256(text.encode()).hexdigest()[:32]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "store.json").write_text(text + "\n")
    return folder


def _last_used(folder: Path) -> float:
    with suppress(FileNotFoundError):  # other runs delete too
        return folder.stat().st_mtime
    return 0.0


def _num_bytes(folder: Path) -> int:
    """Size of a store's files, also while another run writes and deletes some."""
    size = 0
    for file in folder.glob("*.safetensors"):
        with suppress(FileNotFoundError):
            size += file.stat().st_size
    return size


def _delete_unused(folder: Path) -> bool:
    """Delete a store, unless a run has it in use."""
    with suppress(FileNotFoundError), (folder / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        shutil.rmtree(folder)
    return True


def model_digest(model: nn.Module) -> str:
    """A digest of all that a model computes with, LoRAs apart: parameters, and buffers as well."""
    return tensors_digest(_without_loras((*model.named_parameters(), *model.named_buffers())))


def tensors_digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A digest of named tensors: names, shapes, dtypes and every value."""
    digest = xxhash.xxh3_128()
    for name, tensor in tensors:
        with gathered([tensor]) as (whole,):
            for part in _parts(whole.detach()):
                value = part.cpu().contiguous()
                digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
                digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors that a (quantized) one is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _parts(getattr(tensor, name))


def weights_digest(model: nn.Module) -> str:
    """A digest of a model's parameters, LoRAs apart: the same on every device."""
    return tensors_digest(_without_loras(model.named_parameters()))


def _without_loras(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Those of the base model, by their names there."""
    return ((name.replace(".base_layer", ""), tensor) for name, tensor in tensors if "lora_" not in name)


def texts_digest(dataset: Dataset, columns: tuple[str, ...] = ("input_ids",)) -> str:
    """A digest of the token ids of tokenized texts. They stand for the text, the tokenizer and the truncation."""
    digest = xxhash.xxh3_128()
    for column in columns:
        for batch in dataset.with_format("numpy").select_columns(column).iter(1000):
            for ids in batch[column]:
                digest.update(len(ids).to_bytes(8, "little"))
                digest.update(ids.astype("int64").tobytes())
    return digest.hexdigest()


def _file_digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()
