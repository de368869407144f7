"""
What clients that fail cost: the demo with each client failing at random in each round, next to the demo without.

    python benchmarks/absence.py --json absence.json

The loss is AdapFu's on the held-out private prompts: with --eval_rounds 1, as by default, that of the best round, with 0 that
of the last; a row compares one share of failures with none,
over seeds of the demo and of the failures. Lower than 1 is better than without failures.
"""

import random
import runpy
import statistics
import tempfile
from pathlib import Path

import yaml
from common import parser, show, spread
from peft import LoraConfig

from fedbiot_trainer import FedBiOTConfig, FederatedRunner


DEMO = Path(__file__).parents[1] / "recipes" / "demo"


def run(
    share: float, seed: int, num_rounds: int, local_steps: int, eval_rounds: int, retries: int
) -> tuple[float, int]:
    """AdapFu's final loss, and how many answers a round had to do without."""
    task, settings = runpy.run_path(str(DEMO / "task.py")), yaml.safe_load((DEMO / "demo.yaml").read_text())
    names = FedBiOTConfig.__dataclass_fields__.keys() & settings.keys() - {"eval_metric", "report_to", "output_dir"}
    datasets, eval_dataset = task["private_domains"]({"clinic": 300, "shop": 450, "library": 600}, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        own = {
            "num_rounds": num_rounds,
            "local_steps": local_steps,
            "eval_rounds": eval_rounds,
            "client_retries": retries,
            "seed": seed,
            "report_to": "none",
        }
        args = FedBiOTConfig(folder, **{name: settings[name] for name in names} | own)
        args.model_init_kwargs = {"dtype": "float32", "attn_implementation": "eager"}
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
        public = task["public_corpus"](3000, seed=seed)
        runner = FederatedRunner(
            str(DEMO / "base"), args, datasets, public_dataset=public, eval_dataset=eval_dataset, peft_config=lora
        )
        generator = random.Random(seed)
        for client in runner.clients.values():

            def fit(start, fit=client.fit):
                if generator.random() < share:
                    raise ConnectionError("not there in this round")
                return fit(start)

            client.fit = fit
        runner.console.quiet = True
        summary = runner.train()
        return summary.adap_fu["loss"], sum(len(record.failed) for record in runner.records)


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--shares", type=float, nargs="+", default=[0.3], help="Shares of answers that fail.")
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--num_rounds", type=int, default=20)
    arguments.add_argument("--local_steps", type=int, default=20)
    arguments.add_argument("--eval_rounds", type=int, default=1)
    arguments.add_argument(
        "--client_retries", type=int, default=0, help="How often a client that failed is asked again."
    )
    arguments.add_argument("--clean_rounds", type=int, help="Rounds of the runs without failures, if not as many.")
    args = arguments.parse_args()
    if args.quick:
        args.seeds, args.num_rounds, args.local_steps = [0], 2, 2
    sizes = args.local_steps, args.eval_rounds, args.client_retries
    clean_rounds = args.clean_rounds or args.num_rounds
    clean = {seed: run(0.0, seed, clean_rounds, *sizes)[0] for seed in args.seeds}
    rows = []
    for share in args.shares:
        losses, failed = zip(*(run(share, seed, args.num_rounds, *sizes) for seed in args.seeds), strict=True)
        ratios = [loss / clean[seed] for loss, seed in zip(losses, args.seeds, strict=True)]
        rows.append(
            {
                "failing": share,
                "rounds": args.num_rounds,
                "clean_rounds": clean_rounds,
                "failed_answers": statistics.mean(failed),
            }
            | {"clean_loss": statistics.mean(clean.values()), "loss": statistics.mean(losses)}
            | spread(ratios)
            | {"target": 1.05}
        )
    show("Clients that fail at random", rows, args.json)


if __name__ == "__main__":
    main()
