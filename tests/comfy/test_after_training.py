"""What a training leaves on a MODEL and in the process, and how it ends when something fails: inside real ComfyUI."""

import contextlib
import csv
import gc
import io
import random
import weakref
from pathlib import Path

import comfy.cli_args
import comfy.model_management
import comfy.utils
import folder_paths
import pytest
import torch
from faults import full_disk
from models import NARROW, TRANSFORMERS, small_transformer, small_unet
from sampling import TRAINING, cond, latent, picture
from tokens import new_controlnext
from torch.utils._python_dispatch import TorchDispatchMode
from trainings import samples, train_on, weights
from versions import on_older

from controlnext_core.families import FAMILIES
from controlnext_core.module import new_module

KEPT = Path(folder_paths.get_output_directory()) / "controlnext_training"
SETTINGS = TRAINING | dict(steps=2, learning_rate=1e-3, unet_learning_rate=1e-3, filename_prefix="after")
UNETS = ("sd15", "sdxl", "svd")


def new_model(base: str):
    return small_unet(base) if base in UNETS else small_transformer(base)


@pytest.fixture
def small(pack):
    """small(base): an untrained CONTROLNEXT for ``new_model``, narrow too."""
    def make(base: str = "sd15"):
        if base not in UNETS:
            return new_controlnext(pack, base)
        state_dict = new_module(FAMILIES[base], out=64, **NARROW).state_dict()
        return pack("nodes.runtime.loaded").trained_controlnext(state_dict, base, "small", {})
    return make


def data_for(base: str, model) -> dict:
    if base not in UNETS:
        return samples(base, model)
    extra = {"concat_latent_image": torch.zeros(1, 4, 8, 8)} if base == "svd" else {}
    return {"latents": [{"samples": latent(base, 1, 8, 8)}], "conditioning": [cond(model, **extra)],
            "images": [picture()]}


@pytest.fixture
def train(run, small):
    """train(model, base, **settings): the node's outputs, for one picture."""
    def run_training(model, base="sd15", **settings):
        return train_on(run, model, data_for(base, model), {"controlnext": small(base), **SETTINGS, **settings})
    return run_training


def clone_data(model):
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


MOVES = {"outside of inference mode": lambda model: clone_data(model),
         "by ComfyUI's patcher": lambda model: [
             comfy.utils.set_attr_param(model, name, value) for name, value in list(model.named_parameters())],
         "under inference mode": torch.inference_mode()(clone_data)}


@pytest.mark.parametrize("base", on_older(("sd15", "sdxl", *TRANSFORMERS), ["sd15", "flux", "wan"]))
def test_a_model_that_a_node_loaded_is_trained_as_often_as_one_likes_wherever_its_weights_were_moved(train, base):
    with torch.inference_mode():
        model = new_model(base)
    first = train(model, base, steps=1)[1]["loss"]
    for move in MOVES.values():
        move(model.model.diffusion_model)
        assert train(model, base, steps=1)[1]["loss"] == first


def leftovers(model) -> dict:
    """What stands in the layers beside weights and what is of their class: {(layer, attribute): value or its type}."""
    values = {(name, key): value for name, layer in model.model.named_modules() for key, value in vars(layer).items()
              if key not in ("_parameters", "_buffers", "_modules")}
    plain = (bool, int, float, str, list, tuple, type(None))
    return {key: value if isinstance(value, plain) else type(value) for key, value in values.items()}


@pytest.mark.versions
@pytest.mark.parametrize("base", ["sd15", "sd3", "flux"])
@pytest.mark.parametrize("ends", ["whole", "interrupted"])
def test_nothing_of_a_training_stays_on_a_model(train, base, ends):
    model = new_model(base)
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    comfy.model_management.unload_all_models()
    before, grads = leftovers(model), [value.requires_grad for value in model.model.parameters()]
    objects = {name: id(value) for name, value in model.model.named_parameters()}
    if ends == "whole":
        train(model, base)
    else:
        hook = model.model.diffusion_model.register_forward_hook(interrupt)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            train(model, base)
        hook.remove()
    assert leftovers(model) == before
    assert [value.requires_grad for value in model.model.parameters()] == grads
    assert all(value.grad is None for value in model.model.parameters())
    assert {name: id(value) for name, value in model.model.named_parameters()} == objects
    assert not model.object_patches_backup and not comfy.model_management.in_training


def interrupt(module, args, output):
    raise comfy.model_management.InterruptProcessingException


def test_a_model_goes_with_its_last_reference_after_a_training(train):
    model = new_model("sd15")
    train(model)
    layer = weakref.ref(next(model.model.diffusion_model.input_blocks.children()))
    gc.collect()  # of what the training itself leaves
    gc.disable()
    try:
        del model
        comfy.model_management.cleanup_models()
        assert layer() is None
    finally:
        gc.enable()


