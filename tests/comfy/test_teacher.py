"""A ControlNet as the teacher of Train ControlNeXt: ComfyUI's own ControlNets and T2I-Adapters, and ControlNeXts."""

from pathlib import Path

import comfy.cldm.mmdit
import comfy.model_management
import comfy.ops
import comfy.sd
import folder_paths
import pytest
import torch
from comfy.t2i_adapter.adapter import Adapter
from comfy.taesd.taesd import TAESD
from models import NARROW, small_sd3, small_unet, stock_controlnet
from safetensors.torch import save_file
from sampling import TRAINING, cond, one_forward, picture
from trainings import train_on

from controlnext_core.families import FAMILIES
from controlnext_core.losses import draw_levels
from controlnext_core.module import new_module
from controlnext_core.training import draw_rows
from controlnext_core.unet_keys import targets_of

WIDTHS = {"sd15": 64, "sdxl": 64, "sd3": 192}
KINDS = {"sd15": "sd15", "sdxl": "sdxl", "sd3": "sd3", "adapter": "sd15", "controlnext": "sd15"}  # teacher -> base
SETTINGS = TRAINING | dict(steps=1, learning_rate=1e-3, unet_learning_rate=1e-3, filename_prefix="taught")
TWO_WIDTHS = dict(num_res_blocks=[2, 2], channel_mult=[1, 2], transformer_depth=[1, 0, 0, 0],
                  transformer_depth_output=[1, 0, 0, 0, 0, 0])  # as a T2I-Adapter has them


@pytest.fixture(scope="module")
def models():
    return {"sd15": small_unet("sd15", model_channels=64, **TWO_WIDTHS), "sdxl": small_unet("sdxl", model_channels=64),
            "sd3": small_sd3()}


def filled(net, seed: int = 6) -> dict[str, torch.Tensor]:
    """A state dict of seeded random weights."""
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(value.shape, generator=generator) / max(value.shape[1:].numel(), 20) ** 0.5
            for key, value in net.state_dict().items()}


def shapes(weights: dict) -> dict[str, tuple]:
    return {key: tuple(value.shape) for key, value in weights.items()}


@pytest.fixture(scope="module")
def vae():
    """A VAE of 16 channels, as SD3's."""
    return comfy.sd.VAE(sd=filled(TAESD(latent_channels=16)))


def adapter() -> dict[str, torch.Tensor]:
    return filled(Adapter(cin=192, channels=[64, 128, 256, 256], nums_rb=2, ksize=1, sk=True, use_conv=False, xl=False))


def sd3_controlnet(model) -> dict[str, torch.Tensor]:
    """In the names of diffusers."""
    config = model.model.model_config.unet_config
    weights = filled(comfy.cldm.mmdit.ControlNet(num_blocks=2, operations=comfy.ops.disable_weight_init, **config))
    named = {name: value for name, value in weights.items() if name.startswith(("controlnet_blocks", "pos_embed_"))}
    for name, target in targets_of(shapes(weights)).items():
        value = weights[target.key]
        named[name] = value if target.rows is None else value.narrow(0, *target.rows)
    return {name: value.clone() for name, value in named.items()}


def student(pack, base: str):
    module = new_module(FAMILIES[base], seed=2, out=WIDTHS[base], **NARROW)
    return pack("nodes.runtime.loaded").trained_controlnext(module.state_dict(), base, "small", {})


@pytest.fixture(scope="module")
def teachers(pack, run, models, models_folder):
    """{kind: CONTROL_NET}, ComfyUI's by its own loader."""
    loaded = {}
    files = {"sd15": stock_controlnet(models["sd15"]), "sdxl": stock_controlnet(models["sdxl"]),
             "sd3": sd3_controlnet(models["sd3"]), "adapter": adapter()}
    for name, weights in files.items():
        file = models_folder / "controlnet" / f"teacher_{name}.safetensors"
        save_file(weights, file)
        loaded[name] = run("ControlNetLoader", control_net_name=file.name)
        file.unlink()
    module = new_module(FAMILIES["sd15"], seed=3, out=64, **NARROW)
    other = pack("nodes.runtime.loaded").trained_controlnext(module.state_dict(), "sd15", "other", {})
    return loaded | {"controlnext": run("ControlNeXtToControlNet", controlnext=other)}


def latents(model, count: int) -> list[dict]:
    channels = model.model.latent_format.latent_channels
    return [{"samples": torch.randn(1, channels, 8, 8, generator=torch.Generator().manual_seed(seed))}
            for seed in range(count)]


