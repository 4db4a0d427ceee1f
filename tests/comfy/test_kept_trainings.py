"""What Train ControlNeXt takes from a kept training and over links: what it can use, or a refusal in one sentence."""

import copy
import os
import random
import re
from pathlib import Path

import folder_paths
import numpy as np
import pytest
import torch
from models import NARROW, small_unet
from sampling import TRAINING, cond, picture

from controlnext_core.families import FAMILIES
from controlnext_core.module import new_module

FOLDER = Path(folder_paths.get_output_directory()) / "controlnext_training"
NAN, INF = float("nan"), float("inf")
WITH_UNET = dict(ema=0.9, unet_pattern="to_out|to_k")
MODULE_ONLY = dict(trainable="module", scale_learning_rate=0.0)
SETTINGS = TRAINING | dict(steps=2, batch_size=2, learning_rate=1e-3, unet_learning_rate=1e-3,
                           gradient_checkpointing=False, filename_prefix="mutated")
TINY = dict(model_channels=32, num_res_blocks=[1, 1], channel_mult=[1, 1], transformer_depth=[1, 0],
            transformer_depth_output=[0, 0, 0, 0])
LINKS = ("latents", "images", "conditioning", "empty_conditioning", "controlnext", "model")
WIDGETS = (*SETTINGS, "resume_from", "caption_dropout", "ema", "unet_pattern", "min_snr_gamma", "warmup_steps",
           "grad_accumulation_steps", "inject_at", "super_resolution", "teacher_strength", "teacher_share",
           "scale_learning_rate")
NUMBERS = (0, -1, 1, 2.0, 0.5, 10 ** 9, -10 ** 9, 10 ** 30, 10 ** 400, 1e300, NAN, INF, -INF, np.float32(NAN),
           np.int64(2), np.float64(0.5))
THINGS = (None, "", "x", "x" * 5000, "a\nb", b"bytes", [], {}, (1, 2), object(), torch.zeros(2), np.zeros(2))


@pytest.fixture(scope="module")
def unet():
    return small_unet("sd15", **TINY)


@pytest.fixture(scope="module")
def small(pack):
    module = new_module(FAMILIES["sd15"], out=32, **NARROW)
    return pack("nodes.runtime.loaded").trained_controlnext(module.state_dict(), "sd15", "small", {})


@pytest.fixture(scope="module")
def train(run, small):
    """train(model, **inputs): the node's outputs for two samples; None is an input that is not connected."""
    def run_training(model, **inputs):
        generator = torch.Generator().manual_seed(1)
        given = {"model": [model], "controlnext": [small], "images": [picture(0), picture(1)],
                 "latents": [{"samples": torch.randn(1, 4, 8, 8, generator=generator)} for _ in range(2)],
                 "conditioning": [cond(model, 0), cond(model, 1)], **lists(**SETTINGS), **inputs}
        return run("ControlNeXtTrain", **{name: value for name, value in given.items() if value is not None})
    return run_training


def lists(**settings) -> dict:
    return {name: [value] for name, value in settings.items()}


def kept_after(settings: dict, train, unet) -> dict:
    """What a training of one step keeps."""
    train(unet, **lists(**settings, steps=1, save_every=1, filename_prefix="whole"))
    file = max(FOLDER.glob("whole_*.pt"), key=lambda path: path.stat().st_mtime_ns)
    return torch.load(file, weights_only=True)


@pytest.fixture(scope="module")
def kept(train, unet) -> list[tuple[dict, dict]]:
    """(settings, what a training with them keeps) with everything that there is, and with little."""
    return [(settings, kept_after(settings, train, unet)) for settings in (WITH_UNET, MODULE_ONLY)]


def put(state: object, name: str = "mutated.pt") -> str:
    torch.save(state, FOLDER / name)
    return name


def entries(value) -> list[tuple]:
    """(holder, key) of all that a nested value holds."""
    keys = {dict: list, list: lambda items: range(len(items))}.get(type(value), lambda _: ())(value)
    return [found for key in keys for found in ((value, key), *entries(value[key]))]


def tensors_in(state: dict) -> list[tuple]:
    return [(holder, key) for holder, key in entries(state) if torch.is_tensor(holder[key])]


def an_entry_is_missing(state: dict, draw: random.Random) -> None:
    holder, key = draw.choice(entries(state))
    del holder[key]


def a_great_part_is_something_else(state: dict, draw: random.Random) -> None:
    state[draw.choice(list(state))] = draw.choice((*THINGS[:-3], *NUMBERS[:-3], torch.zeros(2)))


