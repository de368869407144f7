import pytest
import torch
from conftest import sums, tiny_model
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig

from fedbiot_trainer import ClientSFTTrainer, FederatedClient
from fedbiot_trainer.server.split_model import SplitModel


LONG = Dataset.from_dict({"prompt": ["1" * 60] * 9, "completion": ["2"] * 9})
BLANK = Dataset.from_dict({"prompt": ["1+1="] * 5, "completion": [" ", "", "\n", "", ""]})


@pytest.fixture
def make_client(make_args, tokenizer):
    def make(dataset, **changes):
        models = SplitModel(tiny_model(), 2, 0.5, LoraConfig(r=4, target_modules=["q_proj"]))
        trainer = ClientSFTTrainer(
            models.adap_emu,
            make_args(**{"max_length": 32, **changes}),
            dataset.select([0]),
            processing_class=tokenizer,
        )
        return FederatedClient("a", trainer, dataset)

    return make


@pytest.mark.parametrize("more", [LONG, BLANK], ids=["max_length", "emptiness"])
@pytest.mark.parametrize("packing", [False, True])
def test_rows_with_nothing_to_train_on_do_not_count(make_client, more, packing, caplog):
    settings = {"packing": True, "packing_strategy": "bfd"} if packing else {}
    client = make_client(concatenate_datasets([sums(0, 4), more]), **settings)
    assert client.num_examples == 12
    assert f"{len(more)} of the {12 + len(more)} examples of client 'a' are left out and do not count" in caplog.text
    if not packing:
        assert len(client.train_dataset) == 12


def test_every_row_counts_where_each_has_a_token(make_client, caplog):
    client = make_client(sums(0, 4), packing=True, packing_strategy="wrapped")
    assert client.num_examples == 12 > len(client.train_dataset)
    assert "left out" not in caplog.text


def test_text_of_one_token_has_nothing_to_predict(make_client):
    client = make_client(Dataset.from_dict({"text": ["abc", "", "  ", "d"]}))
    assert client.num_examples == 2
    assert make_client(Dataset.from_dict({"input_ids": [[5, 6, 7], [1]]})).num_examples == 1


@pytest.mark.parametrize(
    "dataset", [LONG, BLANK, Dataset.from_dict({"text": [""] * 3})], ids=["long", "blank", "text"]
)
def test_client_with_nothing_to_learn_is_refused(make_client, dataset):
    with pytest.raises(ValueError, match="The dataset of client 'a' has no token to train on: .* `max_length`"):
        make_client(dataset)


def test_weight_of_the_average(make_runner):
    run = make_runner(
        client_datasets={"few": concatenate_datasets([LONG, sums(0, 1)]), "many": sums(0, 3)}, max_length=32
    )
    run.train()
    assert run.summary.num_examples == {"few": 3, "many": 9}
    assert run.records[0].weights == pytest.approx({"few": 0.25, "many": 0.75})


@pytest.mark.parametrize("part", ["client", "evaluation", "public"])
def test_text_longer_than_the_positions(make_runner, part):
    data = {
        "client_datasets": {"a": sums(0, 4), "b": sums(4, 8)},
        "eval_dataset": sums(8, 10),
        "public_dataset": sums(10, 20),
    }
    long = Dataset.from_dict({"prompt": ["1" * 200, "1"], "completion": ["2", "2"]})
    name = {"client": "client 'b'", "evaluation": "`eval_dataset`", "public": "`public_dataset`"}[part]
    if part == "client":
        data["client_datasets"]["b"] = long
    else:
        data[{"evaluation": "eval_dataset", "public": "public_dataset"}[part]] = long
    with pytest.raises(ValueError, match=f"longest text of {name} has 202 tokens, but the model has 128 positions"):
        make_runner(max_length=1024, **data)
    make_runner(max_length=128, **data)


def test_text_column_beside_a_completion_does_not_take_its_end_token(make_client, tokenizer):
    dataset = sums(0, 1).add_column("text", ["abc"] * 3)
    client = make_client(dataset)
    assert all(labels[-1] == tokenizer.eos_token_id for labels in client.train_dataset["labels"])
    assert torch.equal(*(torch.tensor(c.train_dataset["input_ids"][0]) for c in (client, make_client(sums(0, 1)))))


def test_pieces_without_a_label_are_left_out(make_client):
    """Of a text that is cut, a piece may be all prompt."""
    long = Dataset.from_dict({"prompt": ["1" * 60] * 4, "completion": ["2" * 4] * 4})
    client = make_client(long, packing=True, packing_strategy="wrapped", max_length=16)
    assert all(any(label != -100 for label in row[1:]) for row in client.train_dataset["labels"])
