"""What is computed once stays, right and within its bound: the feature cache alone and in ComfyUI's samplings."""

import contextlib
import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import comfy.model_management
import comfy.sample
import comfy.samplers
import psutil
import pytest
import torch
from models import WIDTH, narrowed, small_unet
from safetensors.torch import save_file
from sampling import cond, one_call_each, picture, sample

FAMILIES = {"sd15": "sd15", "sdxl": "sdxl", "svd": "svd"}
MB = 1024 ** 2


@pytest.fixture(scope="module")
def unets():
    return {base: small_unet(base) for base in FAMILIES.values()}


@pytest.fixture(scope="module")
def load(run, goldens, models_folder):
    """load(variant, file): a CONTROLNEXT of the goldens' weights, in a file of its own."""
    def load_file(variant: str, name: str, **changes):
        path = models_folder / "controlnext" / f"cache_{name}.safetensors"
        save_file({**narrowed(goldens.state_dict(variant)), **changes}, path)
        return run("ControlNeXtLoader", controlnext_name=path.name, variant=variant)
    return load_file


@pytest.fixture(scope="module")
def controlnexts(load):
    return {family: load(family, family) for family in FAMILIES}


def conds(model, seed: int = 0):
    extra = {}
    if model.model.model_config.unet_config.get("use_temporal_attention"):
        extra["concat_latent_image"] = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    return cond(model, seed, **extra), cond(model, seed + 1, **extra)


def sampled(model, batch: int = 1, height: int = 8, width: int = 8, prompt: int = 0, **options) -> torch.Tensor:
    options = {"cfg": 3.0, "steps": 3, **options}
    return sample(model, *conds(model, prompt), torch.zeros(batch, 4, height, width), **options)


def ask(cache, keys, size: int = MB) -> int:
    """Ask ``cache`` for every key; how many had to be computed."""
    computed = []

    def compute():
        computed.append(1)
        return (torch.empty(size, dtype=torch.uint8),)
    for key in keys:
        cache.get(key, compute)
    return len(computed)


# The cache alone


def test_what_was_used_longest_ago_goes_first(cache_of):
    cache = cache_of(4 * MB)
    for run in (["a", "b"], ["c", "d"], ["a"], ["e"]):
        ask(cache, run)
        cache.end_run()
    assert cache.size == 4 * MB
    assert ask(cache, ["a", "e"]) == 0
    assert ask(cache, ["b"]) == 1, "b was used longest ago and one had to go"


def test_a_run_larger_than_the_bound_finds_what_fitted_again(cache_of):
    """Least recently used order would find nothing: it drops every entry just before its next use."""
    cache = cache_of(6 * MB)
    assert ask(cache, range(10)) == 10
    cache.end_run()
    for _ in range(3):
        assert ask(cache, range(10)) == 4
        cache.end_run()


def test_two_runs_in_turn_that_do_not_fit_together_find_what_fitted(cache_of):
    """As a first pass and an upscaling pass do, queued again and again."""
    cache = cache_of(6 * MB)
    first, second = [("first", i) for i in range(4)], [("second", i) for i in range(4)]
    computed = []
    for _ in range(5):
        for keys in (first, second):
            computed.append(ask(cache, keys))
            cache.end_run()
    assert computed[:2] == [4, 4]
    assert sum(computed[2:]) == 8 * 2, "2 of 8 do not fit"


def test_within_a_run_nothing_is_dropped_for_something_newer(cache_of):
    cache = cache_of(4 * MB)
    ask(cache, range(8))
    assert ask(cache, range(4)) == 0


def test_what_is_larger_than_the_bound_is_not_kept_and_drops_nothing(cache_of):
    cache = cache_of(4 * MB)
    ask(cache, range(4))
    cache.end_run()
    assert ask(cache, ["large", "large"], 5 * MB) == 2
    assert ask(cache, range(4)) == 0


def test_a_bound_of_zero_keeps_nothing(cache_of):
    cache = cache_of(0)
    assert ask(cache, ["a", "a"]) == 2
    assert cache.size == 0


def test_what_two_threads_compute_at_once_is_kept_once_also_when_a_run_ends_between_them(cache_of):
    cache = cache_of(4 * MB)

    def compute_while_another_thread_does():
        ask(cache, ["a"])
        cache.end_run()
        return (torch.zeros(MB, dtype=torch.uint8),)
    cache.get("a", compute_while_another_thread_does)
    assert ask(cache, ["a"]) == 0
    assert cache.size == sum(kept.size for kept in cache.kept()) == MB


