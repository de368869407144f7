"""Owner and sites as objects that exchange bytes: everything of a deployed run but the engine."""

import hashlib
import math
import time

import pytest
import torch
from conftest import LORA, slow, sums, tiny_model
from datasets import Dataset

from fedbiot_trainer import FederatedRunner
from fedbiot_trainer.engines.remote import DELIVERY_TIMEOUT, RemoteClients, read_had
from fedbiot_trainer.engines.site import Site, SiteError, SiteLimits
from fedbiot_trainer.federation.interruption import RunInterrupted
from fedbiot_trainer.federation.pool import Reply
from fedbiot_trainer.wire.frame import PayloadError, encode
from fedbiot_trainer.wire.shipment import PackageFile, PackageList


DATA = {"north": sums(0, 8), "south": sums(8, 12), "west": sums(12, 16)}


class Carrier:
    """Brings requests to sites in this process, and keeps a list of them."""

    def __init__(self, sites):
        self.connected = {site.name: site for site in sites}
        self.asked, self.expected = [], []

    def expect(self, num_bytes):
        self.expected.append(num_bytes)

    def is_ending(self):
        return False

    def sites(self):
        return list(self.connected)

    def ask(self, kind, payloads, timeout):
        for name in payloads:
            self.asked.append((kind, name))
            try:
                yield Reply(name, self.connected[name].answer(kind, payloads[name]))
            except Exception as error:
                text = str(error) if isinstance(error, SiteError) else type(error).__name__
                yield Reply(name, error=text)


@pytest.fixture
def make_sites(tmp_path):
    def make(limits=None, **settings):
        settings = {"use_cpu": True, **settings}
        return [Site(name, tmp_path / "sites" / name, text, limits, **settings) for name, text in DATA.items()]

    return make


@pytest.fixture
def make_owner(make_args, tokenizer, tmp_path):
    def make(carrier, folder="owner", piece=10_000, min_sites=3, patience=0.0, **changes):
        return FederatedRunner(
            model=tiny_model(),
            args=make_args(output_dir=str(tmp_path / folder), **changes),
            public_dataset=sums(40, 50),
            eval_dataset=sums(50, 55),
            processing_class=tokenizer,
            peft_config=LORA,
            remote_clients=lambda package: RemoteClients(carrier, package, min_sites, patience, piece),
        )

    return make


SETTINGS = {"num_rounds": 2, "local_steps": 2, "client_zero_shot_examples": 4, "load_best_model_at_end": False}
THREE_ROUNDS = SETTINGS | {"num_rounds": 3}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def runs():
    return {}


@pytest.fixture
def whole(make_runner, runs, tmp_path):
    """The finished run in one process with some settings, one for all tests that compare with it."""

    def whole(**settings):
        if str(settings) not in runs:
            folder = str(tmp_path / f"whole-{len(runs)}")
            runs[str(settings)] = make_runner(client_datasets=DATA, output_dir=folder, **SETTINGS, **settings)
            runs[str(settings)].train()
        return runs[str(settings)]

    return whole


@pytest.mark.parametrize(
    "settings",
    [
        {},
        slow({"freeze_a": True}),
        {"client_ranks": ["west=2"], "aggregation": "svd"},
        slow({"num_adapter_layers": 1, "num_adapter_layers_bottom": 1}),
    ],
    ids=str,
)
def test_a_run_with_sites_is_the_run_in_one_process(whole, make_owner, make_sites, settings):
    whole = whole(**settings)
    owner = make_owner(Carrier(make_sites()), **SETTINGS, **settings)
    summary, expected = owner.train(), whole.summary
    assert same(whole.server.client_lora, owner.server.client_lora)
    assert summary.adap_fu == expected.adap_fu and summary.num_examples == expected.num_examples
    assert summary.client_zero_shot_losses == pytest.approx(expected.client_zero_shot_losses)
    for one, other in zip(whole.records, owner.records, strict=True):
        assert one.client_losses == other.client_losses and one.bytes_up == other.bytes_up


@pytest.mark.slow
def test_a_run_with_sites_in_mixed_precision_is_the_run_in_one_process(whole, make_owner, make_sites):
    owner = make_owner(Carrier(make_sites(bf16=True)), **SETTINGS, bf16=True)
    owner.train()
    assert same(whole(bf16=True).server.client_lora, owner.server.client_lora)


