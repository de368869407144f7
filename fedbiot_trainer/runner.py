"""The round loop: server -> payload -> client -> payload -> server."""

import time
from collections.abc import Mapping, Sequence

from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from transformers import (
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
from transformers.utils import logging

from .callbacks import RunProgress, no_progress_bars, reported, timed
from .client import ClientSFTTrainer, FederatedClient
from .config import FedBiOTConfig
from .evaluation import LOSS_METRICS, Evaluator, TextMetric
from .package import load_model
from .partition import name_client_datasets
from .payload import PayloadError
from .report import count_parameters, mean_length, result_lines, result_table, split_table
from .run_folder import RunFolder
from .server import FederatedServer
from .trainer import frozen_garbage


logger = logging.get_logger(__name__)


class FederatedRunner:
    """
    Runs FedBiOT: one [`FederatedServer`] and simulated [`FederatedClient`]s that exchange payloads.

    Args:
        model (`str` or `PreTrainedModel`):
            The full model, loaded or by name. Its tensors are shared, not copied: they stay as they are, frozen.
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

    Attributes:
        server ([`FederatedServer`]): The model owner.
        clients (`dict[str, FederatedClient]`): The data owners, by name.
        summary (`dict`): Content of `summary.json`, once [`train`] has ended.

    Raises:
        ValueError: Before any training, if the configuration, a dataset or `output_dir` cannot work.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: FedBiOTConfig,
        client_datasets: Mapping[str, Dataset] | Sequence[tuple[str, Dataset]] | None = None,
        train_dataset: Dataset | None = None,
        public_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: LoraConfig | None = None,
        emulator_peft_config: LoraConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        for name in args.without_effect():
            logger.warning(
                f"`{name}` is {getattr(args, name)}, which has no effect: a run counts `num_rounds` rounds of "
                "`local_steps` steps, evaluates every `eval_rounds` rounds and saves after each."
            )
        self.args = args
        self.folder = RunFolder(args, model if isinstance(model, str) else model.config._name_or_path)
        client_datasets = name_client_datasets(client_datasets, train_dataset, args)
        if args.eval_drift and eval_dataset is None:
            raise ValueError("`eval_drift` is True, but `eval_dataset` is None. Pass held-out text, or leave it out.")
        text_metric = TextMetric(args, eval_dataset) if args.eval_metric is not None else None

        set_seed(args.seed)
        with no_progress_bars():
            if isinstance(model, str):
                init_kwargs, remote = args.init_kwargs(), ("revision", "token", "trust_remote_code")
                remote = {name: init_kwargs[name] for name in remote if init_kwargs.get(name) is not None}
                processing_class = processing_class or AutoTokenizer.from_pretrained(model, **remote)
                model = load_model(model, **init_kwargs)
            if processing_class is None:
                raise ValueError("`processing_class` is None, and a loaded `model` does not tell its tokenizer.")
            inner_args = args.quiet()
            self.server = FederatedServer(
                model, inner_args, public_dataset, processing_class, peft_config, emulator_peft_config
            )
            self.trainer = ClientSFTTrainer(
                self.server.split_model.emulator,
                inner_args,
                next(iter(client_datasets.values())).select([0]),  # clients bring their own
                share_accelerator=self.server.trainer,
                processing_class=processing_class,
            )
            self.clients = {
                name: FederatedClient(name, self.trainer, dataset) for name, dataset in client_datasets.items()
            }
            self.evaluator = None
            if eval_dataset is not None:
                self.evaluator = Evaluator(self.server.split_model, self.trainer, eval_dataset, text_metric)
        for trainer in filter(None, (self.trainer, self.server.trainer)):
            trainer.remove_callback(PrinterCallback)

        self.console = Console()
        main, local_main = args.process_index == 0, args.local_process_index == 0
        self.state = TrainerState(
            max_steps=args.num_rounds, is_world_process_zero=main, is_local_process_zero=local_main
        )
        trackers = [callback() for callback in get_reporting_integration_callbacks(args.report_to)]
        callbacks = [DefaultFlowCallback(), *trackers, *(callbacks or [])]
        self.callback_handler = CallbackHandler(callbacks, model, processing_class, optimizer=None, lr_scheduler=None)
        self.control = self.callback_handler.on_init_end(args, self.state, TrainerControl())
        self.summary: dict = {}

    def train(self, resume_from_checkpoint: str | bool | None = None) -> dict:
        """
        Run all rounds, evaluate and save.

        Returns:
            `dict`: The content of `summary.json`.

        Raises:
            ValueError: If this runner has trained already.
        """
        if resume_from_checkpoint:
            raise ValueError(
                f"`resume_from_checkpoint` is {resume_from_checkpoint!r}, but this version cannot resume a run. The "
                f"LoRAs after the last round are in '{self.folder.path}'."
            )
        if self.state.global_step > 0:
            raise ValueError(
                f"This runner has trained {self.state.global_step} rounds. Make another one, with another `output_dir`."
            )
        args, started = self.args, time.perf_counter()
        self.trainer.accelerator.wait_for_everyone()  # all have seen that the folder is free
        self.folder.claim()
        parameters = count_parameters(self.server.split_model)
        with no_progress_bars():
            bytes_once = self.folder.write_package(self.server)
        num_sampled = args.num_sampled(len(self.clients))
        if args.process_index == 0:
            per_round = self.server.payload_sizes() if args.use_wire_format else None
            self.console.print(split_table(self.server.split_model, parameters, bytes_once, per_round, num_sampled))

        total_steps = args.num_rounds * num_sampled * args.local_steps
        if self.server.trainer is not None:
            total_steps += args.initial_alignment_steps + args.num_rounds * args.alignment_steps
        with (
            RunProgress(total_steps, args.num_rounds, self.console, args.process_index == 0) as progress,
            reported(progress, self.trainer, "sft_loss"),
            reported(progress, self.server.trainer, "alignment_l2"),
            frozen_garbage(),
        ):
            self.control = self.callback_handler.on_train_begin(args, self.state, self.control)
            initial = self._start(progress)
            for server_round in range(1, args.num_rounds + 1):
                self._train_round(server_round, progress)
                if self.control.should_training_stop:
                    break
            progress.phase(self.state.global_step, "evaluating")
            results = self.evaluate()
            shown = LOSS_METRICS if self.state.global_step > 0 else set()  # with the last round
            scores = {who: values.keys() - shown for who, values in results.items()}
            self._log({f"{who}_{name}": results[who][name] for who, names in scores.items() for name in names})

        public = [self.server.trainer.train_dataset] if self.server.trainer is not None else []
        self.summary = {
            **self.folder.summarize(self.server, results, bytes_once, time.perf_counter() - started),
            "parameters": parameters,
            "num_examples": {name: client.num_examples for name, client in self.clients.items()},
            "num_public_examples": len(public[0]) if public else 0,
            "tokens_per_example": {
                "clients": mean_length(client.train_dataset for client in self.clients.values()),
                "public": mean_length(public) if public else None,
            },
            "initial_alignment": initial,
        }
        self.save_model()
        self.control = self.callback_handler.on_train_end(args, self.state, self.control)
        if args.process_index == 0:
            if results:
                self.console.print("", result_table(self.summary))
            self.console.print(
                *result_lines(self.summary, self.folder.path), sep="\n", highlight=False, soft_wrap=True
            )
        return self.summary

    def _start(self, progress: RunProgress) -> dict[str, float]:
        """What comes before the first round: the zero-shot evaluation and the initial alignment."""
        if self.evaluator is not None:
            progress.phase(0, "evaluating the full model")
            self.evaluator.zero_shot()
        seconds: dict[str, float] = {}
        if self.server.trainer is not None:
            what = "hidden states of the public text"
            self.server.trainer.prepare_teacher(lambda done, total: progress.phase(0, f"{what} {done}/{total}"))
        with timed(seconds, "seconds"):
            progress.phase(0, "initial alignment")
            metrics = self.server.align(self.args.initial_alignment_steps)
        if metrics:
            values = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            progress.line(f"initial alignment | {values} | {seconds['seconds']:.1f} s")
        return metrics | seconds

    def _train_round(self, server_round: int, progress: RunProgress):
        self.control = self.callback_handler.on_step_begin(self.args, self.state, self.control)
        record = self._run_round(server_round, progress)
        self.state.global_step = server_round
        self.state.epoch = server_round / self.args.num_rounds
        self.folder.save_round(self.server, record)
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        progress.round_line(record)
        self._report(record)
        self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
        if not record["client_losses"]:
            self.save_model()
            raise RuntimeError(
                f"No client sent a valid update in round {server_round}, so there is nothing to average: "
                f"{record['refused']}. The state after round {server_round - 1} is in '{self.folder.path}'."
            )

    def _run_round(self, server_round: int, progress: RunProgress) -> dict:
        """One round, in the order of the paper: align, broadcast, local training, aggregate, evaluate."""
        seconds: dict[str, float] = {}
        with timed(seconds, "align"):
            progress.phase(server_round, "alignment")
            alignment = self.server.align(self.args.alignment_steps)
        with timed(seconds, "broadcast"):
            start = self.server.start_round(server_round)
        names = self.args.sample(list(self.clients), server_round)
        metrics, refused, bytes_up = {}, {}, 0
        for name in names:
            with timed(seconds, "local_training"):
                progress.phase(server_round, f"client {name}")
                reply = self.clients[name].fit(start, server_round)
            with timed(seconds, "aggregate"):
                bytes_up += len(reply) if self.args.use_wire_format else 0
                try:
                    metrics[name] = self.server.receive(server_round, name, reply)
                except PayloadError as error:
                    refused[name] = str(error)
        with timed(seconds, "aggregate"):
            self.server.aggregate()
        evaluated = {}
        if self.evaluator is not None and self.args.evaluates_after(server_round):
            with timed(seconds, "evaluate"):
                progress.phase(server_round, "evaluating")
                self.server.load()
                evaluated = self.evaluator.adapted() | (self.evaluator.drift() if self.args.eval_drift else {})
        on_wire = self.args.use_wire_format
        return {
            "server_round": server_round,
            "zero_shot_loss": self.evaluator.zero_shot()["loss"] if self.evaluator is not None else None,
            "adap_emu_loss": evaluated.get("adap_emu", {}).get("loss"),
            "adap_fu_loss": evaluated.get("adap_fu", {}).get("loss"),
            "adap_emu_token_accuracy": evaluated.get("adap_emu", {}).get("token_accuracy"),
            "adap_fu_token_accuracy": evaluated.get("adap_fu", {}).get("token_accuracy"),
            "drift_l2": evaluated.get("drift_l2"),
            "drift_kl": evaluated.get("drift_kl"),
            "alignment_l2": alignment.get("alignment_l2"),
            "alignment_kl": alignment.get("alignment_kl"),
            "client_losses": {name: values["loss"] for name, values in metrics.items()},
            "proximal_terms": {name: values.get("proximal_term") for name, values in metrics.items()},
            "refused": refused,
            "bytes_down": len(start) * len(names) if on_wire else None,
            "bytes_up": bytes_up if on_wire else None,
            "seconds": seconds,
        }

    def _report(self, record: dict):
        """Give the round's scalars to trackers and callbacks."""
        logs = {key: value for key, value in record.items() if key.startswith(("alignment_", "drift_", "bytes_"))}
        logs |= {f"client_loss/{name}": loss for name, loss in record["client_losses"].items()}
        logs |= {f"proximal_term/{name}": term for name, term in record["proximal_terms"].items()}
        logs |= {f"seconds/{phase}": value for phase, value in record["seconds"].items()}
        self._log({key: value for key, value in record.items() if key.startswith(("adap_", "zero_shot"))}, **logs)

    def _log(self, evaluated: dict, **logs):
        metrics = {f"eval_{key}": value for key, value in evaluated.items() if value is not None}
        logs = {key: value for key, value in logs.items() if value is not None} | metrics
        if logs:
            self.state.log_history.append({**logs, "step": self.state.global_step})
            self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)
        if metrics:
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """
        Evaluate the full model without any LoRA, AdapEmu and AdapFu on `eval_dataset`.

        Returns:
            `dict`: `zero_shot`, `adap_emu` and `adap_fu`, each with `loss`, `token_accuracy` and, with
            `args.eval_metric`, what that metric returns. Empty without an `eval_dataset`.
        """
        if self.evaluator is None:
            return {}
        self.server.load()
        generate = self.args.eval_metric is not None
        return {"zero_shot": self.evaluator.zero_shot(generate), **self.evaluator.adapted(generate)}

    def save_model(self):
        """Write `client_lora/` with its model card, the LoRAs of `emulator_package/`, and the run's figures."""
        self.folder.save(self.server, self.summary)

    def push_to_hub(self, repo_id: str | None = None, private: bool | None = None, token: str | None = None) -> str:
        """
        Upload `client_lora/` to the Hub. The emulator package stays here: it is for the clients.

        Args:
            repo_id (`str`, *optional*): Defaults to `args.hub_model_id`.
            private (`bool`, *optional*): Defaults to `args.hub_private_repo`.
            token (`str`, *optional*): Defaults to `args.hub_token`, then to the stored one.

        Returns:
            `str`: Address of the commit.

        Raises:
            ValueError: If no repository is named.
        """
        self.save_model()
        return self.folder.push_to_hub(repo_id, private, token)
