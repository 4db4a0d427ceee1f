"""Train ControlNeXt and Save ControlNeXt Model inside a real ComfyUI."""

import re
from pathlib import Path

import comfy.cli_args
import comfy.model_management
import comfy.model_sampling
import comfy.utils
import folder_paths
import pytest
import torch
from faults import full_disk, kill_while_writing
from models import NARROW, small_unet
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sampling import TRAINING, cond, sample
from trainings import train_on, weights

from controlnext_core.families import FAMILIES
from controlnext_core.module import new_module
from controlnext_core.unet_keys import diffusers_to_ldm

OUTPUT = Path(folder_paths.get_output_directory())
SETTINGS = TRAINING | dict(steps=6, batch_size=2, learning_rate=1e-3, unet_learning_rate=1e-3,
                           gradient_checkpointing=False, filename_prefix="test")

ONE_LEVEL = dict(num_res_blocks=[1], channel_mult=[1], transformer_depth=[1], transformer_depth_output=[0, 0])


def narrow_unet(base: str = "sd15", **changes):
    return small_unet(base, **changes)


@pytest.fixture(scope="module")
def unet():
    return narrow_unet()


def pictures(sizes: list[tuple[int, int]]) -> tuple[list, list]:
    """(LATENTs, control images), one of each per (height, width) in latent pixels."""
    generator = torch.Generator().manual_seed(1)
    return ([{"samples": torch.randn(1, 4, *size, generator=generator)} for size in sizes],
            [torch.rand(1, 8 * height, 8 * width, 3, generator=generator) for height, width in sizes])


@pytest.fixture
def small(pack):
    """small(base): an untrained CONTROLNEXT for ``narrow_unet``, narrow too."""
    def make(base: str = "sd15"):
        module = new_module(FAMILIES[base], out=64, **NARROW)
        return pack("nodes.runtime.loaded").trained_controlnext(module.state_dict(), base, "small", {})
    return make


@pytest.fixture
def train(run, small):
    """train(model, **settings): the node's outputs, as ComfyUI calls it with lists; four samples unless given."""
    def run_training(model, latents=None, images=None, conditioning=None, **settings):
        drawn = pictures([(8, 8)] * 4)
        inputs = {"latents": latents or drawn[0], "images": images or drawn[1],
                  "conditioning": conditioning or [cond(model, seed) for seed in range(4)]}
        return train_on(run, model, inputs, {"controlnext": small(), **SETTINGS, **settings})
    return run_training


def assert_equal(ours: dict, expected: dict):
    assert ours.keys() == expected.keys()
    assert [name for name in ours if not torch.equal(ours[name], expected[name])] == []


def kept_states() -> list[str]:
    folder = OUTPUT / "controlnext_training"
    return sorted(path.name for path in folder.glob("*.pt")) if folder.exists() else []


@pytest.mark.parametrize("base", ["sd15", "sdxl"])
def test_a_few_steps_lower_the_loss_on_one_picture_and_leave_the_model_as_it_was(train, small, base):
    model = narrow_unet(base)
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    latents, images = pictures([(8, 8)])
    data = dict(latents=latents, images=images, conditioning=[cond(model)], steps=16, batch_size=1,
                controlnext=small(base))
    untrained = train(model, **data, learning_rate=0.0, unet_learning_rate=0.0)[1]["loss"]
    controlnext, loss_map, steps, controlled = train(model, **data, learning_rate=3e-3, unet_learning_rate=3e-3)
    assert steps == len(loss_map["loss"]) == 16
    # of the same noise and timesteps
    assert sum(loss_map["loss"][8:]) < 0.9 * sum(untrained[8:])
    assert_equal(model.model.state_dict(), before)
    assert not model.patches and not model.weight_wrapper_patches and not model.object_patches
    assert not any(layer.weight_function for layer in model.model.modules() if hasattr(layer, "weight_function"))
    assert all(value.any() for value in weights(controlnext).values())
    names = diffusers_to_ldm(model.model.diffusion_model.state_dict())
    assert controlled.patches.keys() == {f"diffusion_model.{names[name]}" for name in controlnext.unet_differences}
    pattern = "to_out" if base == "sd15" else "attn2.to_out"
    assert controlnext.unet_differences.keys() == {name for name in names if pattern in name}


