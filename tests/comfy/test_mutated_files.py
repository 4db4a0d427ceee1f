"""Weight files with seeded mutations: each is loaded to finite numbers, or refused in one short sentence."""

import json
import random
from pathlib import Path

import pytest
import torch
from models import NARROW, WIDTH, small_unet
from safetensors.torch import save
from test_unet_loader import differences, original, patched

from controlnext_core.families import FAMILIES
from controlnext_core.module import new_module
from controlnext_core.release_files import FAMILY_KEY, MODE_KEY, PLACE_KEY, with_scale
from controlnext_core.unet_keys import diffusers_to_ldm

SEEDS = range(30)
NAMES = ["", ".", "down_res.0.", "down_res.123456789.conv1.weight", "é\u202e\ud800", "a\nb", "x" * 5000, 1,
         "unet.conv_in.weight", "embedding.0.weight", "scale", "conv_in.lora_up.weight"]
TEXTS = ["", "sdxl", "svd_mid", "down_0", "middle", "difference", "replace", "nowhere", "é\n", "x" * 5000]
OBJECTS = [None, 7, "text", [torch.zeros(2)], {"weight": torch.zeros(2)}, float("nan")]
DTYPES = [torch.int64, torch.bool, torch.complex64, torch.uint8, torch.float8_e4m3fn, torch.float64, torch.bfloat16]
NUMBERS = [float("nan"), float("-inf"), 0.0, 1e30]
CHANGES = [
    torch.flatten, torch.sum, torch.nn.Parameter, lambda tensor: tensor[None], lambda tensor: tensor[:0],
    lambda tensor: tensor.reshape(*[1] * 70, -1), lambda tensor: tensor.movedim(0, -1),
    lambda tensor: torch.cat([tensor, tensor]), lambda tensor: torch.cat([tensor, tensor])[:len(tensor)],
    lambda tensor: tensor.to_sparse(), lambda tensor: tensor.to("meta"),
    lambda tensor: tensor.flatten()[:1].expand(tensor.shape),
    lambda tensor: torch.nested.nested_tensor([tensor, tensor]),
]
HEADERS = [{}, [], {"a": {}}, {"a": {"dtype": "F32", "shape": [2 ** 40], "data_offsets": [0, 4]}},
           {"a": {"dtype": "F99", "shape": [], "data_offsets": [0, 0]}}, {"__metadata__": None},
           {"__metadata__": {"a": 1}}]


def some(state_dict: dict, draw: random.Random) -> list:
    """A few keys, or all of them."""
    return draw.sample(list(state_dict), min(draw.choice([1, 1, 2, 9, 999]), len(state_dict)))


def replacing(choices: list, replace):
    """A mutation that puts ``replace(tensor, choice)`` in the place of some tensors."""
    def mutate(state_dict, draw):
        choice = draw.choice(choices)
        return state_dict | {key: replace(state_dict[key], choice) for key in some(state_dict, draw)}
    return mutate


def renamed(state_dict, draw):
    names = {key: draw.choice(NAMES) for key in some(state_dict, draw)[:3]}
    return {names.get(key, key): value for key, value in state_dict.items()}


def without_some(state_dict, draw):
    out = some(state_dict, draw)
    return {key: value for key, value in state_dict.items() if key not in out}


def without_a_part(state_dict, draw):
    part = draw.choice(list(state_dict)).rsplit(".", draw.choice([1, 2, 3]))[0]
    return {key: value for key, value in state_dict.items() if not key.startswith(part)}


def cut_everywhere(state_dict, draw):
    """Every tensor smaller where it has one width, so that all still agree."""
    width, other = draw.choice([8, 16, 32, 64, 128]), draw.choice([0, 1, 2, 3, 5, 7])

    def cut(tensor):
        return tensor[tuple(slice(other if size == width else None) for size in tensor.shape)]
    return {key: cut(value) for key, value in state_dict.items()}


def prefixed(state_dict, draw):
    prefix = draw.choice(["module.", "unet.", "controlnext.", "x.", "model.diffusion_model."])
    beside = draw.choice([{}, {"unet.conv_in.weight": torch.zeros(2)}, {"controlnext.scale": torch.ones(())}])
    return {prefix + key: value for key, value in state_dict.items()} | beside


def wrapped(state_dict, draw):
    return draw.choice([{"state_dict": state_dict}, {"state_dict": {"state_dict": state_dict}}, {"state_dict": None},
                        {"model": state_dict, "step": 3}, [state_dict], torch.zeros(2), 7, None, {},
                        {1: torch.zeros(2)}, {0: state_dict}])


