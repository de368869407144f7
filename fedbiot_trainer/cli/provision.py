"""
Startup kits for an owner and its sites: certificates, addresses, and what a job of the owner's may do at a site. Each
party is handed its own kit, and nobody the folder.

    fedbiot provision --host owner.example.org --port 8002 --sites clinic shop library --output_dir kits
"""

import argparse
import sys
from pathlib import Path

from ..engines.errors import check_installed


def main(argv: list[str] | None = None):
    """Make the kits that the command line or `argv` asks for."""
    check_installed("nvflare", "nvflare")
    from ..engines.nvflare.provision import SERVER, provision

    parser = argparse.ArgumentParser(
        "fedbiot provision", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host", required=True, help="Name under which sites reach the owner's machine.")
    parser.add_argument("--port", type=int, default=8002, help="Its one open port. Default: 8002.")
    parser.add_argument("--sites", nargs="+", required=True, metavar="SITE", help="Their names.")
    parser.add_argument("--administrator", default="owner@fedbiot.org", help="Who submits runs, as an email address.")
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="Holds the certificate authority: keep it apart."
    )
    args = parser.parse_args(argv)
    kits = provision(args.output_dir, args.host, args.port, args.sites, args.administrator)
    for name, kit in kits.items():
        start = {SERVER: "startup/start.sh", args.administrator: f"fedbiot serve --kit {kit} --config run.yaml"}
        sys.stdout.write(f"{name:<20} {kit}  {start.get(name, 'fedbiot join --kit KIT --data my.jsonl')}\n")