def test_what_is_trained_is_what_is_applied(pack, small, unet):
    """One forward of the training and one of Apply ControlNeXt give the same."""
    latents, images = pictures([(8, 8)] * 2)
    samples = pack("nodes.training.data").samples_for(unet, latents, [cond(unet, seed) for seed in (0, 1)], images)
    settings = pack("nodes.training.settings").TrainSettings(batch_size=2, training_dtype="fp32", trainable="module")
    x, sigma = torch.randn(2, 4, 8, 8), torch.tensor([2.0, 2.0])
    with pack("nodes.training.session").Session(unet, samples, settings, small()) as session:
        session.control.images = samples.batch_images([1, 0])
        conds = samples.batch_conds(unet.model, [1, 0], [False, False], "cpu")
        ours = session.denoise(x, sigma, conds)
        assert ours.requires_grad
    controlnext, _ = session.result()
    for row, which in enumerate((1, 0)):
        applied = pack("nodes.apply").ControlNeXtApply.execute(unet, controlnext, images[which], 1.0, 0.0, 1.0)[0]
        options = {**applied.model_options["transformer_options"], "wrappers": applied.wrappers}
        expected = applied.model.apply_model(x[row:row + 1], sigma[:1], transformer_options=options,
                                             c_crossattn=cond(unet, which)[0][0])
        assert torch.allclose(ours[row:row + 1], expected, atol=2e-5)
        plain = applied.model.apply_model(x[row:row + 1], sigma[:1], c_crossattn=cond(unet, which)[0][0])
        assert not torch.allclose(ours[row:row + 1], plain, atol=1e-2)


def test_rows_of_a_batch_belong_together_also_after_resolution_bucket(pack, run, unet):
    sizes = [(8, 8), (8, 16), (8, 8), (16, 8), (8, 16)]
    latents = [{"samples": torch.full((1, 4, *size), float(index))} for index, size in enumerate(sizes)]
    images = [torch.full((1, 8 * size[0] + 3, 8 * size[1], 3), float(index)) for index, size in enumerate(sizes)]
    conds = [cond(unet, context=torch.full((1, 2, 768), float(index))) for index in range(5)]
    bucketed = run("ResolutionBucket", latents=latents, conditioning=conds)
    empty = cond(unet, context=torch.full((1, 77, 768), -1.0))
    assert len(bucketed[0]) == 3
    for some_latents, some_conds in ((latents, conds), bucketed):
        samples = pack("nodes.training.data").Samples(some_latents, some_conds, images, empty, 8)
        assert sorted(len(rows) for rows in samples.buckets()) == [1, 2, 2]
        for rows in samples.buckets():
            dropped = [True] + [False] * (len(rows) - 1)
            pixels, latent = samples.batch_images(rows), samples.batch_latents(rows)
            context = samples.batch_conds(unet.model, rows, dropped, "cpu")["c_crossattn"]
            assert pixels.shape[-2:] == (8 * latent.shape[-2], 8 * latent.shape[-1])
            assert latent[:, 0, 0, 0].tolist() == pixels[:, 0, 0, 0].tolist()
            assert context[:, 0, 0].tolist() == [-1.0] + latent[1:, 0, 0, 0].tolist()


