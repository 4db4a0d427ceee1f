"""A ControlNeXt as a CONTROL_NET in other packs: each test does to it what the named file and lines do to a ControlNet.

The packs, at the commits that were read: Ultimate SD Upscale (ssitu/ComfyUI_UltimateSDUpscale 34a3c2c), Tiled Diffusion
(shiimizu/ComfyUI-TiledDiffusion a155b1b), Impact Pack (ltdrdata/ComfyUI-Impact-Pack 727295b), Advanced-ControlNet
(Kosinkadink/ComfyUI-Advanced-ControlNet 9e60d8a), Efficiency Nodes (jags111/efficiency-nodes-comfyui 4579b7d).
"""

import comfy.controlnet
import comfy.sample
import pytest
import torch
import torch.nn.functional as F
from comfy.utils import common_upscale
from models import small_sd3
from sampling import conds, latent, picture, relative, sample
from tokens import new_controlnext

from controlnext_core.sizes import crop

TILE = 8  # latent pixels on a side, of a picture with 2 x 2 of them
BOUND = 1e-4  # of the picture's standard deviation: how many rows go through the UNet at once changes the rounding
TILES = [(TILE, TILE, top, left) for top in (0, TILE) for left in (0, TILE)]  # as crop takes them


@pytest.fixture
def image_parts(controlnexts, monkeypatch):
    """What the module of sd15 was given since the test began, its caches empty."""
    loaded, images = controlnexts["sd15"].loaded, []
    image_part = loaded.patcher.model.image_part
    monkeypatch.setattr(loaded.patcher.model, "image_part",
                        lambda image, *args: images.append(image) or image_part(image, *args))
    loaded.features.clear()
    loaded.image_parts.clear()
    return images


@pytest.fixture
def draw_tile(hang, unets, controlnexts):
    """draw_tile(noise, hints, ...): a tile alone, under its own part of each hint, as the others have to draw it."""
    def draw(noise, hints, **settings):
        hung = conds(unets["sd15"], "sd15")
        for hint in hints:
            hung = hang(controlnexts["sd15"], hint, *hung, **settings)
        return draw_noise(unets["sd15"], *hung, noise)
    return draw


def draw_noise(model, positive, negative, noise, cfg=3.0):
    with torch.inference_mode():
        return comfy.sample.sample(model, noise, 2, cfg, "euler", "normal", positive, negative, torch.zeros_like(noise),
                                   seed=0, disable_pbar=True)


def noise_of(batch=1, channels=4):
    return torch.randn(batch, channels, 2 * TILE, 2 * TILE, generator=torch.Generator().manual_seed(8))


def hint_of(seed):
    """A control image of 8 bits, which Lanczos keeps where nothing is to be resized."""
    return (255 * picture(seed, height=16 * TILE, width=16 * TILE)).round() / 255


def part(image, tile):
    """The part of an IMAGE over a tile."""
    return crop(image.movedim(-1, 1), tile, 8).movedim(1, -1)


def chain(control):
    while control is not None:
        yield control
        control = control.previous_controlnet


def cut(conditioning, tiles):
    """A CONDITIONING whose controls are copies, each with the tiles' parts of its hint, one a batch entry."""
    result = []
    for context, extra in conditioning:
        link = extra["control"]
        head = copied = link.copy()
        while link is not None:
            parts = [F.interpolate(crop(copied.cond_hint_original, tile, 8), size=(8 * TILE, 8 * TILE),
                                   mode="nearest-exact") for tile in tiles]
            copied.cond_hint_original = torch.cat(parts)
            link = link.previous_controlnet
            copied.set_previous_controlnet(None if link is None else link.copy())
            copied = copied.previous_controlnet
        result.append([context, {**extra, "control": head}])
    return result


def test_ultimate_sd_upscale_gives_each_tile_its_part_of_every_hint_in_the_chain(hang, unets, controlnexts, draw_tile):
    """usdu_utils.py:315-334: copies a chain link by link and replaces each copy's hint by the tile's part."""
    model, hints = unets["sd15"], [hint_of(1), hint_of(2)]
    hung = conds(model, "sd15")
    for hint in hints:
        hung = hang(controlnexts["sd15"], hint, *hung)
    tile = TILES[1]
    noise = crop(noise_of(), tile, 1)
    drawn = draw_noise(model, *(cut(one, [tile]) for one in hung), noise)
    assert relative(drawn, draw_tile(noise, [part(hint, tile) for hint in hints])) <= BOUND
    assert relative(drawn, draw_tile(noise, [part(hint, TILES[0]) for hint in hints])) > 1e-3
    kept = [link.cond_hint_original.movedim(1, -1) for link in chain(hung[0][0][1]["control"])]
    assert all(torch.equal(*pair) for pair in zip(kept, reversed(hints), strict=True))


