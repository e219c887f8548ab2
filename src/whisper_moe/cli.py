"""The command line. Flags are named as ``whisper``'s, whose underscore spellings work too.

Everything that can be wrong about paths and flags is checked before a model is loaded, and ``--help`` never imports torch.
Text goes to standard output, facts to standard error. Exit status: 0, 1 when some files failed, 2 for usage.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from whisper_moe.generate.options import APPENDED_PUNCTUATION, PREPENDED_PUNCTUATION

app = typer.Typer(
    help="Speech to text with eight experts: any audio or video file in, text and subtitles out.",
    add_completion=False, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip


class _StandardError(logging.StreamHandler[Any]):
    """Whatever standard error is when something is said."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _speak() -> None:
    """What the package logs is for the user of its commands: every line as it is, facts too."""
    logger = logging.getLogger("whisper_moe")
    if not logger.handlers:
        logger.addHandler(_StandardError())
    logger.setLevel(logging.INFO)


def _option(*names: str, help: str, panel: str = "Options", **more: Any) -> Any:
    """A typer option that also answers to its underscore spellings; paths may begin with ``~``, as in ``--output-dir=~/out``."""
    underscored = (_underscored(name) for name in names)
    spellings = [*names, *(name for name in underscored if name.strip(" /"))]
    return typer.Option(*spellings, help=help, rich_help_panel=panel, callback=_at_home, **more)


def _at_home(value: Any) -> Any:
    return value.expanduser() if isinstance(value, Path) else value


def _underscored(name: str) -> str:
    """``--no_x`` for ``--no-x``, a space where nothing changes; of ``--on/--off`` each half is a name of its own."""
    halves = [(half, f"--{half[2:].replace('-', '_')}") for half in name.split("/")]
    return "/".join(new if old.startswith("--") and new != old else " " for old, new in halves)


def _optional(*names: str, help: str, kind: type[int] | type[float], least: float = -math.inf, **more: Any) -> Any:
    """An option whose value is a number, or the word None, with which ``whisper`` leaves a setting out."""

    def read(value: Any) -> float | None:
        if str(value).lower() == "none":
            return None
        try:
            number = kind(value)
        except ValueError:
            raise typer.BadParameter(f"{value!r} is neither a number nor None") from None
        if number < least:
            raise typer.BadParameter(f"{value} is less than {least}")
        return number

    return _option(*names, help=help, parser=read, metavar=f"<{kind.__name__} or None>", **more)


Model = Annotated[str | None, _option("--model", help="A whisper-moe folder or training run, or any Whisper: base, turbo …, Hub id, folder, .pt file, LoRA adapter. Default: the one that comes along.")]  # fmt: skip
ModelDir = Annotated[Path | None, _option("--model-dir", help="Look for the model here first (NAME.pt, NAME), and download it to here.")]  # fmt: skip
Track = Annotated[str | None, _option("--track", help="The sound track of a film: its number, from 0, or its language: hin, hi, Hindi.")]  # fmt: skip
Device = Annotated[str, _option("--device", help="cpu, cuda, cuda:1, mps; auto takes a GPU if there is one.")]
Dtype = Annotated[
    str,
    _option(
        "--dtype",
        "--compute-type",
        help="auto (int8 on a CPU that is fast at it, else float32), float32, int8, bfloat16 or float16.",
    ),
]
Threads = Annotated[int | None, _optional("--threads", kind=int, least=0, help="CPU threads; 0 for PyTorch's default.")]


