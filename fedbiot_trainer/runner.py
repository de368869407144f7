"""The round loop in one process: server -> payload -> client -> payload -> server."""

import gc
import importlib.metadata
import json
import math
import random
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import datasets
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DefaultFlowCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    set_seed,
)
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler
from transformers.utils import logging as transformers_logging

from .callbacks import RunProgress, StepReporter
from .client import ClientSFTTrainer, FederatedClient
from .config import FedBiOTConfig
from .evaluation import evaluate_exact_match, evaluate_loss
from .lora import save_lora
from .model_card import write_model_card
from .partition import partition_dataset
from .payload import PayloadError
from .report import count_parameters, format_bytes, plot_rounds, result_table, split_table
from .server import FederatedServer


RUN_FILES = ("rounds.jsonl", "summary.json", "rounds.png", "emulator_package", "client_lora")


class FederatedRunner:
    """
    Runs FedBiOT in one process: one [`FederatedServer`] and simulated [`FederatedClient`]s that exchange payloads.

    Args:
        model (`str` or `PreTrainedModel`):
            The full model, loaded or by name.
        args ([`FedBiOTConfig`]):
            Configuration.
        client_datasets (`dict[str, Dataset]` or sequence of `(name, Dataset)`, *optional*):
            Private text of each client, in any form that [`~trl.SFTTrainer`] takes.
        train_dataset ([`~datasets.Dataset`], *optional*):
            Instead of `client_datasets`: text to split among `args.num_clients` clients as `args.partition` says.
        public_dataset ([`~datasets.Dataset`], *optional*):
            Public text for the alignment. Required unless alignment is off.
        eval_dataset ([`~datasets.Dataset`], *optional*):
            Held-out private text. Without it, nothing is evaluated.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            Tokenizer. Loaded with the model if that is given by name.
        peft_config ([`~peft.LoraConfig`], *optional*):
            The client LoRA. Defaults to rank 8 on PEFT's target modules for the architecture.
        emulator_peft_config ([`~peft.LoraConfig`], *optional*):
            The emulator LoRA. Defaults to `peft_config`, with rank `args.emulator_lora_r` if that is set.
        callbacks (`list[TrainerCallback]`, *optional*):
            Called like a trainer's, with a round in the place of a step: `state.global_step` is the round.

    Raises:
        ValueError: Before any training, if the configuration, a dataset or `output_dir` cannot work.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: FedBiOTConfig,
        client_datasets: Mapping[str, Dataset] | list[tuple[str, Dataset]] | None = None,
        train_dataset: Dataset | None = None,
        public_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: LoraConfig | None = None,
        emulator_peft_config: LoraConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        if args.world_size > 1:
            raise ValueError(
                f"The run was launched with {args.world_size} processes, but this version trains in one. Launch it "
                "with `accelerate launch --num_processes 1` or plain `python`."
            )
        self.args = args
        self.output_dir = Path(args.output_dir)
        self._claim_output_dir()
        client_datasets = _name_datasets(client_datasets, train_dataset, args)
        _check_eval_dataset(eval_dataset, args)

        set_seed(args.seed)
        self.model_name = model if isinstance(model, str) else model.config._name_or_path
        if isinstance(model, str):
            processing_class = processing_class or AutoTokenizer.from_pretrained(model)
            model = AutoModelForCausalLM.from_pretrained(model, **(args.model_init_kwargs or {}))
        if processing_class is None:
            raise ValueError("`processing_class` is None, but a loaded `model` does not say which tokenizer it has.")
        self.processing_class = processing_class
        inner_args = args.quiet()
        with _no_progress_bars():
            self.server = FederatedServer(
                model, inner_args, public_dataset, processing_class, peft_config, emulator_peft_config
            )
            first = next(iter(client_datasets))
            _check_not_empty(first, client_datasets[first])
            self.trainer = ClientSFTTrainer(
                self.server.split_model.emulator,
                inner_args,
                client_datasets[first],
                processing_class=processing_class,
            )
            self.clients = {
                name: FederatedClient(name, self.trainer, dataset) for name, dataset in client_datasets.items()
            }
            self.eval_dataset = eval_dataset
            self._eval_tokens = self.trainer.prepare(eval_dataset, "`eval_dataset`") if eval_dataset else None
        for trainer in filter(None, (self.trainer, self.server.trainer)):
            trainer.remove_callback(PrinterCallback)

        self.console = Console()
        self.state = TrainerState(max_steps=args.num_rounds, is_world_process_zero=True, is_local_process_zero=True)
        self.control = TrainerControl()
        reporters = [callback() for callback in get_reporting_integration_callbacks(args.report_to)]
        self.callback_handler = CallbackHandler(
            [DefaultFlowCallback(), *reporters, *(callbacks or [])],
            model,
            processing_class,
            optimizer=None,
            lr_scheduler=None,
        )
        self.control = self.callback_handler.on_init_end(args, self.state, self.control)
        self.parameters = count_parameters(self.server.split_model)
        self.summary: dict = {}
        self._zero_shot: dict[str, float] | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None) -> dict:
        """
        Run all rounds, evaluate and save.

        Returns:
            `dict`: The content of `summary.json`.

        Raises:
            RuntimeError: If no client of a round sent a valid update. Everything up to that round is saved.
        """
        if resume_from_checkpoint:
            raise ValueError(
                f"`resume_from_checkpoint` is {resume_from_checkpoint!r}, but this version cannot resume a run. The "
                "LoRAs after the last round are in `output_dir`."
            )
        args = self.args
        started = time.perf_counter()
        sampled = self._num_sampled()
        total_steps = args.initial_alignment_steps + args.num_rounds * (
            args.alignment_steps + sampled * args.local_steps
        )
        bytes_once = self._write_package()
        if args.should_log:
            start = self.server.start_round(0)
            size = len(start) if isinstance(start, bytes) else None
            table = split_table(self.server.split_model, self.parameters, bytes_once, size, sampled)
            self.console.print(table)
        progress = RunProgress(total_steps, args.num_rounds, self.console, args.should_log)
        with progress, _reported(progress, self.trainer, "sft_loss"), _frozen_garbage():
            with _reported(progress, self.server.trainer, "alignment_l2"):
                self._train_rounds(progress)
            progress.phase(args.num_rounds, "evaluating")
            results = self.evaluate()
        self.summary = self._summarize(results, bytes_once, time.perf_counter() - started)
        self.save_model()
        self.control = self.callback_handler.on_train_end(args, self.state, self.control)
        self._show_result()
        return self.summary

    def _train_rounds(self, progress: RunProgress):
        args = self.args
        self.control = self.callback_handler.on_train_begin(args, self.state, self.control)
        if self._eval_tokens is not None:
            progress.phase(0, "evaluating the full model")
            self._evaluate_zero_shot(generate=False)
        progress.phase(0, "initial alignment")
        clock = time.perf_counter()
        self.initial_alignment = self.server.align(args.initial_alignment_steps)
        self.initial_alignment["seconds"] = time.perf_counter() - clock
        if args.initial_alignment_steps:
            values = "  ".join(f"{k} {v:.4f}" for k, v in self.initial_alignment.items() if k != "seconds")
            progress.line(f"initial alignment: {values} | {self.initial_alignment['seconds']:.1f} s")
        for server_round in range(1, args.num_rounds + 1):
            self.control = self.callback_handler.on_step_begin(args, self.state, self.control)
            record = self._run_round(server_round, progress)
            self.state.global_step = server_round
            self.state.epoch = server_round / args.num_rounds
            self._save_round(record)
            progress.round_line(record)
            self._report(record)
            self.control = self.callback_handler.on_step_end(args, self.state, self.control)
            if not record["client_losses"]:
                self.save_model()
                raise RuntimeError(
                    f"No client sent a valid update in round {server_round}, so there is nothing to average: "
                    f"{record['refused']}. The state after round {server_round - 1} is in '{self.output_dir}'."
                )
            if self.control.should_training_stop:
                break

    def _run_round(self, server_round: int, progress: RunProgress) -> dict:
        """One round, in the order of the paper: align, broadcast, local training, aggregate, evaluate."""
        seconds: dict[str, float] = {}
        with _timed(seconds, "align"):
            progress.phase(server_round, "alignment")
            alignment = self.server.align(self.args.alignment_steps)
        with _timed(seconds, "broadcast"):
            start = self.server.start_round(server_round)
        replies = {}
        with _timed(seconds, "local_training"):
            names = self._sample(server_round)
            for name in names:
                progress.phase(server_round, f"client {name}")
                replies[name] = self.clients[name].fit(start, server_round)
        with _timed(seconds, "aggregate"):
            updates, refused = [], {}
            for name, reply in replies.items():
                try:
                    updates.append(self.server.receive(server_round, name, reply))
                except PayloadError as error:
                    refused[name] = str(error)
            if updates:
                self.server.aggregate(updates)
        last = server_round == self.args.num_rounds
        due = self.args.eval_rounds and server_round % self.args.eval_rounds == 0
        losses: dict[str, dict] = {"adap_emu": {}, "adap_fu": {}}
        if self._eval_tokens is not None and (due or last):
            with _timed(seconds, "evaluate"):
                progress.phase(server_round, "evaluating")
                losses = self._evaluate_adapted(generate=False)
        on_wire = self.args.use_wire_format
        return {
            "server_round": server_round,
            "zero_shot_loss": (self._zero_shot or {}).get("loss"),
            "adap_emu_loss": losses["adap_emu"].get("loss"),
            "adap_fu_loss": losses["adap_fu"].get("loss"),
            "adap_emu_token_accuracy": losses["adap_emu"].get("token_accuracy"),
            "adap_fu_token_accuracy": losses["adap_fu"].get("token_accuracy"),
            "alignment_l2": alignment.get("alignment_l2"),
            "alignment_kl": alignment.get("alignment_kl"),
            "client_losses": {update.client: update.metrics["loss"] for update in updates},
            "proximal_terms": {update.client: update.metrics.get("proximal_term") for update in updates},
            "refused": refused,
            "bytes_down": len(start) * len(names) if on_wire else None,
            "bytes_up": sum(len(reply) for reply in replies.values()) if on_wire else None,
            "seconds": seconds,
        }

    def evaluate(self) -> dict[str, dict[str, float]]:
        """
        Evaluate the full model without any LoRA, AdapEmu and AdapFu on `eval_dataset`.

        Returns:
            `dict`: `zero_shot`, `adap_emu` and `adap_fu`, each with `loss`, `token_accuracy` and, with
            `args.eval_exact_match`, `exact_match`. Empty without an `eval_dataset`.
        """
        if self._eval_tokens is None:
            return {}
        generate = self.args.eval_exact_match
        return {"zero_shot": self._evaluate_zero_shot(generate), **self._evaluate_adapted(generate)}

    def _evaluate_zero_shot(self, generate: bool) -> dict[str, float]:
        full = self.server.split_model.full
        if self._zero_shot is None or generate and "exact_match" not in self._zero_shot:
            with full.disable_adapter():
                self._zero_shot = self._evaluate_model(full, generate)
        return self._zero_shot

    def _evaluate_adapted(self, generate: bool) -> dict[str, dict[str, float]]:
        self.server.load()
        model = self.server.split_model
        return {
            "adap_emu": self._evaluate_model(model.emulator, generate),
            "adap_fu": self._evaluate_model(model.full, generate),
        }

    def _evaluate_model(self, model, generate: bool) -> dict[str, float]:
        batch_size = self.args.per_device_eval_batch_size
        metrics = evaluate_loss(model, self._eval_tokens, self.trainer.data_collator, batch_size)
        if generate:
            metrics |= evaluate_exact_match(
                model, self.eval_dataset, self.processing_class, batch_size, self.args.eval_max_new_tokens
            )
        return metrics

    def _num_sampled(self) -> int:
        return max(1, math.floor(self.args.fraction_train * len(self.clients) + 0.5))

    def _sample(self, server_round: int) -> list[str]:
        """Clients of a round, drawn without replacement; the same for the same seed and round."""
        drawn = set(
            random.Random(f"{self.args.seed}/{server_round}").sample(sorted(self.clients), self._num_sampled())
        )
        return [name for name in self.clients if name in drawn]

    def _report(self, record: dict):
        """Give the round's scalars to trackers and callbacks."""
        logs = {key: record[key] for key in ("alignment_l2", "alignment_kl", "bytes_down", "bytes_up")}
        logs |= {f"client_loss/{name}": loss for name, loss in record["client_losses"].items()}
        logs |= {f"seconds/{phase}": value for phase, value in record["seconds"].items()}
        metrics = {f"eval_{key}": value for key, value in record.items() if key.startswith(("adap_", "zero_shot"))}
        metrics = {key: value for key, value in metrics.items() if value is not None}
        logs = {key: value for key, value in (logs | metrics).items() if value is not None}
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)
        if metrics:
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)

    def _claim_output_dir(self):
        left = [name for name in RUN_FILES if (self.output_dir / name).exists()]
        if left and not self.args.overwrite_output_dir:
            raise ValueError(
                f"`output_dir` is '{self.output_dir}', which holds another run ({', '.join(left)}). Choose another "
                "folder, or set `overwrite_output_dir=True` to delete what that run left."
            )
        for name in left:
            path = self.output_dir / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.output_dir.mkdir(parents=True, exist_ok=True)

    def _write_package(self) -> int:
        with _no_progress_bars():
            return self.server.package().save(self.output_dir / "emulator_package", self.processing_class)

    def _save_round(self, record: dict):
        """Put the round's result on disk: a crash in the next round loses nothing."""
        with (self.output_dir / "rounds.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.server.package().save_loras(self.output_dir / "emulator_package")
        self._save_client_lora()
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _save_client_lora(self):
        state = self.server.split_model.split.to_full(self.server.client_lora)
        save_lora(self.output_dir / "client_lora", self.server.final_config(), state, self.model_name)

    def save_model(self):
        """Write `client_lora/` (with a model card), the LoRAs of `emulator_package/`, `summary.json`, `rounds.png`."""
        self.server.package().save_loras(self.output_dir / "emulator_package")
        self._save_client_lora()
        if self.summary:
            (self.output_dir / "summary.json").write_text(json.dumps(self.summary, indent=2) + "\n")
        if (self.output_dir / "rounds.jsonl").exists():
            plot_rounds(self.output_dir / "rounds.jsonl", self.output_dir / "rounds.png")
        write_model_card(self.output_dir / "client_lora", self.model_name, self.args, self.summary)

    def push_to_hub(self, repo_id: str | None = None, private: bool | None = None, token: str | None = None) -> str:
        """
        Upload `client_lora/` to the Hub. The emulator package stays here: it is for the clients.

        Args:
            repo_id (`str`, *optional*): Defaults to `args.hub_model_id`.

        Returns:
            `str`: Address of the commit.

        Raises:
            ValueError: If no repository is named.
        """
        from huggingface_hub import HfApi

        repo_id = repo_id or self.args.hub_model_id
        if repo_id is None:
            raise ValueError("`repo_id` is None and `hub_model_id` is not set, so there is nowhere to push to.")
        private = self.args.hub_private_repo if private is None else private
        api = HfApi(token=token or self.args.hub_token)
        self.save_model()
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=repo_id, folder_path=self.output_dir / "client_lora"))

    def _summarize(self, results: dict, bytes_once: int, seconds: float) -> dict:
        records = [json.loads(line) for line in (self.output_dir / "rounds.jsonl").read_text().splitlines()]
        on_wire = self.args.use_wire_format
        phases = {phase for record in records for phase in record["seconds"]}
        split = self.server.split_model.split
        return {
            **results,
            "split": {
                "num_layers": split.num_layers,
                "kept": split.kept,
                "dropped": split.dropped,
                "adapter_layers": split.adapter_indices,
            },
            "parameters": self.parameters,
            "num_examples": {name: client.num_examples for name, client in self.clients.items()},
            "initial_alignment": self.initial_alignment,
            "rounds": len(records),
            "bytes": {
                "once_per_client": bytes_once,
                "down": sum(record["bytes_down"] for record in records) if on_wire else None,
                "up": sum(record["bytes_up"] for record in records) if on_wire else None,
            },
            "seconds": {
                "total": seconds,
                **{phase: sum(record["seconds"].get(phase, 0) for record in records) for phase in sorted(phases)},
            },
            "settings": json.loads(self.args.to_json_string()),
            "peft_config": json.loads(json.dumps(self.server.final_config().to_dict(), default=sorted)),
            "versions": {
                name: importlib.metadata.version(name)
                for name in ("torch", "transformers", "peft", "trl", "accelerate", "datasets")
            },
        }

    def _show_result(self):
        if not self.args.should_log:
            return
        if "adap_fu" in self.summary:
            self.console.print()
            self.console.print(result_table(self.summary))
        sizes, seconds = self.summary["bytes"], self.summary["seconds"]["total"]
        if self.args.use_wire_format:
            self.console.print(
                f"\nbytes: {format_bytes(sizes['down'])} down, {format_bytes(sizes['up'])} up in "
                f"{self.summary['rounds']} rounds, and {format_bytes(sizes['once_per_client'])} once to each client",
                highlight=False,
            )
        self.console.print(f"time: {seconds:.0f} s   results: {self.output_dir}", highlight=False, soft_wrap=True)


