"""Images and masks as other nodes give them, and what both routes take, in ComfyUI's own sampler."""

import pytest
import torch
from models import small_unet
from sampling import cond, conds, latent, picture, relative, sample


@pytest.fixture(scope="module")
def unet():
    return small_unet("sd15")


def odd_image(kind: str) -> torch.Tensor:
    image = picture(1)
    return {"no pictures": image[:0], "no height": image[:, :0], "no channels": image[..., :0],
            "one picture without its batch": image[0], "a video in five dimensions": image[None],
            "channels first": image.movedim(-1, 1), "bytes": (255 * image).byte(), "truth values": image > 0.5,
            "one number": torch.tensor(0.5)}[kind]


KINDS = ["no pictures", "no height", "no channels", "one picture without its batch", "a video in five dimensions",
         "channels first", "bytes", "truth values", "one number"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_image_is_one_sentence_where_it_enters(run, apply, hang, controlnexts, unet, kind):
    image, controlnext = odd_image(kind), controlnexts["sd15"]
    attempts = [lambda: apply(unet, controlnext, image),
                lambda: run("ControlNeXtCanny", image=image, threshold="auto", low_threshold=1, high_threshold=2)]
    if image.ndim == 4:  # ComfyUI's own Apply ControlNet moves the channels of anything else
        attempts.append(lambda: sample(unet, *hang(controlnext, image, *conds(unet)), latent("sd15"), steps=1))
    for attempt in attempts:
        with pytest.raises(ValueError, match="^image: ") as caught:
            attempt()
        assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


@pytest.mark.parametrize("made", [lambda image: image.half(), lambda image: image.double(),
                                  lambda image: image.movedim(1, 2).contiguous().movedim(1, 2),
                                  lambda image: torch.cat([image, image[..., :1]], -1)],
                         ids=["float16", "float64", "not contiguous", "alpha"])
def test_an_image_in_another_form_draws_the_same(control, controlnexts, unet, made):
    image = picture(2).half().float()
    drawn = [sample(*control(unet, controlnexts["sd15"], one), latent("sd15"), steps=1) for one in (image, made(image))]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("value", [1.02, -0.01])
def test_values_a_little_outside_0_to_1_draw_a_finite_picture(control, controlnexts, unet, value):
    image = torch.full((1, 40, 72, 3), value)
    assert torch.isfinite(sample(*control(unet, controlnexts["sd15"], image), latent("sd15"), steps=1)).all()


HALF = torch.cat([torch.zeros(1, 64, 32), torch.ones(1, 64, 32)], -1)


@pytest.mark.parametrize("mask", [HALF[0], HALF[:, None], HALF.half(), HALF > 0.5, HALF.double()],
                         ids=["no batch", "one channel", "float16", "truth values", "float64"])
def test_a_mask_in_another_form_draws_the_same(control, controlnexts, unet, mask):
    drawn = [sample(*control(unet, controlnexts["sd15"], picture(), mask=one), latent("sd15"), steps=1)
             for one in (HALF, mask)]
    assert torch.equal(*drawn)
    assert relative(drawn[0], sample(*control(unet, controlnexts["sd15"], picture()), latent("sd15"), steps=1)) > 1e-3


@pytest.mark.parametrize("mask", [HALF * float("nan"), HALF[:0], HALF[..., None], HALF[0, 0], 255 * HALF.byte(),
                                  torch.ones(1, 3, 64, 64), HALF[:, :0]],
                         ids=["nan", "no masks", "an image", "a row", "bytes", "three channels", "no height"])
def test_what_is_no_mask_is_one_sentence_that_names_it(run, apply, controlnexts, unet, mask):
    for attempt in (lambda: apply(unet, controlnexts["sd15"], picture(), mask=mask),
                    lambda: run("ControlNeXtToControlNet", controlnext=controlnexts["sd15"], mask=mask)):
        with pytest.raises(ValueError, match="^mask: ") as caught:
            attempt()
        assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


SETTINGS = {
    "mask": lambda run: dict(mask=HALF),
    "a strength for each picture": lambda run: dict(mask=torch.tensor([0.0, 0.3, 1.0]).reshape(3, 1, 1)),
    "keyframes": lambda run: dict(strength_keyframes=run(
        "CreateHookKeyframe", strength_mult=0.0, start_percent=0.5,
        prev_hook_kf=run("CreateHookKeyframe", strength_mult=0.7, start_percent=0.0))),
    "curve": lambda run: dict(strength_curve=run("CurveEditor", curve={
        "points": [(0.0, 1.0), (1.0, 0.2)], "interpolation": "linear"})),
    "window_reference": lambda run: dict(window_reference="on"),
    "stretch": lambda run: dict(resize="stretch", image=picture(3, 1, 40, 72)),
    "crop": lambda run: dict(resize="crop", image=picture(3, 1, 40, 72)),
    "pad": lambda run: dict(resize="pad", image=picture(3, 1, 40, 72)),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_both_routes_draw_the_same_with_every_setting(run, apply, hang, controlnexts, unet, name):
    settings = {"image": picture(3, 3), **SETTINGS[name](run)}
    batch = latent("sd15", 3)
    by_model = sample(apply(unet, controlnexts["sd15"], **settings), *conds(unet), batch, cfg=2.0, steps=3)
    hung = hang(controlnexts["sd15"], positive=cond(unet), negative=cond(unet, 1), **settings)
    by_prompt = sample(unet, *hung, batch, cfg=2.0, steps=3)
    plain = sample(apply(unet, controlnexts["sd15"], settings["image"]), *conds(unet), batch, cfg=2.0, steps=3)
    assert relative(by_prompt, by_model) <= 1e-4
    if name not in ("window_reference", "stretch"):  # these are what a batch and the first route have anyhow
        assert relative(by_model, plain) > 1e-3


def test_auto_stretches_on_a_model_and_crops_as_comfyuis_controlnets_do_on_a_prompt(apply, hang, controlnexts, unet):
    wide = picture(4, 1, 40, 72)

    def by_model(**settings):
        return sample(apply(unet, controlnexts["sd15"], wide, **settings), *conds(unet), latent("sd15"), steps=1)

    def by_prompt(**settings):
        return sample(unet, *hang(controlnexts["sd15"], wide, *conds(unet), **settings), latent("sd15"), steps=1)
    assert torch.equal(by_model(), by_model(resize="stretch"))
    assert torch.equal(by_prompt(), by_prompt(resize="crop"))
    assert relative(by_model(), by_prompt()) > 1e-3


@pytest.mark.parametrize("size", [(40, 72), (72, 40), (64, 33), (1, 500)])
def test_pad_puts_the_whole_image_on_black(pack, size):
    padded = pack("nodes.runtime.images").resized(torch.ones(1, 3, *size), 64, 64, "pad")
    assert padded.shape[-2:] == (64, 64)
    inner = padded[0, 0] > 0.5
    share = min(64 / size[0], 64 / size[1])
    assert int(inner.any(1).sum()) == max(1, round(size[0] * share))
    assert int(inner.any(0).sum()) == max(1, round(size[1] * share))
    assert not padded[0, 0][~inner].any()


NUMBERS = {"nan": float("nan"), "infinite": float("inf"), "beyond the range": 11.0, "below the range": -0.5,
           "a text": "1", "nothing": None}


@pytest.mark.parametrize("value", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("name", ["strength", "start_percent", "end_percent"])
def test_a_number_over_a_link_that_is_none_of_the_range_is_one_sentence_that_names_the_input(apply, controlnexts, unet,
                                                                                           name, value):
    with pytest.raises(ValueError, match=f"^{name}: ") as caught:
        apply(unet, controlnexts["sd15"], picture(), **{name: value})
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["inject_at", "apply_to", "window_reference", "resize"])
def test_a_choice_over_a_link_that_is_none_is_the_sentence_that_lists_the_choices(run, apply, controlnexts, unet, name):
    for attempt in (lambda: apply(unet, controlnexts["sd15"], picture(), **{name: ""}),
                    lambda: run("ControlNeXtToControlNet", controlnext=controlnexts["sd15"], **{name: ""})):
        with pytest.raises(ValueError, match=f"^{name}: .*auto"):
            attempt()


@pytest.mark.parametrize("node, values", [
    ("ControlNeXtCanny", dict(image=picture(), threshold="x", low_threshold=1, high_threshold=2)),
    ("ControlNeXtCanny", dict(image=picture(), threshold="manual", low_threshold=float("nan"), high_threshold=2)),
    ("ControlNeXtLoader", dict(controlnext_name="sd15.safetensors", variant="sd16")),
    ("ControlNeXtUNetLoader", dict(model=None, unet_name="unet.safetensors", strength=float("inf"), mode="auto")),
    ("ControlNeXtSaveAsLoRA", dict(model=None, unet_name="unet.safetensors", filename_prefix="x", rank=-1))])
def test_the_other_nodes_name_their_input_too(run, controlnexts, node, values):
    with pytest.raises(ValueError, match="^(threshold|low_threshold|variant|strength|rank): "):
        run(node, **values)
