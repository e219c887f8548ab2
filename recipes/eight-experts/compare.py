"""Experts, their merged models and every rival on the same clips: errors, who answered, speed and memory.

    python recipes/eight-experts/compare.py OUT --set malayalam=TABLES/malayalam-test.tsv … --set none:french=FRENCH.tsv \
        --expert malayalam=runs/malayalam/model … --system delta=merged/delta --system dense=runs/union/model \
        --system default=default --limit 60 --margins 0.5,2.5,30 --dev OUT-OF-THE-DEV-SETS

A set is named after its expert; ``malayalam:radio`` is a second source of it, ``none:french`` is for no expert. Nobody is told a
clip's language (but with ``--tell``); an expert alone is told its own, as within a merged model. Rows beside the systems given:

``base``, and every expert everywhere; ``oracle``: the expert of each set on it, all loaded at once and the right one named;
``dispatch``: the language that the base hears says which expert answers (``EXPERT_OF``), English goes to the expert that was best
on the dev sets, or, in a row of its own, to the base; ``soup``: the mean of the experts' weights. Oracle and dispatch decode
nothing of their own. Without ``--expert`` the base alone is beside the systems given, and the oracle is the base.

OUT/transcripts has a file for each system and set, named by what it depends on (weights, clips, margin, what is told; not this
program's own version): what is there is not decoded again. Speed and memory are of a run of their own, all systems in turn.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

from decoding import THE_CLIPS, Job, Model, costs, digest, heard_by, sample, stem
from figures import (
    MEAN,
    NOBODYS,
    SECOND,
    Sets,
    Texts,
    best_english,
    broken,
    family,
    figures,
    routing,
    transcripts,
    write,
)
from soup import alike, cook

from whisper_moe.evaluate.measure import SystemFailed, apart, disk_bytes
from whisper_moe.evaluate.run import shown
from whisper_moe.machine import machine, versions
from whisper_moe.merge.run import named_experts
from whisper_moe.weights.load import config_of, resolve

logger = logging.getLogger("compare")
EXPERT_OF = {"ml": "malayalam", "sw": "swahili", "hi": "hindi", "ur": "hindi"}
"""Where dispatch sends a language that the base hears; ``en`` to the best English expert, any other to the base."""
REPORT = "report.json"
CHOSEN = ("oracle", "dispatch", "dispatch, English to the base")
OWN = {"base", *CHOSEN, "soup"}
Sent: TypeAlias = dict[str, dict[str, list[tuple[str | None, str]]]]
"""Rival that decodes nothing itself → set → of each clip: what language the base hears, and who answers."""


def sent_to(language: str | None, english: str | None, known: Sequence[str]) -> str:
    name = english if language == "en" else EXPERT_OF.get(language or "")
    return name if name and name in known else "base"


def decoded(
    models: Iterable[Model], sets: Sets, asked: argparse.Namespace, apart: Callable[..., Any]
) -> tuple[Texts, dict[str, list[str]], dict[str, str]]:
    """What each model wrote, the base and what has experts at each margin; whom it can ask; which could not be run, and why."""
    texts: Texts = {}
    asks, failed = dict[str, list[str]](), dict[str, str]()
    for model in models:
        config = config_of(resolve(model.path))
        heard = config.moe or model.name == "base"
        margins = [margin for margin in asked.margins if heard and margin != config.margin]
        try:
            for one in (model, *(model._replace(name=f"{model.name}@{m:g}", margin=m) for m in margins)):
                texts[one.name] = heard_by(one, sets, Path(asked.out), apart)
                if config.moe:
                    asks[one.name] = [*config.moe.names, *["none"] * config.moe.none_choice]
        except SystemFailed as error:
            failed[model.name] = str(error)
            logger.warning("%s: %s", model.name, error)
    return texts, asks, failed


def named(asked: argparse.Namespace) -> list[dict[str, str]]:
    """Sets, experts and other systems. Raises ``ValueError`` for names that would be mixed up, or leave nothing to be told."""
    tables, experts, others = map(named_experts, (asked.set, asked.expert, asked.system))
    twice = experts.keys() & others.keys() | OWN & (experts.keys() | others.keys())
    if twice := twice | {MEAN, SECOND, NOBODYS} & tables.keys():
        raise ValueError(f"names that are taken: {', '.join(sorted(twice))}")
    stems = [*map(stem, tables)]
    if mixed := [name for name in tables if stems.count(stem(name)) > 1]:
        raise ValueError(f"sets that would have files of one name: {', '.join(mixed)}")
    if lacking := experts.keys() - tables.keys():
        raise ValueError(f"experts without a set of their own: {', '.join(sorted(lacking))}")
    if not any(family(name) == name for name in tables):
        said = ", ".join(tables) or "none"
        raise ValueError(f"no set is named after an expert, only {said}: name one, as in french=TABLE")
    return [tables, experts, others]


def cast(
    asked: argparse.Namespace, sets: Sets, experts: Mapping[str, str], others: Mapping[str, str]
) -> tuple[dict[str, Model], list[Model], list[str]]:
    """The base with the experts, and their rivals, a soup of those experts among them that can be averaged."""
    told = THE_CLIPS if asked.tell else None
    crew = {"base": Model("base", asked.base, told, asked.fallback)}
    for name, source in experts.items():
        crew[name] = Model(name, source, told or sets[name][0].sample.language, asked.fallback)
    same = alike({name: crew[name].path for name in experts}, crew["base"].path)
    soup = Path(asked.out) / "models" / f"soup-{digest([crew[name].key() for name in ('base', *same)])}"
    if same and not soup.exists():
        cook(same, crew["base"].path, soup)
    others = {"soup": str(soup)} | dict(others) if same else others
    return crew, [Model(name, source, told, asked.fallback) for name, source in others.items()], [*same]


def timings(
    sets: Sets, most: int, crew: Mapping[str, Model], alone: Sequence[Model], sent: Sent, english: str | None
) -> dict[str, Job]:
    """Of the first clips of each set: models alone, and those that answer by another's choice, all in memory."""
    few = [(place, i) for place in sets for i in range(len(sets[place][:most]))]
    clips = [sets[place][i] for place, i in few]
    if not clips:
        return {}
    jobs = {model.name: Job({model.name: model}, [model.name] * len(clips), clips) for model in alone}
    for rival, places in sent.items():
        able = {who for place in sets for _, who in places[place]} | ({english} if rival == CHOSEN[1] else set())
        able |= {*crew} - {"base"} if rival == CHOSEN[0] else {"base", *EXPERT_OF.values()}
        held = {name: model for name, model in crew.items() if name in able}
        jobs[rival] = Job(held, [places[place][i][1] for place, i in few], clips, detect=rival != CHOSEN[0])
    return jobs


