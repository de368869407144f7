"""What goes wrong in a run of machines of their own, and what is lost by it: that party's round, and nothing else."""

import os
import signal
import time

import pytest
from namespaces import network, why_not


pytest.importorskip("nvflare", reason="needs NVFlare: pip install 'fedbiot-trainer[nvflare]'")

from machines import NAMES, SITES, Federation, wait_for


pytestmark = [pytest.mark.slow]

CLIENT_TIMEOUT = 50
CUT = 20  # seconds
FLAGS = [
    "--num_rounds", 100000, "--eval_rounds", 0, "--client_timeout", CLIENT_TIMEOUT, "--min_sites", 2, "--aggregation", "norm_clipping",
    "--num_byzantine", 0,
]  # fmt: skip


class LongRun:
    """A run that goes on from test to test. Its sites do wrong what a file in their folder says."""

    def __init__(self, federation: Federation):
        self.federation, self.network = federation, federation.network
        self.join(*SITES)
        self.go_on()

    def join(self, *sites):
        for is_there in [self.federation.join(site) for site in sites]:
            wait_for(is_there, "a site to register", 240)
        for site in sites:
            self.federation.command(site, "faulty_site:faulty")

    def go_on(self):
        self.served = self.federation.serve(*FLAGS, "--resume_from_checkpoint", "true")
        before = len(self.served.rounds())
        self.served.wait_for_round(lambda record: True, before, 400)

    def fault(self, site: str):
        return self.federation.kit(site) / "fedbiot" / "fault"

    def hold(self, site: str) -> int:
        """Keep a site in its training. Gives the number of rounds that have ended."""
        self.fault(site).write_text("hold")
        wait_for(self.fault(site).with_name("held").exists, f"{site} to train", 200)
        return len(self.served.rounds())

    def release(self, site: str):
        self.fault(site).unlink()
        self.fault(site).with_name("held").unlink(missing_ok=True)

    def ended(self, since: int, seconds: float = 120.0) -> dict:
        """The round that was going on then."""
        return self.served.wait_for_round(lambda record: True, since, seconds)

    def whole(self, since: int, seconds: float = 200.0) -> dict:
        """The first round after that in which all have answered."""
        return self.served.wait_for_round(lambda record: set(record["client_losses"]) == set(SITES), since, seconds)

    def without(self, site: str, since: int, seconds: float = 120.0) -> dict:
        """The first round after that in which a site has not answered, but the others have."""
        record = self.served.wait_for_round(lambda record: site not in record["client_losses"], since, seconds)
        assert set(record["client_losses"]) == set(SITES) - {site} and record["counted"]
        return record


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer):
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with network(NAMES) as machines:
        federation = Federation(machines, tmp_path_factory.mktemp("machines"), tokenizer)
        try:
            federation.start_owner()
            yield LongRun(federation)
        finally:
            federation.end()


def kill(run, name, what):
    """SIGKILL for the processes of a machine that have this in their command. Gives how many there were."""
    found = [pid for pid, command in run.network.processes(name).items() if what in command]
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    return len(found)


def test_a_sites_training_process_is_killed(run):
    since = run.hold("north")
    assert kill(run, "north", "fedbiot_trainer.engines.nvflare.site") == 1
    run.release("north")
    record = run.without("north", since)
    assert record["failed"] == {
        "north": "SiteError: The site's process died. It starts anew with the next request. Its log says more."
    }
    assert run.whole(record["server_round"])["server_round"] == record["server_round"] + 1
    assert "no answer from client 'north': SiteError: The site's process died" in run.served.said()


@pytest.mark.parametrize(
    "fault, refused, error",
    [
        ("raise", "failed", "ValueError"),
        ("garbage", "refused", "The client update is not a FedBiOT payload, or it is truncated."),
        ("pose", "refused", "The client update is signed by client 'south'."),
        ("old", "refused", "The client update is from round {last}, but this is round {this}."),
    ],
)
def test_an_answer_that_is_none(run, fault, refused, error):
    since = len(run.served.rounds())
    run.fault("north").write_text(fault)
    record = run.without("north", since)
    this = record["server_round"]
    assert record[refused] == {"north": error.format(last=this - 1, this=this)}
    assert run.whole(this)["server_round"] == this + 1