@pytest.mark.slow
def test_sites_with_smaller_micro_batches_come_to_the_same(whole, make_owner, make_sites):
    """As one process does that cuts its batches so."""
    cut = whole(per_device_train_batch_size=1, gradient_accumulation_steps=4)
    owner = make_owner(Carrier(make_sites(per_device_train_batch_size=1)), **SETTINGS)
    assert owner.args.per_device_train_batch_size == 4
    owner.train()
    assert same(cut.server.client_lora, owner.server.client_lora)
    assert not same(cut.server.client_lora, whole().server.client_lora)  # sums in another order


class Patience:
    """A carrier that notes how long it would wait. Sites have the whole package, and fail in training."""

    def __init__(self):
        self.waits = []

    def expect(self, num_bytes):
        pass

    def sites(self):
        return ["north", "south"]

    def ask(self, kind, payloads, timeout):
        self.waits.append((kind, sorted(payloads), timeout))
        for name in payloads:
            yield Reply(name, b'{"config.json": 2}', error="it failed" if kind == "fit" and name == "south" else None)


def test_who_has_had_the_package_holds_up_a_round_no_longer_than_in_training(tmp_path):
    carrier = Patience()
    (tmp_path / "config.json").write_text("{}")
    pool = RemoteClients(carrier, tmp_path)
    for timeout in (5.0, 5.0, None):
        list(pool.fit({"north": b"", "south": b""}, timeout))
    assert carrier.waits == [
        ("hello", ["north", "south"], DELIVERY_TIMEOUT),
        ("package", [], DELIVERY_TIMEOUT),
        ("fit", ["north", "south"], 5.0),
        ("hello", ["south"], 5.0),
        ("package", [], 5.0),
        ("fit", ["north", "south"], 5.0),
        ("hello", ["south"], DELIVERY_TIMEOUT),
        ("package", [], DELIVERY_TIMEOUT),
        ("fit", ["north", "south"], None),
    ]


def test_the_package_is_sent_once_in_pieces(make_owner, make_sites):
    carrier = Carrier(make_sites())
    owner = make_owner(carrier, **SETTINGS)
    owner.train()
    size = PackageList.of(owner.folder.package).size
    asked = [kind for kind, name in carrier.asked if name == "north"]
    assert asked[0] == "hello" and asked[-2:] == ["fit"] * 2
    assert asked.count("package") > size // 10_000
    assert 3 * size < owner.pool.bytes_delivered < 4 * size
    # Another run with the same emulator: what sites have is not sent again.
    carrier.asked.clear()
    make_owner(carrier, "again", **SETTINGS).train()
    assert [kind for kind, _ in carrier.asked].count("package") == 0


@pytest.mark.parametrize("piece", [slow(100), 10_000_000])
def test_the_engine_is_told_before_how_large_a_payload_can_be(make_owner, make_sites, piece):
    class Measuring(Carrier):
        def ask(self, kind, payloads, timeout):
            for payload in payloads.values():
                largest.append(len(payload))
                assert kind == "hello" or len(payload) <= 1.1 * self.expected[-1] + 1000  # with names and settings
            return super().ask(kind, payloads, timeout)

    largest, carrier = [], Measuring(make_sites())
    make_owner(carrier, piece=piece, **SETTINGS).train()
    assert carrier.expected[0] >= piece and max(largest) > 2000


def test_a_piece_for_several_sites_is_in_memory_once(make_owner, make_sites):
    class Counting(Carrier):
        def ask(self, kind, payloads, timeout):
            if kind == "package":
                copies.append(len({id(payload) for payload in payloads.values()}) / len(payloads) if payloads else 0)
            return super().ask(kind, payloads, timeout)

    copies = []
    make_owner(Counting(make_sites()), **SETTINGS).train()
    assert len(copies) > 5 and max(copies) == pytest.approx(1 / 3)


def lora_pieces(owner):
    """Of the two files of a package that are others after each round."""
    sizes = [
        file.size
        for file in PackageList.of(owner.folder.package).files
        if file.name.endswith("adapter_model.safetensors")
    ]
    return sum(math.ceil(size / 10_000) for size in sizes)