def test_the_generators_of_the_process_are_as_they_were(train, monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)  # what torch.manual_seed does to every GPU
    before, of_python = torch.get_rng_state(), random.getstate()
    train(new_model("sd15"), controlnext=None, trainable="module", steps=1)
    assert not seeded and torch.equal(torch.get_rng_state(), before) and random.getstate() == of_python


def test_checkpointing_is_exact_beside_patches_that_look_at_their_block(train):
    """As IP-Adapter and block weights do: each block has a strength of its own."""
    strength = {("input", 1): 0.3, ("middle", 0): 2.0, ("output", 0): -1.0, ("output", 1): 0.5}
    seen = []

    def patch(q, k, v, extra_options):
        seen.append(extra_options["block"])
        return q, k, v * strength.get(tuple(extra_options["block"]), 1.5)
    model = new_model("sd15")
    model.set_model_attn2_patch(patch)
    plain, checkpointed = (train(model, steps=4, gradient_checkpointing=checkpointing)
                           for checkpointing in (False, True))
    assert len(set(seen)) > 2
    assert checkpointed[1] == plain[1]
    ours, expected = weights(checkpointed[0]), weights(plain[0])
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


class Copies(TorchDispatchMode):
    """Counts the copies that are made of tensors of one shape."""

    def __init__(self, shape: torch.Size):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("clone", "_to_copy", "copy_") and args[0].shape == self.shape:
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_frozen_weight_is_copied_once_a_forward(pack, small):
    model = new_model("sd15")
    data = pack("nodes.training.data").samples_for(model, *data_for("sd15", model).values())
    settings = pack("nodes.training.settings").TrainSettings(training_dtype="fp32", gradient_checkpointing=False)
    weight = model.model.diffusion_model.time_embed[0].weight
    assert [value.shape for value in model.model.parameters()].count(weight.shape) == 1
    with pack("nodes.training.session").Session(model, data, settings, small()) as session:
        with Copies(weight.shape) as copies:
            session.loss_of_batch()
    assert copies.count == 1


def test_a_controlnext_as_the_teacher_or_in_the_model_keeps_nothing_for_later(pack, run, train, apply, small):
    teacher, other = small(), small()
    net = run("ControlNeXtToControlNet", controlnext=teacher)
    train(apply(new_model("sd15"), other, picture(3)), teacher=net, steps=3)
    for loaded in (teacher.loaded, other.loaded):
        assert loaded.features.size == loaded.image_parts.size == 0


def test_when_an_error_ends_a_training_its_step_is_given_back_before_the_state_is_kept(train, pack, monkeypatch):
    """Of an out-of-memory, whose step would else stand in the way of keeping."""
    model, held, alive_while_kept = new_model("sd15"), [], []

    def run_out_in_the_second_step(module, args, output):
        held.append(weakref.ref(output))
        if len(held) == 2:
            raise comfy.model_management.OOM_EXCEPTION("out of memory")
    session = pack("nodes.training.session").Session
    state = session.state

    def note(self):
        alive_while_kept.extend(one() is not None for one in held)
        return state(self)
    monkeypatch.setattr(session, "state", note)
    hook = model.model.diffusion_model.register_forward_hook(run_out_in_the_second_step)
    with pytest.raises(comfy.model_management.OOM_EXCEPTION):
        train(model, filename_prefix="oom")
    hook.remove()
    assert alive_while_kept == [False, False]
    (state,) = KEPT.glob("oom_*.pt")
    assert train(model, filename_prefix="oom", resume_from=state.name)[1] == train(model)[1]


def test_an_update_that_fails_leaves_a_state_that_goes_on_bit_for_bit(train, monkeypatch):
    model = new_model("sd15")
    whole = train(model, steps=3)
    step, calls = torch.optim.AdamW.step, []

    def fail_once(self, *args, **kwargs):
        calls.append(None)
        if len(calls) == 2:
            raise RuntimeError("the device is gone")
        return step(self, *args, **kwargs)
    monkeypatch.setattr(torch.optim.AdamW, "step", fail_once)
    with pytest.raises(RuntimeError, match="the device is gone"):
        train(model, steps=3, filename_prefix="gone")
    (state,) = KEPT.glob("gone_*_step_1.pt")
    assert train(model, steps=3, resume_from=state.name)[1] == whole[1]


@pytest.mark.parametrize("error", [MemoryError("no room"), RuntimeError("the device is gone")])
def test_one_failed_save_of_many_is_told_and_the_training_goes_on(train, monkeypatch, caplog, error):
    caplog.set_level("INFO")
    save, calls = torch.save, []

    def fail_once(*args, **kwargs):
        calls.append(None)
        if len(calls) == 2:
            raise error
        save(*args, **kwargs)
    monkeypatch.setattr(torch, "save", fail_once)
    name = type(error).__name__.lower()
    assert train(new_model("sd15"), steps=3, save_every=1, filename_prefix=name)[2] == 3
    assert f"step 2 is not saved ({type(error).__name__}: {error})" in caplog.text
    assert sorted(path.stem[-6:] for path in KEPT.glob(f"{name}_*.pt")) == ["step_1", "step_3"]


