"""A whole federated run in one object, as a trainer is a whole training."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, set_seed
from transformers.utils import logging

from ..client.client import FederatedClient
from ..client.trainer import ClientSFTTrainer
from ..config import FedBiOTConfig
from ..evaluation.evaluator import Evaluator
from ..output.hub import make_repository, push_folder
from ..output.progress import RunProgress, no_progress_bars, reported
from ..output.run_folder import RunFolder
from ..output.tables import result_lines, result_table, split_table
from ..output.trackers import Trackers
from ..server.hidden_states import texts_digest, weights_digest
from ..server.server import FederatedServer
from ..shared.arguments import check_args, check_callbacks, model_or_name
from ..shared.lora_state import CLIENT, EMULATOR
from ..shared.records import ParameterCounts, RoundRecord, RunSummary
from ..shared.round_trainer import frozen_garbage
from ..shared.selection import choose_selection, keeps_best_round
from .interruption import Interruption
from .loading import load_for_run
from .loop import RoundLoop, Schedule
from .observers import CallCallbacks, KeepState, ShowProgress, WarnOfNoGain, WriteFiles, run_progress
from .participation import Participation
from .plug_in import plug_in
from .pool import ClientPool, LocalClients
from .public_measures import public_measures
from .resume import claim, run_settings
from .run_texts import RunTexts
from .state import FederationState
from .summary import summarize


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
            Private text of each client, in any form that [`~trl.SFTTrainer`] takes. Numbers become names.
        train_dataset ([`~datasets.Dataset`], *optional*):
            Instead of `client_datasets`: text to split among `args.num_clients` clients as `args.partition` says.
        public_dataset ([`~datasets.Dataset`], *optional*):
            Public text for the alignment. Required unless alignment is off.
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
            Held-out private text. Without it, nothing is evaluated. Of several sets, each is reported by name.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            Tokenizer. By default that which lies where the model was loaded from. It stays as it is: a run works with a copy.
        peft_config ([`~peft.LoraConfig`], *optional*):
            The client LoRA. Defaults to rank 8 on PEFT's target modules for the architecture.
        emulator_peft_config ([`~peft.LoraConfig`], *optional*):
            The emulator LoRA. Defaults to `peft_config`, with rank `args.emulator_lora_r` if that is set, and on what
            `args.alignment_init` needs as well.
        callbacks (`list[TrainerCallback]`, *optional*):
            Called like a trainer's, with a round in the place of a step: `state.global_step` is the round.
        remote_clients (callable, *optional*):
            Instead of the clients' text: makes, of the folder of the emulator package, a [`ClientPool`] of clients elsewhere.

    Attributes:
        server ([`FederatedServer`]): The model owner.
        clients (`dict[str, FederatedClient]`): The data owners, by name, that are here.
        pool ([`ClientPool`]): They, as the round loop sees them.
        summary ([`RunSummary`], *optional*): The content of `summary.json`, once [`train`] has ended.

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
        eval_dataset: Dataset | Mapping[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: LoraConfig | None = None,
        emulator_peft_config: LoraConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        remote_clients: Callable[[Path], ClientPool] | None = None,
    ):
        check_args(args)
        check_callbacks(callbacks or [])
        model = model_or_name(model, PreTrainedModel)
        without_effect = args.without_effect()
        if without_effect:
            logger.warning("\n".join(without_effect.values()))
        self.args = args
        self.folder = RunFolder(args, model if isinstance(model, str) else model.config.name_or_path)
        is_remote = remote_clients is not None
        texts = RunTexts.of(args, client_datasets, train_dataset, public_dataset, eval_dataset, is_remote)
        self.selection = choose_selection(args, texts.eval_sets, callbacks or [])
        self.keeps_best_round = keeps_best_round(args, texts.eval_sets)

        set_seed(args.seed)
        with no_progress_bars():
            model, processing_class = load_for_run(model, processing_class, args, texts)
            inner_args = args.quiet()
            self.server = FederatedServer(
                model, inner_args, texts.public, processing_class, peft_config, emulator_peft_config
            )
            self.trainer = ClientSFTTrainer(
                self.server.models.adap_emu,
                inner_args,
                texts.example(),  # clients bring their own
                share_accelerator=self.server.trainer,
                processing_class=processing_class,
            )
            self.clients = {
                name: FederatedClient(name, self.trainer, dataset, args.ranks.get(name))
                for name, dataset in texts.clients.items()
            }
            self.evaluator = None
            if texts.eval_sets:
                self.evaluator = Evaluator(self.server.models, self.trainer, texts.eval_sets, texts.metrics)
            self.drift, self.public_loss = public_measures(args, self.server, self.trainer, self.evaluator, texts)
        self.files = WriteFiles(self.folder, self.server)
        self.console = Console(force_terminal=False if args.disable_tqdm else None)
        self.interruption = Interruption()
        for trainer in filter(None, (self.trainer, self.server.trainer, self.server.plug_in_trainer)):
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(self.interruption)
        self.pool: ClientPool = (
            LocalClients(list(self.clients.values()), self.interruption)
            if remote_clients is None
            else remote_clients(self.folder.package)
        )
        self.trackers = Trackers(args, args.num_rounds, callbacks or [], model, processing_class)
        self.records: list[RoundRecord] = []
        self.summary: RunSummary | None = None
        self._has_begun = False

    @property
    def state(self):
        """The trainer state that callbacks see (`global_step` is the round)."""
        return self.trackers.state

    def train(self, resume_from_checkpoint: str | bool | None = None) -> RunSummary:
        """
        Run all rounds, evaluate and save.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                `True` goes on from the newest state in `output_dir` (or begins, if the run was stopped before its first
                round). A path: from a state of another run's folder.

        Returns:
            [`RunSummary`]: The content of `summary.json`.

        Raises:
            ValueError: If this runner has trained already, or the state belongs to another run.
            RuntimeError: If too few clients answered in several rounds in a row.
            RunInterrupted: If the process was told to stop (SIGTERM, Ctrl-C). The state is on disk.
        """
        if self._has_begun:
            raise ValueError(
                f"This runner has trained {self.trackers.state.global_step} rounds, or begun to. Make another one to go on "
                "with `resume_from_checkpoint=True`, or for another `output_dir`."
            )
        started = time.perf_counter()
        self.settings = self._run_settings()
        try:
            checkpoint = resume_from_checkpoint or self.args.resume_from_checkpoint
            held_out = None if self.evaluator is None else self.evaluator.digest
            state = claim(self.folder, checkpoint, self.settings, self.args, held_out)
            if self.args.push_to_hub and self.args.process_index == 0:
                make_repository(self.args)
            self._has_begun = True
            with self.interruption.listening(), frozen_garbage():
                return self._train(state, started)
        finally:
            self.folder.release()

    def _run_settings(self) -> dict[str, Any]:
        models = self.server.models
        loras = {CLIENT: models.adap_fu.peft_config[CLIENT].to_dict()}
        if EMULATOR in models.adap_emu.peft_config:
            loras[EMULATOR] = models.adap_emu.peft_config[EMULATOR].to_dict()
        for lora in loras.values():
            del lora["base_model_name_or_path"]  # its weights are compared
        return run_settings(
            self.args,
            split=asdict(models.split),
            **{f"{name}_lora": lora for name, lora in loras.items()},
            weights=weights_digest(models.adap_fu),
            public_text=texts_digest(self.server.trainer.train_dataset) if self.server.trainer is not None else None,
        )

    def _train(self, state: FederationState | None, started: float) -> RunSummary:
        server, main = self.server, self.args.process_index == 0
        if state is not None:
            server.client_lora, server.emulator_lora = state.client_lora, state.emulator_lora
            self.trackers.at_round(state.server_round)
        parameters, bytes_once = self._write_package()
        asked = self.args.num_sampled(len(self.pool.names()))
        progress = run_progress(self.args, asked, server.trainer is not None, self.console, state)
        self.pool.on_client = progress.client
        earlier = [] if state is None else state.comparable_records()
        loop = self._loop(progress, earlier)
        with (
            progress,
            reported(progress, self.trainer, "sft_loss"),
            reported(progress, server.trainer, "alignment_l2"),
            reported(progress, server.plug_in_trainer, "plug_in_kl"),
        ):
            if state is not None:
                progress.line(f"going on after round {state.server_round}")
            self.trackers.tell("on_train_begin")
            self.trackers.go_on(earlier)
            try:
                loop.run(state)
            finally:
                self.records = loop.records
                self.save_model()
            if loop.best is not None:
                server.client_lora, server.emulator_lora = loop.best.client_lora, loop.best.emulator_lora
            progress.phase(loop.server_round, "plugging in")
            plugged_in = plug_in(server, self.evaluator, self.args, self.selection)
            progress.phase(loop.server_round, "evaluating")
            results = self._results()
            # Shown with the last round.
            shown = self.evaluator.loss_metrics if self.evaluator and loop.server_round > 0 else set()
            scores = {who: values.keys() - shown for who, values in results.items()}
            self.trackers.report_end(
                {f"eval_{who}_{name}": results[who][name] for who, names in scores.items() for name in names},
                {f"eval_{who}_{name}": value for who, values in results.items() for name, value in values.items()},
            )

        summary = self.summary = summarize(
            self.args,
            server,
            self.clients,
            self.records,
            results,
            parameters,
            bytes_once,
            time.perf_counter() - started,
            loop.initial_alignment,
            None if loop.best is None else loop.best.server_round,
            *plugged_in,
        )
        self.save_model()
        self.trackers.tell("on_train_end")
        if main:
            if results:
                self.console.print("", result_table(summary))
            self.console.print(*result_lines(summary, self.folder.path), sep="\n", highlight=False, soft_wrap=True)
        if self.args.push_to_hub and main:
            self.console.print(f"pushed to {self.push_to_hub()}")
        return summary

    def _write_package(self) -> tuple[ParameterCounts, int]:
        """Write what clients get, and show the split. Returns its sizes, in parameters and bytes."""
        server, parameters = self.server, self.server.models.count_parameters()
        self.trainer.package_lora = server.client_lora
        bytes_once = self.files.save_package(self.args, self.trainer.completion_only_loss)
        if self.args.process_index == 0:
            split, asked = server.models.split.record(), self.args.num_sampled(len(self.pool.names()))
            self.console.print(split_table(split, parameters, bytes_once, server.payload_sizes(), asked))
        return parameters, bytes_once

    def _loop(self, progress: RunProgress, earlier: Sequence[RoundRecord]) -> RoundLoop:
        args = self.args
        keep = max(2, args.save_total_limit or 2)  # one to fall back on
        return RoundLoop(
            self.server,
            self.pool,
            Participation(args, args.seed),
            Schedule(**{f.name: getattr(args, f.name) for f in fields(Schedule)}),
            self.interruption,
            observers=[
                KeepState(self.folder.state, keep, args.save_after_clients),
                self.files,
                ShowProgress(progress),
                CallCallbacks(self.trackers),
                WarnOfNoGain(earlier, self.keeps_best_round),
            ],
            evaluator=self.evaluator,
            drift=self.drift,
            public_loss=self.public_loss,
            settings=self.settings,
            selection=self.selection if self.keeps_best_round else None,
        )

    def evaluate(self) -> dict[str, dict[str, float]]:
        """
        Evaluate the full model without any LoRA, AdapEmu and AdapFu on `eval_dataset`.

        Returns:
            `dict`: `zero_shot`, `adap_emu` and `adap_fu`, each with `loss`, `token_accuracy` and, with
            `args.eval_metric`, what that metric returns. Of several sets, each metric by name (`<name>_loss`), and the
            means of the first two over all tokens. Empty without an `eval_dataset`.
        """
        if self.evaluator is not None:
            self.evaluator.forget()
        return self._results()

    def _results(self) -> dict[str, dict[str, float]]:
        if self.evaluator is None:
            return {}
        self.server.install_loras()
        return {"zero_shot": self.evaluator.zero_shot(generate=True), **self.evaluator.adapted(generate=True)}

    def save_model(self, output_dir: str | Path | None = None):
        """
        Write `client_lora/` with its model card, the LoRAs of `emulator_package/`, and the run's figures.

        Args:
            output_dir (`str` or `Path`, *optional*): Another folder than the run's gets what is in `client_lora/`, and no more.
        """
        if not output_dir or Path(output_dir).resolve() == self.folder.path.resolve():
            self.files.save_loras()
            self.folder.save(self.records, self.summary)
        else:
            self.files.save_result(output_dir, self.summary)

    def push_to_hub(self, repo_id: str | None = None, private: bool | None = None, token: str | None = None) -> str:
        """
        Upload `client_lora/` to the Hub. The emulator package stays here: it is for the clients.

        Args:
            repo_id (`str`, *optional*): Defaults to `args.hub_model_id`, then to the name of `args.output_dir`.
            private (`bool`, *optional*): Defaults to `args.hub_private_repo`.
            token (`str`, *optional*): Defaults to `args.hub_token`, then to the stored one.

        Returns:
            `str`: Address of the commit.
        """
        self.save_model()
        return push_folder(self.folder.client_lora, self.args, repo_id, private, token)