def test_a_caption_may_be_that_of_all_pictures_of_a_latent(pack, unet):
    latents = [{"samples": torch.full((count, 4, 8, 8), float(index))} for index, count in enumerate((1, 3))]
    conds = [cond(unet, context=torch.full((1, 2, 768), float(index))) for index in range(2)]
    samples = pack("nodes.training.data").Samples(latents, conds, [torch.zeros(4, 64, 64, 3)], None, 8)
    context = samples.batch_conds(unet.model, [0, 1, 2, 3], [False] * 4, "cpu")["c_crossattn"]
    assert context[:, 0, 0].tolist() == samples.batch_latents([0, 1, 2, 3])[:, 0, 0, 0].tolist() == [0.0, 1.0, 1.0, 1.0]


def test_an_interrupted_training_is_kept_and_resumed_as_if_it_had_never_stopped(train, unet, caplog):
    extra = dict(ema=0.9, caption_dropout=0.5, empty_conditioning=cond(unet, 9), gradient_checkpointing=True,
                 min_snr_gamma=1.0, warmup_steps=5, grad_accumulation_steps=2, super_resolution=True)
    whole = train(unet, **extra)
    calls = []

    def interrupt_in_the_fourth_step(module, args, output):
        calls.append(None)
        if len(calls) == 8:
            comfy.model_management.interrupt_current_processing()
            comfy.model_management.throw_exception_if_processing_interrupted()
    hook = unet.model.diffusion_model.register_forward_hook(interrupt_in_the_fourth_step)  # amid an accumulation
    before = kept_states()
    caplog.set_level("INFO")
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(unet, **extra)
    hook.remove()
    (kept,) = set(kept_states()) - set(before)
    assert f"choose {kept} in resume_from" in caplog.text
    assert re.fullmatch(r"test_\d{5}_step_3\.pt", kept)
    resumed = train(unet, **extra, resume_from=kept)
    assert resumed[1:3] == whole[1:3]
    assert_equal(weights(resumed[0]), weights(whole[0]))
    with pytest.raises(ValueError, match="resume_from: .* only one of them keeps a moving average"):
        train(unet, **(extra | {"ema": 0.0}), resume_from=kept)


def test_for_super_resolution_control_is_a_small_copy_of_the_picture_drawn_anew_each_time(
        pack, train, unet, monkeypatch):
    run_module, copies = pack("nodes.training.session"), []
    degraded = run_module.degraded

    def note(picture, generator):
        copies.append((picture, degraded(picture, generator)))
        return copies[-1][1]
    monkeypatch.setattr(run_module, "degraded", note)
    shown = []
    control_class = pack("nodes.training.control").TrainingControl
    forward = control_class.__call__
    monkeypatch.setattr(control_class, "__call__",
                        lambda self, call: shown.append(self.images) or forward(self, call))
    latents, images = pictures([(8, 6)])
    train(unet, latents, images, [cond(unet)], steps=3, batch_size=1, super_resolution=True)
    assert len(shown) == len(copies) == 3
    for (picture, small), image in zip(copies, shown, strict=True):
        assert (picture == (255 * images[0][0]).round().byte().numpy()).all()
        assert small.shape[0] <= 64 / 2
        resized = comfy.utils.common_upscale(torch.from_numpy(small)[None].movedim(-1, 1) / 255, 48, 64, "lanczos",
                                             "disabled")
        assert torch.equal(image, resized), "resized as Apply ControlNeXt resizes what is smaller"
    assert len({small.tobytes() for _, small in copies}) == 3


def test_a_training_that_an_older_version_kept_goes_on(train, unet):
    whole, before = train(unet, steps=2, save_every=1), kept_states()
    train(unet, steps=1, save_every=1)
    (kept,) = set(kept_states()) - set(before)
    file = OUTPUT / "controlnext_training" / kept
    state = torch.load(file, weights_only=True)
    del state["place"]
    torch.save(state, file)
    assert_equal(weights(train(unet, steps=2, resume_from=kept)[0]), weights(whole[0]))


