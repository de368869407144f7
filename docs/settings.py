"""Writes docs/settings.md: `python docs/settings.py`."""

from dataclasses import fields
from pathlib import Path

from trl import SFTConfig

from fedbiot_trainer.config.settings import GROUPS, heading
from fedbiot_trainer.config.training_arguments import TREATMENTS, Refused, Used


PAGE = Path(__file__).with_suffix(".md")
HEAD = """\
# Every setting

`python docs/settings.py` writes this page. `FedBiOTConfig` has the settings of the federation, and it is an
[`SFTConfig`](https://huggingface.co/docs/trl/sft_trainer#trl.SFTConfig): what is written for a training of TRL's can be
passed as it is. What then has no effect is named in one warning at the start of a run, with what does it instead.
"""
SFT = """\
## TRL's, for the clients' training

{used} are used, {refused} are refused with an error, {without} have no effect in a `FederatedRunner`.

| setting | | what for, or why not |
|---|---|---|
"""


def settings_page() -> str:
    """The page, from the settings themselves."""
    page = HEAD
    for group in reversed(GROUPS):
        page += f"\n## {heading(group)}\n\n| setting | default | |\n|---|---|---|\n"
        for field in fields(group):
            page += f"| `{field.name}` | `{field.default}` | {_cell(field.metadata['help'])} |\n"
    rows, counts = "", {"used": 0, "refused": 0, "without": 0}
    for field in fields(SFTConfig):
        treatment = TREATMENTS[field.name]
        if isinstance(treatment, Used):
            kind, word, note = "used", "used", treatment.where
        elif isinstance(treatment, Refused):
            kind, word, note = "refused", "**refused**", treatment.why
        else:
            kind, word, note = "without", "no effect", treatment.why
        counts[kind] += 1
        rows += f"| `{field.name}` | {word} | {_cell(note)} |\n"
    return f"{page}\n{SFT.format(**counts)}{rows}"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


if __name__ == "__main__":
    PAGE.write_text(settings_page())
