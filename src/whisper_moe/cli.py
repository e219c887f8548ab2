"""The command line, as one table. Flags are named as ``whisper``'s, whose underscore spellings work too.

``--help`` and mistakes in usage never import torch. Exit status: 0, 1 when some files failed, 2 for usage.
"""

from __future__ import annotations

import inspect
import logging
import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import typer

from whisper_moe import commands, texts
from whisper_moe.jobs import UsageError, give_up_output, sentence

logger = logging.getLogger(__name__)

_TABLE = """
transcribe: Write down what is said, in its language or in English.
  files                     [str]?               Audio or video files, globs, or - for standard input. Without any: the bundled sample.
  --model                   str                  A whisper-moe folder or training run, or any Whisper: base, turbo …, Hub id, folder, .pt file, LoRA adapter. Default: the one that comes along.
  --model-dir               path                 Look for the model here first (NAME.pt, NAME), and download it to here.
  --task                    str = transcribe     transcribe, or translate into English.
  --language -l             str                  auto (for every window), or a code or name: hi, Hindi. Default: the one that a fine-tune states, else auto.
  --languages               str                  Detect among these only: hi,ta,en.
  --detect-language-once    switch               Each file is in one language: that of its first window where it is sure.
  --output-format -f        str                  txt, srt, vtt, tsv, json or all. Without -o it is printed: of several files txt, or json with a line for each.
  --output-dir -o           path                 Write a file for each input here.
  --speak                   path                 Also read each transcript aloud, into a file NAME.m4a in this folder; needs a model that speaks.
  --skip-existing           switch               Leave out what has all its files in the output folder.
  --device                  str = auto           cpu, cuda, cuda:1, mps; auto takes a GPU if there is one.
  --dtype --compute-type    str = auto           auto (int8 on a CPU that is fast at it, else float32), float32, int8, bfloat16 or float16.
  --fp16                    truth = False        True: the same as --dtype float16, on an NVIDIA GPU only.
  --threads                 int?>=0              CPU threads; 0 for PyTorch's default.
  --track                   str                  The sound track of a film: its number, from 0, or its language: hin, hi, Hindi.
  --verbose                 truth = True         False prints no facts and no progress.
 Decoding:
  --beam-size               int?>=1 = 1          Beams at temperature 0.
  --best-of                 int?>=1 = 5          Samples at other temperatures.
  --patience                float? = 1.0         Beam search patience (arXiv 2204.05424).
  --length-penalty          float?               Alpha of arXiv 1609.08144; default: mean log-probability.
  --temperature             float>=0 = 0.0       The first to try.
  --temperature-increment-on-fallback  float?>=0 = 0.2  Step up to 1 while a transcript looks wrong; 0 tries no other.
  --initial-prompt          str                  Text that comes before: names, spelling, style.
  --condition-on-previous-text  truth = False    True prompts each window with the text before it; one window at a time, slower.
  --carry-initial-prompt    truth = False        True: before every window also with --condition-on-previous-text; without that it always is.
  --hotwords                str                  Words to expect.
  --suppress-tokens         ints                 Ids never to say, 1,2; -1 for annotations such as ♪. Default: the checkpoint's.
  --without-timestamps      switch               One segment for each window.
  --word-timestamps         truth = False        True for a time on every word.
  --prepend-punctuations    str = "'“¿([{-       Marks that are part of the word after them.
  --append-punctuations     str = "'.。,，!！?？:：”)]}、  Marks that are part of the word before them.
  --hallucination-silence-threshold  float?>=0   Skip silence of more seconds before what looks made up (with word timestamps).
 Subtitles:
  --highlight-words         truth = False        True underlines each word in srt and vtt as it is said.
  --max-line-width          int?>=1              Characters in a line (with word timestamps).
  --max-line-count          int?>=1              Lines in a subtitle (with word timestamps).
  --max-words-per-line      int?>=1              Words in a line (with word timestamps).
 Experts:
  --experts                 str                  Only these may answer: hindi,none; none is the base alone. Default: the router chooses among all.
  --exclude                 str                  These may not answer.
  --show-routing            switch               Say which experts answered each segment.
  --lazy                    switch               Of experts that are whole models, keep only the two used last in memory.
 Windows:
  --clip-timestamps         str = 0              Only these stretches: start,end,start,end,… in seconds; the last end may be missing.
  --vad                     str = none           Drop what is not speech: none, energy, or silero (extra `vad`).
  --vad-filter              truth = False        True: --vad silero, or energy where silero is not installed.
  --context-margin          float>=0             Seconds of silence kept after a clip; 30 pads to Whisper's full window.
  --window                  float>=1<=30         Seconds that a long recording is cut into, at most. Default: 20.
  --carry-ttt               switch               Fast weights learn through a whole recording; slower.
  --compression-ratio-threshold  float? = 2.4    Above it a text repeats itself.
  --logprob-threshold       float? = -1.0        Below it a text is unsure.
  --no-speech-threshold     float? = 0.6         Above it an unsure text is silence.

speak: Read a text aloud.
  text                      str                  A text, a text file, or - for standard input.
  --output -o               path!                The file of the sound: m4a, wav, mp3, flac, ogg.
  --voice                   str                  By name. Default: the first of the language.
  --language -l             str                  en or hi, by code or name. Default: the voice's, or that of most letters.
  --rate                    float = 1.0          Times the voice's own speed, 0.5 to 2.
  --model                   str                  A whisper-moe folder or training run that speaks. Default: the one that comes along.
  --model-dir               path                 Look for the model here first, and download it to here.
  --threads                 int?>=0              CPU threads; 0 for PyTorch's default.
  --json                    switch               Print voice, language, duration, and each sentence with its phonemes and its time.

translate: Translate a text, a text file, or what is said in a recording.
  text                      str                  A text, a text file, a recording, or - for standard input.
  --source --from           str                  Its language, by code or name. Default: that of most letters, or the one that is heard.
  --to                      str                  The language wanted. Default: the only one there is for that; of a recording English.
  --output -o               path                 Write to this file instead of standard output.
  --speak                   path                 Also read the translation aloud, into this file: m4a, wav, mp3, flac, ogg.
  --model                   str                  A whisper-moe folder or training run that reads texts; the one that comes along, the default, reads none: of recordings it writes English.
  --model-dir               path                 Look for the model here first, and download it to here.
  --device --dtype --threads
  --json                    switch               Print languages, and each sentence with its translation and how sure it is.

sign: Read signs: films of signing in, a line of text for each out.
  files                     [str]                Video files, or globs.
  --language -l             str                  The sign language: isl, asl. Default: what the model has learned.
  --output -o               path                 Write to this file instead of standard output.
  --model                   str                  A whisper-moe folder or training run that sees films. Default: the one that comes along.
  --model-dir               path                 Look for the model here first, and download it to here.
  --device --dtype --threads
  --json                    switch               Print a line of JSON for each: source, text, language, and how sure it is.

serve: Answer over HTTP what OpenAI's clients ask, with one model; extra `serve`.
  --model                   str                  A whisper-moe folder or training run, or any Whisper. Default: the one that comes along.
  --model-dir               path                 Look for the model here first, and download it to here.
  --host                    str = 127.0.0.1      The address to listen at; one that others reach needs a key.
  --port                    int>=0<=65535 = 8000  And its port.
  --api-key-file            path                 Keys, one a line; also from WHISPER_MOE_API_KEY.
  --insecure                switch               Let everybody ask who reaches the address.
  --device --dtype --threads
 Limits:
  --max-body                int>=1 = 25000000    Bytes of a request.
  --max-seconds             float>=1 = 600       Of sound in a request.
  --max-pixels              int>=1 = 2073600     Of a film's pictures.
  --max-frames              int>=1 = 900         Of a film.
  --max-text                int>=1 = 4096        Characters of a text.
  --max-deadline            float>=1 = 60        Seconds from request to answer.
  --max-queue               int>=1 = 256         Requests that wait or are computed.
  --max-frozen              float>=1 = 60        Seconds without a sign of life after which the model's process is replaced.

detect-language: Say which language is spoken at the start of each file, and how surely.
  files                     [str]                Audio or video files.
  --model --model-dir
  --languages               str                  Choose among these only: hi,ta,en.
  --track --device --dtype --threads

upcycle: Turn any Whisper into a mixture of experts that computes the same function.
  source                    str                  Any Whisper: base, turbo …, Hub id, folder, OpenAI's .pt, LoRA adapter; or a dense whisper-moe folder.
  --output -o               path!                The folder to write.
  --experts                 int>=0 = 8           Routed experts; 0 keeps the model dense.
  --expert-dim              int>=1               Hidden units of each in a layer; default 256, or the feed-forward's own without a shared expert.
  --top-k                   int>=1 = 2           Experts that a segment is sent to.
  --shared/--no-shared      switch = True        Keep Whisper's feed-forward as a shared expert; without, every expert is a copy of it.
  --scope                   str = segment        One choice for each segment, or token.
  --router-layer            int>=0 = 2           Encoder layers before the router's choice.
  --ttt-layers              ints                 Encoder layers with a TTT layer behind a closed gate: 3 or 1,3; empty for none. Default: 3, or none without experts.
  --add-language            [str]                A language that Whisper lacks gets a token: or=odia, or=odia:like=bn,as (its token starts as their mean). Once for each.
  --base                    str                  The Whisper that a LoRA adapter belongs to, if not the one it names; of other sources, the one whose tokenizer they take.
  --quantize                switch               Store matrices as int8.
  --overwrite               switch               Replace a checkpoint that is there.
  --seed                    int = 0              Of the parts that are new.

doctor: Say whether fine-tuned Whispers can be merged, and what they lost: silence, timestamps, finite numbers.
  experts                   [str]                Fine-tunes of one size: folders, Hub ids, .pt files, LoRA adapters; NAME=MODEL names one.
  --base                    str                  What they were made from; default: OpenAI's Whisper of their shape.
  --dev                     [str]                Tables, folders or Hub ids to measure each one's WER on. Once for each.
  --json                    switch               As JSON, with every layer.

merge: Make one model of fine-tuned Whispers that knows which of them to ask.
  experts                   [str]                Fine-tunes of one size: folders, Hub ids, .pt files, LoRA adapters; NAME=MODEL names one.
  --output -o               path!                The folder to write.
  --probe                   [str]                A few minutes of clips for each expert, in their order: tables, folders or Hub ids. Once for each.
  --none                    [str]                Clips that are for none of them, and stay with the base. Once for each.
  --base                    str                  What they were made from; default: OpenAI's Whisper of their shape.
  --granularity             str = delta          delta: each expert is the base and a low-rank difference. model: experts stay whole models.
  --delta-rank              int>=1 = 32          Rank of an expert's difference from the base, in each matrix.
  --gate-threshold          float>=0 = 0.1       model: where the second expert's gate is below it, the first answers alone.
  --measure                 int>=0 = 20          Clips of each probe on which WER is measured, before and after; 0 for none.
  --quantize                switch               Store the base's matrices as int8.
  --overwrite               switch               Replace a checkpoint that is there.

add-expert: Give a merged model one expert more; what the others answer stays.
  model                     path                 A folder that merge wrote; it is changed.
  expert                    str                  The fine-tune, of the same base; NAME=MODEL names it.
  --probe                   str!                 A few minutes of clips for it: a table, folder or Hub id.
  --base                    str                  What it was made from; default: OpenAI's Whisper of its shape.

remove-expert: Take an expert out of a merged model.
  model                     path                 A folder that merge wrote; it is changed.
  name                      str                  The expert, as info lists it.

export: Write a dense model as a Whisper that other programs read.
  model                     str                  A dense whisper-moe folder, or any Whisper.
  --output -o               path!                The folder to write.
  --to                      str = whisper        whisper: a folder that transformers reads.

info: Parameters, total and active, bytes, FLOPs for 30 s, and the experts by name.
  model                     str?                 A model or preset (8x241m); default: the one that comes along.
  --json                    switch               As JSON.

evaluate: Measure a model on corpora: errors by language, with intervals, speed, memory, cost; and others beside it.
  model                     str                  A whisper-moe folder or training run, any Whisper, or default.
  data                      [str]                Tables (path, text …), folders or Hub ids.
  --compare                 [str]                Another model, or transcripts:FILE.tsv, what any system wrote (id, text). Once for each.
  --output-dir -o           path                 Write report.json, report.md and transcripts.tsv here. Without, tables are printed.
  --device --dtype --threads
  --latency-clips           int>=0 = 40          Clips that are also transcribed one at a time.
 Data:
  --split                   str                  train, valid, test …; default: test.
  --languages               str                  These only: hi,or. One is also that of rows that do not say.
  --task                    str                  The task of rows that do not say: transcribe, translate …
  --columns                 str                  Which are which: path=clip,text=said.
  --configuration           str                  Of the Hub: the part to read, where it has several: hi_in.
  --limit                   int>=1               The first so many samples of each.
  --detect-language         switch               Let the systems detect the language; else they are told.
 Decoding:
  --beam-size               int>=1 = 1           Beams at temperature 0; 1 is greedy.
  --fallback/--no-fallback  switch = True        Decode again at other temperatures what looks wrong.
  --context-margin          float>=0             Seconds of silence kept after a clip by this project's models.

data inspect: Samples, hours, languages, speakers and tasks, a histogram of durations, and what cannot be used, by name.
  sources                   [str]                Tables, folders or Hub ids.
  --split                   str = train          train, valid, test …
  --languages               str                  These only: hi,or. One is also that of rows that do not say.
  --task                    str                  The task of rows that do not say.
  --columns                 str                  Which are which: path=clip,text=said; or the names of those of a file without any: path,text.
  --configuration           str                  Of the Hub: the part to read, where it has several: hi_in.
  --path                    str                  Where a row's file lies, from its columns: {language}/{path}.
  --text                    str                  file-name for recordings that are named after what is said, none for those without a text.
  --streaming               switch               Read row after row, without preparing a copy.
  --limit                   int>=1               The first so many samples of each.
  --decode                  switch               Decode everything, instead of reading headers.
  --model                   str                  That is to learn: its tokens tell which texts are too long. Default: the model that comes along.
  --json                    switch               As JSON, with the name of every unusable sample.

train: Train as a recipe says; under torchrun, with all of its processes. 130 and 143: stopped by a signal, to be resumed.
  recipe                    path                 A YAML file: model, data, optimisation, losses, evaluation. With --resume, also a run's directory, which keeps its own.
  overrides                 [KEY=VALUE]?         Changes to it: optimisation.lr=1e-5 data.train.0.limit=100.
  --output -o               path                 The run's directory; default: the recipe's, or runs/ and its name.
  --resume                  switch               Go on from the newest checkpoint in the directory, if there is one: --resume runs/mine optimisation.steps=8000.
"""
"""A block for each command, the function of its name in :mod:`~whisper_moe.commands` or :mod:`~whisper_moe.texts`, or that of
:data:`_ELSEWHERE`. A line for each argument and flag: its spellings, its kind and its help, two spaces between them; or flags
alone, as the first command has them. Above those of another panel of the help stands the panel's name.

Of the kinds, ``[str]`` is a list, ``!`` marks a flag that must be given, ``?`` an argument that need not, or a number that may be
the word None, with which ``whisper`` leaves a setting out. ``switch`` takes no value, ``truth`` True or False, as there."""