def test_a_control_enters_where_it_was_trained_to(comfy_nodes, run, train, models_folder, unet):
    one_level = narrow_unet(**ONE_LEVEL)
    before = kept_states()
    trained = train(one_level, steps=2, inject_at="conv_in", save_every=1)[0]
    kept = min(set(kept_states()) - set(before))
    assert_equal(weights(train(one_level, steps=2, resume_from=kept)[0]), weights(trained))
    further = train(one_level, steps=1, controlnext=trained)[0]
    comfy_nodes["ControlNeXtSave"].execute(further, "controlnext/placed")
    file = models_folder / "controlnext" / "placed.safetensors"
    (OUTPUT / "controlnext" / "placed_00001_" / "controlnet.safetensors").rename(file)
    loaded = run("ControlNeXtLoader", controlnext_name=file.name, variant="auto")
    image, latent = torch.rand(1, 64, 64, 3), torch.zeros(1, 4, 8, 8)
    by_itself, there, elsewhere = (
        sample(run("ControlNeXtApply", model=unet, controlnext=loaded, image=image, strength=1.0, start_percent=0.0,
                   end_percent=1.0, inject_at=place), cond(unet), cond(unet, 1), latent)
        for place in ("auto", "conv_in", "down_0"))
    assert torch.equal(by_itself, there)
    assert not torch.equal(by_itself, elsewhere)


@pytest.mark.parametrize("place", ["down_0", "before_middle", "middle"])
def test_control_can_be_trained_for_any_place(train, unet, place):
    assert all(value.any() for value in weights(train(unet, steps=2, inject_at=place, trainable="module")[0]).values())


