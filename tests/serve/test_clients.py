"""OpenAI's own client, unmodified, and the commands of the documentation, against the model that comes along."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from openai import BadRequestError, NotFoundError, OpenAI
from serve.serving import KEY, serving

from whisper_moe import WhisperMoE
from whisper_moe.generate.options import SubtitleOptions
from whisper_moe.generate.result import Transcription, as_text
from whisper_moe.media.audio import load_audio
from whisper_moe.serve.app import Server

ROOT = Path(__file__).parent.parent.parent
CLIP = ROOT / "examples/sample.m4a"


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[httpx.Client, Server]]:
    if not (ROOT / "checkpoints").is_dir():
        pytest.skip("the default model is not in this checkout")
    with serving(ROOT / "checkpoints") as running:
        yield running


@pytest.fixture(scope="module")
def api(served: tuple[httpx.Client, Server]) -> OpenAI:
    return OpenAI(base_url=f"{served[0].base_url}/v1", api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def own(default_model: WhisperMoE) -> Transcription:
    return default_model.transcribe(CLIP, word_timestamps=True)


def heard(api: OpenAI, **how: Any) -> Any:
    with CLIP.open("rb") as file:
        return api.audio.transcriptions.create(model="whisper-1", file=file, **how)


def test_all_formats_are_those_of_the_command_line(api: OpenAI, own: Transcription) -> None:
    assert heard(api).text == heard(api, response_format="json").text == own.text
    assert heard(api, response_format="text").strip() == own.text
    plain = Transcription(
        **{name: getattr(own, name) for name in ("text", "language", "duration")}, segments=own.segments
    )
    for kind in ("srt", "vtt"):
        said = heard(api, response_format=kind)
        assert re.sub(r"\d\d:\d\d[:.,\d]*", "T", said) != said and own.segments[0].text.strip() in said
        assert len(said.split("-->")) <= len(as_text(plain, kind, SubtitleOptions()).split("-->"))


def test_verbose_json_has_words_segments_and_who_answered(api: OpenAI, own: Transcription) -> None:
    found = heard(api, response_format="verbose_json", timestamp_granularities=["word", "segment"])
    assert (found.text, found.language, found.duration) == (own.text, "english", own.duration)
    words = [word for segment in own.segments for word in segment.words or ()]
    assert [word.word for word in found.words] == [word.word.strip() for word in words]
    assert [word.start for word in found.words] == pytest.approx([word.start for word in words], abs=0.05)
    assert [segment.text for segment in found.segments] == [segment.text for segment in own.segments]
    assert found.segments[0].experts == dict(own.segments[0].experts)
    assert found.usage.seconds == own.duration


def test_a_stream_ends_with_the_whole_text(api: OpenAI, own: Transcription) -> None:
    events = list(heard(api, stream=True))
    assert [each.type for each in events[:-1]] == ["transcript.text.delta"] * (len(events) - 1)
    assert "".join(each.delta for each in events[:-1]) == events[-1].text == own.text


def test_a_translation_is_in_english(api: OpenAI, default_model: WhisperMoE) -> None:
    with CLIP.open("rb") as file:
        found = api.audio.translations.create(model="whisper-1", file=file, response_format="verbose_json")
    assert (found.text, found.language) == (default_model.transcribe(CLIP, task="translate").text, "english")


def test_naming_an_expert_forces_it(api: OpenAI) -> None:
    names = [each.id for each in api.models.list()]
    assert names[0] == "whisper-moe" and len(names) == 10
    with CLIP.open("rb") as file:
        found = api.audio.transcriptions.create(model=names[2], file=file, response_format="verbose_json")
    assert {name for segment in found.segments or [] for name in segment.experts} == {names[2]}  # pyright: ignore[reportAttributeAccessIssue]
    assert api.models.retrieve(names[2]).id == names[2]
    with pytest.raises(NotFoundError):
        api.models.retrieve("gpt-7")


@pytest.mark.parametrize("kind", ["mp3", "opus", "aac", "flac", "wav", "pcm"])
def test_speech_in_every_format(api: OpenAI, default_model: WhisperMoE, kind: Any) -> None:
    said = api.audio.speech.create(model="tts-1", voice="alloy", input="Good morning.", response_format=kind).content
    wanted = default_model.speak("Good morning.").samples
    found = np.frombuffer(said, "<i2") / 32_768 if kind == "pcm" else load_audio(io.BytesIO(said))
    assert len(found) == pytest.approx(len(wanted), rel=0.15)
    if kind in ("pcm", "wav", "flac"):
        assert np.abs(found[: len(wanted)] - wanted[: len(found)]).max() < 1e-3
    with pytest.raises(BadRequestError, match="voice"):
        api.audio.speech.create(model="tts-1", voice="nobody", input="Good morning.")


def test_a_film_of_a_sign_and_a_text_that_it_has_no_part_for(served: tuple[httpx.Client, Server]) -> None:
    client, _ = served
    with (ROOT / "examples/signs/hand.mov").open("rb") as file:
        assert client.post("/v1/video/sign", files={"file": file}).json()["text"] == "3"
    with CLIP.open("rb") as file:
        refused = client.post("/v1/video/sign", files={"file": file})
    assert refused.status_code == 400 and "film" in refused.json()["error"]["message"]
    texts = client.post("/v1/text/translations", json={"input": "Good morning", "target": "hi"})
    assert texts.status_code in (200, 400)


def test_what_it_has_done_can_be_counted(served: tuple[httpx.Client, Server]) -> None:
    client, _ = served
    text = client.get("/metrics").text
    assert 'whisper_moe_requests_total{route="/v1/models",status="200"}' in text and "whisper_moe_audio_seconds" in text


def commands() -> list[str]:
    """Those of the documentation, each with its continuation lines."""
    text = (ROOT / "docs/serving.md").read_text("utf-8")
    return [command.replace("\\\n", " ") for command in re.findall(r"^curl .*(?:\\\n.*)*(?<!\\)$", text, re.M)]


@pytest.mark.parametrize("command", commands(), ids=lambda command: re.findall(r"8000/(\S+)", command)[0])
def test_the_commands_of_the_documentation(served: tuple[httpx.Client, Server], command: str, tmp_path: Path) -> None:
    client, _ = served
    here = (
        command.replace("http://localhost:8000", str(client.base_url))
        .replace("$KEY", KEY)
        .replace("out/", f"{tmp_path}/")
    )
    done = subprocess.run(["bash", "-c", here + " --fail-with-body -sS"], cwd=ROOT, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr + done.stdout
    said = done.stdout.decode()
    if "speech" in command:
        assert next(tmp_path.iterdir()).stat().st_size > 1_000
    elif "response_format" not in command and "stream" not in command and "/metrics" not in command:
        assert json.loads(said)
    else:
        assert said


def test_captions_while_somebody_speaks(api: OpenAI, own: Transcription) -> None:
    """The clip in tenths of a second, as fast as they go."""
    samples = (load_audio(CLIP).clip(-1, 1) * 32_767).astype("<i2")
    kinds: list[str] = []
    said, whole = "", ""
    with api.realtime.connect(model="whisper-1") as session:
        assert session.recv().type == "session.created"
        audio = {"input": {"format": {"type": "audio/pcm", "rate": 16_000}, "transcription": {"language": "en"}}}
        session.send({"type": "session.update", "session": {"type": "transcription", "audio": audio}})  # pyright: ignore[reportArgumentType]
        for begin in range(0, len(samples), 1_600):
            block = base64.b64encode(samples[begin : begin + 1_600].tobytes()).decode()
            session.send({"type": "input_audio_buffer.append", "audio": block})
        session.send({"type": "input_audio_buffer.commit"})
        session.send({"type": "nonsense"})  # pyright: ignore[reportArgumentType]
        while "error" not in kinds or not whole:
            event = session.recv()
            kinds.append(event.type)
            if event.type.endswith(".delta"):
                said += event.delta  # pyright: ignore[reportAttributeAccessIssue]
            if event.type.endswith(".completed"):
                whole = event.transcript  # pyright: ignore[reportAttributeAccessIssue]
    words = [re.findall(r"\w+", text.lower()) for text in (whole, own.text)]
    assert said.strip() == whole and words[0] and set(words[0]) & set(words[1])
    assert "session.updated" in kinds
    with pytest.raises(Exception, match=r"40[13]"):
        OpenAI(base_url=api.base_url, api_key="wrong").realtime.connect(model="whisper-1").enter()
