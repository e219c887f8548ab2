"""What a model is made of: frozen configuration, validated when it is built, written as ``config.json``.

Nothing here imports torch: the command line reads a model's configuration before it decides to load anything.
Dimensions follow Whisper's names; the defaults of :class:`ModelConfig` are whisper-base's.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from whisper_moe.config_aside import ASIDE, Frozen, SensesConfig, SpeechConfig
from whisper_moe.config_aside import Strict as Strict
from whisper_moe.config_aside import problems as problems

SAMPLE_RATE = 16_000
"""Samples a second that every log-mel is computed at."""
FRAMES_PER_SECOND = 100
"""Mel frames a second."""
HOP = SAMPLE_RATE // FRAMES_PER_SECOND
"""Samples from one mel frame to the next: 160, 10 ms."""
POSITIONS_PER_SECOND = 50
"""Encoder positions a second: the stem's second convolution halves the frames."""
SAMPLES_PER_POSITION = SAMPLE_RATE // POSITIONS_PER_SECOND
FULL_WINDOW = 30.0
"""Seconds that Whisper was trained on; as a margin of silence, every clip is padded to them."""
DEFAULT_MARGIN = 2.5
"""Seconds of silence kept after each clip for a model that says nothing of it; chosen by measurement (``docs/lab.md``)."""
MAX_PACK_TOKENS = 2_048
"""The context that segments are packed into (Patch-n-Pack)."""
MAX_SIDE = 2**18
"""Of a matrix. Sizes have bounds, some times those of the largest Whisper: a model's shapes are computed, tables of positions
with them, before its files are believed."""
EMBEDDED = Path(__file__).parents[2] / "checkpoints"
"""The default model of a checkout."""


def model_folder(path: Path) -> Path:
    """Where the model is that somebody named: a training run has it in a folder of its own."""
    return path / "model" if (path / "run.json").is_file() and (path / "model").is_dir() else path


def model_name(path: Path) -> str:
    """What a model's file or folder is called; all runs call it ``model``, and it is called by the run."""
    path = path.resolve()
    return path.parent.name if path.name == "model" and (path.parent / "run.json").is_file() else path.name