@pytest.fixture
def train(run, pack, vae):
    """train(model, base, teacher, **settings): the node's outputs; two pictures unless ``count`` is given."""
    def run_training(model, base, teacher, count=2, **settings):
        settings = {"controlnext": student(pack, base), "teacher": teacher, "teacher_vae": vae, **SETTINGS, **settings}
        data = {"latents": latents(model, count), "conditioning": [cond(model, seed) for seed in range(count)],
                "images": [picture(seed) for seed in range(count)]}
        return train_on(run, model, data, settings)
    return run_training


def drawn(model, prediction: str):
    """(noisy latents, noise level) of the first step of a training on one picture."""
    generator, sampling = torch.Generator().manual_seed(SETTINGS["seed"]), model.get_model_object("model_sampling")
    draw_rows([[0]], 1, generator)
    sigma = sampling.sigmas[draw_levels(1, len(sampling.sigmas), prediction, generator)]
    clean = model.model.process_latent_in(latents(model, 1)[0]["samples"])
    return sampling.noise_scaling(sigma, torch.randn(clean.shape, generator=generator), clean), sigma


@pytest.fixture
def distance(run, apply, pack, vae):
    """distance(model, base, teachers, strength): mean squared, of what is predicted under student and teachers."""
    def measure(model, base, teachers, strength=1.0, prediction="epsilon"):
        x, sigma = drawn(model, prediction)
        taught = cond(model)
        for teacher in teachers:
            taught, _ = run("ControlNetApplyAdvanced", positive=taught, negative=taught, control_net=teacher,
                            image=picture(), strength=strength, start_percent=0.0, end_percent=1.0, vae=vae)
        x = model.get_model_object("model_sampling").calculate_input(sigma, x)
        ours = one_forward(apply(model, student(pack, base), picture()), cond(model), x, float(sigma))
        return (ours - one_forward(model, taught, x, float(sigma))).square().mean().item()
    return measure


@pytest.mark.versions
@pytest.mark.parametrize("kind, base", KINDS.items())
def test_the_loss_is_how_far_what_student_and_teacher_predict_lie_apart(train, distance, models, teachers, kind, base):
    model, prediction = models[base], "flow" if base == "sd3" else "epsilon"
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    parts = [one.model for one in teachers[kind].get_models()] or [teachers[kind].t2i_model]
    weights = [{key: value.clone() for key, value in part.state_dict().items()} for part in parts]
    controlnext, losses, _, _ = train(model, base, teachers[kind], count=1, teacher_strength=0.7)
    assert losses["loss"] == pytest.approx([distance(model, base, [teachers[kind]], 0.7, prediction)], rel=1e-4)
    assert losses["loss"][0] > 1e-3
    assert all(value.any() for value in controlnext.unet_differences.values())
    assert all(torch.equal(value, before[key]) for key, value in model.model.state_dict().items())
    assert not model.patches and not model.weight_wrapper_patches
    for part, kept in zip(parts, weights, strict=True):
        assert all(torch.equal(value, kept[key]) for key, value in part.state_dict().items())
        assert all(value.grad is None for value in part.parameters())
    assert teachers[kind].cond_hint_original is None and teachers[kind].strength == 1.0


def test_of_a_model_that_predicts_v_it_is_v(run, train, distance, models, teachers):
    model = run("ModelSamplingDiscrete", model=models["sd15"], sampling="v_prediction", zsnr=False)
    losses = train(model, "sd15", teachers["sd15"], count=1)[1]["loss"]
    assert losses == pytest.approx([distance(model, "sd15", [teachers["sd15"]])], rel=1e-4)


def test_a_chain_of_controlnets_teaches_as_it_steers(train, distance, models, teachers):
    first, last = teachers["adapter"], teachers["sd15"].copy()
    last.set_previous_controlnet(first)
    losses = train(models["sd15"], "sd15", last, count=1)[1]["loss"]
    assert losses == pytest.approx([distance(models["sd15"], "sd15", [first, teachers["sd15"]])], rel=1e-4)
    assert last.previous_controlnet is first


