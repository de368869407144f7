"""
A site's side of a run: takes part with its own text, on its own hardware, within its own limits, until it is stopped.

    fedbiot join --kit clinic --data patients.jsonl --config site.yaml

`site.yaml` may have, by name, the settings that are a site's (`use_cpu`, `bf16`, `per_device_train_batch_size`, ...), its
limits (`min_examples`, `max_local_steps`, `max_round_seconds`, `max_package_gb`), and `accelerate_config`, with which it trains in
several processes.
"""

import argparse
import json
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..config import FedBiOTConfig
from ..data.sources import read_dataset, to_examples
from ..engines.errors import check_installed
from ..engines.site import Site, SiteLimits
from ..output.run_folder import lock_folder
from ..shared.texts import check_texts
from ..wire.plan import SITES
from .early import read_yaml


PROCESS = "fedbiot_trainer.engines.nvflare.site"
SHARDING = ("deepspeed", "fsdp", "fsdp_config", "accelerator_config")
LIMITS = [field.name for field in fields(SiteLimits)]
EXCHANGED = """\
receives  once: the emulator package, at most {max_package_gb:g} GB; each round: two LoRAs and what to do
sends     each round: the client LoRA, the number of examples, the means of training loss and proximal term; once: the
          emulator's loss on up to as many examples as the owner's plan says. No text, no token, no path.
"""


def read_settings(file: Path | None) -> dict[str, Any]:
    """
    What a site's YAML says.

    Raises:
        FileNotFoundError, ValueError: If there is none, or it has what is not a site's to decide, or of another kind.
    """
    settings = {} if file is None else read_yaml(str(file))
    allowed = {*SITES, *LIMITS, "accelerate_config"} - {"output_dir"}
    unknown = sorted(settings.keys() - allowed)
    if unknown:
        raise ValueError(
            f"`config` is '{file}', which sets {', '.join(unknown)}, but that is not a site's to decide. It may set "
            f"{', '.join(sorted(allowed))}."
        )
    launcher = settings.get("accelerate_config")
    if launcher is not None and not Path(launcher).is_file():
        raise FileNotFoundError(f"`accelerate_config` is '{launcher}', but there is no such file.")
    # How the site's processes share their work is for these to find out.
    alone = {name: value for name, value in settings.items() if name in SITES and name not in SHARDING}
    FedBiOTConfig(output_dir="site", report_to="none", **alone)
    return settings


def make_site(file: str) -> Site:
    """The site that a file of [`main`] describes, in each of its processes."""
    return _site_of(json.loads(Path(file).read_text()))


def _site_of(spec: dict[str, Any]) -> Site:
    dataset = to_examples(read_dataset(spec["data"], None, "train"), tuple(spec["templates"]), None, 0, spec["data"])
    limits = {name: value for name, value in spec["settings"].items() if name in LIMITS}
    settings = {name: value for name, value in spec["settings"].items() if name not in LIMITS}
    return Site(spec["name"], spec["folder"], dataset, SiteLimits(**limits), **settings)


def _claim(folder: Path):
    """
    Keep a second process of the site away, which NVFlare would take turns with, for as long as this one lives, also as the
    programs that it becomes.

    Raises:
        ValueError: If there is one.
    """
    lock = lock_folder(folder)
    if lock is None:
        raise ValueError(
            f"`folder` is '{folder}', with which this site is taking part already. Stop that (`startup/stop_fl.sh` in the kit, and "
            "wait until it has ended) before it joins again."
        )
    os.set_inheritable(lock, True)


def main(argv: list[str] | None = None):
    """Take part as the command line or `argv` says."""
    check_installed("nvflare", "nvflare")
    from ..engines.nvflare.executor import SITE_FILE
    from ..engines.nvflare.provision import check_site_kit

    parser = argparse.ArgumentParser(
        "fedbiot join", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kit", type=Path, required=True, help="The startup kit that the owner has sent.")
    parser.add_argument("--data", required=True, help="The site's text: a file, or a dataset's name on the Hub.")
    parser.add_argument("--config", type=Path, help="YAML of the site's own settings.")
    parser.add_argument("--prompt_template", help="Makes prompts of columns in braces: 'Question: {question}'.")
    parser.add_argument("--completion_template", help="Makes their completions.")
    parser.add_argument("--folder", type=Path, help="Keeps the package. Default: a folder in the kit.")
    parser.add_argument("--check_only", action="store_true", help="Say what would be done, and end.")
    args = parser.parse_args(argv)
    kit = args.kit.absolute()
    name = check_site_kit(kit)
    settings = read_settings(args.config)
    launcher = settings.pop("accelerate_config", None)
    folder = (args.folder or kit / "fedbiot").absolute()
    data = str(Path(args.data).absolute()) if Path(args.data).exists() else args.data
    spec = {"name": name, "folder": str(folder), "data": data, "settings": settings,
            "templates": [args.prompt_template, args.completion_template]}  # fmt: skip
    site = _site_of(spec)
    check_texts(site.train_dataset, f"`data` ('{args.data}')", settings.get("dataset_text_field", "text"))
    if len(site.train_dataset) < site.limits.min_examples:
        raise ValueError(
            f"`min_examples` is {site.limits.min_examples:,}, but '{args.data}' has {len(site.train_dataset):,}, so this site would "
            "refuse each round. Lower it, or take part when there are more."
        )
    sys.stdout.write(f"site {name}: {len(site.train_dataset):,} examples of {args.data}\n")
    sys.stdout.write(EXCHANGED.format(max_package_gb=site.limits.max_package_gb))
    sys.stdout.flush()
    if args.check_only:
        return
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder)
    (folder / "site.json").write_text(json.dumps(spec, indent=2))
    launch = ["accelerate.commands.launch", "--config_file", str(Path(launcher).absolute()), "-m"] if launcher else []
    command = [sys.executable, "-m", *launch, PROCESS, f"{__name__}:{make_site.__name__}", str(folder / "site.json")]
    (kit / "local" / SITE_FILE).write_text(json.dumps({"command": command}, indent=2))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    script = str(kit / "startup" / "sub_start.sh")
    os.execve(script, [script, "--once"], os.environ | {"PATH": path})