def test_an_engine_that_ends_the_run_loses_no_answer(make_owner, make_sites):
    class Ending(Carrier):
        def is_ending(self):
            return self.asked.count(("fit", "south")) == 2

    carrier = Ending(make_sites())
    owner = make_owner(carrier, **SETTINGS)
    owner.interruption.is_ending = carrier.is_ending
    with pytest.raises(RunInterrupted):
        owner.train()
    going_on = make_owner(Carrier(make_sites()), resume_from_checkpoint="true", **SETTINGS)
    going_on.train()
    assert len(going_on.records) == SETTINGS["num_rounds"]
    assert going_on.pool.carrier.asked.count(("fit", "south")) == SETTINGS["num_rounds"] - 2


def test_a_delivery_that_is_cut_goes_on(make_owner, make_sites):
    class Cut(Carrier):
        def ask(self, kind, payloads, timeout):
            for reply in super().ask(kind, payloads, timeout):
                cut = kind == "package" and reply.client == "south" and self.asked.count((kind, "south")) == 3
                yield Reply("south", error="it has left") if cut else reply

    carrier = Cut(make_sites())
    owner = make_owner(carrier, **THREE_ROUNDS)
    owner.train()
    first, second, third = owner.records
    assert first.failed == {"south": "the package could not be delivered: it has left"}
    assert set(second.client_losses) == set(third.client_losses) == set(DATA)
    assert carrier.asked.count(("package", "south")) <= carrier.asked.count(("package", "north")) + lora_pieces(owner)


def test_a_site_that_is_started_anew_has_its_package(make_owner, make_sites):
    sites, rounds = make_sites(), []
    carrier = Carrier(sites)
    [anew] = [site for site in make_sites() if site.name == "south"]
    owner = make_owner(carrier, **THREE_ROUNDS)
    fit = owner.pool.fit

    def restarted(starts, timeout):
        rounds.append(1)
        if len(rounds) == 2:
            carrier.connected["south"] = anew
        return fit(starts, timeout)

    owner.pool.fit = restarted
    owner.train()
    assert owner.records[1].failed == {"south": "This site was started anew and has not been told of the package."}
    assert owner.records[2].failed == {} and len(owner.records[2].client_losses) == 3
    assert carrier.asked.count(("hello", "south")) == 2
    assert carrier.asked.count(("package", "south")) == carrier.asked.count(("package", "north")) + lora_pieces(owner)


def test_a_round_waits_for_sites(make_owner, make_sites):
    late, *others = make_sites()
    carrier = Carrier(others)
    owner = make_owner(carrier, min_sites=3, patience=60.0, **SETTINGS | {"num_rounds": 1})
    sites = carrier.sites

    def arriving():
        carrier.connected[late.name] = late
        carrier.sites = sites
        return sites()[:2]

    carrier.sites = arriving
    owner.train()
    assert set(owner.records[0].client_losses) == set(DATA)


def test_sites_train_on_the_tokens_that_the_owner_does(make_owner, make_sites):
    """Whatever form their text has: the losses of all mean the same."""
    sites = {site.name: site for site in make_sites()}
    sites["south"].train_dataset = Dataset.from_dict({"text": ["1+1=2"] * 4})
    owner = make_owner(Carrier(sites.values()), **SETTINGS)
    owner.train()
    assert set(owner.records[0].client_losses) == {"north", "west"}
    assert (
        "to train on completions alone, and this site's text has none (it is `text`)"
        in owner.records[0].failed["south"]
    )
    assert sites["north"].client.trainer.completion_only_loss


def test_without_sites_it_ends(make_owner):
    with pytest.raises(RuntimeError, match="fewer than 1 clients"):
        make_owner(Carrier([]), min_sites=1, patience=0.0, **THREE_ROUNDS).train()


def test_a_site_that_has_left_is_waited_for_once(make_sites, tmp_path):
    carrier, said = Carrier(make_sites()), []
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "config.json").write_text("{}")
    pool = RemoteClients(carrier, tmp_path / "package", min_sites=3, patience=1.0)
    pool.on_wait = said.append
    west = carrier.connected.pop("west")
    seconds = []
    for _ in range(2):
        started = time.monotonic()
        assert pool.names() == ["north", "south"]
        seconds.append(time.monotonic() - started)
    assert seconds[0] >= 1.0 > seconds[1]
    going_on = "going on with 2 of 3 sites: north, south"
    assert said == ["waiting for 3 sites, 1 s at most; there: north, south", going_on, going_on]
    carrier.connected["west"] = west
    assert pool.names() == ["north", "south", "west"]
    del carrier.connected["west"]
    started = time.monotonic()
    assert pool.names() == ["north", "south"] and time.monotonic() - started >= 1.0