def test_an_update_that_is_a_hundred_times_too_large(run):
    """`norm_clipping` takes it for its direction alone."""
    since = len(run.served.rounds())
    run.fault("north").write_text("large")
    record = run.served.wait_for_round(lambda record: record["aggregation"]["largest_norm"] > 50, since)
    rule = record["aggregation"]
    assert rule["clipped"] >= 1 and rule["clip_norm"] < 5
    after = run.whole(record["server_round"])
    assert all(loss < 10 for loss in after["client_losses"].values())


def test_a_cable_is_pulled_and_put_back(run):
    since = run.hold("south")
    run.network.cut("south")
    run.release("south")
    time.sleep(CUT)
    run.network.mend("south")
    record = run.ended(since)
    assert set(record["client_losses"]) == set(SITES) and not record["failed"]  # it was waited for
    assert record["seconds"]["local_training"] > CUT - 1


def test_a_cable_is_pulled_where_a_site_waits_for_others(run):
    """Its question for something to do gets lost. It is asked again after the time that the largest message may take."""
    since = run.hold("north")
    run.network.cut("south")
    time.sleep(CUT + 5)  # the engine makes a new connection
    run.network.mend("south")
    run.release("north")
    run.whole(since + 1)


def test_a_cable_stays_out_for_longer_than_a_client_may_take(run):
    since = run.hold("south")
    run.network.cut("south")
    run.release("south")
    record = run.without("south", since)
    # Which of them is noticed first.
    reasons = [f"TimeoutError: it took longer than {CLIENT_TIMEOUT} s", "ConnectionError: it is not connected"]
    assert record["failed"]["south"] in reasons
    since = record["server_round"]
    run.served.wait_for_round(lambda record: "south" not in record["client_losses"], since)
    run.network.mend("south")
    back = run.whole(since)
    between = run.served.rounds()[since : back["server_round"] - 1]
    assert all(record["seconds"]["local_training"] < CLIENT_TIMEOUT for record in between)


def test_a_sites_machine_goes_down_and_comes_back(run):
    since = run.hold("west")
    run.network.kill("west")
    run.release("west")
    record = run.without("west", since)
    assert record["failed"] == {"west": "ConnectionError: it is not connected"}
    run.join("west")
    since = len(run.served.rounds())
    later = run.served.wait_for_round(lambda record: record["server_round"] > since + 2, since)
    assert set(later["client_losses"]) == {"north", "south"} and not later["failed"]  # nobody waits for it


def test_the_owners_job_dies_and_a_sites_disk_is_full(run):
    """West, which came back in the run before, takes part in this one. North's folder is smaller than the package."""
    run.hold("north")
    assert kill(run, "owner", "server.runner_process") == 1
    assert run.served.end(120) == 1
    assert "it can go on with `--resume_from_checkpoint true`" in run.served.said()
    done = len(run.served.rounds())
    run.network.kill("north")
    run.release("north")
    small = run.federation.home("north") / "small"
    small.mkdir()
    mount = 'mount -t tmpfs -o size=100k small "$0" && exec "$@"'
    within = ("unshare", "--mount", "sh", "-c", mount, small)
    wait_for(run.federation.join("north", "--folder", small, within=within), "north to register", 240)
    run.go_on()
    record = run.without("north", done)
    assert record["server_round"] == done + 1
    assert record["failed"] == {"north": "the package could not be delivered: OSError"}


def test_the_server_dies_and_the_run_goes_on_where_it_was(run):
    """Its start script starts it anew."""
    run.hold("south")
    done = len(run.served.rounds())
    assert kill(run, "owner", "nvflare.private.fed.app.server") == 2
    assert run.served.end(200) == 1
    assert "does not answer" in run.served.said() and "can go on with `--resume_from_checkpoint" in run.served.said()
    run.release("south")
    run.network.kill("north")
    run.join("north")
    run.go_on()
    assert run.whole(done, 300)["server_round"] == done + 1
    numbers = [record["server_round"] for record in run.served.rounds()]
    assert numbers == list(range(1, len(numbers) + 1))


def test_the_owner_stops_the_run(run):
    assert run.served.stop() == 128 + signal.SIGINT
    assert "stopped by SIGINT. To go on: --resume_from_checkpoint true" in run.served.said()


def test_the_owner_has_nothing_of_the_sites(run):
    assert run.federation.leaks() == []