def compare(asked: argparse.Namespace, apart: Callable[..., Any] = apart) -> int:
    """Everything; the exit status. Raises ``ValueError`` where the base or an expert cannot be run: what was heard stays."""
    out, (tables, experts, others) = Path(asked.out), named(asked)
    sets, names = {name: sample(file, asked.limit) for name, file in tables.items()}, [*experts]
    crew, rivals, same = cast(asked, sets, experts, others)
    models = [*crew.values(), *rivals]
    margins = {model.name: config_of(resolve(model.path)).margin for model in models}
    texts, asks, failed = decoded(models, sets, asked, apart)
    if lost := [f"{name}: {failed[name]}" for name in crew if name in failed]:
        raise ValueError("; ".join(lost))
    kinds = names or [place for place in sets if family(place) == place]
    elsewhere = json.loads((Path(asked.dev) / REPORT).read_text())["english"] if asked.dev else None
    english = elsewhere if elsewhere in names else best_english(sets, texts, names)
    broke = broken(texts)
    heard = {place: [each.language for each in texts["base"][place]] for place in sets}
    own = {place: family(place) if family(place) in names else "base" for place in sets}
    sent: Sent = {rival: {} for rival in CHOSEN if names}  # without experts all three are the base
    for place, languages in heard.items() if names else ():
        who = [(own[place], sent_to(one, english, names), sent_to(one, None, names)) for one in languages]
        for rival, answers in zip(CHOSEN, zip(*who, strict=True), strict=True):
            sent[rival][place] = [*zip(languages, answers, strict=True)]
    for rival, places in sent.items():
        texts[rival] = {place: [texts[who][place][i] for i, (_, who) in enumerate(places[place])] for place in sets}
    ran = [model for model in rivals if model.name not in failed]
    jobs = timings(sets, asked.speed_clips, crew, [crew["base"], *ran], sent, english)
    report = {
        "format": 1,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(["whisper-moe", "torch", "numpy", "rapidfuzz"]),
        "sets": {name: {"source": shown(tables[name]), "clips": len(each)} for name, each in sets.items()},
        "models": {model.name: {"source": shown(model.source), "key": model.key()} for model in models},
        "margins": margins,
        "disk_bytes": {model.name: disk_bytes(model.path) for model in models},
        "told": "the clip's is told" if asked.tell else "not told; an expert alone is told its own",
        "fallback": asked.fallback,
        "english": english,
        "chosen": "other clips" if elsewhere in names else "these very clips",
        "not_in_soup": [name for name in names if name not in same],
        "failed": failed,
        "broken": broke,
        "dispatch": sent.get("dispatch", {}),
        "figures": figures(sets, texts, kinds),
        "routing": {name: routing(known, texts[name]) for name, known in asks.items()},
        "timed_clips": asked.speed_clips,
        "costs": costs(jobs, asked.rounds, out / "speed.json", apart) if jobs else {},
    }
    write(out, report)
    shown_of = transcripts(sets, texts, [model.name for model in ran], kinds)
    (out / "transcripts.md").write_text(shown_of, encoding="utf-8")
    return int(bool(failed or broke))


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Experts, their merged models and rivals on the same clips.")
    parser.add_argument("out")
    parser.add_argument("--base", default="openai/whisper-base")
    for name in ("set", "expert", "system"):
        parser.add_argument(f"--{name}", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--limit", type=int, help="clips of each set")
    parser.add_argument("--margins", type=lambda text: [*map(float, text.split(","))], default=[], help="also these")
    parser.add_argument("--dev", help="an earlier comparison, by which the English expert of dispatch is chosen")
    parser.add_argument("--tell", action="store_true", help="tell everybody the language of each clip")
    parser.add_argument(
        "--no-fallback", dest="fallback", action="store_false", help="decode once, whatever it looks like"
    )
    parser.add_argument("--speed-clips", type=int, default=3, help="of each set; 0 measures no speed")
    parser.add_argument("--rounds", type=int, default=2)
    return parser.parse_args(given)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    sys.exit(compare(arguments()))