def test_ultimate_sd_upscale_gives_each_tile_of_a_transformers_picture_its_part(pack, hang):
    model, controlnext, hint, tile = small_sd3(), new_controlnext(pack, "sd3"), hint_of(1), TILES[1]
    noise = crop(noise_of(channels=16), tile, 1)
    whole = hang(controlnext, hint, *conds(model))
    drawn = draw_noise(model, *(cut(one, [tile]) for one in whole), noise)
    alone, another = (draw_noise(model, *hang(controlnext, part(hint, one), *conds(model)), noise)
                      for one in (tile, TILES[0]))
    assert relative(drawn, alone) <= BOUND
    assert relative(drawn, another) > 1e-3


def test_ultimate_sd_upscale_gives_each_tile_of_a_batch_its_own_part(hang, unets, controlnexts, draw_tile):
    """usdu_patch.py:281-293: samples several tiles as one batch, whose hint is the tiles' parts."""
    model, hint = unets["sd15"], hint_of(1)
    hung = hang(controlnexts["sd15"], hint, *conds(model, "sd15"))
    noises = [crop(noise_of(), tile, 1) for tile in TILES[:2]]
    drawn = draw_noise(model, *(cut(one, TILES[:2]) for one in hung), torch.cat(noises))
    for one, tile, noise in zip(drawn, TILES, noises, strict=False):
        assert relative(one[None], draw_tile(noise, [part(hint, tile)])) <= BOUND


def test_each_tile_of_ultimate_sd_upscale_has_its_image_part_computed_once(hang, unets, controlnexts, image_parts):
    """usdu_patch.py:286-287: the positive's and the negative's controls are copied apart, for each tile anew."""
    model = unets["sd15"]
    hung = hang(controlnexts["sd15"], hint_of(3), *conds(model, "sd15"))
    for _ in range(2):
        for tile in TILES[:3]:
            draw_noise(model, *(cut(one, [tile]) for one in hung), crop(noise_of(), tile, 1))
        assert len(image_parts) == 3


class Tiles:
    """Tiled Diffusion's model_function_wrapper, in short: ``together`` tiles in one forward of the UNet.

    Each tile brings all guidance halves; every forward gets the same transformer_options.
    """

    def __init__(self, together):
        self.together = together

    def __call__(self, apply_model, call):
        x, times, given = call["input"], call["timestep"], call["c"]
        out = torch.empty_like(x)
        for first in range(0, len(TILES), self.together):
            tiles = TILES[first:first + self.together]
            rows = torch.cat([crop(x, tile, 1) for tile in tiles])
            times_of_rows = times.repeat(len(tiles))
            c = {key: value.repeat(len(tiles), *[1] * (value.ndim - 1)) if torch.is_tensor(value) else value
                 for key, value in given.items()}
            for link in chain(given["control"]):
                whole = common_upscale(link.cond_hint_original, 16 * TILE, 16 * TILE, link.upscale_algorithm, "center")
                del link.cond_hint
                link.cond_hint = torch.cat([crop(whole, tile, 8).expand(len(x), -1, -1, -1) for tile in tiles])
            c["control"] = given["control"].get_control_orig(rows, times_of_rows, c, len(call["cond_or_uncond"]),
                                                             given["transformer_options"])
            drawn = apply_model(rows, times_of_rows, **c).chunk(len(tiles))
            for (height, width, top, left), tile in zip(tiles, drawn, strict=True):
                out[:, :, top:top + height, left:left + width] = tile
        return out


def draw_tiled(model, positive, negative, noise, together):
    model = model.clone()
    model.set_model_unet_function_wrapper(Tiles(together))
    control = positive[0][1]["control"]
    control.get_control_orig = control.get_control
    control.get_control = lambda *args, **kwargs: control
    control.cleanup()  # before pre_run, utils.py:98-101
    return draw_noise(model, positive, negative, noise)


@pytest.mark.parametrize("apply_to, together", [("both", 1), ("positive", 4)])
def test_tiled_diffusion_gives_each_tile_its_part_of_every_hint_in_the_chain(hang, unets, controlnexts, draw_tile,
                                                                             apply_to, together):
    """tiled_diffusion.py:352-446 and 525: puts the tiles' parts into each link's cond_hint, then asks the first link.

    utils.py:53-66: until then get_control only returns the control itself.
    """
    model, hints = unets["sd15"], [hint_of(1), hint_of(2)]
    hung = conds(model, "sd15")
    for hint in hints:
        hung = hang(controlnexts["sd15"], hint, *hung, apply_to=apply_to)
    noise = noise_of(2)
    drawn = draw_tiled(model, *hung, noise, together)
    for tile in TILES[:2]:
        alone = draw_tile(crop(noise, tile, 1), [part(hint, tile) for hint in hints], apply_to=apply_to)
        assert relative(crop(drawn, tile, 1), alone) <= BOUND


