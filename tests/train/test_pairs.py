"""Learning to translate: pairs of texts share packs with sound, one expert learns, a few tokens stand for all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from data.memory import tiny_reader
from generate.test_translate import PIECES, SENSES
from generate.tiny import CONFIG, tiny_tokenizer, tiny_whisper_moe
from train.tiny import recipe_tree, tones

pytest.importorskip("datasets")

from recipes.translation.begin import likely, main
from whisper_moe.data.examples import IGNORED, pack_examples
from whisper_moe.data.sample import DataError, Sample, TooLong
from whisper_moe.media.tokenizer import Pieces
from whisper_moe.train.losses import SpeechObjective, cross_entropy, sampled, sampled_cross_entropy
from whisper_moe.train.parallel import Parallel
from whisper_moe.train.reading import checked
from whisper_moe.train.recipe import LossRecipe, Recipe
from whisper_moe.train.run import run
from whisper_moe.weights.load import load_model

READS = CONFIG.model_copy(update={"senses": SENSES})
ROWS = [("A dog.", "काम है"), ("A cat, a hat", "मेरा है"), ("to see", "हम में"), ("one more", "में हम")]


def pair(source: str = "A dog.", text: str = "काम है", **more: Any) -> Sample:
    both = {"language": "en", "target_language": "hi"} | more
    return Sample(id="pair", task="translate-text", source_text=source, text=text, **both)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    tiny_whisper_moe(config=READS).save_pretrained(folder / "model")
    tones(folder / "tones")
    rows = [f"{a}\t{b}\ten\thi\ttranslate-text\n{b}\t{a}\thi\ten\ttranslate-text\n" for a, b in ROWS]
    (folder / "pairs.tsv").write_text("source_text\ttext\tlanguage\ttarget_language\ttask\n" + "".join(rows), "utf-8")
    return folder


def tree_of(material: Path, **optimisation: Any) -> dict[str, Any]:
    tree = recipe_tree(material / "model", material / "tones", **optimisation)
    tree["model"]["expert"] = "translate"
    tree["data"]["train"] = [{"kind": "table", "source": str(material / "pairs.tsv")}]
    return tree


def test_a_pair_is_a_source_for_the_encoder_and_a_text_for_the_decoder() -> None:
    pieces, reader = Pieces(tiny_tokenizer(), PIECES, READS.vocab_size), tiny_reader(READS)
    example = reader.read(pair("  A   dog. "), 5.0)
    assert example.mel.tolist() == pieces.source("A dog.", "en")
    assert list(example.tokens) == [*pieces.opening("hi"), *pieces.encode(" काम है")]
    assert list(example.labels) == [IGNORED] * 3 + [*pieces.encode(" काम है"), pieces.tokenizer.eot]
    assert reader.measure(pair(), float("nan")) == (0, example.size)


@pytest.mark.parametrize(
    ("sample", "error", "said"),
    [
        (pair(text=" "), DataError, "no text"),
        (pair(source=""), DataError, "no text"),
        (pair(text="a\0"), DataError, "U\\+0000"),
        (pair(text="कख" * 40), TooLong, "its text has 85 tokens; there are 64"),
        (pair(language="hi", target_language="hi"), ValueError, "translates en>hi, hi>en, not hi>hi"),
    ],
)
def test_what_is_no_pair_is_named(sample: Sample, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        tiny_reader(READS).tokens(sample)


def test_a_model_that_only_hears_takes_no_pairs() -> None:
    with pytest.raises(ValueError, match="needs an input that this model does not have"):
        tiny_reader(CONFIG).tokens(pair())


def test_a_run_for_the_expert_of_texts_changes_nothing_of_what_is_heard(material: Path, tmp_path: Path) -> None:
    before = load_model(str(material / "model"), aside=True).state
    assert run(checked(Recipe, tree_of(material, steps=4), "here"), tmp_path / "run") == 0
    after = load_model(str(tmp_path / "run/model"), aside=True).state
    changed = {key for key, tensor in after.items() if not torch.equal(tensor, before[key])}
    assert changed == {key for key in after if key.startswith("senses.")}
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text("utf-8").splitlines()]
    assert lines[0]["segments"] and not any(lines[0].get("load", {}).values())


def test_batches_with_and_without_sound_make_one_step(material: Path, tmp_path: Path) -> None:
    tree = tree_of(material, steps=4, accumulate=2)
    tree["model"] = {"source": str(material / "model"), "train": ["senses.*"]}
    tree["data"]["train"].append({"kind": "table", "source": str(material / "tones"), "languages": ["en"]})
    tree["data"]["loader"] |= {"batch_size": 1, "planning_buffer": 2}
    assert run(checked(Recipe, tree, "here"), tmp_path / "run") == 0


def test_low_rank_fine_tuning_is_for_what_is_heard(material: Path, tmp_path: Path) -> None:
    tree = recipe_tree(material / "model", material / "tones", steps=2)
    tree["model"]["lora"] = {"rank": 2}
    assert run(checked(Recipe, tree, "here"), tmp_path / "run") == 0
    before, after = (load_model(str(path), aside=True).state for path in (material / "model", tmp_path / "run/model"))
    assert all(torch.equal(after[key], before[key]) for key in before if key.startswith("senses."))


def test_words_of_translations_are_not_counted_in_training(material: Path, tmp_path: Path) -> None:
    tree = tree_of(material, steps=2)
    tree["data"]["evaluation"] = tree["data"]["train"]
    with pytest.raises(ValueError, match="texts and films are judged by"):
        run(checked(Recipe, tree, "here"), tmp_path / "run")


def test_pairs_and_sound_are_learned_from_in_one_pack(material: Path, tmp_path: Path) -> None:
    tree = tree_of(material, steps=3)
    tree["model"] = {"source": str(material / "model"), "train": ["senses.*"]}
    tree["data"]["train"].append({"kind": "table", "source": str(material / "tones"), "languages": ["en"]})
    assert run(checked(Recipe, tree, "here"), tmp_path / "run") == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text("utf-8").splitlines()]
    assert any(sum(line["load"].values()) > 0 for line in lines)
    before, after = (load_model(str(path), aside=True).state for path in (material / "model", tmp_path / "run/model"))
    changed = {key for key, tensor in after.items() if not torch.equal(tensor, before[key])}
    assert {"senses.tokens.weight", "encoder.stem.conv1.weight", "encoder.blocks.1.experts.up_weight"} <= changed


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_few_tokens_stand_for_all(smoothing: float) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(9, 400).double(), torch.tensor([3, 8, IGNORED, 399, 8, 0, 17, 5, IGNORED])
    whole = cross_entropy(logits, labels, smoothing=smoothing)

    def loss(many: int, seed: int) -> float:
        among, places, shift = sampled(labels, 400, many, seed)
        assert len(among) == len(set(among.tolist())) == min(400, 6 + many)
        return float(sampled_cross_entropy(logits[:, among], places, shift, smoothing=smoothing))

    assert loss(10_000, seed=1) == pytest.approx(float(whole))
    found = [loss(60, seed) for seed in range(300)]
    assert sum(found) / len(found) == pytest.approx(float(whole), rel=0.01)


@pytest.mark.parametrize("many", [0, 10_000])
def test_labels_count_by_what_the_input_is(many: int) -> None:
    model = tiny_whisper_moe(config=READS).model
    packs = pack_examples([tiny_reader(READS).read(pair(), 0.0), tiny_reader(READS).read(pair("to see", "में हम"), 0.0)])
    losses = [
        SpeechObjective(LossRecipe(sampled=many, weights=weights))(
            model, packs, SpeechObjective(LossRecipe()).totals(packs), Parallel()
        ).loss.item()
        for weights in ({}, {"text": 0.5}, {"film": 3.0})
    ]
    assert losses[1] == pytest.approx(losses[0] / 2, rel=1e-6) and losses[2] == pytest.approx(losses[0], rel=1e-6)


def test_the_loss_among_some_tokens_is_that_of_all_where_all_are_drawn() -> None:
    model = tiny_whisper_moe(config=READS).model.requires_grad_(True)
    packs = pack_examples([tiny_reader(READS).read(pair(), 0.0)])
    whole, some = (SpeechObjective(LossRecipe(sampled=many)) for many in (0, 10_000))
    totals = whole.totals(packs)
    losses = [each(model, packs, totals, Parallel()).loss.item() for each in (whole, some)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_pieces_stand_for_the_tokens_that_are_always_there_with_them() -> None:
    """1 is in every text, so it stands for none of them in particular."""
    first, texts = 10, {2: 10, 3: 11, 4: 12}
    pairs = [([1, a, b], [texts[a], texts[b]]) for a in texts for b in texts if a != b]
    stands = likely(pairs, first, 4).to_dense()
    assert stands.shape == (4, first) and not stands[3].any(), "of what is never seen nothing is known"
    assert stands[:3].argmax(1).tolist() == [2, 3, 4]
    assert (stands[:3].amax(1) > 5 * stands[:3, 1]).all()


def test_an_expert_begins_beside_what_hears_and_its_pieces_near_what_they_stand_for(
    material: Path, tmp_path: Path
) -> None:
    head = "source_text\ttext\tlanguage\ttarget_language\ttask\n"
    rows = [f"{a}\t{b}\ten\thi\ttranslate-text\n" for a, b in ROWS]
    (tmp_path / "train.tsv").write_text(head + "".join(rows), "utf-8")
    (tmp_path / "bible.tsv").write_text(head, "utf-8")
    (tmp_path / "pieces.txt").write_text(" काम\n है\n हम\n", "utf-8")
    main(str(material / "model"), tmp_path, tmp_path / "begun", 4)
    before, after = (load_model(str(path), aside=True) for path in (material / "model", tmp_path / "begun"))
    heard = [key for key in after.state if not key.startswith("senses.")]
    assert heard and all(torch.equal(after.state[key], before.state[key]) for key in heard)
    assert after.config.senses is not None and after.config.senses.tokens == ("<|text|>", " काम", " है", " हम")
    core, rows_VD = after.state["decoder.token_embedding.weight"], after.state["senses.tokens.weight"]
    assert torch.allclose(rows_VD[1:].norm(dim=1), core.norm(dim=1).median().expand(3), rtol=1e-4)
