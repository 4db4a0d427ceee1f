"""The UNet under control equals the reference implementation, through ComfyUI's own sampler."""

import gc

import pytest
import torch
from models import golden_unet
from safetensors.torch import save_file
from sampling import cond, one_forward

BASES = {"sd15": ("sd15", "sd15_mid"), "sdxl": ("sdxl",), "svd": ("svd", "svd_padded", "svd_mid")}
BOUND = {"sd15": 5e-5, "sdxl": 5e-5, "svd": 1e-4}


@pytest.fixture(scope="module", params=BASES)
def base(request):
    return request.param


@pytest.fixture(scope="module")
def unet(base, goldens):
    yield golden_unet(goldens, base)
    gc.collect()


def forward_inputs(goldens, base, model, case):
    """(positive cond, UNet input, sigma) of a golden case."""
    inputs = {name: goldens.input(described) for name, described in case["inputs"].items()}
    context = inputs["encoder_hidden_states"]
    if base == "svd":
        sample = inputs["sample"][0]
        ids = inputs["added_time_ids"][0]
        extra = {"concat_latent_image": sample[:, 4:], "fps": ids[0] + 1, "motion_bucket_id": ids[1],
                 "augmentation_level": ids[2]}
        return cond(model, context=context, **extra), sample[:, :4], float(case["sigma"])
    extra = {}
    if base == "sdxl":
        height, width, top, left, target_height, target_width = inputs["time_ids"][0].tolist()
        extra = {"pooled_output": inputs["text_embeds"], "height": height, "width": width, "crop_h": top,
                 "crop_w": left, "target_height": target_height, "target_width": target_width}
    sigma = float(model.model.model_sampling.sigma(torch.tensor(float(case["timestep"]))))
    return cond(model, context=context, **extra), inputs["sample"], sigma


@pytest.mark.parametrize("output, strength", [("off", None), ("on", 1.0), ("half", 0.5)])
def test_unet_equals_reference(run, goldens, models_folder, base, unet, output, strength):
    for variant in BASES[base]:
        save_file(goldens.state_dict(variant), models_folder / "controlnext" / f"{variant}.safetensors")
        for case in goldens.unet[variant]["cases"]:
            model = unet
            if strength is not None:
                controlnext = run("ControlNeXtLoader", controlnext_name=f"{variant}.safetensors",
                                  variant=variant if variant == "svd_padded" else "auto")
                image = goldens.input(case["inputs"]["image"])
                image = (image[0] if base == "svd" else image).movedim(1, -1)
                model = run("ControlNeXtApply", model=unet, controlnext=controlnext, image=image, strength=strength,
                            start_percent=0.0, end_percent=1.0)
            positive, sample, sigma = forward_inputs(goldens, base, model, case)
            result = one_forward(model, positive, sample, sigma)
            if base == "svd":
                result = result[None]
            difference = goldens.difference("unet.safetensors", case["outputs"][output], result)
            print(f"{case['name']} {output}: {difference:.2e} of the output's std")
            assert difference <= BOUND[base], f"{case['name']} {output}"
