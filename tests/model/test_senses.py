"""Senses beside hearing: what is heard stays as it was, and what is read does not depend on what shares its pack."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch

from whisper_moe.config import AdaptConfig, ModelConfig, MoEConfig, TTTConfig
from whisper_moe.config_aside import FilmConfig, SensesConfig
from whisper_moe.media.video import tubelets
from whisper_moe.model.model import WhisperMoEModel
from whisper_moe.model.router import NONE
from whisper_moe.model.senses import Senses, edges, matrices

SENSES = SensesConfig(
    tokens=("<|text|>", "<|sign|>", "क", "ख"),
    directions=(("en", "hi"),),
    rank=3,
    experts=("translate", "sign"),
    signs=("sgn",),
    film=FilmConfig(frames=2, patch=4, patches=6, tokens=30),
)
CONFIG = ModelConfig(
    vocab_size=100,
    n_mels=8,
    d_model=16,
    encoder_layers=3,
    encoder_heads=2,
    encoder_ffn_dim=24,
    decoder_layers=2,
    decoder_heads=2,
    decoder_ffn_dim=24,
    moe=MoEConfig(n_experts=3, expert_dim=8, router_layer=1),
    ttt=TTTConfig(encoder_layers=(1,), mini_batch=4),
    adapt=AdaptConfig(encoder_layers=(0, 2), adapter_dim=4),
    senses=SENSES,
)
FILMS = [
    torch.randint(256, shape, generator=torch.Generator().manual_seed(shape[0]), dtype=torch.uint8)
    for shape in ((3, 2, 3, 96), (2, 1, 6, 96))
]
"""Three tubelets after one another of two rows and three columns; two of one row and six columns."""
TEXTS = [torch.tensor([3, 4, 102, 7]), torch.tensor([103, 5])]
SAID = [torch.tensor([1, 103, 9]), torch.tensor([1, 2, 3, 4, 99]), torch.tensor([7, 8])]


def said(
    model: WhisperMoEModel, inputs: list[torch.Tensor], texts: list[torch.Tensor], **how: torch.Tensor
) -> torch.Tensor:
    return model(inputs, texts, **how).logits


def model_of(config: ModelConfig = CONFIG, seed: int = 1) -> WhisperMoEModel:
    torch.manual_seed(seed)
    model = WhisperMoEModel(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def model() -> WhisperMoEModel:
    return model_of()


def mel(frames: int = 22) -> torch.Tensor:
    return torch.randn(8, frames, generator=torch.Generator().manual_seed(frames), dtype=torch.float64)


@torch.no_grad()
def test_sound_and_texts_in_one_pack_are_what_each_is_alone(model: WhisperMoEModel) -> None:
    together = said(model, [TEXTS[0], mel(), TEXTS[1]], SAID)
    parts = together.split([len(text) for text in SAID])
    for part, segment, text in zip(parts, (TEXTS[0], mel(), TEXTS[1]), SAID, strict=True):
        alone = said(model, [segment], [text])  # of sound without the senses' tokens
        torch.testing.assert_close(part[:, : alone.shape[1]], alone, rtol=0, atol=1e-12)


@torch.no_grad()
def test_sound_a_text_and_two_films_in_one_pack_are_what_each_is_alone(model: WhisperMoEModel) -> None:
    segments = [FILMS[0], TEXTS[0], mel(), FILMS[1]]
    texts = [*SAID, SAID[0]]
    parts = said(model, segments, texts).split([len(text) for text in texts])
    for part, segment, text in zip(parts, segments, texts, strict=True):
        alone = said(model, [segment], [text])
        torch.testing.assert_close(part[:, : alone.shape[1]], alone, rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_films_positions_are_its_times_rows_and_columns(model: WhisperMoEModel) -> None:
    """Nothing else tells tubelets apart that are nothing: each table tells along its own axis alone."""
    stem = deepcopy(model.senses and model.senses.film)
    assert stem is not None
    film, tables = FILMS[0][:1, :1, :1].expand(3, 2, 3, -1), (stem.times, stem.rows, stem.columns)
    stem.patches.weight.zero_()  # the convolutions would know a picture's border
    kept = [table.clone() for table in tables]
    for axis in range(3):
        for place, (table, values) in enumerate(zip(tables, kept, strict=True)):
            table.copy_(values if place == axis else torch.zeros(()))
        rows = stem(film).view(3, 2, 3, -1)
        for other in range(3):
            assert torch.allclose(rows, rows.roll(1, other), atol=1e-9) == (other != axis)
    with pytest.raises(ValueError, match=r"a film of \[6, 2, 3\] tubelets; there are positions for 5"):
        stem(FILMS[0].repeat(2, 1, 1, 1))


@torch.no_grad()
def test_tubelets_are_whole_pictures_to_the_convolutions_and_tubelets_again_behind_them(model: WhisperMoEModel) -> None:
    stem = deepcopy(model.senses and model.senses.film)
    assert stem is not None
    frames = torch.randint(256, (6, 8, 12, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    seen, depth = list[torch.Tensor](), stem.patches.out_features // stem.film.frames
    places = torch.arange(6 * 2 * 3).view(6, 1, 2, 3).expand(-1, depth, -1, -1).double()

    class Early(torch.nn.Module):
        def forward(self, maps: torch.Tensor) -> torch.Tensor:
            seen.append(maps)
            return places

    stem.early, stem.norm = Early(), torch.nn.Identity()  # type: ignore[assignment]
    stem.patches = torch.nn.Linear(stem.film.frames * depth, stem.patches.out_features, bias=False).double()
    torch.nn.init.eye_(stem.patches.weight)
    for table in (stem.times, stem.rows, stem.columns, stem.whole.weight, stem.whole.bias):
        table.zero_()
    rows = stem(torch.from_numpy(tubelets(frames.numpy(), stem.film))).view(3, 2, 3, 2, depth)
    assert torch.equal(rows[..., 0].permute(0, 3, 1, 2).flatten(0, 1), places[:, 0])
    colours = 2 * (frames.permute(0, 3, 1, 2) / 255 - 0.5)  # a cell is a pixel here
    torch.testing.assert_close(seen[0][:, 8:11], colours.double(), rtol=0, atol=1e-6)
    moves = 20 * (seen[0][:, :11] - seen[0][:, :11].mean(0))
    torch.testing.assert_close(seen[0][:, 11:], moves, rtol=0, atol=1e-5)


@torch.no_grad()
def test_what_all_of_a_film_says_is_added_to_every_row(model: WhisperMoEModel) -> None:
    stem = deepcopy(model.senses and model.senses.film)
    assert stem is not None
    stem.norm = torch.nn.Identity()  # type: ignore[assignment]
    whole = stem(FILMS[0])
    weight = stem.whole.weight.clone()
    for table in (stem.whole.weight, stem.whole.bias):
        table.zero_()
    own = stem(FILMS[0])
    stem.whole.weight.copy_(weight)
    read = torch.nn.functional.gelu(stem.read(own))
    added = weight @ torch.cat([read.amax(0), read.mean(0)])
    torch.testing.assert_close(stem(FILMS[0]), own + added)
    assert (whole - own).norm() > 0


@torch.no_grad()
def test_little_that_moves_tells_more_than_much_that_stands_still(model: WhisperMoEModel) -> None:
    """One patch that changes by a fiftieth of the range, beside a ground that is another one altogether."""
    stem = model.senses and model.senses.film
    assert stem is not None
    plain = torch.full((2, 2, 2, 96), 120, dtype=torch.uint8)
    waved, other = plain.clone(), torch.full_like(plain, 125)
    waved[1, 0, 0, 48:] = 125
    apart = [(stem(film) - stem(plain)).norm() for film in (waved, other)]
    assert apart[0] > apart[1]


def test_edges_are_told_by_their_directions_whatever_the_light() -> None:
    picture = torch.zeros(1, 16, 16, 3)
    picture[:, :, 9:] = 0.6  # light to the right, within the third column of cells
    upright, lying = edges(picture)[0], edges(picture.transpose(1, 2))[0]
    assert upright.nonzero().unique(dim=0).tolist() == [[row, 2, 0] for row in range(4)]
    assert lying.nonzero().unique(dim=0).tolist() == [[2, column, 4] for column in range(4)]
    noisy = torch.rand(2, 16, 16, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(edges(noisy + 0.3), edges(noisy), rtol=0, atol=1e-5)
    torch.testing.assert_close(edges(0.5 * noisy), edges(noisy), rtol=0, atol=0.05)
    moved = torch.zeros_like(picture)
    moved[:, :, 11:] = 0.6
    assert torch.equal(edges(moved)[0], upright), "it stays within its cell"
    assert not edges(torch.full((1, 8, 8, 3), 0.3)).any()


def test_noise_hides_no_edge() -> None:
    picture = torch.zeros(1, 32, 32, 3)
    picture[:, :, 18:] = 0.4
    clean, noise = edges(picture), torch.randn(picture.shape, generator=torch.Generator().manual_seed(1))
    noisy = edges((picture + 0.086 * noise).clamp(0, 1))  # 22 of 256, as much as an evaluation adds
    assert torch.nn.functional.cosine_similarity(noisy.flatten(), clean.flatten(), dim=0) > 0.9
    finest = torch.arange(32).remainder(2).expand(1, 32, 32)[..., None].expand(1, 32, 32, 3).float()
    assert not edges(finest).any(), "what is finer than a cell's four pixels is no edge"


@torch.no_grad()
def test_what_is_heard_is_to_the_last_bit_what_it_is_without_other_senses(model: WhisperMoEModel) -> None:
    alone = WhisperMoEModel(CONFIG.model_copy(update={"senses": None})).double().eval()
    alone.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith("senses.")})
    heard = [mel(), mel(30)], [torch.tensor([1, 2, 3]), torch.tensor([7, 8])]
    assert torch.equal(said(model, *heard)[..., :100], said(alone, *heard))


@torch.no_grad()
def test_a_text_goes_through_the_core_and_its_own_expert_alone(model: WhisperMoEModel) -> None:
    before = said(model, [TEXTS[0]], SAID[:1])
    changed = model_of()
    for name, parameter in changed.named_parameters():
        if ".ttt" in name or ".adapter." in name or "delta_" in name or ("senses" not in name and ".experts." in name):
            parameter.zero_()
    torch.testing.assert_close(said(changed, [TEXTS[0]], SAID[:1]), before, rtol=0, atol=0)
    for name, parameter in changed.named_parameters():
        if name.startswith("senses.experts.") and name.endswith(".up"):
            parameter.zero_()
    assert not torch.allclose(said(changed, [TEXTS[0]], SAID[:1]), before)


@torch.no_grad()
def test_experts_of_sound_have_no_part_in_a_text(model: WhisperMoEModel) -> None:
    senses = model.senses
    assert senses is not None
    encoded = model.encoder([mel(26), senses.embedded(TEXTS[0], model)])
    assert encoded.routing is not None
    assert encoded.routing.experts[1].tolist() == [NONE, NONE]
    assert encoded.routing.experts[0].tolist() != [NONE, NONE]
    assert encoded.senses is not None
    assert encoded.senses.experts.tolist() == [[NONE], [0]]


@torch.no_grad()
def test_a_joint_models_router_chooses_for_all_senses() -> None:
    joint = model_of(CONFIG.model_copy(update={"senses": SENSES.model_copy(update={"routed": True})}))
    assert joint.senses is not None
    segments = [joint.senses.embedded(each, joint) for each in (TEXTS[0], mel(), FILMS[0])]
    together = joint.encoder(segments)
    assert together.routing is not None and len(together.choices[0]) == 3
    assert (together.routing.experts[0] != NONE).any(), "of a text; a film may take none"
    for place, (segment, states) in enumerate(
        zip(segments, together.states_TD.split(together.layout.lengths), strict=True)
    ):
        alone = joint.encoder([segment])
        assert alone.routing is not None and torch.equal(alone.routing.experts[0], together.routing.experts[place])
        torch.testing.assert_close(states, alone.states_TD, rtol=0, atol=1e-12)
    for name, parameter in joint.named_parameters():
        if name.startswith("encoder.") and ".experts." in name and name.endswith("up_weight"):
            parameter.zero_()
    assert not torch.allclose(joint.encoder(segments).states_TD[:4], together.states_TD[:4]), (
        "experts answer for a text"
    )


@torch.no_grad()
def test_token_by_token_is_all_at_once(model: WhisperMoEModel) -> None:
    senses, decoder = model.senses, model.decoder
    assert senses is not None
    whole = said(model, TEXTS, [SAID[1], SAID[1]])
    state = decoder.start(model.encoder([senses.embedded(text, model) for text in TEXTS]))
    for place, id in enumerate(SAID[1].tolist()):
        rows = senses.rows(torch.tensor([id, id]), decoder)[:, None]
        last = decoder.extend(rows, state)[:, -1]
        logits = senses.logits(decoder.head(last), last)
        torch.testing.assert_close(logits, whole.unflatten(0, (2, -1))[:, place], rtol=0, atol=1e-12)


def test_logits_of_some_tokens_are_those_of_all(model: WhisperMoEModel) -> None:
    among = torch.tensor([103, 0, 57])
    inputs = [mel(), TEXTS[0]]
    found = said(model, inputs, SAID[:2], among=among)
    torch.testing.assert_close(found, said(model, inputs, SAID[:2])[:, among], rtol=0, atol=1e-12)


def test_every_part_of_the_sense_learns(model: WhisperMoEModel) -> None:
    said(model, [TEXTS[0], FILMS[0]], SAID[:2]).square().sum().backward()
    idle = [name for name, p in model.named_parameters() if name.startswith("senses.") and not p.grad.any()]  # type: ignore[union-attr]
    assert idle == []
    model.zero_grad()


def test_activation_checkpointing_changes_nothing(model: WhisperMoEModel) -> None:
    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        said(model, [mel(), TEXTS[0]], SAID[:2]).square().sum().backward()
        return [
            p.grad.clone() for name, p in model.named_parameters() if name.startswith("senses.") and p.grad is not None
        ]

    before = gradients()
    try:
        for block in (*model.encoder.blocks, *model.decoder.blocks):
            block.recompute = True
        after = gradients()
    finally:
        for block in (*model.encoder.blocks, *model.decoder.blocks):
            block.recompute = False
        model.zero_grad()
    assert len(before) == len(after) > 10
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "parts",
    [
        {"moe": MoEConfig(granularity="delta", router_layer=1)},
        {"moe": MoEConfig(shared=False, none_choice=False)},
        {"moe": MoEConfig(scope="token")},
        {"ttt": TTTConfig(decoder_layers=(0,))},
        {"adapt": AdaptConfig(decoder_layers=(0,))},
    ],
)
def test_a_core_that_is_not_there_as_it_was_is_refused(parts: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="senses need"):
        ModelConfig.model_validate(CONFIG.model_dump() | parts)


def test_a_pack_without_sound_has_no_choice_of_a_router(model: WhisperMoEModel) -> None:
    found = [model(inputs, SAID[2:]).routings for inputs in ([TEXTS[0]], [mel()])]
    assert [[len(each) for each in routings] for routings in found] == [[0], [1]]


def test_every_matrix_of_the_blocks_has_a_difference(model: WhisperMoEModel) -> None:
    blocks = {
        (name, layer.in_features, layer.out_features)
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear)
        and ".blocks." in name
        and "ttt" not in name
        and "adapter" not in name
        and not name.startswith("senses")
    }
    assert blocks == set(matrices(CONFIG))
    fresh = Senses(SENSES, CONFIG)
    assert all(not part.up.any() for part in fresh.experts.values())  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