def an_entry_is_something_else(state: dict, draw: random.Random) -> None:
    holder, key = draw.choice(entries(state))
    holder[key] = draw.choice((*THINGS, *NUMBERS))


def an_entry_has_another_name(state: dict, draw: random.Random) -> None:
    holder, key = draw.choice([(holder, key) for holder, key in entries(state) if isinstance(holder, dict)])
    holder[draw.choice((*THINGS[:4], 7, -1, "scale", f"module.{key}"))] = holder.pop(key)


def a_list_is_longer(state: dict, draw: random.Random) -> None:
    lists_in = [holder[key] for holder, key in entries(state) if isinstance(holder[key], list)]
    draw.choice(lists_in).append(draw.choice((1.0, NAN, torch.zeros(3), None, "x")))


def a_tensor_has_another_form(state: dict, draw: random.Random) -> None:
    holder, key = draw.choice(tensors_in(state))
    holder[key] = draw.choice((
        lambda value: value[None], lambda value: value.flatten()[:1], lambda value: value.flatten()[:0],
        lambda value: value.half(), lambda value: value.double(), lambda value: value.to(torch.int64),
        lambda value: value.to_sparse() if value.ndim else value, lambda value: value.to("meta"), lambda value: value.T,
        lambda value: value.new_zeros(()).expand(value.shape or (10 ** 12,)), lambda value: value.to(torch.complex64),
        lambda value: torch.nn.Parameter(value.float()), lambda value: value.new_zeros(3)))(holder[key])


def a_tensor_has_other_numbers(state: dict, draw: random.Random) -> None:
    for holder, key in draw.sample(tensors_in(state), draw.choice((1, 1, 5))):
        factor = draw.choice((NAN, INF, -1, 1e20, 1e38, 0))
        holder[key] = (holder[key].float() * factor).to(holder[key].dtype)


def two_tensors_are_one(state: dict, draw: random.Random) -> None:
    (holder, key), (other, name) = draw.sample(tensors_in(state), 2)
    holder[key] = other[name]


def the_counts_are_others(state: dict, draw: random.Random) -> None:
    state[draw.choice(("step", "losses", "scale", "family", "place", "average"))] = draw.choice((
        -10 ** 9, 10 ** 9, 10 ** 400, NAN, INF, 1e300, True, 1.0, "sdxl", "svd_mid", "middle", "block_3", "nowhere",
        [], [NAN], [1.0] * 5, None))


def it_goes_round(state: dict, draw: random.Random) -> None:
    holder, key = draw.choice(entries(state))
    holder[key] = state


STATE_FAULTS = (an_entry_is_missing, a_great_part_is_something_else, an_entry_is_something_else,
                an_entry_has_another_name, a_list_is_longer, a_tensor_has_another_form, a_tensor_has_other_numbers,
                two_tensors_are_one, the_counts_are_others, it_goes_round)


def a_mutated_state(kept, draw: random.Random) -> tuple[dict, str]:
    """(settings, name of a kept training) of which something is not as it was written."""
    settings, state = copy.deepcopy(draw.choice(kept))
    if draw.random() < 0.7:
        del state["digest"]  # as an older version, so that all else is looked at
    for fault in draw.sample(STATE_FAULTS, draw.choice((1, 1, 2))):
        fault(state, draw)
    try:
        return settings, put(state)
    except (AttributeError, TypeError, NotImplementedError):  # what cannot be written
        return settings, put(draw.choice(THINGS[:-3]))


def a_damaged_file(kept, draw: random.Random) -> tuple[dict, str]:
    settings, state = draw.choice(kept)
    file = FOLDER / put(state)
    content = bytearray(file.read_bytes())
    fate = draw.choice(("cut", "flipped", "filled", "other", "doubled"))
    at = draw.randrange(len(content))
    if fate == "cut":
        del content[at:]
    elif fate == "flipped":
        content[at] ^= 1 << draw.randrange(8)
    elif fate == "filled":
        content[at:at + 300] = draw.choice((b"\0", b"\xff")) * 300
    elif fate == "doubled":
        content += bytes(content)
    else:
        content = draw.choice((b"", b"text", b"PK\x03\x04", b"\x80\x02}q\x00.", b"\x80\x02]q\x00h\x00a."))
    file.write_bytes(content)
    return settings, file.name


