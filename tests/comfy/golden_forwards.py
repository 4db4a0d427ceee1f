"""One forward of a golden case: the UNet's inputs, the MODEL under the case's control, how far the output is off."""

import torch
from safetensors.torch import save_file
from sampling import cond, one_forward

BASES = {"sd15": ("sd15", "sd15_mid"), "sdxl": ("sdxl",), "svd": ("svd", "svd_padded", "svd_mid")}
BOUND = {"sd15": 5e-5, "sdxl": 5e-5, "svd": 1e-4}


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


def control(run, goldens, models_folder, variant, case) -> dict:
    """Load ControlNeXt Model, and the case's control image."""
    save_file(goldens.state_dict(variant), models_folder / "controlnext" / f"{variant}.safetensors")
    # a file of the svd layout is taken for svd unless svd_padded is named
    controlnext = run("ControlNeXtLoader", controlnext_name=f"{variant}.safetensors",
                      variant=variant if variant == "svd_padded" else "auto")
    image = goldens.input(case["inputs"]["image"])
    image = image[0] if image.ndim == 5 else image
    return {"controlnext": controlnext, "image": image.movedim(1, -1)}


def controlled(run, goldens, models_folder, model, variant, case, strength=1.0):
    """The MODEL behind Apply ControlNeXt."""
    return run("ControlNeXtApply", model=model, strength=strength, start_percent=0.0, end_percent=1.0,
               **control(run, goldens, models_folder, variant, case))


def difference(goldens, base, model, case, output, positive=None) -> float:
    """How far one forward is off, as a share of the output's std, with what hangs on ``positive`` if that is given."""
    own, x, sigma = forward_inputs(goldens, base, model, case)
    result = one_forward(model, positive or own, x, sigma).cpu()
    result = result[None] if base == "svd" else result
    return goldens.difference("unet.safetensors", case["outputs"][output], result)
