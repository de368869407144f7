"""Which room of the package may use which: the directions of the design, read from the imports."""

import ast
from pathlib import Path

import pytest

import fedbiot_trainer


PACKAGE = Path(fedbiot_trainer.__file__).parent
# From the top of the house to the bottom. A room may use those on the floors below it, and nothing beside or above it.
FLOORS = (
    {"cli"},
    {"engines"},
    {"federation"},
    {"data", "evaluation"},
    {"server", "client"},
    {"wire", "output"},
    {"shared"},
    {"config"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def imports(file: Path) -> set[str]:
    """The modules of this package that a file imports, anywhere in it, by their full names."""
    home = [PACKAGE.name, *file.relative_to(PACKAGE).with_suffix("").parts]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = home[: -node.level] if node.level else []
            module = [*start, *(node.module or "").split(".")] if node.module else start
            found |= {".".join([*module, alias.name]) for alias in node.names}
    return {name for name in found if name.partition(".")[0] == PACKAGE.name}


MODULES = {file.relative_to(PACKAGE).as_posix(): file for file in sorted(PACKAGE.rglob("*.py"))}
IMPORTS = {name: imports(file) for name, file in MODULES.items()}


def test_imports_are_seen():
    assert f"{PACKAGE.name}.wire.messages.RoundStart" in IMPORTS["client/client.py"]
    assert f"{PACKAGE.name}.shared.lora_state.LoraState" in IMPORTS["server/aggregation/fedavg.py"]
    assert sum(map(len, IMPORTS.values())) > 100


def test_every_room_has_a_floor():
    assert {name.partition("/")[0] for name in MODULES if "/" in name} <= FLOOR.keys()
    assert {name for name in MODULES if "/" not in name} == {"__init__.py", "__main__.py"}


@pytest.mark.parametrize("name", [name for name in MODULES if "/" in name])
def test_arrows_go_down(name):
    room = name.partition("/")[0]
    for module in IMPORTS[name]:
        used = module.split(".")[1]
        assert used in FLOOR, f"{name} imports {module}: a module must not go back through the package's own doors"
        assert used == room or FLOOR[used] > FLOOR[room], f"{name} imports {module}, which is not below it"


@pytest.mark.parametrize(
    "room, never",
    [
        ("client", {"server"}),
        ("wire", {"server", "client"}),
        ("shared", {"wire"}),
        ("output", {"server"}),
        ("config", FLOOR.keys() - {"config"}),
    ],
)
def test_never(room, never):
    """The lines that matter most, said once more: they hold whatever becomes of the floors."""
    used = {module.split(".")[1] for name in IMPORTS if name.startswith(f"{room}/") for module in IMPORTS[name]}
    assert not used & never


def test_what_the_data_side_imports_has_nothing_of_the_owners():
    """Also by way of others: the client's rooms work where the server's code is not installed."""
    reached, waiting = set(), {name for name in MODULES if name.startswith("client/")}
    while waiting:
        name = waiting.pop()
        reached.add(name)
        for module in IMPORTS[name]:
            parts = module.split(".")[1:]
            candidates = (
                "/".join(parts[:i]) + end for i in range(1, len(parts) + 1) for end in (".py", "/__init__.py")
            )
            waiting |= {found for found in candidates if found in MODULES} - reached
    assert {"wire/messages.py", "shared/round_trainer.py", "config/config.py"} <= reached
    assert not {name for name in reached if name.startswith(("server/", "federation/", "engines/"))}


def test_no_drawer_for_odds_and_ends():
    assert not [name for name in MODULES if Path(name).stem in ("utils", "util", "helpers", "common", "misc")]


def test_an_engine_is_imported_in_its_own_folder_only():
    for name, file in MODULES.items():
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            if any(module.partition(".")[0] == "nvflare" for module in modules):
                assert name.startswith("engines/nvflare/")