def test_threads_get_their_own_results_within_the_bound(cache_of):
    cache, wrong, limit = cache_of(50 * 1000), [], 50 * 1000

    def work(seed: int):
        generator = torch.Generator().manual_seed(seed)
        for key in torch.randint(100, (3000,), generator=generator).tolist():
            tensor, = cache.get(key, lambda key=key: (torch.full((1000,), key, dtype=torch.uint8),))
            if int(tensor[0]) != key or cache.size > limit:
                wrong.append(key)
            if key == 99:
                cache.end_run()
            if key == 98:
                cache.clear()
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert cache.size == sum(kept.size for kept in cache.kept())


# In samplings


@pytest.mark.parametrize("again", [dict(seed=77), dict(prompt=5), dict(cfg=5.0), dict(batch=3), dict(sampler="ddim")])
def test_the_same_image_size_and_schedule_run_the_module_never_again(apply, unets, controlnexts, module_runs, again):
    images, timesteps = module_runs(controlnexts["sd15"])
    controlnexts["sd15"].loaded.features.clear()
    sampled(apply(unets["sd15"], controlnexts["sd15"], picture(11)))
    assert (len(images), len(timesteps)) == (1, 3)
    sampled(apply(unets["sd15"], controlnexts["sd15"], picture(11), strength=0.4), **again)
    assert (len(images), len(timesteps)) == (1, 3)


def test_other_unet_weights_run_the_module_never_again(run, apply, unets, controlnexts, module_runs):
    """A LoRA changes what is controlled, not the control."""
    images, timesteps = module_runs(controlnexts["sd15"])
    controlnexts["sd15"].loaded.features.clear()
    before = sampled(apply(unets["sd15"], controlnexts["sd15"], picture(11)))
    model = unets["sd15"].clone()
    key = "diffusion_model.out.2.weight"
    model.add_patches({key: ("diff", (0.1 * torch.ones_like(model.model_state_dict(key)[key]),))})
    after = sampled(apply(model, controlnexts["sd15"], picture(11)))
    assert not torch.equal(after, before)
    assert (len(images), len(timesteps)) == (1, 3)


@contextlib.contextmanager
def caches_off(controlnext):
    loaded = controlnext.loaded
    limits = loaded.features.limit, loaded.image_parts.limit
    loaded.features.clear()
    loaded.features.limit = loaded.image_parts.limit = 0
    yield
    assert loaded.features.size == loaded.image_parts.size == 0
    loaded.features.limit, loaded.image_parts.limit = limits


@pytest.mark.parametrize("family, kind", [
    ("sd15", "batch"), ("sd15", "batch of images"), ("sd15", "apart"), ("sd15", "regional"), ("sd15", "bfloat16"),
    ("sdxl", "batch of images"), ("sdxl", "apart"), ("svd", "batch"), ("svd", "batch of images"), ("svd", "windows"),
])
def test_results_with_and_without_caches_are_equal_bit_for_bit(
        run, apply, unets, controlnexts, module_runs, monkeypatch, family, kind):
    controlnext, base = controlnexts[family], FAMILIES[family]
    batch, images = {"batch": (3, 1), "batch of images": (3, 3), "windows": (7, 7)}.get(kind, (1, 1))
    model = small_unet(base, torch.bfloat16) if kind == "bfloat16" else unets[base]
    model = apply(model, controlnext, picture(2, images))
    positive, negative = conds(model)
    if kind == "apart":
        one_call_each(monkeypatch, model)
    if kind == "regional":
        positive = run("ConditioningSetArea", conditioning=positive, width=32, height=64, x=32, y=0, strength=1.0)
    if kind == "windows":
        model = run("ContextWindowsManual", model=model, context_length=4, context_overlap=1, context_stride=1, dim=0,
                    context_schedule="standard_static", closed_loop=False, fuse_method="flat", freenoise=False)
    _, timesteps = module_runs(controlnext)

    def result():
        return sample(model, positive, negative, torch.zeros(batch, 4, 8, 8), cfg=3.0, steps=2)
    with caches_off(controlnext):
        off = result()
    assert len(timesteps) > 0
    timesteps.clear()
    first = result()
    assert len(timesteps) > 0
    timesteps.clear()
    second = result()
    assert not timesteps
    assert torch.isfinite(off).all()
    assert torch.equal(first, off)
    assert torch.equal(second, off)


