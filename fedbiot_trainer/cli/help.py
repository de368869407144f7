"""`fedbiot train --help`: the federation's own flags first, under what they are about, and TRL's after them."""

import argparse
import sys
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import partial
from typing import get_args

from trl import ModelConfig, TrlParser

from ..config import FedBiOTConfig
from ..config.kinds import check_kinds
from ..config.settings import GROUPS, heading
from ..config.training_arguments import TREATMENTS, Used
from .early import read_yaml


USAGE = "%(prog)s [--config FILE.yaml] [--FLAG VALUE ...]"
# Script arguments of TRL's that are refused or about debugging, and what is settled of the LoRA.
OF_NO_USE = ("dataset_streaming", "ignore_bias_buffers", "use_peft", "lora_task_type")
OTHERS = """\
TRL's training arguments. Of those that are not here, a run refuses what it
has no place for and names in a warning what it does not need: a table of all
is in docs/settings.md of the repository.\
"""


class TrainParser(TrlParser):
    """A [`~trl.TrlParser`] of script arguments, [`FedBiOTConfig`] and [`~trl.ModelConfig`] with a help to read."""

    def __init__(self, script_arguments: type, command: str, description: str):
        self.script_arguments = script_arguments
        super().__init__(
            (script_arguments, FedBiOTConfig, ModelConfig),
            prog=f"fedbiot {command}",
            usage=USAGE,
            description=description,
            formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=32),
        )

    def parse_args_and_config(self, args: Iterable[str] | None = None, **kwargs):
        """As in [`~trl.TrlParser`]; the YAML is there, and what it has is of the kind that the setting is."""
        args = list(sys.argv[1:] if args is None else args)
        if "--config" in args[:-1]:
            read_yaml(args[args.index("--config") + 1])
        parsed = super().parse_args_and_config(args, **kwargs)
        for arguments in parsed:
            if is_dataclass(arguments) and not isinstance(arguments, FedBiOTConfig):  # which checks itself
                check_kinds(arguments)
        return parsed

    def format_help(self) -> str:
        """The help, from the settings themselves."""
        shown = argparse.ArgumentParser(
            self.prog,
            usage=USAGE,
            description=self.description,
            formatter_class=self.formatter_class,
            add_help=False,
        )
        ours = {field.name for group in GROUPS for field in fields(group)}
        script = fields(self.script_arguments)
        for group, settings in (
            (self.script_arguments, script),
            *((group, fields(group)) for group in reversed(GROUPS)),
        ):
            title, _, more = heading(group).partition(": ")
            _add_group(shown, title, settings, f"{more[0].upper()}{more[1:]}." if more else None)
        _add_group(shown, "The model and the client LoRA", fields(ModelConfig))
        used = [field for field in fields(FedBiOTConfig) if isinstance(TREATMENTS.get(field.name), Used)]
        _add_group(shown, "The clients' training", [field for field in used if field.name not in ours], OTHERS)
        return shown.format_help()


def _add_group(parser: argparse.ArgumentParser, title: str, settings: Iterable[Field], description: str | None = None):
    group = parser.add_argument_group(title, description)
    for setting in settings:
        if setting.name in OF_NO_USE:
            continue
        default = setting.default if setting.default_factory is MISSING else setting.default_factory()
        help_text = setting.metadata.get("help", "")
        if setting.metadata.get("choices"):
            help_text += f" One of {', '.join(map(str, setting.metadata['choices']))}."
        if default not in (None, MISSING, ""):
            help_text += f" Default: {default}.".replace("%", "%%")
        several = list in [getattr(kind, "__origin__", kind) for kind in (*get_args(setting.type), setting.type)]
        group.add_argument(
            f"--{setting.name}",
            metavar=_value(setting),
            nargs="+" if several else None,
            help=" ".join(help_text.split()),
        )


def _value(setting: Field) -> str:
    """What stands for the value of a flag: its kind where that says enough."""
    kinds = get_args(setting.type) or (setting.type,)
    for kind, name in ((bool, "BOOL"), (int, "N"), (float, "X")):
        if kind in kinds and str not in kinds:
            return name
    return setting.name.rpartition("_")[2].upper()