_ELSEWHERE = {
    "doctor": "merge.run.doctor",
    "add_expert": "merge.run.add_expert",
    "remove_expert": "merge.run.remove_expert",
    "data_inspect": "data.inspect.run",
    "serve": "serve.command.serve",
    "train": "train.run.train",
}
"""Commands whose function takes the flags by their names. It is imported when it is called, for that may import torch."""

_TYPES = {"str": str, "path": Path, "int": int, "float": float, "switch": bool}
_READERS: dict[str, tuple[Callable[[str], Any], str, str]] = {
    "path": (lambda word: Path(word).expanduser(), "<path>", "a path"),
    "truth": (lambda word: {"true": True, "false": False}[word.lower()], "<str>", "True or False"),
    "ints": (lambda word: tuple(map(int, filter(str.strip, word.split(",")))), "<str>", "numbers with commas between"),
    "int?": (lambda word: None if word.lower() == "none" else int(word), "<int or None>", "a number or None"),
    "float?": (lambda word: None if word.lower() == "none" else float(word), "<float or None>", "a number or None"),
}
"""Of kinds that Typer has not: what makes a value of a word, how help calls the kind, and what the word must be."""


def _parameter(line: str, panel: str) -> inspect.Parameter:
    names, kind, help = re.split(r"\s{2,}", line.strip())
    said = re.fullmatch(r"(\[)?([^]?!>< ]+)\]?([?!])?(?:>=(\d+))?(?:<=(\d+))?(?: = (.+))?", kind)
    assert said is not None, line
    several, kind, mark, least, most, default = said.groups()
    name = names.split()[0].removeprefix("--").partition("/")[0].replace("-", "_")
    hint = list[str] if several else _TYPES.get(kind, str)
    if not names.startswith("--"):
        metavar = f"[{kind}]..." if several and kind not in _TYPES else None
        how: Any = typer.Argument(None if mark == "?" else ..., help=help, show_default=False, metavar=metavar)
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=how, annotation=hint)
    more: dict[str, Any] = {"min": least and int(least), "max": most and int(most)}
    if reader := _READERS.get(f"{kind}{mark}" if mark == "?" else kind):
        hint, more = str, {"parser": _reading(*reader, float(least or "-inf")), "metavar": reader[1]}
    start = ... if mark == "!" else default == "True" if kind == "switch" else default
    how = typer.Option(start, *names.split(), help=help, rich_help_panel=panel, **more)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=how, annotation=hint)


