"""A router that is fitted, not trained: from moments alone, and old columns stay when a new one is solved."""

from __future__ import annotations

import torch
from torch import Tensor

from whisper_moe.config import MoEConfig
from whisper_moe.merge.router import RIDGE, SHRINKAGE, columns, distances, fit, moments_of, reach_of, whitening
from whisper_moe.model.router import NONE, Router

WIDTH = 16


def clips(kind: int, count: int, seed: int) -> Tensor:
    """[clips, copies, D] around a place of their own."""
    generator = torch.Generator().manual_seed(seed)
    places = 2 * torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return places[kind] + torch.randn(count, 2, WIDTH, generator=generator, dtype=torch.float64)


def router_of(tensors: dict[str, Tensor], experts: int) -> Router:
    router = Router(WIDTH, MoEConfig(n_experts=experts, top_k=1, fitted_router=True, granularity="delta"))
    router.load_state_dict({("" if name == "weight" else "fit.") + name: tensor for name, tensor in tensors.items()})
    return router


def test_columns_are_the_ridge_regression_onto_the_index_of_the_expert() -> None:
    parts = [clips(kind, 40, kind).flatten(0, 1) for kind in range(3)]
    x = torch.cat([torch.ones(240, 1, dtype=torch.float64), torch.cat(parts)], 1)
    y = torch.eye(3, dtype=torch.float64).repeat_interleave(80, 0)
    penalty = RIDGE * 240 * torch.eye(WIDTH + 1, dtype=torch.float64)
    penalty[0, 0] = 0
    expected = torch.linalg.solve(x.T @ x + penalty, x.T @ y).T
    moments = torch.stack([x[80 * c : 80 * c + 80].T @ x[80 * c : 80 * c + 80] for c in range(3)])
    torch.testing.assert_close(columns(moments), expected)
    torch.testing.assert_close(columns(moments, [2]), expected[2:])


def test_clips_find_their_expert_and_what_is_for_none_stays_with_the_base() -> None:
    router = router_of(fit([clips(kind, 30, kind) for kind in range(4)]), experts=3)
    for kind in range(4):
        chosen = router(clips(kind, 50, 100 + kind)[:, 0].float()).experts[:, 0]
        assert (chosen == (kind if kind < 3 else NONE)).float().mean() > 0.95


def test_what_is_beyond_the_reach_of_every_expert_is_for_none_though_nothing_was_said_of_it() -> None:
    for experts in (1, 3):
        tensors = fit([*(clips(kind, 30, kind) for kind in range(experts)), clips(0, 0, 0)])
        router = router_of(tensors, experts)
        found = [router(clips(kind, 50, 50 + kind)[:, 0].float()).experts[:, 0] == kind for kind in range(experts)]
        assert torch.cat(found).float().mean() > 0.9
        assert (router(clips(3, 50, 53)[:, 0].float()).experts == NONE).float().mean() > 0.9
        assert (router(clips(3, 50, 53)[:, 0].float(), allowed=range(experts)).experts != NONE).all()


def test_an_expert_of_wider_spread_reaches_as_far_as_its_own_clips_and_the_others_no_less() -> None:
    """Means of a few frames, of words alone, are scattered more than those of sentences."""
    centre = clips(2, 400, 7).mean((0, 1), keepdim=True)

    def wide(count: int, seed: int) -> Tensor:
        return centre + 4 * (clips(2, count, seed) - centre)

    tensors = fit([clips(0, 300, 0), clips(1, 300, 1), wide(8, 2), clips(3, 0, 3)])
    assert tensors["reach"][2] > 1.5 * tensors["reach"][0]
    assert tensors["reach"][0] == tensors["reach"][1]  # of all clips together
    router = router_of(tensors, experts=3)
    held_out = wide(60, 9)[:, 0].float()
    beyond = router.fit.unknown(held_out, 3)[:, 2]  # pyright: ignore[reportOptionalMemberAccess]
    assert beyond.float().mean() < 0.2
    further = (clips(3, 30, 30) - tensors["centre"]) / tensors["scale"]
    reach = reach_of(further, tensors["whitening"].double(), tensors["reach"][:-1])
    assert tensors["reach"][0] <= reach < 1.2 * tensors["reach"][0]  # not as far as the scattered one


def test_an_expert_that_is_less_probable_than_asked_for_leaves_the_clip_to_the_base() -> None:
    """Two that are both half sure would answer together, each in its own language."""
    tensors = fit([clips(kind, 30, kind) for kind in range(4)])
    bold, careful = router_of(tensors, experts=3), router_of(tensors, experts=3)
    careful.least = 0.6
    between = [0.5 * (clips(0, 50, 1) + clips(1, 50, 2)), clips(0, 50, 3)]
    for features in (part[:, 0].float() for part in between):
        found, kept = bold(features), careful(features)
        assert found.logits is not None and kept.logits is not None
        assert torch.equal(found.logits, kept.logits)  # what is said of each is not what may answer
        probable = bold.fit.logits(features, bold.weight).softmax(1)[:, :3] >= 0.6
        for row, (first, *_) in enumerate(kept.choices):
            assert first == (found.choices[row][0] if probable[row].any() else NONE)
        assert (careful(features, allowed=[0, 1]).experts[:, 0] != NONE).all()
    unsure, sure = (part[:, 0].float() for part in between)
    left = [(router(unsure).experts[:, 0] == NONE).sum() for router in (bold, careful)]
    assert left[1] > left[0]
    assert (careful(sure).experts[:, 0] == 0).float().mean() > 0.9


def test_distances_are_those_of_mahalanobis() -> None:
    part = clips(0, 40, 1).flatten(0, 1)
    covariance = part.T.cov(correction=0)
    shrunk = covariance + SHRINKAGE * covariance.diagonal().mean() * torch.eye(WIDTH, dtype=torch.float64)
    away = part - part.mean(0)
    expected = torch.einsum("nd,de,ne->n", away, torch.linalg.inv(shrunk), away).sqrt()
    moments = moments_of(part)
    torch.testing.assert_close(distances(part, moments, whitening(moments[None])), expected)


def test_what_is_forced_or_forbidden_is_obeyed() -> None:
    router = router_of(fit([clips(kind, 30, kind) for kind in range(4)]), experts=3)
    features = clips(1, 5, 3)[:, 0].float()
    assert router(features, allowed=[2]).experts.unique().tolist() == [2]
    assert 1 not in router(features, allowed=[0, 2, NONE]).experts
    assert router(features, allowed=[NONE]).experts.unique().tolist() == [NONE]
