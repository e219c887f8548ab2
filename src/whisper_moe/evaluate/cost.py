"""What a model costs: parameters total and active, bytes on disk, floating-point operations.

Operations are counted by formula, two for each multiplication with addition, matrix products and convolutions only; they
equal what ``torch.utils.flop_counter`` sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

from whisper_moe.config import FRAMES_PER_SECOND, FULL_WINDOW, POSITIONS_PER_SECOND, PRESETS, ModelConfig
from whisper_moe.evaluate.measure import Clip, Measured, disk_bytes
from whisper_moe.generate.options import TranscribeOptions
from whisper_moe.weights.checkpoint import describe
from whisper_moe.weights.load import DEFAULT_MOE, DEFAULT_TTT, config_of, default, resolve
from whisper_moe.weights.parts import SPEECH_PARTS, expected_shapes, expert_part, part_of, spelled_alone
from whisper_moe.weights.upcycle import upcycled_config

TYPICAL_TOKENS = 100
"""Tokens that a full window of speech is written in, about."""
_TTT_PRODUCTS = 7
"""Products with the fast weights a token and direction: two forward, one backward, two updates, two forward again."""


def parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters of each part, all its tensors counted: ``core``, ``router``, ``adapt``, ``experts/NN-name``."""
    counts: dict[str, int] = {}
    for key, shape in expected_shapes(config).items():
        names = spelled_alone(key, shape)
        for name in names:
            part = part_of(name, config)
            counts[part] = counts.get(part, 0) + prod(shape) // len(names)
    if config.moe and config.moe.granularity == "model":  # each as large as the base
        counts |= {expert_part(expert, config): counts["core"] for expert in range(config.moe.n_experts)}
    return counts


def active_parameters(config: ModelConfig) -> int:
    """Parameters that one segment of sound is computed with: all but the experts that it did not choose, and what speaks."""
    counts = {part: count for part, count in parameters(config).items() if part not in SPEECH_PARTS}
    experts = sorted(count for part, count in counts.items() if part.startswith("experts/"))
    return sum(counts.values()) - sum(experts[: len(experts) - config.moe.top_k] if config.moe else [])


class Flops(NamedTuple):
    """Floating-point operations of one window."""

    encoder: int
    memory: int
    """The keys and values that cross-attention reads, once a window."""
    decoder: int
    """All decoded tokens, one after another."""


def flops(config: ModelConfig, seconds: float = FULL_WINDOW, tokens: int = TYPICAL_TOKENS) -> Flops:
    """Operations for a window of ``seconds`` written in ``tokens`` tokens, each computed in a step of its own.

    Every chosen expert is counted: a segment that the router sends to *none* costs less. TTT gates are counted as open.
    """
    frames = round(seconds * FRAMES_PER_SECOND)
    positions, width = (frames + 1) // 2, config.d_model
    if config.core_alone_on_full_windows and positions == config.max_source_positions:
        ttt = config.ttt.model_copy(update={"encoder_layers": ()}) if config.ttt else None
        config = config.model_copy(update={"adapt": None, "ttt": ttt})
    stem = 2 * 3 * width * (frames * config.n_mels + positions * width)
    layers = sum(_encoder_layer(config, layer, positions) for layer in range(config.encoder_layers))
    choice = _choice(config) if config.moe and config.moe.scope == "segment" else 0
    memory = config.decoder_layers * 2 * positions * 2 * width**2
    decoder = sum(_decoder_token(config, positions, past) for past in range(1, tokens + 1))
    return Flops(stem + layers + choice, memory, decoder)


def _encoder_layer(config: ModelConfig, layer: int, positions: int) -> int:
    width = config.d_model
    attention = 2 * positions * 4 * width**2 + 2 * 2 * positions**2 * width
    pointwise = _feed_forward(config, "encoder", layer) + _convolution(config, layer)
    return attention + positions * pointwise + _encoder_ttt(config, layer, positions)