def _reading(read: Callable[[str], Any], metavar: str, wanted: str, least: float) -> Callable[[str], Any]:
    def parse(word: str) -> Any:
        try:
            value = read(word)
        except (ValueError, KeyError):
            raise typer.BadParameter(f"{word!r} is not {wanted}") from None
        if isinstance(value, (int, float)) and value < least:
            raise typer.BadParameter(f"{word} is less than {least:g}")
        return value

    return parse


def _status(command: str, flags: dict[str, Any]) -> int:
    """A failure that a user can mend is one sentence and an exit status; anything else is a bug and shows itself."""
    try:
        if command in _ELSEWHERE:
            module, _, function = f"whisper_moe.{_ELSEWHERE[command]}".rpartition(".")
            return int(getattr(import_module(module), function)(**flags) or 0)
        return (getattr(commands, command, None) or getattr(texts, command))(SimpleNamespace(**flags))
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        give_up_output()
        return 0
    except (ValueError, ImportError, OSError) as error:
        logger.error("whisper-moe: %s", sentence(error))
        return 2 if isinstance(error, UsageError) else 1


def _built() -> typer.Typer:
    # Words with underscores are read as those with hyphens, in every command below.
    reading = {"help_option_names": ["-h", "--help"], "token_normalize_func": lambda word: word.replace("_", "-")}
    settings: Any = {"context_settings": reading, "pretty_exceptions_enable": False}
    about = "Speech to text with eight experts: any audio or video file in, text and subtitles out."
    program = typer.Typer(help=about, add_completion=False, **settings)
    groups = {"": program, "data": typer.Typer(help="Training data: what is in it.", **settings)}
    said: dict[str, str] = {}
    for block in _TABLE.strip().split("\n\n"):
        head, *lines = block.splitlines()
        words, _, about = head.partition(": ")
        group, _, name = words.rpartition(" ")
        parameters, panel = list[inspect.Parameter](), "Options"
        for line in lines:
            if not line.startswith("  "):
                panel = line.strip(" :")
            elif "  " in line.strip():
                said.setdefault(line.split()[0], line)
                parameters.append(_parameter(line, panel))
            else:
                parameters += [_parameter(said[flag], panel) for flag in line.split()]

        def call(run: str = re.sub(r"\W", "_", words), **flags: Any) -> None:
            raise typer.Exit(_status(run, flags))

        vars(call)["__signature__"] = inspect.Signature(parameters)
        groups[group].command(name, help=about)(call)
    program.add_typer(groups["data"], name="data")
    return program


app = _built()


_UsageError: Any = typer.BadParameter.__base__
"""Click's, of which newer versions of Typer bring their own."""


def main() -> None:
    """Entry point: every failure is one sentence on standard error; so is what the package logs, facts too."""
    root = logging.getLogger("whisper_moe")
    root.handlers = [logging.StreamHandler()]  # to standard error as it is now, also where this is called again
    root.setLevel(logging.INFO)
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], prog_name="whisper-moe", standalone_mode=False))
    except _UsageError as error:
        command = error.ctx.command_path if error.ctx else "whisper-moe"
        print(f"{command}: {error.format_message().rstrip('.')}; see {command} --help", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # help that cannot be written; what the commands do reports its own
        print(f"whisper-moe: {error.strerror or error}", file=sys.stderr)
        sys.exit(1)