def odd_tensor(tensor: torch.Tensor, draw: random.Random) -> torch.Tensor:
    return draw.choice((
        lambda: tensor * NAN, lambda: tensor * INF, lambda: tensor[:0], lambda: tensor[..., :0], lambda: tensor[0],
        lambda: tensor[None], lambda: tensor.half(), lambda: tensor.double(), lambda: tensor.byte(), lambda: tensor > 0,
        lambda: torch.cat([tensor, tensor[..., :1]], -1), lambda: tensor[:, :1], lambda: 1.02 * tensor - 0.01,
        lambda: torch.cat([tensor, tensor]), lambda: tensor.movedim(1, 2), lambda: tensor.movedim(1, -1)))()


def odd_data(model, draw: random.Random) -> dict:
    """Inputs of a training, one of them not as it should be."""
    which = draw.choice(("latents", "images", "conditioning", "empty_conditioning"))
    many = {"latents": [{"samples": torch.randn(1, 4, 8, 8)} for _ in range(2)], "images": [picture(0), picture(1)],
            "conditioning": [cond(model, 0), cond(model, 1)], "empty_conditioning": [cond(model, 2)]}[which]
    at = draw.randrange(len(many))
    if draw.random() < 0.2:
        many = draw.choice(([], many[:1], many * 3, [[]] if "cond" in which else many[:1]))
    elif which == "latents":
        many[at] = {"samples": odd_tensor(many[at]["samples"], draw)}
    elif which == "images":
        many[at] = odd_tensor(many[at], draw)
    else:
        value = many[at][0][0]
        many[at] = [[draw.choice((value * NAN, value[:0], value[:, :0], value[:, :20], value.half())), {}]]
    return {"caption_dropout": [0.5], "empty_conditioning": [cond(model, 2)], which: many}


def odd_settings(draw: random.Random) -> dict:
    return {name: [draw.choice((*NUMBERS, *THINGS))] for name in draw.sample(WIDGETS, draw.choice((1, 1, 3)))}


def attempt(train, unet, kept, draw: random.Random) -> None:
    """Train with something mutated: it must give a finite result or one sentence that names an input."""
    inputs = {}
    if draw.random() < 0.7:
        settings, name = draw.choice((a_mutated_state, a_mutated_state, a_damaged_file))(kept, draw)
        inputs = lists(**settings, resume_from=name)
    if not inputs or draw.random() < 0.1:
        inputs |= draw.choice((lambda: odd_data(unet, draw), lambda: odd_settings(draw)))()
    try:
        controlnext, losses, steps, _ = train(unet, **inputs)
    except ValueError as error:
        assert_one_sentence(error)
        return
    found = controlnext.loaded.checkpoint
    assert all(value.isfinite().all() for value in (*found.state_dict.values(), *controlnext.unet_differences.values()))
    assert len(losses["loss"]) == steps and np.isfinite(losses["loss"]).all()


def assert_one_sentence(error: ValueError) -> None:
    text = str(error)
    assert re.fullmatch(rf"({'|'.join((*LINKS, *WIDGETS))}): .{{10,490}}\.", text) and text.isprintable(), text


@pytest.mark.parametrize("seed", range(24))
def test_what_is_mutated_gives_a_finite_result_or_one_sentence(train, unet, kept, seed):
    attempt(train, unet, kept, random.Random(seed))


SAMPLES = {
    "moments of another shape": lambda state: state["optimizer"]["state"][1].update(exp_avg=torch.zeros(3)),
    "a moment is missing": lambda state: state["optimizer"]["state"][1].pop("exp_avg_sq"),
    "negative squares": lambda state: state["optimizer"]["state"][1]["exp_avg_sq"].sub_(1),
    "steps that never were": lambda state: state.update(step=-10 ** 9),
    "more steps than losses": lambda state: state.update(step=10 ** 9),
    "an average of NaN": lambda state: state["average"][3].mul_(NAN),
    "a difference of another shape": lambda state: state["differences"].update(
        {key: value[None] for key, value in list(state["differences"].items())[:1]}),
    "weights of another layout": lambda state: state.update(family="svd_mid"),
    "a scale of NaN": lambda state: state.update(scale=NAN),
    "a place that nobody knows": lambda state: state.update(place="nowhere"),
    "random numbers of nothing": lambda state: state["generator"].zero_(),
    "losses that are none": lambda state: state["losses"].__setitem__(0, NAN),
}


@pytest.mark.parametrize("digest", [True, False])
@pytest.mark.parametrize("sample", SAMPLES)
def test_a_kept_training_is_refused_whole_whatever_is_wrong_with_it(train, unet, kept, sample, digest):
    settings, state = copy.deepcopy(kept[0])
    SAMPLES[sample](state)
    if not digest:
        del state["digest"]
    refused = r"^resume_from: mutated.pt is not a saved training of Train ControlNeXt, or it is damaged \(\w+\); "
    with pytest.raises(ValueError, match=refused) as error:
        train(unet, **lists(**settings, resume_from=put(state)))
    assert_one_sentence(error.value)


