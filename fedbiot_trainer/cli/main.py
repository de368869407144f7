"""One door to everything: `fedbiot COMMAND ...`, or `python -m fedbiot_trainer COMMAND ...`."""

import importlib
import sys

from .early import check_early
from .errors import end_with_error


COMMANDS = {
    "train": "federated fine-tuning, from a YAML or flags",
    "plan": "what a run will cost, from the model's config alone",
    "merge": "what a run leaves as one plain model folder",
    "provision": "startup kits for an owner and sites on machines of their own",
    "serve": "the owner's side of a run with such sites",
    "join": "a site's side of it",
    "status": "how the owner's server, its sites and its run are doing",
    "stop": "end the run that is being served",
    "revoke": "let a site take no further part",
}


def main(argv: list[str] | None = None):
    """Run a command."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        command = f"fedbiot {argv[0]}"
        try:
            if argv[0] in ("train", "serve"):
                check_early(argv[1:], are_remote=argv[0] == "serve")
            importlib.import_module(f".{argv[0]}", __package__).main(argv[1:])
        except Exception as error:
            end_with_error(command, error)
        return
    lines = "".join(f"  {name:<11}{text}\n" for name, text in COMMANDS.items())
    text = f"usage: fedbiot COMMAND ...\n\n{lines}\n`fedbiot COMMAND --help` lists its flags.\n"
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(text)
    else:
        sys.exit(f"{text}\nfedbiot: error: there is no command '{argv[0]}'.")