def test_of_a_training_that_is_killed_while_it_is_kept_just_whole_states_are_listed(train, unet, comfy_nodes):
    if torch.cuda.is_available():
        pytest.skip("with a GPU, autograd has threads that a copy of a process lacks")
    settings = dict(steps=2, save_every=1, batch_size=1, controlnext=None, trainable="module", filename_prefix="killed")
    train(unet, **settings)
    before = {name: (OUTPUT / "controlnext_training" / name).read_bytes() for name in kept_states()}
    size = len(before["killed_00001_step_1.pt"])
    folder = OUTPUT / "controlnext_training"
    assert any([kill_while_writing(lambda: train(unet, **settings), folder, written)
                for written in (size // 2, size + size // 2)])
    listed = comfy_nodes["ControlNeXtTrain"].INPUT_TYPES()["optional"]["resume_from"][1]["options"]
    assert {"none", *before} <= set(listed)
    assert all((folder / name).read_bytes() == content for name, content in before.items())
    whole = torch.load(folder / "killed_00001_step_1.pt", weights_only=True)
    for name in listed:
        if name.startswith("killed"):
            assert torch.load(folder / name, weights_only=True).keys() == whole.keys()


def test_a_training_that_the_disk_refuses_goes_on_and_says_so(train, unet, caplog):
    caplog.set_level("INFO")
    before = kept_states()
    with full_disk(100_000):
        refused = train(unet, steps=2, save_every=1)
    assert kept_states() == before and not list((OUTPUT / "controlnext_training").glob("test*.part"))
    for step in (1, 2):
        assert re.search(rf"step {step} is not saved; filename_prefix: test_\d+_step_{step}\.pt could not be written "
                         r"\(File too large\), .*\.\n", caplog.text)
    assert_equal(weights(refused[0]), weights(train(unet, steps=2)[0]))


def test_what_ended_a_training_is_told_also_when_the_disk_refuses_to_keep_it(train, unet, caplog):
    caplog.set_level("INFO")
    steps = []

    def fail_in_the_second_step(module, args, output):
        steps.append(None)
        if len(steps) == 2:
            raise RuntimeError("the original reason")
    hook = unet.model.diffusion_model.register_forward_hook(fail_in_the_second_step)
    with full_disk(100_000), pytest.raises(RuntimeError, match="^the original reason$"):
        train(unet)
    hook.remove()
    assert re.search(r"stopped after step 1 of 6 and not saved; .* could not be written \(File too large\)",
                     caplog.text)


def test_checkpointing_saving_and_previews_change_nothing(train, unet, monkeypatch):
    previews = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK",
                        lambda value, total, preview, node_id=None: previews.append(preview))
    monkeypatch.setattr(comfy.cli_args.args, "preview_method", comfy.cli_args.LatentPreviewMethod.Latent2RGB)
    plain = train(unet, steps=4)
    before = kept_states()
    other = train(unet, steps=4, gradient_checkpointing=True, save_every=2, preview_every=3)
    assert [preview[1].size for preview in previews if preview] == [(8, 8)]
    assert [name[-9:] for name in sorted(set(kept_states()) - set(before))] == ["step_2.pt", "step_4.pt"]
    assert torch.allclose(torch.tensor(other[1]["loss"]), torch.tensor(plain[1]["loss"]), rtol=1e-4)


def test_saved_files_are_the_reference_s_and_sample_the_same_loaded(comfy_nodes, run, train, models_folder, goldens):
    model = narrow_unet()
    trained, _, _, with_unet = train(model, steps=1, controlnext=None, scale_learning_rate=0.0)
    comfy_nodes["ControlNeXtSave"].execute(trained, "controlnext/test")
    saved = OUTPUT / "controlnext" / "test_00001_"
    shapes = {key: list(value.shape) for key, value in load_file(saved / "controlnet.safetensors").items()}
    reference = goldens.module["sd15"]["state_dict_shapes"]
    assert shapes == {**reference, "mid_convs.1.weight": [64, 256, 1, 1], "mid_convs.1.bias": [64]}
    differences = load_file(saved / "unet.safetensors")
    assert differences and all("to_out" in name for name in differences)
    assert differences.keys() <= goldens.unet_shapes["sd15"].keys()
    with safe_open(saved / "unet.safetensors", "pt") as file:
        assert file.metadata() == {"controlnext.family": "sd15", "controlnext.place": "down_0",
                                   "controlnext.unet": "difference"}
    for file in saved.iterdir():
        file.rename(models_folder / "controlnext" / f"trained_{file.name}")
    loaded = run("ControlNeXtLoader", controlnext_name="trained_controlnet.safetensors", variant="auto")
    assert loaded.variant == "sd15"
    again = run("ControlNeXtUNetLoader", model=model, unet_name="trained_unet.safetensors", strength=1.0, mode="auto")
    image, latent = torch.rand(1, 64, 64, 3), torch.zeros(1, 4, 8, 8)
    samples = [sample(run("ControlNeXtApply", model=unet, controlnext=controlnext, image=image, strength=1.0,
                          start_percent=0.0, end_percent=1.0), cond(model), cond(model, 1), latent)
               for unet, controlnext in ((with_unet, trained), (again, loaded), (model, loaded))]
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


def test_a_controlnext_is_trained_on_from_where_it_is(train, unet):
    first = train(unet, steps=2)[0]
    still = train(unet, steps=1, controlnext=first, learning_rate=0.0, unet_learning_rate=0.0,
                  scale_learning_rate=0.0)[0]
    assert_equal(weights(still), weights(first))
    before = {name: value.clone() for name, value in weights(first).items()}
    train(unet, steps=2, controlnext=first, trainable="module")
    assert_equal(weights(first), before)


@pytest.mark.parametrize("kind", [comfy.model_sampling.V_PREDICTION, comfy.model_sampling.CONST])
def test_models_that_predict_v_or_flow_are_trained(train, run, unet, kind):
    if kind is comfy.model_sampling.CONST:
        model = run("ModelSamplingSD3", model=unet, shift=3.0)
    else:
        model = run("ModelSamplingDiscrete", model=unet, sampling="v_prediction", zsnr=False)
    losses = train(model, steps=2, trainable="module", training_dtype="bf16")[1]["loss"]
    assert all(0.1 < loss < 100 for loss in losses)


def test_it_works_with_the_stock_loader_dataset_nodes_and_loss_graph(comfy_nodes, run, train, models_folder,
                                                                     monkeypatch):
    """Also: autograd takes weights that a loader node loaded, which are inference tensors."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent.parent / "scripts")
    import stand_in
    file = models_folder / "checkpoints" / "small.safetensors"
    save_file(stand_in.random_weights(stand_in.checkpoint_shapes(), 0), file)
    model, clip, vae = run("CheckpointLoaderSimple", ckpt_name=file.name)
    file.unlink()
    assert next(model.model.parameters()).is_inference()
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    photographs = [torch.rand(1, 64, 64, 3), torch.rand(1, 64, 128, 3)]
    latents, conditioning = run("MakeTrainingDataset", images=photographs, vae=[vae], clip=[clip], texts=["one", "two"])
    latents, conditioning = run("ResolutionBucket", latents=latents, conditioning=conditioning)
    trained, losses, _, _ = train(model, latents, photographs, conditioning, steps=2, controlnext=None)
    assert_equal(model.model.state_dict(), before)
    assert weights(trained)["mid_convs.1.weight"].shape[0] == 320
    comfy_nodes["LossGraphNode"].execute(losses, "loss")


def test_a_controlnext_whose_tensors_share_memory_is_saved(run, small, models_folder):
    weights_of = small().loaded.checkpoint.state_dict
    shared = dict.fromkeys((key for key, value in weights_of.items() if value.shape == (16,)), torch.ones(16))
    torch.save(weights_of | shared, models_folder / "controlnext" / "shared.bin")
    loaded = run("ControlNeXtLoader", controlnext_name="shared.bin", variant="auto")
    run("ControlNeXtSave", controlnext=loaded, filename_prefix="shared/control")
    saved = load_file(next((OUTPUT / "shared").glob("control_*/controlnet.safetensors")))
    assert len(shared) > 5 and all(torch.equal(saved[key], torch.ones(16)) for key in shared)


BAD = {
    "conditioning: there are 2 captions for 4 latents": dict(conditioning=2),
    "images: there are 3 control images for 4 latents": dict(images=[(8, 8)] * 3),
    "images: a control image is 64x128 where its picture is 64x64": dict(images=[(8, 8)] * 3 + [(16, 8)]),
    "caption_dropout: there is no empty caption": dict(caption_dropout=0.1),
    "unet_pattern: no UNet weight": dict(unet_pattern="to_nowhere"),
    r"unet_pattern: \*\* cannot be used as a regular expression \(nothing to repeat": dict(unet_pattern="**"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_inputs_are_one_clear_sentence(train, unet, message):
    inputs = dict(BAD[message])
    if "images" in inputs:
        inputs["images"] = pictures(inputs["images"])[1]
    if "conditioning" in inputs:
        inputs["conditioning"] = [cond(unet, seed) for seed in range(inputs["conditioning"])]
    with pytest.raises(ValueError, match=message) as error:
        train(unet, **inputs)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_a_controlnext_for_another_model_is_refused(train, unet):
    controlnext = train(unet, steps=1, trainable="module")[0]
    assert controlnext.unet_differences == {}
    with pytest.raises(ValueError, match="model: the ControlNeXt file is sd15 .* but the connected MODEL is SDXL"):
        train(narrow_unet("sdxl"), controlnext=controlnext)
    with pytest.raises(ValueError, match="controlnext: test gives 64 channels where the connected MODEL takes 32"):
        train(small_unet("sd15", model_channels=32), controlnext=controlnext)
    with pytest.raises(ValueError, match="inject_at: .* should enter at down_0, a place that .* lacks; set inject_at "
                                         "to conv_in, before_middle or middle"):
        train(narrow_unet(**ONE_LEVEL))
    with_unet = train(unet, steps=1)[0]
    with pytest.raises(ValueError, match="controlnext: test was trained with UNet weights that .* MODEL lacks"):
        train(narrow_unet(transformer_depth_output=[0, 0, 0, 0]), controlnext=with_unet)