@app.command()
def transcribe(
    files: Annotated[list[str] | None, typer.Argument(help="Audio or video files, globs, or - for standard input. Without any: the bundled sample.", show_default=False)] = None,
    model: Model = None,
    model_dir: ModelDir = None,
    task: Annotated[str, _option("--task", help="transcribe, or translate into English.")] = "transcribe",
    language: Annotated[str | None, _option("--language", "-l", help="auto (for every window), or a code or name: hi, Hindi. Default: the one that a fine-tune states, else auto.")] = None,
    languages: Annotated[str | None, _option("--languages", help="Detect among these only: hi,ta,en.")] = None,
    detect_language_once: Annotated[bool, _option("--detect-language-once", help="Each file is in one language: that of its first window where it is sure.")] = False,
    output_format: Annotated[str | None, _option("--output-format", "-f", help="txt, srt, vtt, tsv, json or all. Without -o it is printed: of several files txt, or json with a line for each.")] = None,
    output_dir: Annotated[Path | None, _option("--output-dir", "-o", help="Write a file for each input here.")] = None,
    skip_existing: Annotated[bool, _option("--skip-existing", help="Leave out what has all its files in the output folder.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    fp16: Annotated[str, _option("--fp16", help="True: the same as --dtype float16, on an NVIDIA GPU only.")] = "False",
    threads: Threads = None,
    beam_size: Annotated[int | None, _optional("--beam-size", kind=int, least=1, help="Beams at temperature 0.", panel="Decoding")] = 1,
    best_of: Annotated[int | None, _optional("--best-of", kind=int, least=1, help="Samples at other temperatures.", panel="Decoding")] = 5,
    patience: Annotated[float | None, _optional("--patience", kind=float, help="Beam search patience (arXiv 2204.05424).", panel="Decoding")] = 1.0,
    length_penalty: Annotated[float | None, _optional("--length-penalty", kind=float, help="Alpha of arXiv 1609.08144; default: mean log-probability.", panel="Decoding")] = None,
    temperature: Annotated[float, _option("--temperature", min=0, help="The first to try.", panel="Decoding")] = 0.0,
    temperature_increment_on_fallback: Annotated[float | None, _optional("--temperature-increment-on-fallback", kind=float, least=0, help="Step up to 1 while a transcript looks wrong; 0 tries no other.", panel="Decoding")] = 0.2,
    initial_prompt: Annotated[str | None, _option("--initial-prompt", help="Text that comes before: names, spelling, style.", panel="Decoding")] = None,
    condition_on_previous_text: Annotated[str, _option("--condition-on-previous-text", help="True prompts each window with the text before it; one window at a time, slower.", panel="Decoding")] = "False",
    carry_initial_prompt: Annotated[str, _option("--carry-initial-prompt", help="True: before every window also with --condition-on-previous-text; without that it always is.", panel="Decoding")] = "False",
    hotwords: Annotated[str | None, _option("--hotwords", help="Words to expect.", panel="Decoding")] = None,
    suppress_tokens: Annotated[str | None, _option("--suppress-tokens", help="Ids never to say, 1,2; -1 for annotations such as ♪. Default: the checkpoint's.", panel="Decoding")] = None,
    without_timestamps: Annotated[bool, _option("--without-timestamps", help="One segment for each window.", panel="Decoding")] = False,
    word_timestamps: Annotated[str, _option("--word-timestamps", help="True for a time on every word.", panel="Decoding")] = "False",
    prepend_punctuations: Annotated[str, _option("--prepend-punctuations", help="Marks that are part of the word after them.", panel="Decoding")] = PREPENDED_PUNCTUATION,
    append_punctuations: Annotated[str, _option("--append-punctuations", help="Marks that are part of the word before them.", panel="Decoding")] = APPENDED_PUNCTUATION,
    hallucination_silence_threshold: Annotated[float | None, _optional("--hallucination-silence-threshold", kind=float, least=0, help="Skip silence of more seconds before what looks made up (with word timestamps).", panel="Decoding")] = None,
    highlight_words: Annotated[str, _option("--highlight-words", help="True underlines each word in srt and vtt as it is said.", panel="Subtitles")] = "False",
    max_line_width: Annotated[int | None, _optional("--max-line-width", kind=int, least=1, help="Characters in a line (with word timestamps).", panel="Subtitles")] = None,
    max_line_count: Annotated[int | None, _optional("--max-line-count", kind=int, least=1, help="Lines in a subtitle (with word timestamps).", panel="Subtitles")] = None,
    max_words_per_line: Annotated[int | None, _optional("--max-words-per-line", kind=int, least=1, help="Words in a line (with word timestamps).", panel="Subtitles")] = None,
    clip_timestamps: Annotated[str, _option("--clip-timestamps", help="Only these stretches: start,end,start,end,… in seconds; the last end may be missing.", panel="Windows")] = "0",
    track: Track = None,
    vad: Annotated[str, _option("--vad", help="Drop what is not speech: none, energy, or silero (extra `vad`).", panel="Windows")] = "none",
    vad_filter: Annotated[str, _option("--vad-filter", help="True: --vad silero, or energy where silero is not installed.", panel="Windows")] = "False",
    context_margin: Annotated[float | None, _option("--context-margin", min=0, help="Seconds of silence kept after a clip; 30 pads to Whisper's full window.", panel="Windows")] = None,
    window: Annotated[float | None, _option("--window", min=1, max=30, help="Seconds that a long recording is cut into, at most. Default: 20.", panel="Windows")] = None,
    carry_ttt: Annotated[bool, _option("--carry-ttt", help="Fast weights learn through a whole recording; slower.", panel="Windows")] = False,
    compression_ratio_threshold: Annotated[float | None, _optional("--compression-ratio-threshold", kind=float, help="Above it a text repeats itself.", panel="Windows")] = 2.4,
    logprob_threshold: Annotated[float | None, _optional("--logprob-threshold", kind=float, help="Below it a text is unsure.", panel="Windows")] = -1.0,
    no_speech_threshold: Annotated[float | None, _optional("--no-speech-threshold", kind=float, help="Above it an unsure text is silence.", panel="Windows")] = 0.6,
    verbose: Annotated[str, _option("--verbose", help="False prints no facts and no progress.")] = "True",
) -> None:  # fmt: skip
    """Write down what is said, in its language or in English."""
    from whisper_moe import commands

    given = dict(locals())
    given.pop("commands")
    raise typer.Exit(commands.transcribe(**given))


@app.command("detect-language")
def detect_language(
    files: Annotated[list[str], typer.Argument(help="Audio or video files.", show_default=False)],
    model: Model = None,
    model_dir: ModelDir = None,
    languages: Annotated[str | None, _option("--languages", help="Choose among these only: hi,ta,en.")] = None,
    track: Track = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
) -> None:
    """Say which language is spoken at the start of each file, and how surely."""
    from whisper_moe import commands

    raise typer.Exit(commands.detect_language(files, model, model_dir, languages, track, device, dtype, threads))


@app.command()
def upcycle(
    source: Annotated[str, typer.Argument(help="Any Whisper: base, turbo …, Hub id, folder, OpenAI's .pt, LoRA adapter; or a dense whisper-moe folder.", show_default=False)],
    output: Annotated[Path, _option("--output", "-o", help="The folder to write.")],
    experts: Annotated[int, _option("--experts", min=0, help="Routed experts; 0 keeps the model dense.")] = 8,
    expert_dim: Annotated[int | None, _option("--expert-dim", min=1, help="Hidden units of each in a layer; default 256, or the feed-forward's own without a shared expert.")] = None,
    top_k: Annotated[int, _option("--top-k", min=1, help="Experts that a segment is sent to.")] = 2,
    shared: Annotated[bool, _option("--shared/--no-shared", help="Keep Whisper's feed-forward as a shared expert; without, every expert is a copy of it.")] = True,
    scope: Annotated[str, _option("--scope", help="One choice for each segment, or token.")] = "segment",
    router_layer: Annotated[int, _option("--router-layer", min=0, help="Encoder layers before the router's choice.")] = 2,
    ttt_layers: Annotated[str | None, _option("--ttt-layers", help="Encoder layers with a TTT layer behind a closed gate: 3 or 1,3; empty for none. Default: 3, or none without experts.")] = None,
    add_language: Annotated[list[str] | None, _option("--add-language", help="A language that Whisper lacks gets a token: or=odia, or=odia:like=bn,as (its token starts as their mean). Once for each.", show_default=False)] = None,
    base: Annotated[str | None, _option("--base", help="The Whisper that a LoRA adapter belongs to, if not the one it names; of other sources, the one whose tokenizer they take.")] = None,
    quantize: Annotated[bool, _option("--quantize", help="Store matrices as int8.")] = False,
    overwrite: Annotated[bool, _option("--overwrite", help="Replace a checkpoint that is there.")] = False,
    seed: Annotated[int, _option("--seed", help="Of the parts that are new.")] = 0,
) -> None:  # fmt: skip
    """Turn any Whisper into a mixture of experts that computes the same function."""
    from whisper_moe import commands

    given = dict(locals())
    given.pop("commands")
    raise typer.Exit(commands.upcycle(**given))


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A dense whisper-moe folder, or any Whisper.", show_default=False)],
    output: Annotated[Path, _option("--output", "-o", help="The folder to write.")],
    to: Annotated[str, _option("--to", help="whisper: a folder that transformers reads.")] = "whisper",
) -> None:
    """Write a dense model as a Whisper that other programs read."""
    from whisper_moe import commands

    raise typer.Exit(commands.export(model, output, to))


@app.command()
def info(
    model: Annotated[str | None, typer.Argument(help="A model or preset (8x241m); default: the one that comes along.", show_default=False)] = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:  # fmt: skip
    """Parameters, total and active, bytes, FLOPs for 30 s, and the experts by name."""
    from whisper_moe import commands

    raise typer.Exit(commands.info(model, json))


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A whisper-moe folder or training run, any Whisper, a peer (see --compare), or default.", show_default=False)],
    data: Annotated[list[str], typer.Argument(help="Tables (path, text …), folders or Hub ids; a kind may come first: kathbath:FOLDER.", show_default=False)],
    compare: Annotated[list[str] | None, _option("--compare", help="Another model or a peer: faster-whisper:NAME, faster-whisper-float32:NAME, openai:NAME, transformers:NAME, transcripts:FILE.tsv. Once for each.", show_default=False)] = None,
    split: Annotated[str | None, _option("--split", help="train, valid, test …; default: what each corpus is evaluated on.", panel="Data")] = None,
    languages: Annotated[str | None, _option("--languages", help="These only: hi,or. Of a table, one is also that of rows that do not say.", panel="Data")] = None,
    task: Annotated[str | None, _option("--task", help="Table: the task of rows that do not say: transcribe, translate …", panel="Data")] = None,
    columns: Annotated[str | None, _option("--columns", help="Table: which are which: path=clip,text=said.", panel="Data")] = None,
    limit: Annotated[int | None, _option("--limit", min=1, help="The first so many samples of each.", panel="Data")] = None,
    detect: Annotated[bool, _option("--detect-language", help="Let the systems detect the language; else they are told.", panel="Data")] = False,
    output: Annotated[Path | None, _option("--output-dir", "-o", help="Write report.json, report.md, report.html and transcripts.tsv here. Without, tables are printed.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    beam: Annotated[int, _option("--beam-size", min=1, help="Beams at temperature 0; 1 is greedy.", panel="Decoding")] = 1,
    fallback: Annotated[bool, _option("--fallback/--no-fallback", help="Decode again at other temperatures what looks wrong.", panel="Decoding")] = True,
    margin: Annotated[float | None, _option("--context-margin", min=0, help="Seconds of silence kept after a clip by this project's models.", panel="Decoding")] = None,
    latency_clips: Annotated[int, _option("--latency-clips", min=0, help="Clips that are also transcribed one at a time.")] = 40,
) -> None:  # fmt: skip
    """Measure a model on corpora: errors by language, with intervals, speed, memory, cost; and peers beside it."""
    from whisper_moe import commands

    given = dict(locals())
    given.pop("commands")
    raise typer.Exit(commands.evaluate(**given))


data = typer.Typer(help="Training data: what is in it.", context_settings={"help_option_names": ["-h", "--help"]})
app.add_typer(data, name="data")


@data.command("inspect")
def data_inspect(
    sources: Annotated[list[str], typer.Argument(help="Tables, folders or Hub ids.", show_default=False)],
    kind: Annotated[str, _option("--kind", help="kathbath, include, wiki-translate, table; auto goes by the Hub id or by what lies in the folder.")] = "auto",
    split: Annotated[str, _option("--split", help="train, valid, test …")] = "train",
    languages: Annotated[str | None, _option("--languages", help="These only: hi,or. Of a table, one is also that of rows that do not say.")] = None,
    directions: Annotated[str | None, _option("--directions", help="wiki-translate: en>hi,any>en.")] = None,
    task: Annotated[str | None, _option("--task", help="Table: the task of rows that do not say.")] = None,
    columns: Annotated[str | None, _option("--columns", help="Table: which are which: path=clip,text=said; or the names of those of a file without any: path,text.")] = None,
    configuration: Annotated[str | None, _option("--configuration", help="Table of the Hub: the part to read, where it has several: hi_in.")] = None,
    path: Annotated[str | None, _option("--path", help="Table: where a row's file lies, from its columns: {language}/{path}.")] = None,
    text: Annotated[str | None, _option("--text", help="Table: file-name for recordings that are named after what is said, none for those without a text.")] = None,
    videos: Annotated[str | None, _option("--videos", help="INCLUDE: the folder of the videos.", parser=os.path.expanduser, metavar="<str>")] = None,
    include_50: Annotated[bool, _option("--include-50", help="INCLUDE: the 50 words of INCLUDE-50.")] = False,
    streaming: Annotated[bool, _option("--streaming", help="Read row after row, without preparing a copy.")] = False,
    limit: Annotated[int | None, _option("--limit", min=1, help="The first so many samples of each.")] = None,
    decode: Annotated[bool, _option("--decode", help="Decode everything, instead of reading headers.")] = False,
    model: Annotated[str | None, _option("--model", help="That is to learn: its tokens tell which texts are too long. Default: the model that comes along.")] = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON, with the name of every unusable sample.")] = False,
) -> None:  # fmt: skip
    """Samples, hours, languages, speakers and tasks, a histogram of durations, and what cannot be used, by name."""
    from whisper_moe.data import inspect

    given = dict(locals())
    given.pop("inspect")
    raise typer.Exit(inspect.run(**given))


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML file: model, data, optimisation, losses, evaluation. With --resume, also a run's directory, which keeps its own.", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to it: optimisation.lr=1e-5 data.train.0.limit=100.", show_default=False)] = None,
    output: Annotated[Path | None, _option("--output", "-o", help="The run's directory; default: the recipe's, or runs/ and its name.")] = None,
    resume: Annotated[bool, _option("--resume", help="Go on from the newest checkpoint in the directory, if there is one: --resume runs/mine optimisation.steps=8000.")] = False,
) -> None:  # fmt: skip
    """Train as a recipe says; under torchrun, with all of its processes. 130 and 143: stopped by a signal, to be resumed."""
    from whisper_moe.train import run

    raise typer.Exit(run.train(recipe, overrides or [], output, resume))


@app.command()
def grok(
    recipe: Annotated[Path, typer.Argument(help="A YAML file such as recipes/grokking.yaml.", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to it: grokfast=[0.98,2.0].", show_default=False)] = None,
    output: Annotated[Path, _option("--output", "-o", help="A folder for curve, figures and plot.")] = Path("runs/grokking"),
) -> None:  # fmt: skip
    """Watch a small model understand long after it has learned by heart."""
    from whisper_moe.train import grokking

    raise typer.Exit(grokking.run(recipe, overrides or [], output))


_UsageError: Any = typer.BadParameter.__base__
"""Click's, of which newer versions of Typer bring their own."""


def main() -> None:
    """Entry point: every failure is one sentence on standard error."""
    _speak()
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], prog_name="whisper-moe", standalone_mode=False))
    except _UsageError as error:
        command = error.ctx.command_path if error.ctx else "whisper-moe"
        print(f"{command}: {error.format_message().rstrip('.')}; see {command} --help", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # help that cannot be written; what the commands do reports its own
        print(f"whisper-moe: {error.strerror or error}", file=sys.stderr)
        sys.exit(1)
