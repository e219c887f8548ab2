"""Write ``expected/``: what the embedded default makes of each example, in float32. Run it when the default changes."""

from __future__ import annotations

from pathlib import Path

from whisper_moe import WhisperMoE

EXAMPLES = Path(__file__).parent
SUFFIXES = {".m4a", ".ogg", ".mp3", ".mov", ".wav", ".flac"}


def main() -> None:
    model = WhisperMoE.from_pretrained(EXAMPLES.parent / "checkpoints", dtype="float32")
    folder = EXAMPLES / "expected"
    folder.mkdir(exist_ok=True)
    for path in sorted(p for p in EXAMPLES.iterdir() if p.suffix in SUFFIXES):
        (folder / f"{path.name}.txt").write_text(model.transcribe(path).text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
