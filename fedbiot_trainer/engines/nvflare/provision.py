"""Makes the startup kits: who takes part, with which certificate, and what the owner's jobs may do at a site."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from cryptography import x509
from nvflare.lighter.constants import CtxKey
from nvflare.lighter.prov_utils import prepare_builders, prepare_packager
from nvflare.lighter.provision import prepare_project
from nvflare.lighter.provisioner import Provisioner

from .owner import MESSAGE_SECONDS


PROJECT_FILE = "project.yml"
EXECUTOR = "fedbiot_trainer.engines.nvflare.executor.SiteExecutor"
CONTROLLER = "fedbiot_trainer.engines.nvflare.owner.OwnerController"
OWNER_GATE = "fedbiot_trainer.engines.nvflare.gate.OwnerGate"
SITE_GATE = "fedbiot_trainer.engines.nvflare.gate.SiteGate"
SERVER = "owner"
MAX_PORT = 65_535
SITE_PARTS = (
    "startup/sub_start.sh",
    "startup/client.crt",
    "startup/client.key",
    "startup/rootCA.pem",
    "local/resources.json",
)
_BUILDERS: tuple[tuple[str, dict[str, str]], ...] = (
    ("workspace.WorkspaceBuilder", {}),
    ("static_file.StaticFileBuilder", {"config_folder": "config", "scheme": "grpc"}),
    ("cert.CertBuilder", {}),
    ("signature.SignatureBuilder", {}),
)
# What the owner's administrator may have done at a site: start and end jobs, and see how they go. No command in a shell,
# no look at the site's files, and no code in a job.
_RIGHTS = {
    "submit_job": "any",
    "manage_job": "any",
    "download_job": "any",
    "view": "any",
    "clone_job": "none",
    "operate": "none",
    "shell_commands": "none",
    "byoc": "none",
}


def provision(
    folder: str | Path, host: str, port: int, sites: Sequence[str], administrator: str = "owner@fedbiot.org"
) -> dict[str, Path]:
    """
    Make a startup kit for each party. Sites connect to one port of the owner's machine, and need none of their own.

    A second call with more sites keeps the certificate authority: kits that are in use stay good.

    Args:
        folder (`str` or `Path`): Where `project.yml`, the certificate authority and the kits go. Not to be shared.
        host (`str`): Name under which sites reach the owner's machine.
        port (`int`): Its one open port.
        sites (sequence of `str`): Names of the sites: letters, digits, `-` and `_`.
        administrator (`str`, *optional*): Who submits jobs, written as an email address.

    Returns:
        `dict[str, Path]`: The kit of `owner` (the server), of each site, and of the administrator.

    Raises:
        ValueError: If a name, the port or the folder cannot be used, or a name is used twice.
    """
    for site in sites:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", site) or site in (SERVER, "server"):  # NVFlare's name of every server
            raise ValueError(
                f"`sites` has '{site}': a name is made of letters, digits, '-' and '_', and not '{SERVER}' or 'server'."
            )
    if len(set(sites)) < len(sites):
        raise ValueError(f"`sites` has a name twice: {list(sites)}.")
    if not 1 <= port <= MAX_PORT:
        raise ValueError(f"`port` is {port}, but ports are 1 to {MAX_PORT}.")
    folder = Path(folder).absolute()
    check_kit_path(folder, "output_dir")
    project = project_of(host, port, sites, administrator)
    try:
        participants = prepare_project(project)
    except ValueError as error:
        raise ValueError(
            f"`host` '{host}' or `administrator` '{administrator}' cannot be: {error}. The first is a host's name or an IP "
            "address, the second is written as an email address."
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PROJECT_FILE).write_text(yaml.safe_dump(project, sort_keys=False))
    context = Provisioner(str(folder), prepare_builders(project), prepare_packager(project)).provision(participants)
    made = context.get(CtxKey.CURRENT_PROD_DIR)
    if context.get(CtxKey.BUILD_ERROR) or made is None:
        raise ValueError(
            f"NVFlare cannot make startup kits of '{folder / PROJECT_FILE}': {context.get(CtxKey.ERRORS)}."
        )
    # NVFlare writes the key of the certificate authority for all to read.
    Path(folder, project["name"]).chmod(0o700)
    kits = {name: Path(made, name) for name in (SERVER, *sites, administrator)}
    _restrict_owner(kits[SERVER] / "local")
    for site in sites:
        _restrict_site(kits[site] / "local")
    return kits


def check_kit_path(folder: Path, argument: str):
    """Raise `ValueError` if NVFlare could not start a process from a kit there: it splits its commands at white space."""
    if re.search(r"\s", str(folder)):
        raise ValueError(
            f"`{argument}` is '{folder}', a path with white space, from which NVFlare cannot start its processes. Choose another."
        )


def check_site_kit(kit: Path) -> str:
    """
    Returns:
        `str`: The site's name, as its certificate says. The folder may have another.

    Raises:
        FileNotFoundError: If a part of it is missing.
        ValueError: If the kit is not as [`provision`] makes it where a site depends on it.
    """
    check_kit_path(kit, "kit")
    for part in SITE_PARTS:
        if not (kit / part).is_file():
            raise FileNotFoundError(f"`kit` is '{kit}', which has no {part}, so it is no whole startup kit of a site.")
    try:
        resources = json.loads((kit / "local" / "resources.json").read_text())
    except ValueError as error:
        raise ValueError(f"`kit` is '{kit}', whose local/resources.json is damaged ({error}).") from error
    allowed = resources.get("class_allow_list"), resources.get("class_list_enforcement_mode")
    gates = [part for part in resources.get("components", []) if part.get("path") == SITE_GATE]
    if allowed != ([EXECUTOR], "enforce") or not gates:
        raise ValueError(
            f"`kit` is '{kit}', but with its `local/resources.json` the owner could do more at this site than train. Ask for "
            "a kit that `fedbiot provision` of this version has made."
        )
    certificate = x509.load_pem_x509_certificate((kit / "startup" / "client.crt").read_bytes())
    return str(certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)[0].value)


def project_of(host: str, port: int, sites: Sequence[str], administrator: str) -> dict[str, Any]:
    """What `project.yml` says."""
    owner = {"name": SERVER, "type": "server", "org": "owner", "default_host": host, "host_names": [host]}
    admin = {"name": administrator, "type": "admin", "org": "owner", "role": "project_admin"}
    return {
        "api_version": 3,
        "name": "fedbiot",
        "participants": [
            owner | {"fed_learn_port": port, "admin_port": port},
            *({"name": site, "type": "client", "org": site.replace("-", "_")} for site in sites),
            admin,
        ],
        "builders": [{"path": f"nvflare.lighter.impl.{path}", "args": args} for path, args in _BUILDERS],
    }


def _restrict_owner(local: Path):
    """The owner's machine keeps its jobs in the kit's own folder, and builds only what a job of ours names."""
    resources = json.loads((local / "resources.json.default").read_text())
    resources["class_allow_list"] = [CONTROLLER]
    storage = local.parent / "storage"
    resources["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"] = str(storage / "snapshots")
    for component in resources["components"]:
        if component["id"] == "job_manager":
            component["args"]["uri_root"] = str(storage / "jobs")
    resources["components"].append({"id": "fedbiot_gate", "path": OWNER_GATE, "args": {}})
    (local / "resources.json").write_text(json.dumps(resources, indent=2))


def _restrict_site(local: Path):
    """Nothing of a site's logs leaves it, and no job makes it run anything but our executor."""
    resources = json.loads((local / "resources.json.default").read_text())
    resources["class_allow_list"] = [EXECUTOR]
    resources["allow_log_streaming"] = False
    resources["client"]["communication_timeout"] = MESSAGE_SECONDS  # the owner's jobs lengthen it; by default, 300 s
    resources["components"] = [part for part in resources["components"] if part["id"] != "site_log_streamer"]
    resources["components"].append({"id": "fedbiot_gate", "path": SITE_GATE, "args": {}})
    (local / "resources.json").write_text(json.dumps(resources, indent=2))
    policy = {"format_version": "1.0", "permissions": {"project_admin": _RIGHTS}}
    (local / "authorization.json").write_text(json.dumps(policy, indent=2))
