"""Blending prompts."""

import math

import pytest
import torch
from livediffusion.engine.blend import METHODS, blend


def vectors(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", METHODS)
def test_the_ends_are_the_prompts_themselves(method):
    a, b = vectors(1, 1, 5, 16), vectors(2, 1, 5, 16)
    assert torch.equal(blend(a, b, 0.0, method), a)
    assert torch.equal(blend(a, b, 1.0, method), b)
    for weight in (1e-4, 1 - 1e-4):
        near = a if weight < 0.5 else b
        assert (blend(a, b, weight, method) - near).abs().max() < 2e-3


@pytest.mark.parametrize("weight", [0.25, 0.5, 0.9])
def test_slerp_turns_evenly_and_blends_lengths(weight):
    a, b = vectors(1, 1, 5, 16), 3 * vectors(2, 1, 5, 16)
    out = blend(a, b, weight, "slerp")
    length = (1 - weight) * a.norm(dim=-1) + weight * b.norm(dim=-1)
    assert torch.allclose(out.norm(dim=-1), length, rtol=1e-4)
    whole, part = (torch.cosine_similarity(a, x, -1).acos() for x in (b, out))
    assert torch.allclose(part, weight * whole, rtol=1e-3)


def test_lerp_is_the_straight_line():
    a, b = vectors(1, 1, 5, 16), vectors(2, 1, 5, 16)
    assert torch.allclose(blend(a, b, 0.3, "lerp"), 0.7 * a + 0.3 * b)


@pytest.mark.parametrize("factor", [1.0, 2.0, -1.0, 0.0], ids=["same", "parallel", "opposite", "0"])
def test_slerp_without_a_direction_to_turn_is_the_straight_line(factor):
    a = vectors(1, 1, 5, 16)
    b = factor * a
    assert torch.allclose(blend(a, b, 0.3, "slerp"), torch.lerp(a, b, 0.3), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_type_and_stays_finite(dtype):
    a, b = vectors(1, 1, 5, 768).to(dtype) * 20, vectors(2, 1, 5, 768).to(dtype) * 20
    out = blend(a, b, 0.5, "slerp")
    assert out.dtype == dtype
    exact = blend(a.float(), b.float(), 0.5, "slerp")
    assert (out.float() - exact).norm() / exact.norm() < 0.02


# --- CONDITIONING --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def node(comfyui):
    from livediffusion.nodes.conditioning import LivePromptBlend

    return lambda *args: LivePromptBlend.execute(*args).args[0]


def prompt(seed, tokens=7, width=16, pooled=None, **settings):
    if pooled:
        settings["pooled_output"] = vectors(seed + 100, 1, pooled)
    return [[vectors(seed, 1, tokens, width), settings]]


@pytest.mark.comfy
def test_tokens_and_pooled_vector_are_blended_and_settings_kept(node):
    a, b = prompt(1, pooled=8, control="mine"), prompt(2, pooled=8, control="theirs", width_=3)
    before = a[0][0].clone()
    ((tokens, settings),) = node(a, b, 0.4, "slerp")
    assert torch.equal(tokens, blend(a[0][0], b[0][0], 0.4))
    pooled = blend(a[0][1]["pooled_output"], b[0][1]["pooled_output"], 0.4)
    assert torch.equal(settings["pooled_output"], pooled)
    assert settings["control"] == "mine" and "width_" not in settings
    assert torch.equal(a[0][0], before) and set(a[0][1]) == {"pooled_output", "control"}


@pytest.mark.comfy
@pytest.mark.parametrize("method", METHODS)
def test_weight_0_is_a_and_weight_1_is_b(node, method):
    a, b = prompt(1, pooled=8), prompt(2, tokens=14, pooled=8)
    for weight, side in ((0.0, a), (1.0, b)):
        ((tokens, settings),) = node(a, b, weight, method)
        assert torch.equal(tokens, side[0][0])
        assert torch.equal(settings["pooled_output"], side[0][1]["pooled_output"])


def attend(query, tokens):
    weights = (query @ tokens.mT / math.sqrt(tokens.shape[-1])).softmax(-1)
    return weights @ tokens


@pytest.mark.comfy
def test_a_longer_prompt_does_not_dilute_the_shorter(node):
    """At the ends of the dial, attention sees what it would see of the prompt alone."""
    a, b = prompt(1, tokens=7), prompt(2, tokens=14)
    query = vectors(3, 1, 4, 16)
    for weight, side in ((1e-6, a), (1 - 1e-6, b)):
        tokens = node(a, b, weight, "lerp")[0][0]
        assert torch.allclose(attend(query, tokens), attend(query, side[0][0]), atol=1e-4)


@pytest.mark.comfy
def test_odd_lengths_do_not_explode(node):
    assert node(prompt(1, tokens=231), prompt(2, tokens=256), 0.5, "slerp")[0][0].shape[1] == 256


@pytest.mark.comfy
def test_attention_masks_are_joined(node):
    mask_a, mask_b = torch.tensor([[1, 1, 0, 0]]), torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0]])
    a = prompt(1, tokens=4, attention_mask=mask_a)
    b = prompt(2, tokens=8, attention_mask=mask_b)
    settings = node(a, b, 0.5, "lerp")[0][1]
    assert settings["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1, 0, 0]]


@pytest.mark.comfy
@pytest.mark.parametrize(
    ("a", "b", "says"),
    [
        ([], prompt(2), "a: .*empty"),
        (prompt(1), [], "b: .*empty"),
        (prompt(1), prompt(2, width=24), "b: .*text encoder"),
    ],
    ids=["no a", "no b", "width"],
)
def test_prompts_that_do_not_fit_are_named(node, a, b, says):
    with pytest.raises(ValueError, match=says):
        node(a, b, 0.5, "slerp")
