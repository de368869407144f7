"""
Let a site take no further part, also after the server has been started anew, or let it in again.

    fedbiot revoke --kit kits/owner@fedbiot.org shop
    fedbiot revoke --kit kits/owner@fedbiot.org shop --undo
"""

import argparse
import sys
from pathlib import Path

from ..engines.errors import check_installed
from ..engines.nvflare.administrator import administrator_kit, open_session


def main(argv: list[str] | None = None):
    """Shut a site out."""
    check_installed("nvflare", "nvflare")
    parser = argparse.ArgumentParser(
        "fedbiot revoke", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("site", help="Its name.")
    parser.add_argument("--kit", type=Path, required=True, help="The administrator's startup kit.")
    parser.add_argument("--undo", action="store_true", help="Let it in again.")
    args = parser.parse_args(argv)
    session = open_session(administrator_kit(args.kit))
    try:
        known = {site.name for site in session.get_connected_client_list()}
        (session.enable_client if args.undo else session.disable_client)(args.site)
    finally:
        session.close()
    doubt = "" if args.undo or args.site in known else " It was not connected: is that its name?"
    sys.stdout.write(f"{args.site} may {'connect again' if args.undo else 'not connect any more'}.{doubt}\n")