def _convolution(config: ModelConfig, layer: int) -> int:
    """Of one position: the Conformer's two pointwise products, and the depthwise one between them."""
    if config.conformer is None or layer not in config.conformer.encoder_layers:
        return 0
    return 2 * config.d_model * (3 * config.d_model + config.conformer.kernel_size)


def _decoder_token(config: ModelConfig, positions: int, past: int) -> int:
    """Of the token with which there are ``past``."""
    width = config.d_model
    own = 2 * 4 * width**2 + 2 * 2 * past * width
    cross = 2 * 2 * width**2 + 2 * 2 * positions * width
    depths = range(config.decoder_layers)
    inner = sum(_feed_forward(config, "decoder", i) + _decoder_ttt(config, i, past) for i in depths)
    return len(depths) * (own + cross) + inner + 2 * config.vocab_size * width


def _feed_forward(config: ModelConfig, side: Any, layer: int) -> int:
    """Of one token: dense or shared feed-forward, ``top_k`` experts with the sum of their biases, and a choice made here."""
    hidden = config.encoder_ffn_dim if side == "encoder" else config.decoder_ffn_dim
    moe, extra = config.moe, 0
    if moe is not None and config.routed(side, layer):
        hidden = hidden * moe.shared + moe.top_k * moe.expert_dim
        extra = 2 * moe.n_experts * config.d_model + (_choice(config) if moe.scope == "token" else 0)
    adapt = config.adapted(side, layer)
    hidden += adapt.adapter_dim if adapt else 0
    return 2 * 2 * config.d_model * hidden + extra


def _choice(config: ModelConfig) -> int:
    """One choice of a router: a logit for each expert and for *none*."""
    return 2 * (config.moe.n_experts + config.moe.none_choice) * config.d_model if config.moe else 0