def test_after_tiled_diffusion_the_whole_hint_acts_again_and_so_it_does_in_copies(hang, unets, controlnexts):
    """utils.py:64-65 puts get_control back for a sampling without tiles; a copy has never lost it."""
    model, hint, noise = unets["sd15"], hint_of(1), noise_of()
    fresh, hung = (hang(controlnexts["sd15"], hint, *conds(model, "sd15")) for _ in range(2))
    expected = draw_noise(model, *fresh, noise)
    draw_tiled(model, *hung, noise, 4)
    control = hung[0][0][1]["control"]
    copy = control.copy()
    copies = [[[context, {**extra, "control": copy}] for context, extra in one] for one in hung]
    assert torch.equal(draw_noise(model, *copies, noise), expected)
    control.get_control = control.get_control_orig
    assert torch.equal(draw_noise(model, *hung, noise), expected)


def test_the_impact_packs_detailer_controls_an_enlarged_segment_by_its_part(run, apply, unets, controlnexts):
    """modules/impact/core.py:1787-1789 and 1820: cuts the image to the segment, applies it to the positive alone."""
    model, image = unets["sd15"], hint_of(4)
    positive, negative = conds(model, "sd15")
    segment = image[:, 40:88, 16:64]  # 48 x 48 pixels, sampled at 64 x 64
    net = run("ControlNeXtToControlNet", controlnext=controlnexts["sd15"])
    hung = run("ControlNetApply", conditioning=positive, control_net=net, image=segment, strength=0.8)
    drawn = sample(model, hung, negative, latent("sd15"), cfg=3.0, steps=2)
    by_model = apply(model, controlnexts["sd15"], segment, 0.8)
    assert relative(drawn, sample(by_model, positive, negative, latent("sd15"), cfg=3.0, steps=2)) <= 1e-6
    assert relative(drawn, sample(model, positive, negative, latent("sd15"), cfg=3.0, steps=2)) > 1e-3


def test_advanced_controlnet_leaves_it_as_it_is_and_applies_it_as_apply_controlnet_does(run, hang, unets, controlnexts):
    """adv_control/control.py:585-603 and 717: converts these types, and asks of the others whether they have sub_idxs.

    adv_control/nodes_main.py:137: the VAE comes by position.
    """
    model = unets["sd15"]
    net = run("ControlNeXtToControlNet", controlnext=controlnexts["sd15"])
    assert type(net) not in (comfy.controlnet.ControlNet, comfy.controlnet.ControlNetSD35, comfy.controlnet.ControlLora)
    assert not isinstance(net, comfy.controlnet.T2IAdapter) and not hasattr(net, "sub_idxs")
    control = net.copy().set_cond_hint(picture().movedim(-1, 1), 0.5, (0.0, 0.6), None)
    control.set_previous_controlnet(None)
    plain = conds(model, "sd15")
    hung = [[[context, {**extra, "control": control, "control_apply_to_uncond": False}] for context, extra in one]
            for one in plain]
    expected = hang(controlnexts["sd15"], picture(), *plain, strength=0.5, end_percent=0.6)
    drawn, expected, uncontrolled = (sample(model, *one, latent("sd15"), cfg=3.0, steps=3)
                                     for one in (hung, expected, plain))
    assert torch.equal(drawn, expected)
    assert relative(drawn, uncontrolled) > 1e-3


def test_the_tiled_ksampler_of_efficiency_nodes_cuts_it_as_a_controlnet(hang, unets, controlnexts, draw_tile):
    """py/bnk_tiled_samplers.py:89-92 and 152: before a tile is sampled, sets cond_hint of each ControlNet in the chain.

    BlenderNeko's ComfyUI_TiledKSampler, which the Impact Pack uses, is the same code.
    """
    model, hint = unets["sd15"], hint_of(1)
    hung = hang(controlnexts["sd15"], hint, *conds(model, "sd15"))
    control = hung[0][0][1]["control"]
    assert isinstance(control, comfy.controlnet.ControlNet)
    for tile in TILES[1:3]:
        noise = crop(noise_of(), tile, 1)
        control.cond_hint = crop(control.cond_hint_original, tile, 8).to(control.control_model.dtype)
        assert relative(draw_noise(model, *hung, noise), draw_tile(noise, [part(hint, tile)])) <= BOUND
