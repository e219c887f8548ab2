"""Fine-tunes become one model that asks the right one: built from tiny Whispers, with noises that a router can tell apart."""

from __future__ import annotations

import json
import shutil
import wave
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from generate.tiny import tiny_whisper_moe
from weights.whispers import published

from whisper_moe import WhisperMoE, api
from whisper_moe.cli import app
from whisper_moe.config import SAMPLE_RATE, ModelConfig, TTTConfig
from whisper_moe.evaluate.cost import facts_of
from whisper_moe.evaluate.metrics import written
from whisper_moe.generate.align import WordTiming
from whisper_moe.generate.mixture import Mixture, cued
from whisper_moe.generate.options import TranscribeOptions
from whisper_moe.media.mel import window_mel
from whisper_moe.media.tokenizer import Tokenizer
from whisper_moe.merge import doctor, run
from whisper_moe.merge.build import decoder_of
from whisper_moe.model.router import Routing
from whisper_moe.weights.checkpoint import CARD, Loaded, load_checkpoint, save_checkpoint
from whisper_moe.weights.files import CheckpointError
from whisper_moe.weights.load import load_model
from whisper_moe.weights.parts import empty_model

KINDS = {"low": (120, 400), "high": (2500, 6000), "other": (700, 1500), "new": (20, 60)}
"""Bands of noise, in Hz: two that experts are for, one that none is, and one for an expert that comes later."""
DENSE = ModelConfig.model_validate(tiny_whisper_moe().config.model_dump() | {"moe": None, "ttt": None})
LEARNER = DENSE.model_copy(update={"ttt": TTTConfig(encoder_layers=(1,), mini_batch=25)})


def noise(kind: str, seed: int, seconds: float = 1.5) -> np.ndarray:
    low, high = KINDS[kind]
    samples = np.random.default_rng(seed).standard_normal(round(seconds * SAMPLE_RATE))
    spectrum, hertz = np.fft.rfft(samples), np.fft.rfftfreq(len(samples), 1 / SAMPLE_RATE)
    found = np.fft.irfft(np.where((hertz > low) & (hertz < high), spectrum, 0), len(samples))
    return (found / np.abs(found).max() / 2).astype(np.float32)


def write_probe(folder: Path, kind: str, clips: int = 8) -> str:
    folder.mkdir()
    lines = ["path\ttext\tlanguage"]
    for index in range(clips):
        with wave.open(str(folder / f"{index}.wav"), "wb") as file:
            file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
            file.writeframes((noise(kind, index) * 32767).astype("<i2").tobytes())
        lines.append(f"{index}.wav\thello\ten")
    (folder / "clips.tsv").write_text("\n".join(lines) + "\n")
    return str(folder / "clips.tsv")


