"""All text of a run, named and checked before anything is loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..config import FedBiOTConfig
from ..data.partition import name_client_datasets
from ..data.public_text import hold_out_public
from ..data.sets import name_eval_sets, name_texts
from ..evaluation.text_metric import TextMetric
from ..shared.texts import check_chat_template, check_texts, text_columns


logger = logging.get_logger(__name__)


@dataclass
class RunTexts:
    """
    Attributes:
        clients (`dict[str, Dataset]`): Private text of each client, if it is here.
        eval_sets (`dict[str, Dataset]`): Held-out text by name; a set that is alone has an empty one.
        metrics (`dict[str, TextMetric]`): What is generated on each of them, if anything is.
        public (`Dataset`, *optional*): Public text to align on, if the run aligns.
        public_eval (`Dataset`, *optional*): Public text that is held out of it.
    """

    clients: dict[str, Dataset]
    eval_sets: dict[str, Dataset]
    metrics: dict[str, TextMetric]
    public: Dataset | None
    public_eval: Dataset | None = None

    @classmethod
    def of(
        cls,
        args: FedBiOTConfig,
        client_datasets: Mapping[str, Dataset] | Sequence[tuple[str, Dataset]] | None,
        train_dataset: Dataset | None,
        public_dataset: Dataset | None,
        eval_dataset: Dataset | Mapping[str, Dataset] | None,
        are_remote: bool = False,
    ) -> "RunTexts":
        """
        The text that a [`FederatedRunner`] is given, which has its arguments. Clients that are remote have theirs.

        Raises:
            TypeError, ValueError: If a dataset cannot work, or a setting does not fit the clients or the sets.
        """
        clients: dict[str, Dataset] = {}
        if not are_remote:
            clients = name_client_datasets(client_datasets, train_dataset, args)
            _check_clients(args, clients)
        elif client_datasets is not None or train_dataset is not None:
            raise ValueError(
                "`remote_clients` have their text where they are, so neither `client_datasets` nor `train_dataset` can be passed."
            )
        if args.eval_drift and eval_dataset is None and args.public_eval_size == 0:
            raise ValueError(
                "`eval_drift` is True, but `eval_dataset` is None and `public_eval_size` is 0. Pass held-out text, hold out "
                "public text, or leave it out."
            )
        eval_sets, metrics = name_eval_sets(eval_dataset), {}
        if args.eval_metric is not None:
            metrics = {name: TextMetric(args, dataset) for name, dataset in (eval_sets or {"": None}).items()}
        texts = cls(clients, eval_sets, metrics, public_dataset if args.aligns else None)
        for name, dataset in name_texts(eval_sets, texts.public).items():
            check_texts(dataset, name, args.dataset_text_field)
        _warn_of_other_tokens(args, clients, eval_sets)
        if texts.public is not None and args.public_eval_size > 0:
            texts.public, texts.public_eval = hold_out_public(texts.public, args.public_eval_size, args.seed)
        return texts

    def example(self) -> Dataset:
        """
        One row in the clients' form: of theirs, of the text that they are evaluated on, or of public text.

        Raises:
            ValueError: If there is no text.
        """
        for dataset in (*self.clients.values(), *self.eval_sets.values(), self.public):
            if dataset is not None:
                return dataset.select([0])
        raise ValueError(
            "`eval_dataset` and `public_dataset` are None, and the clients are remote, so nothing tells the form of their text. "
            "Pass one of them."
        )

    def check_chat_template(self, tokenizer: PreTrainedTokenizerBase, text_field: str):
        """
        Raises:
            ValueError: If a dataset is conversational, and the tokenizer has no template for it.
        """
        texts = name_texts(self.eval_sets, self.public)
        texts |= {f"client '{name}'": dataset for name, dataset in self.clients.items()}
        for name, dataset in texts.items():
            check_chat_template(dataset, name, tokenizer, text_field)


def _warn_of_other_tokens(args: FedBiOTConfig, clients: Mapping[str, Dataset], eval_sets: Mapping[str, Dataset]):
    """Tell of held-out text in which other tokens count than in what is trained on."""
    if args.completion_only_loss is not None or not clients:
        return
    trained = "completion" in text_columns(next(iter(clients.values())), "a client", args.dataset_text_field)
    for name, dataset in name_texts(eval_sets, None).items():
        columns = text_columns(dataset, name, args.dataset_text_field)
        if columns and trained != ("completion" in columns):
            count = (
                "completions alone count in training, and all tokens here" if trained else "all tokens count in both"
            )
            logger.warning(
                f"{name} has {', '.join(columns)}, which is another form than the clients' text has: {count}. Bring them into one "
                "form, or set `completion_only_loss`."
            )


def _check_clients(args: FedBiOTConfig, clients: Mapping[str, Dataset]):
    if args.min_train_clients > len(clients):
        raise ValueError(
            f"`min_train_clients` is {args.min_train_clients}, but there are {len(clients)} clients. Lower it."
        )
    unknown = sorted(args.ranks.keys() - clients.keys())
    if unknown:
        raise ValueError(f"`client_ranks` names {', '.join(unknown)}, but the clients are {', '.join(clients)}.")
