"""Files of the Hugging Face Hub: the local cache first, without a call; a download is announced before it begins."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from whisper_moe.weights.files import CheckpointError

_ID = re.compile(r"(?!.*(--|\.\.))[a-zA-Z0-9_]([\w.-]*\w)?/[a-zA-Z0-9_]([\w.-]*\w)?", re.ASCII)
_SHARD = r"-\d{5}-of-\d{5}"
_FULL = (
    r"model\.safetensors",
    rf"model({_SHARD}\.safetensors|\.safetensors\.index\.json)",
    r"pytorch_model\.bin",
    rf"pytorch_model({_SHARD}\.bin|\.bin\.index\.json)",
)
_ADAPTER = (r"adapter_model\.safetensors", r"adapter_model\.bin")
_SMALL = frozenset(
    """config.json generation_config.json tokenizer.json vocab.json merges.txt added_tokens.json special_tokens_map.json
    tokenizer_config.json adapter_config.json""".split()
)

_WHISPERS = "tiny tiny.en base base.en small small.en medium medium.en large-v2 large-v3 large-v3-turbo".split()
_DISTILLED = "distil-small.en distil-medium.en distil-large-v2 distil-large-v3 distil-large-v3.5".split()
PUBLISHED = (
    {name: f"openai/whisper-{name}" for name in _WHISPERS}
    | {"large-v1": "openai/whisper-large", "large": "openai/whisper-large-v3", "turbo": "openai/whisper-large-v3-turbo"}
    | {name: f"distil-whisper/{name}" for name in _DISTILLED}
)
"""What ``whisper`` and faster-whisper call a model → the Hub's id. Its ``whisper-large`` is the first of that size."""


def is_hub_id(name: str) -> bool:
    """Whether a name has the form ``owner/model``."""
    return _ID.fullmatch(name) is not None


def hub_id(name: str) -> str | None:
    """The ``owner/model`` that a name stands for: itself, or what ``whisper`` or faster-whisper calls so."""
    return name if is_hub_id(name) else PUBLISHED.get(name)


def cached(repo: str, revision: str | None = None, cache_dir: Path | None = None) -> Path | None:
    """The folder of a model in the local cache, complete or not; never calls the Hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # The pattern keeps newer clients from demanding that files which nobody asked for are cached too.
        patterns = ["config.json"]
        return Path(
            snapshot_download(
                repo, revision=revision, cache_dir=cache_dir, local_files_only=True, allow_patterns=patterns
            )
        )
    except LocalEntryNotFoundError:
        return None


def fetch_tokenizer(repo: str, announce: Callable[[str], None]) -> Path | None:
    """A folder with a model's ``tokenizer.json``, which is downloaded alone; None where it is not to be had."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage] (its transport's)

    announce(f"downloading the tokenizer of {repo}")
    try:
        return Path(hf_hub_download(repo, "tokenizer.json")).parent
    except (HTTPError, OSError, ValueError):
        return None


def weight_files(names: Iterable[str], origin: str | Path) -> list[str]:
    """The weights among a folder's files, in one format: safetensors before pickles, one file before shards.

    The first one tells a full model from an adapter. Raises ``CheckpointError`` where both are present.
    """
    found = sorted(names)
    full, adapter = (next(_matches(found, patterns), []) for patterns in (_FULL, _ADAPTER))
    if full and adapter:
        raise CheckpointError(
            f"{origin}: holds a full model ({full[0]}) and an adapter ({adapter[0]}); keep one of them"
        )
    return full or adapter


def _matches(names: list[str], patterns: Iterable[str]) -> Iterator[list[str]]:
    for pattern in patterns:
        matching = [name for name in names if re.fullmatch(pattern, name)]
        if matching:
            yield matching


def wanted(names: list[str], origin: str) -> list[str]:
    """The files that loading a model needs, of all that its repository has."""
    if "MANIFEST.json" in names:
        return [name for name in names if name.endswith((".json", ".safetensors"))]
    return [name for name in names if name in _SMALL] + weight_files(names, origin)


def fetch(
    repo: str, *, revision: str | None = None, cache_dir: Path | None = None, complete: Callable[[Path], bool],
    announce: Callable[[str], None],
) -> Path:  # fmt: skip
    """A model's folder in the local cache, or ``cache_dir``: as it is if ``complete`` says so, else downloaded.

    Raises ``CheckpointError`` when the model is neither in the cache nor to be had.
    """
    for place in dict.fromkeys((cache_dir, None)):
        folder = cached(repo, revision, place)
        if folder is not None and complete(folder):
            return folder
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage] (its transport's)

    where = cache_dir or constants.HF_HUB_CACHE
    try:
        files = HfApi().model_info(repo, revision=revision, files_metadata=True).siblings or []
        names = wanted([file.rfilename for file in files], repo)
        size = sum(file.size or 0 for file in files if file.rfilename in names)
        announce(f"downloading {repo}: {size / 1e6:,.1f} MB to {where}")
        return Path(snapshot_download(repo, revision=revision, cache_dir=cache_dir, allow_patterns=names))
    except CheckpointError:
        raise
    except (HTTPError, OSError, ValueError) as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{repo}: not in {where}, and not to be had from the Hub: {cause}") from error