class Family:
    """A base, two fine-tunes of it, and the folder that all lie in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = tiny_whisper_moe(config=DENSE)
        self.base.save_pretrained(folder / "base")
        for name, seed in (("low", 1), ("high", 2), ("new", 3), ("high-ttt", 2), ("new-ttt", 3)):
            expert = tiny_whisper_moe(config=LEARNER if name.endswith("ttt") else DENSE)
            expert.model.load_state_dict(self.base.model.state_dict(), strict=False)
            torch.manual_seed(seed)
            with torch.no_grad():
                for key, parameter in expert.model.named_parameters():
                    if ".ttt" in key:
                        parameter *= 4  # so that it is heard
                    elif "token_embedding" not in key and key != "decoder.positions":
                        parameter += 0.3 * torch.randn_like(parameter) * parameter.std().nan_to_num(1.0)
            expert.save_pretrained(folder / name)
        (folder / "low" / "README.md").write_text("---\nlicense: mit\n---\nlow\n")
        self.probes = {kind: write_probe(folder / f"{kind}-clips", kind) for kind in KINDS}

    def merge(self, output: str, *more: str, none: bool = True, high: str = "high") -> Path:
        given = ["merge", str(self.folder / "low"), f"high={self.folder / high}", "--base", str(self.folder / "base")]
        given += ["--probe", self.probes["low"], "--probe", self.probes["high"]]
        given += ["--none", self.probes["other"]] if none else []
        app([*given, "-o", str(self.folder / output), *more], standalone_mode=False)
        return self.folder / output


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp("merge"))


@pytest.fixture(scope="module")
def delta(family: Family) -> Path:
    return family.merge("delta", "--delta-rank", "16")


@pytest.fixture(scope="module")
def whole(family: Family) -> Path:
    return family.merge("model", "--granularity", "model", "--gate-threshold", "0.5")


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for overwrite, reason in ((False, "exists already"), (True, "holds more than a checkpoint: notes.txt")):
        with pytest.raises(ValueError, match=reason):
            run.merge(["nobody"], tmp_path, probe=["nothing"], overwrite=overwrite)


def test_probes_are_heard_from_all_over_their_table(family: Family) -> None:
    every = [sample.id for sample, _ in run.clips_of(family.probes["low"])]
    some = [sample.id for sample, _ in run.clips_of(family.probes["low"], limit=4)]
    assert sorted(every) != every
    assert some == every[:4]
    assert len(set(every)) == 8


def said(model: WhisperMoE, clips: list[np.ndarray]) -> list[tuple[int, ...]]:
    options = TranscribeOptions(language="en", temperatures=(0.0,))
    return [r.hypothesis.tokens for r in model._decoder.decode(clips, options, temperature=0.0, margin=2.5)]


CLIPS = [
    (kind, noise(kind, seed, seconds))  # the longest is not the first: packs have another order
    for seed, lengths in ((100, (1.5, 1.8, 1.6)), (101, (1.7, 1.4, 1.9)))
    for kind, seconds in zip(("low", "high", "other"), lengths, strict=True)
]


@pytest.mark.parametrize("granularity", ["delta", "whole"])
def test_each_clip_is_answered_by_its_expert(granularity: str, family: Family, request: pytest.FixtureRequest) -> None:
    merged = WhisperMoE.from_pretrained(request.getfixturevalue(granularity), dtype="float32")
    options = TranscribeOptions(language="en", temperatures=(0.0,))
    results = merged._decoder.decode([clip for _, clip in CLIPS], options, temperature=0.0, margin=2.5)
    alone = {
        name: WhisperMoE.from_pretrained(family.folder / name, dtype="float32") for name in ("low", "high", "base")
    }
    for (kind, clip), result in zip(CLIPS, results, strict=True):
        expert = "none" if kind == "other" else kind
        assert [name for name, gate in result.experts if gate > 0] == [expert]
        assert result.hypothesis.tokens == said(alone["base" if kind == "other" else kind], [clip])[0]
    assert len({result.hypothesis.tokens for result in results[:3]}) == 3, "the experts say different things"


def test_under_the_threshold_one_expert_answers_bit_for_bit(
    whole: Path, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture = WhisperMoE.from_pretrained(whole, dtype="float32")._decoder
    alone = WhisperMoE.from_pretrained(family.folder / "high", dtype="float32")._decoder
    options, clips = TranscribeOptions(language="en", temperatures=(0.0,)), [noise("low", 5), noise("high", 6)]
    expected = alone.decode(clips, options, temperature=0.0, margin=2.5)
    for second, same in ((0.49, True), (0.51, False)):
        gates = torch.tensor([[1 - second, second]] * 2)
        monkeypatch.setattr(mixture, "choose", lambda *_, g=gates: Routing(torch.tensor([[1, 0]] * 2), g))
        found = mixture.decode(clips, options, temperature=0.0, margin=2.5)
        equal = [
            (a.hypothesis, a.no_speech_prob) == (b.hypothesis, b.no_speech_prob)
            for a, b in zip(found, expected, strict=True)
        ]
        assert all(equal) if same else not any(equal)


def test_an_expert_of_full_rank_is_the_fine_tune_but_for_float16(delta: Path, family: Family) -> None:
    merged, alone = load_checkpoint(delta), load_checkpoint(family.folder / "high")
    base, key = load_checkpoint(family.folder / "base"), "encoder.blocks.1.ffn.up"
    down, up = (merged.state[f"{key}.experts.{name}"][1] for name in ("down", "up"))
    weight = base.state[f"{key}.weight"] + up[:-1].T @ down
    change = (alone.state[f"{key}.weight"] - base.state[f"{key}.weight"]).abs().max()
    assert (weight - alone.state[f"{key}.weight"]).abs().max() < 2e-3 * change
    assert [path.name for path in sorted((delta / "experts").iterdir())] == [
        "00-low.safetensors",
        "01-high.safetensors",
    ]


@pytest.mark.parametrize("how", [("--delta-rank", "16"), ("--delta-rank", "1"), ("--granularity", "model")], ids=str)
def test_the_card_says_what_is_lost_and_may_be_edited(
    how: tuple[str, str], family: Family, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        Tokenizer, "decode", lambda _, ids: " ".join(f"w{id}" for id in ids)
    )  # tiny ones speak no words
    given = ["--base", str(family.folder / "base"), "-o", str(merged := tmp_path / "mine"), "--measure", "3", *how]
    for name in ("low", "high"):
        source, table = str(family.folder / name), tmp_path / f"{name}.tsv"
        clips = list(run.clips_of(family.probes[name]))
        texts = written(decoder_of(load_model(source)), clips, 2.5)
        lines = [f"{s.audio.name}\t{text}\ten" for (s, _), text in zip(clips, texts, strict=True) if s.audio]
        table.write_text("\n".join(["path\ttext\tlanguage", *lines]) + "\n")
        given += [source, "--probe", str(table)]
    app(["merge", *given], standalone_mode=False)
    card = (merged / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["language"] == ["en"]
    assert head["pipeline_tag"] == "automatic-speech-recognition"
    assert "base_model" not in head, "none of them is on the Hub"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines() if line.startswith("|")]
    assert [row[:3] for row in rows if len(row) == 6][2:] == [
        ["low", f"{family.folder.name}/low", "mit"],
        ["high", f"{family.folder.name}/high", ""],
        ["none", f"{family.folder.name}/base", ""],
    ]
    rates = [row for row in rows if len(row) == 5][2:]
    assert [row[0] for row in rates] == ["low", "high"]
    assert {(clips, alone) for _, clips, _, alone, _ in rates} == {("3", "0.0")}, "its own words are what is to be said"
    assert any(float(row[2]) > 0 for row in rates), "the base says others"
    assert any(float(row[4]) > 0 for row in rates) == (how[1] == "1"), "nothing is lost but by rank"
    (merged / "README.md").write_text(f"{card}edited\n")
    load_checkpoint(merged)
    before = load_checkpoint(merged)
    save_checkpoint(merged, before, overwrite=True, experts=map(load_checkpoint, before.experts))
    assert (merged / "README.md").read_text().endswith("edited\n"), "what people wrote is not lost"


def test_two_whole_models_are_mixed_by_their_gates(whole: Path, family: Family) -> None:
    merged = WhisperMoE.from_pretrained(whole, dtype="float32")
    mixture = merged._decoder
    assert isinstance(mixture, Mixture)
    gates = torch.tensor([[0.7, 0.3], [0.2, 0.8]])
    clips = [clip for _, clip in CLIPS[:2]]
    pair = mixture._decoder((0, 1), gates)
    encoded = pair.encode(clips, 2.5)
    tokens = torch.tensor([[merged.tokenizer.sot]] * 2)
    logits, state = pair.step(tokens, pair.start(encoded))
    each = [
        decoder.step(tokens, decoder.start(decoder.encode(clips, 2.5)))[0] for decoder in (f() for f in mixture._each)
    ]
    expected = sum(gates[:, i : i + 1] * logits.softmax(-1) for i, logits in enumerate(each))
    torch.testing.assert_close(logits.exp(), expected)
    kept = state.select(torch.tensor([0, 1])).keep([1])
    torch.testing.assert_close(
        pair.step(torch.tensor([[5]]), kept)[0], pair.step(torch.tensor([[5], [5]]), state)[0][1:]
    )


def test_lazy_experts_say_the_same(whole: Path) -> None:
    clips = [clip for _, clip in CLIPS]
    eager, lazy = (WhisperMoE.from_pretrained(whole, dtype="float32", lazy=lazy) for lazy in (False, True))
    assert said(eager, clips) == said(lazy, clips)


@pytest.mark.parametrize("how", [(), ("--lazy",)])
def test_lazy_reads_an_expert_when_it_is_asked_for(
    how: tuple[str, ...], whole: Path, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    monkeypatch.setattr(
        api,
        "load_checkpoint",
        lambda folder, **options: (read.append(folder.name), load_checkpoint(folder, **options))[1],
    )
    clip = str(family.folder / "low-clips" / "3.wav")
    given = ["transcribe", clip, "--model", str(whole), "--language", "en", "--temperature", "0", "--experts", "high"]
    assert app([*given, *how], standalone_mode=False) == 0
    assert read == (["01-high"] if how else ["00-low", "01-high"])


@pytest.mark.parametrize("granularity", ["delta", "whole"])
def test_an_expert_answers_in_the_language_that_it_states(granularity: str, request: pytest.FixtureRequest) -> None:
    merged = WhisperMoE.from_pretrained(request.getfixturevalue(granularity), dtype="float32")
    assert merged.generation["expert_languages"] == {"low": "en", "high": "en"}, "that of all their probe clips"
    merged.generation["expert_languages"] = {"high": "hi"}
    clips, options = [clip for _, clip in CLIPS[:3]], TranscribeOptions(temperatures=(0.0,))
    low, high, none = merged._decoder.decode(clips, options, temperature=0.0, margin=0.0)
    assert (high.language, high.language_probability) == ("hi", None)
    assert None not in (low.language_probability, none.language_probability)
    merged.tokenizer.detected.pop("hi")
    assert merged._decoder.decode(clips, options, temperature=0.0, margin=0.0)[1].language == "hi"
    limited = replace(options, allowed_languages=("en",))
    assert merged._decoder.decode(clips, limited, temperature=0.0, margin=0.0)[1].language == "en"
    asked = replace(options, language="en")
    assert merged._decoder.decode(clips, asked, temperature=0.0, margin=0.0)[1].language == "en"


def test_of_an_expert_without_times_the_base_tells_them(whole: Path, family: Family) -> None:
    merged = WhisperMoE.from_pretrained(whole, dtype="float32")
    mixture, alone = merged._decoder, WhisperMoE.from_pretrained(family.folder / "high", dtype="float32")
    assert isinstance(mixture, Mixture)
    clips, tokenizer = [dict(CLIPS)["high"], dict(CLIPS)["low"]], merged.tokenizer
    timed, plain = (TranscribeOptions(language="en", temperatures=(0.0,), timestamps=times) for times in (True, False))
    before = mixture.decode(clips, timed, temperature=0.0, margin=2.5)
    mixture._untimed[1] = True
    after = mixture.decode(clips, timed, temperature=0.0, margin=2.5)
    assert after[1] == before[1]
    (text,) = alone._decoder.decode(clips[:1], plain, temperature=0.0, margin=2.5)
    said = after[0].hypothesis
    assert tuple(token for token in said.tokens if not tokenizer.is_timestamp(token)) == text.hypothesis.tokens
    assert said.avg_logprob == pytest.approx(text.hypothesis.avg_logprob)
    times = [tokenizer.seconds(token) for token in said.tokens if tokenizer.is_timestamp(token)]
    assert times == sorted(times)
    assert all(map(tokenizer.is_timestamp, (said.tokens[0], said.tokens[-1])))
    (worded,) = mixture.decode(clips[:1], replace(timed, word_timestamps=True), temperature=0.0, margin=2.5)
    assert worded.timings
    assert after[0].timings is None


def test_a_sentence_is_a_cue(whole: Path) -> None:
    tokenizer = WhisperMoE.from_pretrained(whole, dtype="float32").tokenizer
    words = [
        WordTiming(word, (1, 2), 0.3 * i, 0.3 * i + 0.2, 1.0) for i, word in enumerate((" one.", " two", " three"))
    ]
    tokens = list(cued(words, tokenizer))
    times = [tokenizer.seconds(token) if tokenizer.is_timestamp(token) else None for token in tokens]
    assert times == pytest.approx([0.0, None, None, 0.2, 0.3, None, None, None, None, 0.8])


def test_a_whole_expert_may_be_the_only_one(whole: Path, family: Family, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(whole, alone)
    app(["remove-expert", str(alone), "low"], standalone_mode=False)
    merged, options = WhisperMoE.from_pretrained(alone, dtype="float32"), TranscribeOptions(language="en")
    facts = facts_of(str(alone))
    assert facts["bytes"].keys() == facts["parameters"].keys() == {"core", "router", "experts/00-high"}
    assert facts["parameters"]["experts/00-high"] == facts["parameters"]["core"]
    clips = [clip for _, clip in CLIPS[:3]]
    results = merged._decoder.decode(clips, options, temperature=0.0, margin=2.5)
    assert [result.experts for result in results[1:]] == [(("high", 1.0),), (("none", 1.0),)]
    assert (
        results[1].hypothesis.tokens
        == said(WhisperMoE.from_pretrained(family.folder / "high", dtype="float32"), clips[1:2])[0]
    )


def test_teacher_forcing_chooses_as_decoding_does(delta: Path) -> None:
    decoder = WhisperMoE.from_pretrained(delta, for_inference=False)._decoder
    encoder, mels = decoder.model.encoder, decoder.model.config.n_mels
    clips = [
        noise(kind, 200 + seed, seconds) for kind in ("low", "high") for seed in range(8) for seconds in (1.5, 7.0)
    ]
    lengths = [decoder.positions(len(clip), 2.5) for clip in clips]
    mels = [window_mel(clip, mels, length) for clip, length in zip(clips, lengths, strict=True)]
    with torch.inference_mode():
        encoded = encoder(mels, valid_lengths=[decoder.positions(len(clip), 0) for clip in clips])
    assert encoded.routing is not None
    assert encoded.routing.choices == decoder.choose(clips).choices


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("granularity", ["delta", "whole"])
def test_half_precision_chooses_the_same(granularity: str, dtype: str, request: pytest.FixtureRequest) -> None:
    merged = WhisperMoE.from_pretrained(request.getfixturevalue(granularity), device="cpu", dtype=dtype)
    options, clips = TranscribeOptions(language="en", word_timestamps=True), [clip for _, clip in CLIPS]
    results = merged._decoder.decode(clips, options, temperature=0.0, margin=2.5)
    expected = ["none" if kind == "other" else kind for kind, _ in CLIPS]
    assert [name for result in results for name, _ in result.experts] == expected
    empty_model(merged.config).to_empty(device="cpu")  # as a resumed run begins


def test_a_model_without_its_whole_experts_is_neither_written_nor_trained_nor_loaded(
    whole: Path, family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged = WhisperMoE.from_pretrained(whole, for_inference=False)
    with pytest.raises(CheckpointError, match="0 whole models for 2 experts"):
        merged.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    probe = family.probes["low"]
    (recipe := tmp_path / "recipe.yaml").write_text(
        f"model: {{source: {whole}}}\ndata: {{train: [{{kind: table, source: {probe}}}]}}\noptimisation: {{steps: 1}}\n"
    )
    assert app(["train", str(recipe), "-o", str(tmp_path / "run")], standalone_mode=False) == 2
    assert "its experts are whole models" in capsys.readouterr().err
    shutil.copytree(whole, broken := tmp_path / "broken")
    manifest = json.loads((broken / "MANIFEST.json").read_text())
    del manifest["files"]["experts/01-high/MANIFEST.json"]
    (broken / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="1 whole models for 2 experts"):
        WhisperMoE.from_pretrained(broken)


@pytest.mark.parametrize("name", ["", "none", "a,b"])
def test_an_expert_has_a_name_that_can_be_asked_for(name: str) -> None:
    with pytest.raises(ValueError, match="an expert cannot be called"):
        run.named_experts([f"{name}=me/model"])
    assert run.named_experts(["runs/rate=3e-5/hindi"]) == {"hindi": "runs/rate=3e-5/hindi"}


def test_a_file_may_change_who_answers_within_a_window(delta: Path) -> None:
    kinds = ("low", "high", "other", "low", "other", "high")
    mixed = np.concatenate([noise(kind, 70, seconds=4) for kind in kinds])
    merged = WhisperMoE.from_pretrained(delta, dtype="float32")
    accept = {"no_speech_threshold": None, "logprob_threshold": None, "compression_ratio_threshold": None}
    said = merged.transcribe(mixed, temperatures=(0.0,), language="en", window=2.0, **accept)
    changes = [("none" if kind == "other" else kind, 4.0 * i) for i, kind in enumerate(kinds)]
    for segment in said.segments:
        begin = segment.seek / 100
        heard = {name for name, start in changes if start < begin + 2 and begin < start + 4}
        assert {name for name, _ in segment.experts} <= heard, segment
        if len(heard) == 1:
            assert {name for name, _ in segment.experts} == heard
    answered = [name for segment in said.segments for name, _ in segment.experts]
    assert [name for name, before in zip(answered, ["", *answered], strict=False) if name != before] == [
        name for name, _ in changes
    ]


@pytest.mark.parametrize("granularity", ["delta", "whole"])
def test_experts_can_be_forced_and_forbidden(granularity: str, request: pytest.FixtureRequest) -> None:
    merged = WhisperMoE.from_pretrained(request.getfixturevalue(granularity), dtype="float32")
    clip = dict(CLIPS)["high"]
    plain = {
        "no_speech_threshold": None,
        "logprob_threshold": None,
        "compression_ratio_threshold": None,
        "language": "en",
    }

    def answered(**options: tuple[str, ...]) -> set[str]:
        said = merged.transcribe(clip, temperatures=(0.0,), **plain, **options)
        return {name for segment in said.segments for name, _ in segment.experts}

    assert answered() == {"high"}
    assert answered(experts=("low",)) == {"low"}
    assert "high" not in answered(exclude=("high",))
    assert answered(experts=("none",)) == {"none"}
    with pytest.raises(ValueError, match="no expert is called hihg; there are low, high, none"):
        answered(experts=("hihg",))
    with pytest.raises(ValueError, match="no expert is left"):
        answered(experts=("low",), exclude=("low",))


@pytest.mark.parametrize("granularity", ["delta", "whole"])
def test_json_has_the_probability_of_every_choice(
    granularity: str, family: Family, request: pytest.FixtureRequest
) -> None:
    merged = WhisperMoE.from_pretrained(request.getfixturevalue(granularity), dtype="float32")
    plain: dict[str, Any] = {"no_speech_threshold": None, "language": "en", "temperatures": (0.0,)}
    for kind, clip in CLIPS[:3]:
        segment = merged.transcribe(clip, **plain).to_dict()["segments"][0]
        router = merged.model.encoder.router
        assert router is not None
        logits = router(merged._decoder.features([clip])).logits
        assert logits is not None
        found = segment["expert_probabilities"]
        assert [*found.values()] == pytest.approx(logits.softmax(1)[0].tolist(), abs=1e-4)
        assert [*found] == ["low", "high", "none"]
        assert (
            max(found, key=found.__getitem__) == next(iter(segment["experts"])) == ("none" if kind == "other" else kind)
        )
    barred = merged.transcribe(dict(CLIPS)["low"], exclude=("low",), **plain).to_dict()["segments"][0]
    assert barred["expert_probabilities"]["low"] == 0
    assert sum(barred["expert_probabilities"].values()) == pytest.approx(1)
    alone = WhisperMoE.from_pretrained(family.folder / "low", dtype="float32").transcribe(dict(CLIPS)["low"], **plain)
    assert "expert_probabilities" not in alone.to_dict()["segments"][0]


def test_the_command_shows_who_answered(delta: Path, family: Family, caplog: pytest.LogCaptureFixture) -> None:
    clips = [str(family.folder / f"{kind}-clips" / "3.wav") for kind in ("low", "high")]
    with caplog.at_level("INFO", "whisper_moe"):
        given = ["transcribe", *clips, "--model", str(delta), "--language", "en", "--temperature", "0"]
        given += ["--no-speech-threshold", "None", "--show-routing", "-f", "json", "--experts", "high"]
        app(given, standalone_mode=False)
    lines = [line for line in caplog.messages if line.startswith("  ")]
    assert lines
    assert all(line.endswith(" s, en: high 1.00") for line in lines)


@pytest.mark.parametrize("granularity", ["delta", "model"])
def test_an_expert_with_ttt_beside_one_without(granularity: str, family: Family) -> None:
    given = ["--delta-rank", "16", "--granularity", granularity]
    folder = family.merge(f"ttt-{granularity}", *given, high="high-ttt")
    assert "brings TTT in encoder layers 1 |" in (folder / CARD).read_text()
    merged = WhisperMoE.from_pretrained(folder, dtype="float32")
    texts, alone = said(merged, [clip for _, clip in CLIPS]), {"low": "low", "high": "high-ttt", "other": "base"}
    for (kind, clip), text in zip(CLIPS, texts, strict=True):
        assert text == said(WhisperMoE.from_pretrained(family.folder / alone[kind], dtype="float32"), [clip])[0]
    dense = WhisperMoE.from_pretrained(family.folder / "high", dtype="float32")
    assert said(dense, [CLIPS[1][1]])[0] != texts[1], "without its TTT it says something else"
    with pytest.raises(ValueError, match="carry_ttt needs a model"):
        merged.transcribe(CLIPS[1][1], carry_ttt=True)


@pytest.mark.parametrize(
    ("how", "high", "new"),
    [
        (("--quantize",), "high", "new"),
        (("--granularity", "model", "--gate-threshold", "0.5"), "high", "new"),
        (("--delta-rank", "16"), "high", "new-ttt"),
        (("--delta-rank", "16"), "high-ttt", "new"),
        (("--granularity", "model", "--gate-threshold", "0.5"), "high-ttt", "new-ttt"),
    ],
)
def test_an_expert_comes_and_goes_and_the_others_stay(
    how: tuple[str, ...], high: str, new: str, family: Family
) -> None:
    folder = family.merge(f"growing-{len(how)}-{high}-{new}", *how, high=high)
    before, clips = load_checkpoint(folder), [clip for _, clip in CLIPS]
    files = {path: path.read_bytes() for path in folder.rglob("*.safetensors") if path.name != "router.safetensors"}
    texts = said(WhisperMoE.from_pretrained(folder, dtype="float32"), clips)
    with (folder / "README.md").open("a") as card:
        card.write("by hand")
    given = [str(folder), f"new={family.folder / new}", "--base", str(family.folder / "base")]
    app(["add-expert", *given, "--probe", family.probes["new"]], standalone_mode=False)
    grown = WhisperMoE.from_pretrained(folder, dtype="float32")
    assert grown.config.moe is not None
    assert grown.config.moe.names == ("low", "high", "new")
    assert said(grown, clips) == texts
    heard = noise("new", 100)
    if "--quantize" not in how:  # else the base below it is rounded
        alone = WhisperMoE.from_pretrained(family.folder / new, dtype="float32")
        assert said(grown, [heard]) == said(alone, [heard])
    assert grown._decoder.choose([heard]).choices[0][0] == 2
    assert grown.generation["expert_languages"] == {"low": "en", "high": "en", "new": "en"}
    after = load_checkpoint(folder).state
    for key in ("weight", "fit.intercept"):
        old, now = before.state[f"encoder.router.{key}"], after[f"encoder.router.{key}"]
        assert torch.equal(old, now[[0, 1, 3]])
    if new == "new" or "model" in how:  # else the others' have a closed layer more
        assert all(path.read_bytes() == content for path, content in files.items())
    app(["remove-expert", str(folder), "new"], standalone_mode=False)
    after = (folder / "README.md").read_text().partition("by hand")[2].split("\n")
    probe = f"{Path(family.probes['new']).parent.name}/clips.tsv"
    remark = "; brings TTT in encoder layers 1" if new == "new-ttt" else ""
    assert after == ["", f"Added: new, {family.folder.name}/{new}; probe {probe}{remark}.", "", "Removed: new.", ""]
    assert all(path.read_bytes() == content for path, content in files.items())
    again = load_checkpoint(folder)
    assert again.config == before.config
    assert all(torch.equal(tensor, before.state[key]) for key, tensor in again.state.items())


def test_what_cannot_grow_says_why(
    delta: Path, family: Family, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    probe, odia = ["--probe", family.probes["new"], "--base", str(family.folder / "base")], tmp_path / "odia.tsv"
    folder = Path(family.probes["new"]).parent
    rows = [f"{folder}/{index}.wav\thello\tor" for index in range(2)]
    odia.write_text("\n".join(["path\ttext\tlanguage", *rows]) + "\n")
    for given, reason in (
        (["add-expert", str(delta), f"low={family.folder / 'new'}", *probe], "has an expert low already"),
        (["add-expert", str(family.folder / "base"), str(family.folder / "new"), *probe], "no merged model"),
        (
            ["add-expert", str(delta), str(family.folder / "new"), *probe[:2], "--base", str(family.folder / "low")],
            "its base is not low",
        ),
        (["add-expert", str(delta), str(family.folder / "new"), "--probe", str(odia), *probe[2:]], "no token of or"),
        (["remove-expert", str(delta), "nobody"], "its experts are low, high"),
    ):
        caplog.clear()
        assert app(given, standalone_mode=False) == 1
        assert reason in caplog.text


@pytest.mark.parametrize("granularity", ["delta", "model"])
def test_one_expert_is_in_memory_at_a_time(
    granularity: str, family: Family, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    read: list[Loaded] = []

    def load(source: str) -> Loaded:
        assert not any(each.state for each in read), "those before were given up"
        read.append(load_model(source))
        return read[-1]

    for module in (doctor, run):
        monkeypatch.setattr(module, "load_model", load)
    monkeypatch.setattr(run, "base_of", lambda *_: load_model(str(family.folder / "base")))
    probe = [family.probes["low"], family.probes["high"]]
    experts = [str(family.folder / name) for name in ("low", "high")]
    run.merge(experts, tmp_path / "merged", probe=probe, granularity=granularity)
    assert [each.name for each in read] == ["low", "high"] * (2 if granularity == "model" else 1)


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        ((512, 8, (6, 6), 51_865), "base"),
        ((512, 8, (6, 6), 51_864), "base.en"),
        ((1280, 20, (32, 32), 51_865), "large-v2"),
        ((1280, 20, (32, 32), 51_866, 128), "large-v3"),
        ((1280, 20, (32, 4), 51_866, 128), "large-v3-turbo"),
        ((1280, 20, (32, 2), 51_866, 128), None),
    ],
)
def test_the_base_is_openais_whisper_of_that_shape(shape: tuple[Any, ...], name: str | None) -> None:
    if name is not None:
        assert run.openai_like(published(*shape), "mine") == name
    else:
        with pytest.raises(ValueError, match="mine: no Whisper of OpenAI's has its shape"):
            run.openai_like(published(*shape), "mine")
