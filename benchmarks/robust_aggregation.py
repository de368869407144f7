"""
What one bad client of five does to a run, by the rule of aggregation.

The demo's private text is dealt out to five clients alike, and its settings are those of recipes/demo/demo.yaml with
fewer rounds. One client trains as the others do, but answers with its change flipped in sign (-1) or a hundred times
as large (100). Each row is a run; `ratio` is its loss of AdapFu on held-out text against that of the first row, which is
FedAvg without a bad client.

    python benchmarks/robust_aggregation.py --json robust_aggregation.json
"""

import runpy
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml
from common import parser, show
from datasets import concatenate_datasets
from peft import LoraConfig
from rich.console import Console

from fedbiot_trainer import ClientUpdate, FedBiOTConfig, FederatedClient, FederatedRunner, RoundStart
from fedbiot_trainer.shared.lora_state import EMULATOR, get_lora_state, traveling


DEMO = Path(__file__).resolve().parents[1] / "recipes" / "demo"
NUM_CLIENTS = 5
FACTORS = {"clean": 1.0, "sign flip": -1.0, "100x": 100.0}
RULES = {
    "fedavg": {},
    "median": {},
    "trimmed_mean": {},
    "norm_clipping": {},
    "multi_krum": {"min_train_clients": NUM_CLIENTS},
    "svd": {},
    "fedavg, freeze_a": {"freeze_a": True},
    "fedavgm": {"server_momentum": 0.5},
    "fedadam": {},
    "fedyogi": {},
    "fedadagrad": {},
}
NOT_THE_CLIENTS = ("task", "dtype", "attn_implementation", "output_dir", "eval_metric", "report_to")


@dataclass
class BadClient:
    """A client that answers with its change times `factor`."""

    client: FederatedClient
    factor: float

    def __getattr__(self, name):
        return getattr(self.client, name)

    def fit(self, start: bytes) -> bytes:
        trainer, reply = self.client.trainer, self.client.fit(start)
        part = traveling(trainer.package_lora, trainer.args.freeze_a)
        order = RoundStart.from_bytes(start, client_lora=part, emulator_lora=get_lora_state(trainer.model, EMULATOR))
        update = ClientUpdate.from_bytes(reply, client_lora=part)
        update.client_lora = {
            key: sent + self.factor * (update.client_lora[key] - sent) for key, sent in order.client_lora.items()
        }
        return update.to_bytes()


def federation(folder: str, quick: bool, num_rounds: int, seed: int, settings: dict) -> FederatedRunner:
    """The demo's run with five clients alike."""
    recipe = yaml.safe_load((DEMO / "demo.yaml").read_text())
    lora = LoraConfig(
        r=recipe.pop("lora_r"),
        lora_alpha=recipe.pop("lora_alpha"),
        lora_dropout=recipe.pop("lora_dropout"),
        target_modules=recipe.pop("lora_target_modules"),
    )
    recipe = {name: value for name, value in recipe.items() if name not in NOT_THE_CLIENTS}
    recipe |= {"num_rounds": num_rounds, "eval_rounds": 0, "report_to": "none", "disable_tqdm": True, "seed": seed}
    recipe |= {"num_clients": NUM_CLIENTS}
    recipe |= {"teacher_cache_dir": str(Path(folder) / "cache"), "log_level": "error", "use_cpu": True} | settings
    if quick:
        recipe |= {"local_steps": 2, "initial_alignment_steps": 2, "alignment_steps": 1}
    args = FedBiOTConfig(str(Path(folder) / "run"), **recipe)
    task = runpy.run_path(str(DEMO / "task.py"))
    domains, heldout = task["private_domains"](450, 30 if quick else 300, seed=seed)
    args.model_init_kwargs = {"dtype": "float32", "attn_implementation": "eager"}
    return FederatedRunner(
        str(DEMO / "base"),
        args,
        train_dataset=concatenate_datasets(list(domains.values())),
        public_dataset=task["public_corpus"](100 if quick else 3000, seed=seed),
        eval_dataset=heldout,
        peft_config=lora,
    )


def run(folder: str, rule: str, factor: float, quick: bool, num_rounds: int, seed: int) -> dict:
    """A row: the losses at the end of a run with one bad client."""
    settings = {"aggregation": rule.partition(",")[0], **RULES[rule]}
    runner = federation(folder, quick, num_rounds, seed, settings)
    runner.console = Console(quiet=True)
    if factor != 1:
        last = list(runner.clients)[-1]
        runner.pool.clients[last] = BadClient(runner.clients[last], factor)
    summary = runner.train()
    mean_round_bytes = (summary.bytes["down"] + summary.bytes["up"]) / num_rounds
    return {
        "zero_shot": summary.zero_shot["loss"],
        "adap_emu": summary.adap_emu["loss"],
        "adap_fu": summary.adap_fu["loss"],
        "kb_up_per_client": summary.bytes["up"] / num_rounds / NUM_CLIENTS / 1e3,
        "mb_per_round": mean_round_bytes / 1e6,
    }


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--rules", nargs="+", default=list(RULES), choices=list(RULES), help="Rules to run.")
    arguments.add_argument("--attacks", nargs="+", default=list(FACTORS), choices=list(FACTORS), help="Bad clients.")
    arguments.add_argument("--num_rounds", type=int, default=6, help="Rounds of each run.")
    arguments.add_argument("--seed", type=int, default=0, help="Seed of the data and the runs.")
    args = arguments.parse_args()
    if args.quick:
        args.rules, args.num_rounds = ["fedavg", "median"], 1
    rows, clean = [], None
    with tempfile.TemporaryDirectory() as folder:
        for rule in args.rules:
            for attack in args.attacks:
                losses = run(folder, rule, FACTORS[attack], args.quick, args.num_rounds, args.seed)
                clean = clean or losses["adap_fu"]  # of the first rule
                ratio = losses["adap_fu"] / clean
                spread = dict.fromkeys(("ratio_median", "ratio_min", "ratio_max"), ratio)
                target = None if rule == "fedavg" else 1.1
                rows.append({"rule": rule, "one of five": attack, **losses, **spread, "target": target})
                Console(stderr=True).print(rows[-1])
    show(f"{args.num_rounds} rounds of five clients", rows, args.json)


if __name__ == "__main__":
    main()