def test_losses_rates_and_scale_stand_in_a_table_of_every_step(train):
    losses = train(new_model("sd15"), steps=3, warmup_steps=2, filename_prefix="table")[1]["loss"]
    (file,) = KEPT.glob("table_*_losses.csv")
    rows = list(csv.DictReader(file.open()))
    assert [int(row["step"]) for row in rows] == [1, 2, 3]
    assert [float(row["loss"]) for row in rows] == losses
    assert [float(row["learning_rate"]) for row in rows] == pytest.approx([5e-4, 1e-3, 1e-3])
    assert len({row["scale"] for row in rows}) == 3


def test_tensorboard_gets_losses_and_previews(train, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    monkeypatch.setattr(comfy.cli_args.args, "preview_method", comfy.cli_args.LatentPreviewMethod.Latent2RGB)
    losses = train(new_model("sd15"), steps=3, preview_every=2, filename_prefix="board")[1]["loss"]
    (folder,) = KEPT.glob("board_*_tensorboard")
    events = EventAccumulator(str(folder)).Reload()
    scalars = events.Scalars("loss")
    assert [event.step for event in scalars] == [1, 2, 3]
    assert [event.value for event in scalars] == pytest.approx(losses)
    assert [(image.step, image.width, image.height) for image in events.Images("preview")] == [(2, 8, 8)]


def test_a_disk_that_refuses_the_table_ends_no_training(train, caplog):
    model = new_model("sd15")
    with full_disk(40), contextlib.redirect_stderr(io.StringIO()):
        assert train(model, filename_prefix="refused")[2] == 2
    assert "the losses of the training are not written" in caplog.text


def test_previews_are_sampled_under_the_validation_image_and_prompt(train, monkeypatch):
    previews = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK",
                        lambda value, total, preview, node_id=None: previews.append(preview))
    monkeypatch.setattr(comfy.cli_args.args, "preview_method", comfy.cli_args.LatentPreviewMethod.Latent2RGB)
    model = new_model("sd15")
    shown = dict(validation_image=picture(7, 1, 96, 64), validation_conditioning=cond(model, 5))
    drawn = {name: train(model, steps=1, preview_every=1, **given) for name, given in {
        "first": {}, "both": shown, "image": {"validation_image": shown["validation_image"]}}.items()}
    first, both, image = (preview[1] for preview in previews if preview)
    assert first.size == (8, 8) and both.size == image.size == (8, 12)
    assert both.tobytes() != image.tobytes()
    assert drawn["both"][1] == drawn["first"][1]


@pytest.mark.parametrize(("given", "message"), [
    (dict(validation_image=torch.zeros(1, 4, 4, 3)), "validation_image: it is 4x4, less than the 8 pixels"),
    (dict(validation_image=torch.full((1, 64, 64, 3), float("nan"))), "validation_image: .* NaN"),
    (dict(validation_conditioning=[]), "validation_conditioning: it holds no caption"),
    (dict(validation_conditioning=[[torch.zeros(1, 77, 13), {}]]), "validation_conditioning: .* does not fit"),
])
def test_what_previews_cannot_be_sampled_under_is_told_before_the_first_step(train, given, message):
    with pytest.raises(ValueError, match=message):
        train(new_model("sd15"), preview_every=1, **given)


@pytest.mark.parametrize("base", ["sd15", "wan"])
def test_a_noise_mask_says_where_the_loss_counts(run, pack, small, base):
    model = new_model(base)
    data = data_for(base, model)
    shape = data["latents"][0]["samples"].shape
    left = torch.zeros(1, 64, 64)
    left[..., :32] = 1

    def loss(**mask) -> float:
        given = data | {"latents": [{**data["latents"][0], **mask}]}
        return train_on(run, model, given, {"controlnext": small(base), **SETTINGS, "steps": 1})[1]["loss"][0]
    right, whole = 1 - left, loss()
    halves = [loss(noise_mask=mask) for mask in (left, right)]
    assert sum(halves) / 2 == pytest.approx(whole, rel=1e-5) and abs(halves[0] - halves[1]) > 1e-3
    assert loss(noise_mask=left[:, None]) == halves[0], "as Set Latent Noise Mask gives it"
    assert loss(noise_mask=torch.full((1, 64, 64), 0.5)) == pytest.approx(whole, rel=1e-5)
    assert loss(noise_mask=0.5 + 0.5 * left) == pytest.approx((2 * halves[0] + halves[1]) / 3, rel=1e-5)
    assert len(shape) in (4, 5)


@pytest.mark.parametrize("mask", [torch.zeros(1, 64, 64), torch.full((1, 64, 64), float("nan"))])
def test_a_mask_of_nothing_is_refused(train, run, small, mask):
    model = new_model("sd15")
    data = data_for("sd15", model)
    data["latents"][0]["noise_mask"] = mask
    with pytest.raises(ValueError, match="latents: the noise_mask of a LATENT"):
        train_on(run, model, data, {"controlnext": small(), **SETTINGS})