def _encoder_ttt(config: ModelConfig, layer: int, positions: int) -> int:
    """Both directions of a segment; each is cut into mini-batches, of which the last is filled up with padding.

    Fast weights are [d, 4d] and [4d, d] for each head of d.
    """
    ttt, width, heads = config.ttt, config.d_model, config.encoder_heads
    if ttt is None or layer not in ttt.encoder_layers:
        return 0
    padded = -(-positions // ttt.mini_batch) * ttt.mini_batch
    inner = 2 * padded * _TTT_PRODUCTS * 2 * width * 4 * (width // heads)
    # q, k, v; learning rates; an output for each direction
    outer = positions * 2 * width * (3 * width + heads + 2 * width)
    return (config.moe.top_k if ttt.per_expert and config.moe else 1) * (inner + outer)


def _decoder_ttt(config: ModelConfig, layer: int, past: int) -> int:
    """The dual form, a token at a time: scores against the open mini-batch, and its commit when it is full."""
    ttt, width, heads = config.ttt, config.d_model, config.decoder_heads
    if ttt is None or layer not in ttt.decoder_layers:
        return 0
    opened = (past - 1) % ttt.mini_batch + 1
    weight = 2 * width * 4 * (width // heads)
    inner = 5 * weight + 2 * opened * 2 * (width + 4 * width)
    commit = 2 * weight * ttt.mini_batch if opened == ttt.mini_batch else 0
    return inner + commit + 2 * width * (3 * width + heads + width)


def cost(clips: Sequence[Clip], measured: Measured) -> dict[str, Any]:
    """What it took. ``flops_per_second`` follows from the shapes (:func:`flops`): each clip once,
    with its margin, for the tokens it was written in; tries that were given up are not counted.
    """
    seconds, wall, config = sum(clip.seconds for clip in clips), measured.wall_seconds, measured.config
    waits, counts = measured.latencies, [each.tokens for each in measured.heard if each.tokens is not None]
    tokens = sum(counts) if len(counts) == len(clips) else None
    p50, p95 = np.percentile(waits, [50, 95]).tolist() if waits else (None, None)
    timed = ("wall_seconds", "cpu_seconds", "load_seconds", "peak_bytes", "disk_bytes")
    found = {name: getattr(measured, name) for name in timed} | {
        "audio_seconds": seconds,
        "times_real_time": seconds / wall if wall else None,
        "tokens": tokens,
        "tokens_per_second": tokens / wall if wall and tokens is not None else None,
        "latency": {"p50": p50, "p95": p95, "clips": len(waits), "apart": measured.latencies_apart, "seconds": waits},
    }
    if config is not None:
        found["parameters_total"] = sum(parameters(config).values())
        found["parameters_active"] = active_parameters(config)
        found["flops_per_second"] = _flops(config, clips, measured) / seconds if seconds else None
    return found


def _flops(config: ModelConfig, clips: Sequence[Clip], measured: Measured) -> float:
    """Windows of a longer recording are counted as the longest that it may be cut into, and a rest."""
    asked = TranscribeOptions(context_margin=measured.margin)
    most = config.max_source_positions / POSITIONS_PER_SECOND
    window, total = min(asked.window_seconds, most), 0
    for clip, heard in zip(clips, measured.heard, strict=True):
        full, rest = divmod(clip.seconds, window)
        parts = [min(most, part + asked.margin) for part in [window] * int(full) + [rest] * bool(rest)]
        share = round((heard.tokens or 0) / max(1, len(parts)))
        total += sum(sum(flops(config, part, share)) for part in parts)
    return float(total)


def facts_of(model: str | None) -> dict[str, Any]:
    """Everything ``info`` shows about a model, a Whisper, or a preset by name (None: the default)."""
    if model in PRESETS:
        return {"name": model} | _facts(PRESETS[model]) | {"granularity": "ffn"}
    located = resolve(model or default())
    if located.kind == "checkpoint":
        config, sizes = describe(located.path)
    else:
        config, sizes = config_of(located), {"weights": disk_bytes(located.path)}
        if model is None:  # as load_model does
            config = upcycled_config(config, moe=DEFAULT_MOE, ttt=DEFAULT_TTT)
    return {"name": located.name} | _facts(config) | {"bytes": sizes}


def _facts(config: ModelConfig) -> dict[str, Any]:
    counted = parameters(config)
    return {
        "experts": list(config.moe.names) if config.moe else [],
        "top_k": config.moe.top_k if config.moe else 0,
        "context_margin": config.margin,
        "parameters": counted,
        "parameters_total": sum(counted.values()),
        "parameters_active": active_parameters(config),
        "flops_30s": flops(config)._asdict(),
    }


def table(facts: dict[str, Any]) -> str:
    """The facts as lines of text."""
    lines = [facts["name"] + (f" (granularity: {facts['granularity']})" if "granularity" in facts else "")]
    sizes = facts.get("bytes", {})
    for part, count in facts["parameters"].items():
        size = f"{sizes[part] / 1e6:10.1f} MB" if part in sizes else ""
        lines.append(f"  {part:24} {count / 1e6:10.2f} M{size}")
    total = f"{sum(sizes.values()) / 1e6:10.1f} MB" if sizes else ""
    lines.append(f"  {'total':24} {facts['parameters_total'] / 1e6:10.2f} M{total}")
    lines.append(f"  {'active for a segment':24} {facts['parameters_active'] / 1e6:10.2f} M")
    lines += [f"  {name + ', 30 s':24} {count / 1e9:10.2f} GFLOPs" for name, count in facts["flops_30s"].items()]
    lines.append(f"  {'silence after a clip':24} {facts['context_margin']:10.2f} s")
    lines.append(f"  (decoder: {TYPICAL_TOKENS} tokens; TTT layers counted with their gates open)")
    if facts["experts"]:
        lines.append(f"  experts, {facts['top_k']} for each segment: {', '.join(facts['experts'])}")
    return "\n".join(lines)