@pytest.mark.parametrize("kind, base", KINDS.items())
def test_the_teacher_sees_each_row_s_own_image_and_nothing_of_the_student(pack, models, teachers, vae, kind, base):
    model, rows = models[base], [1, 0]
    samples = pack("nodes.training.data").samples_for(model, latents(model, 2), [cond(model, seed) for seed in rows],
                                                      [picture(seed) for seed in rows])
    settings = pack("nodes.training.settings").TrainSettings(
        seed=3, training_dtype="fp32", unet_pattern="to_out.0.weight", gradient_checkpointing=False)
    teacher = pack("nodes.training.teacher").Teacher(teachers[kind], 1.0, 1.0, vae)
    x, sigma = torch.randn(2, *samples.latent_shape(0)[1:]), torch.tensor([0.3, 0.9])
    with pack("nodes.training.session").Session(model, samples, settings, student(pack, base), teacher) as session:
        for difference in session.training.differences.values():
            torch.nn.init.normal_(difference)

        def conds(rows):
            return samples.batch_conds(model.model, rows, [False] * len(rows), "cpu")

        def taught(at):
            session.control.images = samples.batch_images([rows[row] for row in at])
            return session.denoise_without_student(x[at], sigma[at], conds([rows[row] for row in at]), teacher)
        together, apart = taught([0, 1]), torch.cat([taught([0]), taught([1])])
        assert torch.allclose(together, apart, atol=1e-4 * apart.std())
        student_s = session.denoise(x, sigma, conds(rows))
        for difference in session.training.differences.values():
            difference.data.zero_()
        assert torch.equal(taught([0, 1]), together)
        assert not torch.allclose(session.denoise(x, sigma, conds(rows)), student_s, atol=1e-3)


def test_a_union_controlnet_teaches_the_type_that_was_set(run, pack, train):
    model = small_unet("sd15", model_channels=320)  # the width that union types have
    config = {key: value for key, value in model.model.model_config.unet_config.items()
              if key not in ("out_channels", "transformer_depth_output", "dtype")}
    net = comfy.cldm.cldm.ControlNet(hint_channels=3, union_controlnet_num_control_type=6, **config)
    net.load_state_dict(filled(net))
    union = comfy.controlnet.ControlNet(net, load_device=torch.device("cpu"))
    module = new_module(FAMILIES["sd15"], **NARROW)
    wide = pack("nodes.runtime.loaded").trained_controlnext(module.state_dict(), "sd15", "wide", {})
    losses = [train(model, "sd15", run("SetUnionControlNetType", control_net=union, type=kind), count=1,
                    trainable="module", controlnext=wide)[1]["loss"] for kind in ("openpose", "depth")]
    assert losses[0] != losses[1]


def test_the_share_mixes_the_two_losses(train, models, teachers):
    alone, half, taught = (train(models["sd15"], "sd15", teachers["sd15"], teacher_share=share)[1]["loss"][0]
                           for share in (0.0, 0.25, 1.0))
    assert half == pytest.approx(0.75 * alone + 0.25 * taught)
    assert alone == train(models["sd15"], "sd15", None, teacher_vae=None)[1]["loss"][0]
    assert abs(alone - taught) > 1e-2


def test_a_training_under_a_teacher_is_resumed_as_if_it_had_never_stopped(train, models, teachers):
    settings = dict(save_every=2, ema=0.9, filename_prefix="resumed", teacher_share=0.5, batch_size=2)
    folder = Path(folder_paths.get_output_directory()) / "controlnext_training"
    whole = train(models["sd15"], "sd15", teachers["sd15"], steps=4, **settings)
    kept = min(folder.glob("resumed_*_step_2.pt")).name
    again = train(models["sd15"], "sd15", teachers["sd15"], steps=4, **settings, resume_from=kept)
    assert again[1] == whole[1]
    for ours, expected in zip(*({**one[0].loaded.checkpoint.state_dict, **one[0].unet_differences}.values()
                                for one in (again, whole)), strict=True):
        assert torch.equal(ours, expected)


REFUSED = {
    r"teacher_share: there is no teacher": dict(teacher=None, teacher_share=0.5),
    r"teacher_vae: the connected teacher takes control images as latents": dict(teacher="sd3", teacher_vae=None),
    r"teacher: .* does not fit the connected MODEL, which is BaseModel \(.*SDXL on SD1\?\); connect":
        dict(teacher="sdxl"),
    r"teacher: .* changes nothing in what the connected MODEL, which is SD3, predicts":
        dict(teacher="adapter", base="sd3"),
    r"teacher: .* changes nothing .* at a teacher_strength above 0": dict(teacher="sd15", teacher_strength=0.0),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_teacher_that_teaches_nothing_is_refused_in_one_sentence(train, models, teachers, message):
    settings = dict(REFUSED[message])
    base, teacher = settings.pop("base", "sd15"), settings.pop("teacher")
    with pytest.raises(ValueError, match=message) as error:
        train(models[base], base, teachers.get(teacher), **settings)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