def test_a_number_that_is_another_is_damage(train, unet, kept):
    settings, state = copy.deepcopy(kept[0])
    state["module"]["mid_convs.1.weight"][0, 0] += 1e-6
    with pytest.raises(ValueError, match="or it is damaged .digest.; "):
        train(unet, **lists(**settings, resume_from=put(state)))


def weights(controlnext) -> list[torch.Tensor]:
    return [*controlnext.loaded.checkpoint.state_dict.values(), *controlnext.unet_differences.values()]


def test_the_kept_training_of_an_older_version_goes_on_to_the_same_result(train, unet, kept):
    for settings, state in copy.deepcopy(kept):
        whole = train(unet, **lists(**settings))
        del state["digest"], state["place"]
        for group in state["optimizer"]["param_groups"]:
            group.pop("decoupled_weight_decay", None)  # PyTorch has it since 2.7
        resumed = train(unet, **lists(**settings, resume_from=put(state)))
        assert resumed[1:3] == whole[1:3]
        assert all(map(torch.equal, weights(resumed[0]), weights(whole[0])))


@pytest.fixture
def listed(comfy_nodes):
    return lambda: comfy_nodes["ControlNeXtTrain"].INPUT_TYPES()["optional"]["resume_from"][1]["options"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_only_files_are_listed_and_read(train, unet, kept, listed, tmp_path):
    settings, state = kept[0]
    inside, outside = FOLDER / put(state, "listed.pt"), tmp_path / "outside.pt"
    outside.write_bytes(inside.read_bytes())
    os.mkfifo(FOLDER / "pipe.pt")
    (FOLDER / "folder.pt").mkdir()
    (FOLDER / "nowhere.pt").symlink_to(tmp_path / "nothing.pt")
    (FOLDER.parent / "beside.pt").write_bytes(inside.read_bytes())
    names = ("pipe.pt", "folder.pt", "nowhere.pt", "../beside.pt", str(outside), "missing.pt", "", None)
    assert "listed.pt" in listed() and not {*names} & {*listed()}
    for name in names:
        with pytest.raises(ValueError, match="^resume_from: .* came in where one of none, .* is expected; ") as error:
            train(unet, **lists(**settings), resume_from=[name])
        assert_one_sentence(error.value)
    for name in names[:3]:
        os.rename(FOLDER / name, tmp_path / name)


@pytest.fixture
def untouched(unet):
    """The MODEL, which must compute nothing."""
    hook = unet.model.diffusion_model.register_forward_hook(lambda *_: pytest.fail("a step was made"))
    yield unet
    hook.remove()


@pytest.mark.parametrize("value", [NAN, INF, -INF, -1, 10 ** 400, 1e300, "x", None, [1], torch.zeros(2), np.zeros(2),
                                   np.float32(NAN)], ids=str)
@pytest.mark.parametrize("name, expected", [
    ("steps", "a whole number from 1 to 1000000"), ("batch_size", "a whole number from 1 to 1024"),
    ("learning_rate", "a number from 0.0 to 1.0"), ("seed", "a whole number from 0 to 18446744073709551615"),
    ("ema", "a number from 0.0 to 0.99999"), ("grad_accumulation_steps", "a whole number from 1 to 1024"),
    ("teacher_share", "a number from 0.0 to 1.0"), ("gradient_checkpointing", "true or false")])
def test_a_number_that_no_widget_takes_is_refused_before_the_first_step(train, untouched, name, expected, value):
    with pytest.raises(ValueError, match=f"^{name}: .+ came in where {expected} is expected; ") as error:
        train(untouched, **{name: [value]})
    assert_one_sentence(error.value)


@pytest.mark.parametrize("value", ["x", "", "x" * 5000, "a\nb", None, 1, ["bf16"], np.array(["bf16", "fp32"])], ids=str)
@pytest.mark.parametrize("name, choices", [("training_dtype", "bf16, fp32"), ("inject_at", "auto, conv_in, .*block_11"),
                                           ("trainable", "module, module and UNet weights")])
def test_a_choice_that_is_none_is_refused_with_the_choices(train, untouched, name, choices, value):
    with pytest.raises(ValueError, match=f"^{name}: .+ came in where one of {choices} is expected; ") as error:
        train(untouched, **{name: [value]})
    assert_one_sentence(error.value)


@pytest.mark.parametrize("value", [None, 3, torch.zeros(2)], ids=str)
@pytest.mark.parametrize("name", ["unet_pattern", "filename_prefix"])
def test_a_text_that_is_none_is_refused(train, untouched, name, value):
    with pytest.raises(ValueError, match=f"^{name}: .* came in where a text is expected; "):
        train(untouched, **{name: [value]})


@pytest.mark.parametrize("prefix", ["../outside", "/outside/name"])
def test_a_name_outside_of_the_folder_is_refused(train, untouched, prefix):
    with pytest.raises(ValueError, match="^filename_prefix: .* names no place below output/") as error:
        train(untouched, filename_prefix=[prefix])
    assert_one_sentence(error.value)


def test_a_whole_number_may_come_as_another_kind_of_number(train, unet):
    plain = train(unet, steps=[1], seed=[7])
    other = train(unet, steps=[1.0], seed=[np.int64(7)], batch_size=[np.float32(2)], gradient_checkpointing=[0])
    assert other[1:3] == plain[1:3] and type(other[2]) is int


@pytest.mark.parametrize("name", ["steps", "training_dtype"])
def test_an_empty_list_is_refused(train, untouched, name):
    with pytest.raises(ValueError, match=f"^{name}: an empty list came in"):
        train(untouched, **{name: []})


def nan_data(model) -> dict:
    latents = [{"samples": torch.randn(1, 4, 8, 8)}, {"samples": torch.full((1, 4, 8, 8), NAN)}]
    pooled = cond(model, 1, pooled_output=torch.full((1, 8), INF))
    return {"latents": latents, "images": [picture(0), picture(1) * NAN], "conditioning": [cond(model), pooled],
            "empty_conditioning": [[[cond(model)[0][0] * NAN, {}]]]}


@pytest.mark.parametrize("name", ["latents", "images", "conditioning", "empty_conditioning"])
def test_data_that_are_not_finite_are_named_before_the_first_step(train, untouched, name):
    with pytest.raises(ValueError, match=f"^{name}: a.* holds NaN or infinite values; check the node"):
        train(untouched, **{name: nan_data(untouched)[name]})


IMAGE = picture(1)
ODD_DATA = {
    "images: .*64x64x3; check": dict(images=[picture(0), IMAGE[0]]),
    "images: .*1x1x64x64x3; check": dict(images=[picture(0), IMAGE[None]]),
    "images: .*so there is no picture": dict(images=[picture(0), IMAGE[:0]]),
    "images: it holds uint8": dict(images=[picture(0), IMAGE.byte()]),
    "latents: there are none": dict(latents=[]),
    r"latents: a LATENT is \[0, 4, 8, 8\]": dict(latents=[{"samples": torch.zeros(0, 4, 8, 8)}]),
    "latents: a LATENT has 16 channels where those of the connected MODEL have 4": dict(
        latents=[{"samples": torch.zeros(2, 16, 8, 8)}]),
    "empty_conditioning: it holds no caption": dict(empty_conditioning=[[]]),
    "conditioning: a caption is .*so there is nothing in it": dict(conditioning=[[[torch.zeros(0, 77, 768), {}]]]),
}


@pytest.mark.parametrize("message", ODD_DATA)
def test_data_of_another_form_are_refused_before_the_first_step(train, untouched, message):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        train(untouched, **ODD_DATA[message])
    assert_one_sentence(error.value)


@pytest.mark.parametrize("made", [lambda image: image.half(), lambda image: torch.cat([image, image[..., :1]], -1),
                                  lambda image: image.movedim(1, 2).contiguous().movedim(1, 2)],
                         ids=["float16", "alpha", "not contiguous"])
def test_images_in_another_form_train_the_same(train, unet, made):
    images = [picture(seed).half().float() for seed in range(2)]
    losses = [train(unet, steps=[1], images=some)[1] for some in (images, [made(image) for image in images])]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("resumed", [False, True])
def test_what_was_trained_for_a_text_encoder_of_another_width_is_refused(train, unet, kept, resumed):
    other, settings = small_unet("sd15", **TINY, context_dim=96), lists(**WITH_UNET)
    if resumed:
        given = {"resume_from": [put(kept[0][1])]}
    else:
        given = {"controlnext": [train(unet, **settings, steps=[1])[0]]}
    with pytest.raises(ValueError, match="^model: .* with a context of 96, which is not supported") as error:
        train(other, **settings, **given)
    assert_one_sentence(error.value)