def _name_datasets(client_datasets, train_dataset, args) -> dict[str, Dataset]:
    if (client_datasets is None) == (train_dataset is None):
        given = "neither" if client_datasets is None else "both"
        raise ValueError(f"Pass one of `client_datasets` and `train_dataset`; {given} was given.")
    if client_datasets is None:
        return partition_dataset(train_dataset, args)
    pairs = list(client_datasets.items() if isinstance(client_datasets, Mapping) else client_datasets)
    names = [name for name, _ in pairs]
    if not pairs:
        raise ValueError("`client_datasets` is empty: a federation needs at least one client.")
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
        raise ValueError(
            f"`client_datasets` has the name(s) {', '.join(duplicates)} more than once. Names must differ."
        )
    for name, dataset in pairs:
        _check_not_empty(name, dataset)
    forms = {name: "completion" in dataset.column_names for name, dataset in pairs}
    if args.completion_only_loss is None and len(set(forms.values())) > 1:
        raise ValueError(
            "`client_datasets` mixes prompt-completion data with other text "
            f"({', '.join(name for name, form in forms.items() if form)} have completions, the others do not), so it is "
            "open which tokens count. Set `completion_only_loss`, or bring all clients into one form."
        )
    return dict(pairs)


def _check_not_empty(name, dataset):
    if len(dataset) == 0:
        raise ValueError(f"The dataset of client '{name}' is empty.")


