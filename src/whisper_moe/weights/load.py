"""One way in: a checkpoint of ours, any Whisper (a folder, the Hub, openai/whisper's ``.pt``, a LoRA adapter), or the default.

The local cache of the Hub comes first, without a call; a download is logged before it begins. Nothing is unpickled but
tensors (``weights_only``), and every failure is a ``CheckpointError`` that names the file, the cause and the remedy.
"""

from __future__ import annotations

import logging
import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from whisper_moe.config import EMBEDDED, ModelConfig, MoEConfig, TTTConfig, model_folder, model_name
from whisper_moe.weights import whisper
from whisper_moe.weights.checkpoint import CONFIG, MANIFEST, Loaded, load_checkpoint, read_config
from whisper_moe.weights.files import CheckpointError, listed, open_tensors, read_index, read_json, regular_size
from whisper_moe.weights.tokens import GENERATION, OLD_TOKENIZER, PUBLISHED, TOKENIZER, complete, read_tokenizer
from whisper_moe.weights.upcycle import upcycle

DEFAULT_SOURCE = "openai/whisper-base"
"""What the default is made from; an installation without a checkout makes it from there."""
DEFAULT_MOE = MoEConfig()
DEFAULT_TTT = TTTConfig(encoder_layers=(3,))

_ID = re.compile(r"(?!.*(--|\.\.))[a-zA-Z0-9_]([\w.-]*\w)?/[a-zA-Z0-9_]([\w.-]*\w)?", re.ASCII)
_WHISPERS = "tiny tiny.en base base.en small small.en medium medium.en large-v2 large-v3 large-v3-turbo".split()
_DISTILLED = "distil-small.en distil-medium.en distil-large-v2 distil-large-v3 distil-large-v3.5".split()
SHORT_NAMES = (
    {name: f"openai/whisper-{name}" for name in _WHISPERS}
    | {"large-v1": "openai/whisper-large", "large": "openai/whisper-large-v3", "turbo": "openai/whisper-large-v3-turbo"}
    | {name: f"distil-whisper/{name}" for name in _DISTILLED}
)
"""What ``whisper`` and faster-whisper call a model → the Hub's id. Its ``whisper-large`` is the first of that size."""
_SHARD = r"-\d{5}-of-\d{5}"
_FULL = (
    r"model\.safetensors",
    rf"model({_SHARD}\.safetensors|\.safetensors\.index\.json)",
    r"pytorch_model\.bin",
    rf"pytorch_model({_SHARD}\.bin|\.bin\.index\.json)",
)
_ADAPTER, ADAPTER_CONFIG = (r"adapter_model\.safetensors", r"adapter_model\.bin"), "adapter_config.json"
_SMALL = {CONFIG, GENERATION, TOKENIZER, *OLD_TOKENIZER, ADAPTER_CONFIG}
_SMALL |= {"special_tokens_map.json", "tokenizer_config.json"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Located:
    """Where a model lies on this disk, and what it is."""

    kind: Literal["checkpoint", "whisper", "openai", "adapter"]
    path: Path
    name: str


def default() -> str:
    """The path or Hub id of the default model."""
    return str(EMBEDDED) if EMBEDDED.is_dir() else DEFAULT_SOURCE


def load_model(
    model: str | os.PathLike[str] | None,
    *,
    keep_int8: bool = False,
    aside: bool = False,
    base: str | None = None,
    model_dir: str | os.PathLike[str] | None = None,
) -> Loaded:
    """Read a whisper-moe directory or training run, any Whisper, or the default (None).

    A Whisper stays the dense model that it is; only where the default has to be made from one is it upcycled. ``model_dir``:
    see :func:`resolve`. ``keep_int8``, ``aside``: see :func:`~whisper_moe.weights.checkpoint.load_checkpoint`. ``base``: the
    model under an adapter, or the one whose tokenizer any other Whisper takes.
    """
    located = resolve(model if model is not None else default(), model_dir=model_dir)
    if located.kind == "checkpoint":
        return replace(load_checkpoint(located.path, keep_int8=keep_int8, aside=aside), name=located.name)
    loaded = _load_whisper(located, base)
    if model is not None:
        return loaded
    logger.info("no default model beside this installation: made from %s, its experts not trained", located.name)
    config, state = upcycle(loaded.config, loaded.state, moe=DEFAULT_MOE, ttt=DEFAULT_TTT)
    return replace(loaded, config=config, state=state)


# Where a model is


def resolve(
    model: str | os.PathLike[str], *, revision: str | None = None, model_dir: str | os.PathLike[str] | None = None
) -> Located:
    """Find a model: a local path if there is one of that name, else a Hub id, from the cache or downloaded.

    A training run stands for its model, and ``base`` or ``turbo`` for what ``whisper`` calls so. In ``model_dir`` a file or
    folder of that name is looked for first, and downloads go there.
    """
    name, folder = os.fspath(model), Path(model_dir).expanduser() if model_dir is not None else None
    repo, path = hub_id(name), Path(name).expanduser()
    if folder is not None:
        whispers = (repo or name).removeprefix("openai/whisper-")  # its file of turbo is called large-v3-turbo.pt
        files = (folder / f"{name}.pt", folder / f"{whispers}.pt", folder / name)
        path = next(filter(Path.exists, files), path)
    if repo is not None and not path.exists():
        path = _fetch(repo, revision, folder)
        return Located(_kind(path), path, repo)
    if repo is not None and repo != name:
        logger.info("%s: taken from %s, not %s of the Hub", name, path, repo)
    path = model_folder(path)
    return Located(_kind(path), path, model_name(path))


def _kind(path: Path) -> Literal["checkpoint", "whisper", "openai", "adapter"]:
    if path.is_file():
        if path.suffix != ".pt":
            raise CheckpointError(f"{path}: not a model; expected a folder or an openai/whisper .pt file")
        return "openai"
    if not path.is_dir():
        close = get_close_matches(str(path), SHORT_NAMES)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise CheckpointError(f"{path}: no such file or folder{hint}")
    config = path / CONFIG
    if (path / MANIFEST).exists() or (config.exists() and read_json(config).get("model_type") == "whisper_moe"):
        return "checkpoint"
    weights = weight_files((file.name for file in path.iterdir()), path)
    if not weights and (path / "run.json").exists():
        raise CheckpointError(f"{path}: a training run without a model so far")
    if not weights:
        raise CheckpointError(f"{path}: no model.safetensors, pytorch_model.bin or adapter_model.safetensors in it")
    return "adapter" if weights[0].startswith("adapter_") else "whisper"


def hub_id(name: str) -> str | None:
    """The ``owner/model`` that a name stands for: itself, or what ``whisper`` or faster-whisper calls so."""
    return name if _ID.fullmatch(name) else SHORT_NAMES.get(name)


def weight_files(names: Iterable[str], origin: str | Path) -> list[str]:
    """The weights among a folder's files, in one format: safetensors before pickles, one file before shards.

    The first one tells a full model from an adapter. Raises ``CheckpointError`` where both are present.
    """
    found = sorted(names)
    full, adapter = (
        next(filter(None, ([name for name in found if re.fullmatch(pattern, name)] for pattern in patterns)), [])
        for patterns in (_FULL, _ADAPTER)
    )
    if full and adapter:
        both = f"a full model ({full[0]}) and an adapter ({adapter[0]})"
        raise CheckpointError(f"{origin}: holds {both}; keep one of them")
    return full or adapter


def needed_files(names: list[str], origin: str) -> list[str]:
    """The files that loading a model needs, of all that its repository has."""
    if MANIFEST in names:
        return [name for name in names if name.endswith((".json", ".safetensors"))]
    return [name for name in names if name in _SMALL] + weight_files(names, origin)


def _fetch(repo: str, revision: str | None, cache_dir: Path | None) -> Path:
    """A model's folder in ``cache_dir`` or the Hub's own cache, if it is complete there, else downloaded."""
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    for place in dict.fromkeys((cache_dir, None)):
        # The pattern keeps newer clients from demanding that files which nobody asked for are cached too.
        options: dict[str, Any] = {"local_files_only": True, "allow_patterns": [CONFIG]}
        with suppress(LocalEntryNotFoundError):
            folder = Path(snapshot_download(repo, revision=revision, cache_dir=place, **options))
            if _is_complete(folder):
                return folder
    where = cache_dir or constants.HF_HUB_CACHE
    try:
        files = HfApi().model_info(repo, revision=revision, files_metadata=True).siblings or []
        names = needed_files([file.rfilename for file in files], repo)
        size = sum(file.size or 0 for file in files if file.rfilename in names)
        logger.info("downloading %s: %s MB to %s", repo, f"{size / 1e6:,.1f}", where)
        return Path(snapshot_download(repo, revision=revision, cache_dir=cache_dir, allow_patterns=names))
    except CheckpointError:
        raise
    except _hub_errors() as error:
        said = f"{repo}: not in {where}, and not to be had from the Hub: {_cause(error)}"
        raise CheckpointError(said) from error


def _hub_errors() -> tuple[type[Exception], ...]:
    """What its client raises for what is not to be had."""
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage] (its transport's)

    return HTTPError, OSError, ValueError


def _is_complete(folder: Path) -> bool:
    """Whether a folder of the Hub's cache has what loading needs; another program may have asked for less."""
    names = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    if MANIFEST in names:
        files = read_json(folder / MANIFEST).get("files")
        return isinstance(files, dict) and names >= set(files)
    weights = weight_files(names, folder)
    if weights and weights[0].startswith("adapter_"):
        return ADAPTER_CONFIG in names
    index = next((name for name in weights if name.endswith(".index.json")), None)
    shards = read_index(folder / index).values() if index else weights
    return bool(shards) and names >= {CONFIG, *shards} and (TOKENIZER in names or names >= set(OLD_TOKENIZER))


# What is in it


def _load_whisper(at: Located, base: str | None, above: tuple[Path, ...] = ()) -> Loaded:
    """``above``: the adapters that this is the base of."""
    if at.path.resolve() in above:
        raise CheckpointError(f"{at.path}: names itself as its base model")
    if at.kind == "checkpoint":
        raise CheckpointError(f"{at.path}: is a whisper-moe checkpoint already, not a Whisper")
    if at.kind == "adapter":
        return _load_adapter(at, base, (*above, at.path.resolve()))
    return _load_openai(at.path, base) if at.kind == "openai" else _load_folder(at, base)


def config_of(at: Located) -> ModelConfig:
    """What a model is made of; of its weights nothing is read, but the table of a ``.pt`` file."""
    if at.kind == "checkpoint":
        return read_config(at.path / CONFIG)
    if at.kind == "adapter":
        return config_of(under(at))
    if at.kind == "openai":
        return whisper.config_from_openai(_unpickled(at.path).get("dims") or {}, origin=at.path)
    return whisper.config_from_whisper(read_json(at.path / CONFIG), origin=at.path / CONFIG)


def _load_folder(at: Located, base: str | None) -> Loaded:
    """As transformers writes it."""
    file, hf_config = at.path / GENERATION, read_json(at.path / CONFIG)
    config = whisper.config_from_whisper(hf_config, origin=at.path / CONFIG)
    stated = read_json(file) if file.exists() else None
    tokenizer_json, tokenizer = read_tokenizer(_tokenizer_of(at.path, config.vocab_size, base), stated)
    generation = complete(stated, tokenizer, config, legacy=hf_config, origin=file)
    weights, origin = read_weights(at.path)
    state = whisper.state_from_whisper(weights, config, origin=origin)
    return Loaded(config, state, generation, tokenizer_json, at.name)


def _load_openai(path: Path, base: str | None) -> Loaded:
    """A ``.pt`` file as openai/whisper downloads it."""
    content = _unpickled(path)
    dims, weights = content.get("dims"), content.get("model_state_dict")
    if not isinstance(dims, dict) or not isinstance(weights, dict):
        raise CheckpointError(f"{path}: lacks dims or model_state_dict; not a file of openai/whisper")
    config = whisper.config_from_openai(dims, origin=path)
    tokenizer_json, tokenizer = read_tokenizer(_tokenizer_of(path, config.vocab_size, base))
    generation = complete(None, tokenizer, config, origin=path)
    state = whisper.state_from_openai(_tensors(weights, path), config, origin=path)
    return Loaded(config, state, generation, tokenizer_json, path.stem)


def _load_adapter(at: Located, base: str | None, above: tuple[Path, ...]) -> Loaded:
    """A LoRA adapter as PEFT writes it, merged into its base."""
    below = _load_whisper(under(at, base), None, above)
    deltas, origin = read_weights(at.path)
    adapter = whisper.Adapter.read(at.path / ADAPTER_CONFIG)
    merged = whisper.merge_adapter(whisper.state_to_whisper(below.state, below.config), deltas, adapter, origin)
    return replace(below, name=at.name, state=whisper.state_from_whisper(merged, below.config, origin=origin))


def under(at: Located, base: str | None = None) -> Located:
    """The model that an adapter is merged into: ``base``, else the one that it states."""
    settings = at.path / ADAPTER_CONFIG
    adapter = whisper.Adapter.read(settings)
    name, revision = base or adapter.base_model_name_or_path, None if base else adapter.revision
    if not name:
        raise CheckpointError(f"{settings}: names no base model; name it as the base")
    try:
        return resolve(name, revision=revision)
    except CheckpointError as error:
        said = f"{settings}: its base model {name!r} was not found ({error}); name another base"
        raise CheckpointError(said) from error


def _tokenizer_of(path: Path, vocab_size: int, base: str | None) -> Path:
    """Where a Whisper's tokenizer is: with ``base``, within its folder or beside its ``.pt`` file, or with OpenAI's own model
    of that vocabulary, in the Hub's cache or downloaded alone."""
    if base is not None:
        given = Path(base).expanduser()
        found = given if (given / TOKENIZER).exists() else resolve(base).path
        return found.with_name(TOKENIZER) if found.is_file() else found
    own = path if path.is_dir() else path.parent
    if path.is_dir() and any((own / name).exists() for name in OLD_TOKENIZER):
        return own
    if (own / TOKENIZER).exists():
        return own / TOKENIZER
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    owners = [f"openai/whisper-{name}" for name in PUBLISHED.get(vocab_size, ())]
    for cached in (try_to_load_from_cache(owner, TOKENIZER) for owner in owners):
        if isinstance(cached, str):
            return Path(cached)
    like, place = f" such as {owners[0]}" if owners else "", "into" if path.is_dir() else "beside"
    try:
        if owners:
            logger.info("downloading the tokenizer of %s", owners[0])
            return Path(hf_hub_download(owners[0], TOKENIZER))
    except _hub_errors():
        pass
    raise CheckpointError(
        f"{path}: has no tokenizer: put the tokenizer.json of a model with {vocab_size} tokens{like} {place} it, "
        "or upcycle it with --base MODEL"
    )


def read_weights(folder: Path) -> tuple[Mapping[str, Tensor], Path]:
    """The tensors of a folder, and the file that errors should name. Those of safetensors are mapped, so that a large model is
    held once, as what is made of them."""
    files = weight_files((file.name for file in folder.iterdir()), folder)
    origin = folder / next((name for name in files if name.endswith(".index.json")), files[0])
    if origin.suffix == ".json":
        files = sorted(set(read_index(origin).values()))
    elif len(files) > 1:
        raise CheckpointError(f"{folder}: shards without an index: {listed(files)}")
    paths = [folder / name for name in files]
    if paths[0].suffix == ".safetensors":
        return {key: file.get_tensor(key) for file in map(open_tensors, paths) for key in file.keys()}, origin  # noqa: SIM118
    return {key: tensor for path in paths for key, tensor in _tensors(_unpickled(path), path).items()}, origin


def _unpickled(path: Path) -> dict[str, Any]:
    """A file of ``torch.save``, tensors and plain values only; anything that would run code is refused."""
    regular_size(path)
    try:
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch.load raises almost anything for a damaged file
        raise CheckpointError(f"{path}: not a whole file of plain tensors ({_cause(error)})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds {type(value).__name__}, not a table of tensors")
    return value


def _cause(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _tensors(table: dict[Any, Any], path: Path) -> dict[str, Tensor]:
    """The table itself, if it holds tensors by name, whose numbers lie in memory one beside the other, and nothing else."""

    def plain(tensor: Tensor) -> bool:
        return tensor.layout == torch.strided and not tensor.is_quantized and tensor.device.type == "cpu"

    named = {key for key, value in table.items() if isinstance(key, str) and isinstance(value, Tensor) and plain(value)}
    if wrong := [key for key in table if key not in named]:
        raise CheckpointError(f"{path}: {listed(str(key)[:80] for key in wrong)} is not a tensor with a name")
    return table