def test_a_package_that_sites_refuse_is_found_before_a_round(tmp_path):
    (tmp_path / "modeling_own.py").write_text("import os")
    with pytest.raises(
        PayloadError, match="has a file 'modeling_own.py', but a site takes weights and settings alone"
    ):
        RemoteClients(Patience(), tmp_path).names()


@pytest.mark.parametrize(
    "limits, reason",
    [
        ({"min_examples": 25}, "This site has 24 examples, and trains on 25 at least."),
        slow({"max_local_steps": 1}, "The round has 2 local steps, and this site takes 1 at most."),
        slow({"max_round_seconds": 1e-9}, "The round took longer than this site's 1e-09 s."),
        (
            {"max_package_gb": 1e-6},
            "the package could not be delivered: The package has 0.0 GB, and this site takes 1e-06 GB",
        ),
    ],
    ids=str,
)
def test_a_site_refuses_beyond_its_limits(make_owner, make_sites, limits, reason):
    owner = make_owner(Carrier(make_sites(SiteLimits(**limits))), **THREE_ROUNDS)
    with pytest.raises(RuntimeError, match="sent a valid update"):
        owner.train()
    assert owner.records[-1].failed["north"].startswith(reason)


def test_a_failure_at_a_site_tells_its_type_alone(make_owner, make_sites):
    sites = make_sites()

    def broken():
        raise KeyError("Ann, born 1970, in /home/clinic/ann.jsonl")

    sites[0]._client = broken
    owner = make_owner(Carrier(sites), **SETTINGS)
    owner.train()
    assert [record.failed for record in owner.records] == [{"north": "KeyError"}] * 2


def test_a_site_needs_no_emulator_to_say_what_it_lacks(make_sites):
    site, *_ = make_sites()
    package = PackageList((PackageFile("config.json", 5, "0" * 64),))
    assert site.answer("hello", package.to_bytes()) == b"{}"
    with pytest.raises(SiteError, match="does not know the request 'sing'"):
        site.answer("sing", b"")
    with pytest.raises(SiteError, match="is not a FedBiOT payload"):
        site.answer("hello", b"garbage")


@pytest.mark.parametrize(
    "had",
    [
        None,
        b"",
        b"[]",
        b'{"config.json": 6}',
        b'{"config.json": -1}',
        b'{"other": 1}',
        b'{"config.json": true}',
        b"[" * 10**5,
    ],
)
def test_what_a_site_says_that_it_has_is_checked(had):
    package = PackageList((PackageFile("config.json", 5, "0" * 64),))
    with pytest.raises(ValueError, match="it says that it has|it did not answer"):
        read_had(Reply("a", had), package)


def test_clients_text_is_not_taken_twice(make_args, tokenizer):
    with pytest.raises(ValueError, match="`remote_clients` have their text where they are"):
        FederatedRunner(
            tiny_model(), make_args(), DATA, processing_class=tokenizer, remote_clients=lambda package: None
        )


def test_the_form_of_remote_text_has_to_be_known(make_args, tokenizer):
    args = make_args(alignment_steps=0, initial_alignment_steps=0)
    with pytest.raises(ValueError, match="nothing tells the form of their text"):
        FederatedRunner(tiny_model(), args, processing_class=tokenizer, remote_clients=lambda package: None)


def test_one_process_of_a_site_writes_the_package(make_sites, monkeypatch):
    """Before the first training, when no library has been told of the others."""
    sites = make_sites()
    monkeypatch.setenv("RANK", "1")
    others = make_sites()
    assert [site._writes for site in (*sites, *others)] == [True] * 3 + [False] * 3
    package = PackageList((PackageFile("config.json", 2, hashlib.sha256(b"{}").hexdigest()),))
    piece = encode({"file": "config.json", "offset": 0}, b"{}")
    for site in (sites[0], others[0]):  # of one folder
        site.answer("hello", package.to_bytes())
        assert site.answer("package", piece) == b""
    assert (sites[0].store.path(package) / "config.json").read_bytes() == b"{}"