def _check_eval_dataset(dataset, args):
    if not args.eval_exact_match:
        return
    columns = [] if dataset is None else dataset.column_names
    if "prompt" not in columns or "completion" not in columns or not isinstance(dataset[0]["prompt"], str):
        raise ValueError(
            "`eval_exact_match` is set, but `eval_dataset` has no plain `prompt` and `completion` columns "
            f"(it has: {', '.join(columns) or 'none'}). Bring it into prompt-completion form, or leave the setting out."
        )


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - started


@contextmanager
def _reported(progress: RunProgress, trainer, metric: str) -> Iterator[None]:
    if trainer is None:
        yield
        return
    reporter = StepReporter(progress, trainer, metric)
    trainer.add_callback(reporter)
    try:
        yield
    finally:
        trainer.remove_callback(reporter)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Silence the libraries' bars for each preparation step of each client and each file written."""
    shown = datasets.are_progress_bars_disabled() is False, transformers_logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown[0]:
            datasets.enable_progress_bars()
        if shown[1]:
            transformers_logging.enable_progress_bar()


@contextmanager
def _frozen_garbage() -> Iterator[None]:
    """
    Keep what exists now out of garbage collection. Accelerate collects at the start of every `train()`, and going
    through all modules of the libraries and the models each time takes longer than a small client's local steps.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