def test_threads_that_share_a_control_get_what_each_gets_alone(pack, apply, unets, controlnexts):
    """As in multi-GPU sampling, where every device has a thread; sizes and timesteps differ to make it harder."""
    model = apply(unets["sd15"], controlnexts["sd15"], picture(91, 2))
    running = pack("nodes.runtime.resolve").model_of(model)
    control, = pack("nodes.runtime.run").controls_in(running, model.model_options["transformer_options"]).values()
    describe, both = pack("nodes.runtime.forward").describe, {"cond_or_uncond": [0, 1]}
    calls = [describe(running.sampling, torch.float32, (4, 4, size, size), torch.full((4,), sigma), both)
             for sigma in (9.0, 0.2) for size in (6, 10)]

    def features(call) -> torch.Tensor:
        with torch.inference_mode():
            return control(call)[0]
    expected = [features(call) for call in calls]
    controlnexts["sd15"].loaded.features.clear()
    control.loaded.end_run()
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(features, calls * 2))
    assert all(torch.equal(one, other) for one, other in zip(results, expected * 2, strict=True))


def stripes(height: int, width: int) -> torch.Tensor:
    """Images whose bytes are the same in any shape of as many pixels."""
    return (torch.arange(height * width) // 64 % 2).float().reshape(1, height, width, 1).expand(-1, -1, -1, 3)


@pytest.mark.parametrize("name", ["image", "shape of the same bytes", "size", "variant", "weights", "dtype"])
def test_what_changes_the_features_is_computed_anew(apply, unets, controlnexts, load, name):
    """The changed one samples as it does with empty caches, and not as the one before."""
    controlnext = before = controlnexts["svd" if name == "variant" else "sd15"]
    model = unets["svd" if name == "variant" else "sd15"]
    batch, options = 2 if name == "variant" else 1, {"steps": 1}
    image = stripes(64, 64) if name == "shape of the same bytes" else picture(21)
    first = sampled(apply(model, before, image), batch, **options)
    if name == "image":
        image = image.clone()
        image[0, 63, 63, 2] = 1 - image[0, 63, 63, 2]
    elif name == "shape of the same bytes":
        image = stripes(32, 128)
    elif name == "size":
        options |= {"height": 6, "width": 10}
    elif name == "variant":
        controlnext = type(before)(before.loaded, "svd_padded", before.name)
    elif name == "weights":
        time.sleep(0.01)  # a file written in the same tick of the file system's clock is the same file
        controlnext = load("sd15", "sd15", **{"mid_convs.1.bias": torch.linspace(-1, 1, WIDTH)})
        assert controlnext.loaded is not before.loaded
    elif name == "dtype":
        model = small_unet("sd15", torch.bfloat16)
    changed = sampled(apply(model, controlnext, image), batch, **options)
    assert changed.shape != first.shape or not torch.equal(changed, first)
    controlnext.loaded.features.clear()
    assert torch.equal(sampled(apply(model, controlnext, image), batch, **options), changed)


def test_an_image_is_known_again_in_another_batch(apply, unets, controlnexts, module_runs):
    images, timesteps = module_runs(controlnexts["sd15"])
    controlnexts["sd15"].loaded.features.clear()
    batch = picture(31, count=3)
    sampled(apply(unets["sd15"], controlnexts["sd15"], batch), batch=3)
    assert len(timesteps) == 9
    sampled(apply(unets["sd15"], controlnexts["sd15"], batch[[2, 0]]), batch=2)
    assert len(timesteps) == 9


def test_unloading_all_models_empties_the_caches_and_the_next_run_is_right(apply, unets, controlnexts, module_runs):
    """What the server does for POST /free; loading models for the next run is no reason to empty them."""
    loaded = controlnexts["sd15"].loaded
    images, timesteps = module_runs(controlnexts["sd15"])
    model = apply(unets["sd15"], controlnexts["sd15"], picture(41))
    first = sampled(model)
    assert loaded.features.size > 0
    sampled(unets["svd"], batch=2)
    comfy.model_management.load_models_gpu([unets["sdxl"], unets["svd"], model])
    assert loaded.features.size > 0
    comfy.model_management.unload_all_models()
    assert loaded.features.size == 0
    computed = len(timesteps)
    assert torch.equal(sampled(model), first)
    assert len(timesteps) == computed + 3


@pytest.mark.parametrize("interrupted", [False, True])
def test_image_parts_go_when_a_run_ends(apply, unets, controlnexts, interrupted):
    loaded = controlnexts["sd15"].loaded
    loaded.features.clear()
    sizes = []

    def callback(step, *_):
        sizes.append(loaded.image_parts.size)
        if interrupted and step == 1:
            comfy.model_management.interrupt_current_processing()
    interrupts = pytest.raises(comfy.model_management.InterruptProcessingException)
    with interrupts if interrupted else contextlib.nullcontext():
        sampled(apply(unets["sd15"], controlnexts["sd15"], picture(51)), callback=callback, steps=4)
    assert min(sizes) > 0
    assert loaded.image_parts.size == 0
    assert loaded.features.size > 0


def test_more_images_than_the_bound_are_read_anew_each_step_with_equal_results(
        apply, unets, controlnexts, module_runs, monkeypatch):
    """So a video needs no memory for all its frames' image parts, nor do they push features out."""
    images, timesteps = module_runs(controlnexts["sd15"])
    loaded = controlnexts["sd15"].loaded
    model = apply(unets["sd15"], controlnexts["sd15"], picture(61, count=3))
    loaded.features.clear()
    expected = sampled(model, batch=3)
    assert len(images) == 3
    loaded.features.clear()
    monkeypatch.setattr(loaded.image_parts, "limit", loaded.image_parts.limit // 2 ** 20)
    assert torch.equal(sampled(model, batch=3), expected)
    assert len(images) == 3 + 9
    assert loaded.features.size == 9 * WIDTH * 4 * 4 * 4


def test_the_cache_ends_with_the_model_without_the_garbage_collector(apply, unets, load):
    controlnext = load("sd15", "ends")
    model = apply(unets["sd15"], controlnext, picture(71))
    sampled(model)
    comfy.model_management.unload_all_models()
    sampled(model)
    features = weakref.ref(controlnext.loaded.features)
    assert features().size > 0
    gc.collect()
    gc.disable()
    try:
        del controlnext, model
        assert features() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("text, limit", [("0", 0), ("64", 64 * MB), ("", 512 * MB), (None, 512 * MB)])
def test_a_variable_sets_the_bound(load, monkeypatch, text, limit):
    if text is None:
        monkeypatch.delenv("CONTROLNEXT_CACHE_MB", raising=False)
    else:
        monkeypatch.setenv("CONTROLNEXT_CACHE_MB", text)
    loaded = load("sd15", f"bound_{text}").loaded
    assert (loaded.features.limit, loaded.image_parts.limit) == (limit, limit // 2)


@pytest.mark.parametrize("text", ["some", "-1", "1.5"])
def test_a_variable_that_is_no_number_of_megabytes_is_named(load, monkeypatch, text):
    monkeypatch.setenv("CONTROLNEXT_CACHE_MB", text)
    with pytest.raises(ValueError, match=f"^CONTROLNEXT_CACHE_MB: '{text}' is not a whole number of megabytes; set it"):
        load("sd15", f"wrong_{text}")


def test_a_training_under_control_can_go_back_through_kept_features(apply, unets, controlnexts):
    """Inference keeps tensors that autograd refuses, and a training would keep its graphs."""
    loaded = controlnexts["sd15"].loaded
    model = apply(small_unet("sd15"), controlnexts["sd15"], picture(81))
    positive, _ = conds(model)
    gradients = []

    def infer(apply_model, _, sigmas, extra_args=None, **__):
        return apply_model(torch.ones(1, 4, 8, 8), sigmas[:1], **extra_args)

    def train(apply_model, _, sigmas, extra_args=None, **__):
        weight = model.model.diffusion_model.input_blocks[0][0].weight.requires_grad_(True)
        for _ in range(2):  # the second time with the features that the first has kept
            with torch.enable_grad():
                apply_model(torch.ones(1, 4, 8, 8), sigmas[:1], **extra_args).sum().backward()
        gradients.append(float(weight.grad.abs().sum()))
        return torch.ones(1, 4, 8, 8)
    for sampler, inference in ((infer, True), (train, False)):
        with torch.inference_mode(inference):
            comfy.sample.sample_custom(model, torch.zeros(1, 4, 8, 8), 1.0, comfy.samplers.KSAMPLER(sampler),
                                       torch.tensor([5.0, 0.0]), positive, positive, torch.zeros(1, 4, 8, 8),
                                       disable_pbar=True, seed=1)
    assert gradients[0] > 0
    assert not any(tensor.requires_grad for kept in loaded.features.kept() for tensor in kept.on_host)


def test_memory_does_not_grow_over_queued_runs(apply, unets, controlnexts):
    """A new image each run, so that the cache is full and turns over; resident memory is level once it is."""
    loaded = controlnexts["sd15"].loaded
    loaded.features.clear()
    limit, loaded.features.limit = loaded.features.limit, MB // 8
    process, resident = psutil.Process(), []
    try:
        for index in range(40):
            model = apply(unets["sd15"], controlnexts["sd15"], picture(1000 + index))
            sampled(model, steps=1, seed=index)
            resident.append(process.memory_info().rss)
            assert loaded.features.size <= loaded.features.limit
    finally:
        loaded.features.limit = limit
    print(f"resident memory from run 10 to 40: {(resident[-1] - resident[10]) / MB:+.1f} MB")
    assert resident[-1] - resident[10] < 8 * MB
