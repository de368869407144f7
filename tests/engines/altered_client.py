"""
NVFlare's client of a site as its kit starts it, but altered: when it has registered, it sends the requests that stand in
`requests.json` of its kit, as `[[target, channel, topic, body], ...]`, and writes what came back to `replies.json`.
"""

import json
import sys
import threading
from pathlib import Path

from nvflare.apis.shareable import Shareable
from nvflare.fuel.f3.cellnet.defs import CellChannel, MessageHeaderKey
from nvflare.fuel.f3.mpm import MainProcessMonitor
from nvflare.private.admin_defs import Message
from nvflare.private.defs import new_cell_message
from nvflare.private.fed.app.client.client_train import main, parse_arguments
from nvflare.private.fed.client.fed_client_base import FederatedClientBase


SECONDS = 5.0  # for an answer


def ask(cell, target: str, channel: str, topic: str, body: str) -> list[str]:
    """NVFlare's return code, and what stands in the answer."""
    payload = Message(topic, body) if channel == CellChannel.CLIENT_MAIN else Shareable()
    reply = cell.send_request(
        channel=channel, topic=topic, target=target, request=new_cell_message({}, payload), timeout=SECONDS
    )
    return [str(reply.get_header(MessageHeaderKey.RETURN_CODE)), str(getattr(reply.payload, "body", reply.payload))]


def ask_all(cell, kit: Path):
    replies = [ask(cell, *request) for request in json.loads((kit / "requests.json").read_text())]
    (kit / "replies.part").write_text(json.dumps(replies))
    (kit / "replies.part").rename(kit / "replies.json")


if __name__ == "__main__":
    arguments = parse_arguments()
    start_heartbeat = FederatedClientBase.start_heartbeat

    def start_altered(client, *args, **kwargs):
        start_heartbeat(client, *args, **kwargs)
        threading.Thread(target=ask_all, args=(client.cell, Path(arguments.workspace)), daemon=True).start()

    FederatedClientBase.start_heartbeat = start_altered
    sys.exit(MainProcessMonitor.run(main_func=main, run_dir=arguments.workspace, args=arguments))