class MoEConfig(Frozen):
    """A mixture-of-experts feed-forward (Mixtral arXiv 2401.04088; shared expert as in DeepSeekMoE 2401.06066)."""

    granularity: Literal["ffn", "delta", "model"] = "ffn"
    """What an expert is. ``ffn``: feed-forwards beside the dense model's or in their place; ``delta``: a low-rank difference of
    every matrix, with norms and biases in full (:mod:`whisper_moe.model.delta`); ``model``: a whole model
    (:mod:`whisper_moe.generate.mixture`)."""
    delta_rank: int = Field(default=32, ge=1)
    gate_threshold: float = Field(default=0.0, ge=0, le=0.5)
    """``model``: where the second gate is below it, the first expert answers alone."""
    fitted_router: bool = False
    """The router was fitted to a few clips of each expert (:mod:`whisper_moe.merge.router`)."""
    least_probability: float = Field(default=0.0, ge=0, le=1)
    """Of a fitted router with *none*: an expert that it finds less probable than this does not answer."""
    n_experts: int = Field(default=8, ge=1, le=512)
    top_k: int = Field(default=2, ge=1)
    expert_dim: int = Field(default=256, ge=1, le=MAX_SIDE)
    """Hidden units of one routed expert in one layer."""
    shared: bool = True
    """Keep Whisper's own feed-forward as an expert that every token passes through."""
    none_choice: bool = True
    """Let the router choose *none*: a slot whose output is zero, so that unknown input stays with the shared expert."""
    scope: Literal["segment", "token"] = "segment"
    """``segment``: one choice per segment, read at ``router_layer``. ``token``: one per layer and token (Mixtral)."""
    router_layer: int = Field(default=2, ge=0)
    """Segment scope: the router reads the states after this many encoder layers; they are unrouted, the rest are routed."""
    balance_bias: bool = False
    """The router has a bias for each choice: models were once balanced by one, and keep it. Nothing moves it."""
    expert_names: tuple[str, ...] = ()
    """A name for each expert, shown in every transcript; default ``expert-0`` …"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.top_k > self.n_experts:
            raise ValueError(f"top_k ({self.top_k}) is greater than n_experts ({self.n_experts})")
        if self.none_choice and not self.shared:
            raise ValueError(
                "none_choice needs shared=True: without a shared expert, *none* would drop the feed-forward"
            )
        if self.granularity != "ffn" and (self.scope == "token" or not self.shared):
            raise ValueError(f"granularity {self.granularity}: the base is shared, and experts are chosen per segment")
        if self.expert_names and not len(self.expert_names) == len(set(self.expert_names)) == self.n_experts:
            raise ValueError(f"expert_names must be {self.n_experts} different names, got {list(self.expert_names)}")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        return self.expert_names or tuple(f"expert-{i}" for i in range(self.n_experts))


class TTTConfig(Frozen):
    """TTT-MLP layers: test-time training, arXiv 2407.04620 section 2."""

    encoder_layers: tuple[int, ...] = ()
    """Encoder blocks that carry a bidirectional TTT layer (every block, counted from 0)."""
    decoder_layers: tuple[int, ...] = ()
    """Decoder blocks that carry a causal TTT layer."""
    mini_batch: int = Field(default=60, ge=1, le=MAX_PACK_TOKENS)
    """Tokens that share one gradient step, b."""
    base_lr: float = Field(default=0.1, gt=0)
    """Inner learning rate before the learned, per-token factor, η_base."""
    per_expert: bool = False
    """One TTT layer for each routed expert (segment scope only) instead of one for all."""


class ConformerConfig(Frozen):
    """The Conformer's convolution module in encoder blocks (arXiv 2005.08100, section 2.2), behind a gate that starts at 0."""

    encoder_layers: tuple[int, ...] = ()
    """Encoder blocks that carry one."""
    kernel_size: int = Field(default=31, ge=1, le=255)
    """Positions that a convolution sees, odd; 31 are 0.6 s."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {self.kernel_size}")
        return self


class AdaptConfig(Frozen):
    """What is always on beside a frozen core: it starts as the identity and learns what the core was not trained for."""

    encoder_layers: tuple[int, ...] = ()
    """Encoder blocks that are adapted."""
    decoder_layers: tuple[int, ...] = ()
    """Decoder blocks that are adapted."""
    norms: bool = True
    """Their LayerNorms carry a learned difference."""
    adapter_dim: int = Field(default=0, ge=0)
    """Hidden units of a slim feed-forward beside each one's own (an adapter, arXiv 1902.00751, in parallel); 0 for none."""
    full_windows: bool = True
    """False: a window of full length goes through the encoder as if none of this were there, nor its TTT layers: the core
    was trained on such windows, and says of them exactly what it said before."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.full_windows and self.decoder_layers:
            raise ValueError("full_windows: false is for the encoder: the decoder does not know how long a window is")
        return self


class ModelConfig(Frozen):
    """The whole encoder-decoder. The defaults are the shape of ``openai/whisper-base``."""

    model_type: Literal["whisper_moe"] = "whisper_moe"
    format_version: Literal[1] = 1
    vocab_size: int = Field(default=51_865, ge=1, le=MAX_SIDE)
    """Of all tokens: the source's own, then the new ones."""
    new_tokens: tuple[str, ...] = ()
    """Control tokens that the source lacks, such as ``<|or|>``, by name and in the order of their ids: the last ones."""
    n_mels: int = Field(default=80, ge=1, le=MAX_SIDE)
    d_model: int = Field(default=512, ge=4, le=5_120, multiple_of=2)
    """Even: half of a sinusoidal position is sines."""
    encoder_layers: int = Field(default=6, ge=1, le=64)
    encoder_heads: int = Field(default=8, ge=1)
    encoder_ffn_dim: int = Field(default=2_048, ge=1, le=MAX_SIDE)
    decoder_layers: int = Field(default=6, ge=1, le=64)
    decoder_heads: int = Field(default=8, ge=1)
    decoder_ffn_dim: int = Field(default=2_048, ge=1, le=MAX_SIDE)
    max_source_positions: int = Field(default=1_500, ge=1, le=6_000)
    max_target_positions: int = Field(default=448, ge=1, le=6_000)
    context_margin: float | None = Field(default=None, ge=0, le=FULL_WINDOW)
    """Seconds of silence after a clip that the model was trained to do with; None where nobody has said (:attr:`margin`)."""
    moe: MoEConfig | None = None
    ttt: TTTConfig | None = None
    adapt: AdaptConfig | None = None
    conformer: ConformerConfig | None = None
    speech: SpeechConfig | None = None
    senses: SensesConfig | None = None

    @model_serializer(mode="wrap")
    def _written(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Nothing of parts that are read when they are needed, where a model has none: its files stay what they were before."""
        return {name: value for name, value in plain(self).items() if name not in ASIDE or value is not None}

    @model_validator(mode="after")
    def _check(self) -> Self:
        for side in ("encoder", "decoder"):
            heads: int = getattr(self, f"{side}_heads")
            if self.d_model % heads:
                raise ValueError(f"d_model ({self.d_model}) is not a multiple of {side}_heads ({heads})")
        if self.moe and self.moe.scope == "segment" and self.moe.router_layer > self.encoder_layers:
            raise ValueError(
                f"router_layer ({self.moe.router_layer}) is beyond the encoder's {self.encoder_layers} layers"
            )
        for name in ("adapt", "conformer", "ttt"):
            if part := getattr(self, name):
                self._check_depths(name, part)
        if self.ttt:
            self._check_ttt(self.ttt)
        self._check_new_tokens()
        self._check_senses()
        return self

    def _check_senses(self) -> None:
        moe, adapt, ttt = self.moe, self.adapt, self.ttt
        if self.senses and moe and (moe.granularity != "ffn" or not moe.shared or moe.scope != "segment"):
            raise ValueError("senses need a dense core: experts that are chosen for segments, beside a shared one")
        if self.senses and ((adapt and adapt.decoder_layers) or (ttt and ttt.decoder_layers)):
            raise ValueError(
                "senses need a decoder's core as it is: without adapt.decoder_layers and ttt.decoder_layers"
            )

    def _check_new_tokens(self) -> None:
        names = self.new_tokens
        odd = [name for name in names if not re.fullmatch(r"<\|[^\s<|>]{1,64}\|>", name)]
        if odd or len(set(names)) < len(names):
            raise ValueError(f"new_tokens must be different names such as <|or|>, got {odd or list(names)}")
        if len(names) >= self.vocab_size:
            raise ValueError(f"vocab_size ({self.vocab_size}) counts the {len(names)} new tokens and the source's own")

    @property
    def margin(self) -> float:
        """Seconds of silence after a clip that the model is given where nothing else is asked for."""
        return DEFAULT_MARGIN if self.context_margin is None else self.context_margin

    @property
    def source_vocab_size(self) -> int:
        """Tokens that the source came with; the ids of new ones begin here."""
        return self.vocab_size - len(self.new_tokens)

    def _check_depths(self, name: str, part: TTTConfig | AdaptConfig | ConformerConfig) -> None:
        for side in ("encoder", "decoder"):
            depth: int = getattr(self, f"{side}_layers")
            beyond = [i for i in getattr(part, f"{side}_layers", ()) if not 0 <= i < depth]
            if beyond:
                raise ValueError(f"{name}.{side}_layers {beyond} are beyond the {side}'s {depth} layers")

    def _check_ttt(self, ttt: TTTConfig) -> None:
        for side, layers in (("encoder", ttt.encoder_layers), ("decoder", ttt.decoder_layers)):
            heads: int = getattr(self, f"{side}_heads")
            if layers and self.d_model // heads % 2:
                raise ValueError(
                    f"ttt.{side}_layers need heads of an even width (RoPE): d_model ({self.d_model}) / {side}_heads ({heads})"
                )
        if ttt.per_expert:
            if self.moe is None or self.moe.scope != "segment":
                raise ValueError("ttt.per_expert needs experts that are chosen per segment")
            if ttt.decoder_layers:
                raise ValueError("ttt.per_expert is for encoder layers; the decoder's TTT layers serve all experts")
            whole = self.moe.granularity != "ffn"  # segments that are routed begin again at the stem
            unrouted = [i for i in ttt.encoder_layers if i < self.moe.router_layer and not whole]
            if unrouted:
                raise ValueError(f"ttt.per_expert: encoder layers {unrouted} come before the router's choice")

    def adapted(self, side: Literal["encoder", "decoder"], layer: int) -> AdaptConfig | None:
        """How this block is adapted, if it is."""
        return self.adapt if self.adapt and layer in getattr(self.adapt, f"{side}_layers") else None

    @property
    def core_alone_on_full_windows(self) -> bool:
        """Whether the encoder leaves out what adapts it where a window has its full length."""
        return self.adapt is not None and not self.adapt.full_windows

    def routed(self, side: Literal["encoder", "decoder"], layer: int) -> bool:
        """Whether this block's feed-forward is a mixture of experts."""
        if self.moe is None or self.moe.granularity != "ffn":
            return False
        return side == "decoder" or self.moe.scope == "token" or layer >= self.moe.router_layer


def _sized(d_model: int, layers: int, heads: int) -> ModelConfig:
    """Whisper's shape at this width; eight full-size experts without a shared one (``ffn`` granularity), TTT everywhere."""
    moe = MoEConfig(expert_dim=4 * d_model, shared=False, none_choice=False, router_layer=0)
    ttt = TTTConfig(encoder_layers=tuple(range(layers)), per_expert=True)
    side = {"layers": layers, "heads": heads, "ffn_dim": 4 * d_model}
    sides: dict[str, Any] = {f"{name}_{key}": value for name in ("encoder", "decoder") for key, value in side.items()}
    return ModelConfig(d_model=d_model, moe=moe, ttt=ttt, **sides)


PRESETS: dict[str, ModelConfig] = {
    "8x39m": _sized(384, 4, 6),
    "8x74m": _sized(512, 6, 8),
    "8x241m": _sized(768, 12, 12),
    "8x769m": _sized(1024, 24, 16),
}
"""Eight tiny, base, small and medium Whispers. Granularity ``ffn``: their feed-forwards are the experts, all else is one copy."""