MUTATIONS = [
    renamed, without_some, without_a_part, cut_everywhere, prefixed, wrapped,
    replacing(CHANGES, lambda tensor, change: change(tensor)), replacing(DTYPES, torch.Tensor.to),
    replacing(NUMBERS, torch.full_like), replacing(OBJECTS, lambda tensor, other: other),
]


def cut_short(data: bytes, draw) -> bytes:
    return data[:draw.randrange(len(data))]


def with_random_bytes(data: bytes, draw) -> bytes:
    changed, end = bytearray(data), min(draw.choice([8, 400, 10 ** 9]), len(data))
    for _ in range(draw.choice([1, 4, 40])):
        changed[draw.randrange(end)] = draw.randrange(256)
    return bytes(changed)


def with_another_length(data: bytes, draw) -> bytes:
    return draw.choice([0, 1, 2 ** 31, 2 ** 63, 2 ** 64 - 1]).to_bytes(8, "little") + data[8:]


def with_another_header(data: bytes, draw) -> bytes:
    header = json.dumps(draw.choice(HEADERS)).encode()
    return len(header).to_bytes(8, "little") + header + data[:draw.randrange(40)]


def write(folder: Path, weights: dict, draw: random.Random) -> Path:
    """A mutated file of these weights, by its ending a pickle or safetensors."""
    path = folder / f"mutated{draw.choice(['.safetensors', '.SFT', '.bin', '.pt'])}"
    mutated = weights
    for _ in range(draw.choice([0, 1, 1, 2])):
        try:
            mutated = draw.choice(MUTATIONS)(mutated, draw)
        except Exception:  # what it is already bears no more
            break
    if path.suffix in (".bin", ".pt"):
        torch.save(mutated, path)
    else:
        metadata = {key: draw.choice(TEXTS) for key in (FAMILY_KEY, PLACE_KEY, MODE_KEY) if draw.random() < 0.3}
        try:
            path.write_bytes(save({key: value.contiguous() for key, value in mutated.items()}, metadata))
        except Exception:  # no .safetensors can hold it
            path.write_bytes(save(weights, metadata))
    if draw.random() < 0.3:
        change = draw.choice([cut_short, with_random_bytes, with_another_length, with_another_header])
        path.write_bytes(change(path.read_bytes(), draw))
    return path


def loaded_and_refused(folder: Path, weights: dict, load) -> tuple[list, set[str]]:
    """(what ``load(file name)`` gave, the sentences of what it refused) for a mutated file of each seed."""
    given, refused = [], set()
    for seed in SEEDS:
        path = write(folder, weights, random.Random(seed))
        try:
            given.append(load(path.name))
        except ValueError as error:
            message = str(error)
            assert type(error) is ValueError and len(message) < 500 and message.isprintable() and message.endswith(".")
            refused.add(message)
        path.unlink()
    return given, refused


@pytest.fixture(scope="module")
def unet():
    return small_unet("sd15")


@pytest.fixture
def folder(models_folder):
    return models_folder / "controlnext"


def test_a_mutated_control_gives_features_or_one_short_sentence(run, folder, unet):
    weights = with_scale(new_module(FAMILIES["sd15"], out=WIDTH, **NARROW).state_dict(), 0.5)
    image = torch.zeros(1, 64, 64, 3)

    def load(name: str) -> torch.Tensor:
        controlnext = run("ControlNeXtLoader", controlnext_name=name, variant="auto")
        run("ControlNeXtApply", model=unet, controlnext=controlnext, image=image, strength=1.0, start_percent=0.0,
            end_percent=1.0)
        with torch.inference_mode():
            return controlnext.patcher.model(image.movedim(-1, 1), torch.tensor([500.0]), 1, False)
    given, refused = loaded_and_refused(folder, weights, load)
    assert {features.shape for features in given} == {(1, WIDTH, 8, 8)}
    assert len(refused) > 9


def test_mutated_unet_weights_are_finite_or_one_short_sentence(run, folder, unet):
    names = {key: name for name, key in diffusers_to_ldm(original(unet)).items()}
    weights = {names[key]: value for key, value in differences(unet, keys=("attn2.to_out", "norm2")).items()}

    def load(name: str):
        return run("ControlNeXtUNetLoader", model=unet, unet_name=name, strength=1.0, mode="auto")
    given, refused = loaded_and_refused(folder, weights, load)
    assert given and all(model.patches for model in given)
    assert all(patched(model, key.removeprefix("diffusion_model.")).isfinite().all()
               for model in given for key in model.patches)
    assert len(refused) > 9
