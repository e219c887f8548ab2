"""The model card of a merged model: ``README.md``, as the Hub shows it. It is no part of the checkpoint: people may edit it.

What it says was read or measured while merging; a licence is named only where a source's own card names one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import whisper_moe
from whisper_moe.config import MoEConfig
from whisper_moe.evaluate.report import markdown_table
from whisper_moe.evaluate.run import shown
from whisper_moe.merge.doctor import Diagnosis
from whisper_moe.weights.checkpoint import CARD
from whisper_moe.weights.files import CheckpointError, atomic_file
from whisper_moe.weights.load import hub_id, resolve

SYSTEMS = ("base", "fine-tune", "merged")
"""Whose WER is measured: the base's, the expert's as it was, and of the merged model where that expert alone may answer."""
_CARD = """---
{head}
---

# {name}

Fine-tunes of {base} as the experts of one model, which chooses among them for each window of up to 30 s; {rest}.
Made by `whisper-moe merge` {version}, granularity `{kind}`. Nothing was trained: the router was fitted to clips.

{experts}

{lost}## Use

    whisper-moe transcribe talk.m4a --model {name} --show-routing
"""
_LOST = """## What is lost

WER, %, on probe clips that have a text, greedily and in the language that they state: the base, the fine-tune alone,
and this model where that expert alone may answer. The fine-tune may have been trained on these clips.

{rates}

"""


class Member(NamedTuple):
    """An expert, and what is known of it; the diagnosis' ``wer`` is of :data:`SYSTEMS`."""

    source: str
    probe: str
    languages: Sequence[str]
    """Of the probe's clips."""
    measured: int
    """Clips whose WER was measured."""
    found: Diagnosis

    @property
    def rates(self) -> list[str]:
        return [f"{100 * self.found.wer[system]:.1f}" for system in SYSTEMS]


def write_card(folder: Path, base: str, moe: MoEConfig, members: Sequence[Member], none: Sequence[str]) -> None:
    """``base``: its source, like the members'; ``none``: the probes that are for no expert."""
    sources = [each for each in (base, *(member.source for member in members)) if not Path(each).exists()]
    head: dict[str, str | list[str]] = {
        "language": sorted({code for member in members for code in member.languages if code}),
        "base_model": [known for each in sources if (known := hub_id(each))],
        "base_model_relation": "merge",
        "pipeline_tag": "automatic-speech-recognition",
        "tags": ["whisper", "mixture-of-experts"],
    }
    rows = [
        (each.found.name, each.source, ", ".join(each.languages), shown(each.probe), "; ".join(each.found.reasons))
        for each in members
    ]
    rows += [("none" if moe.none_choice else "base", base, "", ", ".join(map(shown, none)), "")]
    experts = [(name, shown(source), _licence(source), *rest) for name, source, *rest in rows]
    measured = [(each.found.name, str(each.measured), *each.rates) for each in members if each.measured]
    text = _CARD.format(
        head="\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items() if value),
        name=folder.resolve().name,
        base=shown(base),
        rest="*none* is the base itself" if moe.none_choice else "all but their feed-forwards is their average",
        version=whisper_moe.__version__,
        kind=f"{moe.granularity}`, rank `{moe.delta_rank}" if moe.granularity == "delta" else moe.granularity,
        experts=markdown_table(("expert", "source", "stated licence", "languages", "probe", "doctor"), experts),
        lost=_LOST.format(rates=markdown_table(("expert", "clips", *SYSTEMS), measured)) if measured else "",
    )
    with atomic_file(folder / CARD) as file:
        file.write_text(text, encoding="utf-8")


def _licence(source: str) -> str:
    """As the head of its card says, where there is one on this disk."""
    try:
        card = (resolve(source).path / CARD).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, CheckpointError):
        return ""
    head = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    stated = re.search(r"^license:\s*(\S+)\s*$", head[1], re.MULTILINE) if head else None
    return stated[1] if stated else ""
