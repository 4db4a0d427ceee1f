"""Features kept from run to run lie where ComfyUI puts models that it does not use, and are back when they are needed.

Without a GPU the way is the same: ``torch.device("cpu", 0)`` is the same memory, but no tensor's device is equal to it.
"""

import comfy.model_management
import pytest
import torch
from sampling import conds, latent, picture, sample

ELSEWHERE = torch.device("cpu", 0)
STEPS, IMAGES, SIZE = 4, 2, 1000


def ask(cache, step: int, computed: list) -> list[int]:
    """Ask for what a step needs, all of it right; how many lie on the device after each entry."""
    on_device = []
    for image in range(IMAGES):
        def compute(value=10 * step + image):
            computed.append(value)
            return torch.full((SIZE,), value), torch.full((2,), -value)
        first, second = cache.get((image, step), compute, step=step)
        assert first.tolist() == [10 * step + image] * SIZE
        assert second.tolist() == [-10 * step - image] * 2
        on_device.append(sum(entry.on_device is not None for entry in cache.kept()))
    return on_device


def test_the_device_has_in_a_first_run_the_current_steps_in_a_second_the_next_ones_too_after_a_run_none(cache_of):
    cache, computed = cache_of(10 ** 6, ELSEWHERE), []
    on_device = [ask(cache, step, computed) for step in range(STEPS)]
    assert on_device == [[1, 2]] * STEPS
    cache.end_run()
    assert not any(entry.on_device for entry in cache.kept())
    assert len(computed) == STEPS * IMAGES
    on_device = [ask(cache, step, computed) for step in range(STEPS)]
    assert on_device == [[4, 4]] * (STEPS - 1) + [[2, 2]]
    cache.end_run()
    assert not any(entry.on_device for entry in cache.kept())
    assert len(computed) == STEPS * IMAGES


def test_what_was_fetched_for_a_step_that_does_not_come_leaves(cache_of):
    cache, computed = cache_of(10 ** 6, ELSEWHERE), []
    for step in range(STEPS):
        ask(cache, step, computed)
    cache.end_run()
    ask(cache, 0, computed)
    assert ask(cache, 3, computed) == [2, 2]
    assert len(computed) == STEPS * IMAGES


def test_what_every_step_needs_stays_on_the_device_until_the_run_ends(cache_of, monkeypatch):
    """The features of a module without time: one copy in a second run, none between steps."""
    cache, cast, copies = cache_of(10 ** 6, ELSEWHERE), comfy.model_management.cast_to, []
    monkeypatch.setattr(comfy.model_management, "cast_to", lambda *args, **how: copies.append(1) or cast(*args, **how))
    for run in range(2):
        for _ in range(STEPS):
            assert torch.equal(cache.get("image", lambda: (torch.ones(SIZE),))[0], torch.ones(SIZE))
        assert len(copies) == run
        cache.end_run()
        assert not any(entry.on_device for entry in cache.kept())


def test_where_the_device_is_home_nothing_is_copied(cache_of):
    tensor = torch.ones(3)
    for host in (None, tensor.device):
        cache = cache_of(10 ** 6, host)
        assert cache.get("key", lambda: (tensor,))[0] is tensor
        cache.end_run()
        assert cache.get("key", lambda: (tensor,))[0] is tensor


def test_when_comfyui_wants_the_device_what_lies_on_the_host_stays(cache_of):
    for host, kept in ((ELSEWHERE, STEPS * IMAGES), (None, 0)):
        cache, computed = cache_of(10 ** 6, host), []
        for step in range(STEPS):
            ask(cache, step, computed)
        cache.free_device()
        assert len(cache.kept()) == kept
        assert cache.size == kept * 8 * (SIZE + 2)
        for step in range(STEPS):
            ask(cache, step, computed)
        assert len(computed) == 2 * STEPS * IMAGES - kept


@pytest.mark.parametrize("family, base, images", [("sd15", "sd15", 1), ("sdxl", "sdxl", 2), ("svd", "svd", 3)])
def test_results_are_equal_bit_for_bit_whether_features_move_or_not(apply, unets, controlnexts, module_runs, family,
                                                                    base, images):
    loaded = controlnexts[family].loaded
    assert loaded.features.host == loaded.patcher.offload_device
    _, timesteps = module_runs(controlnexts[family])
    model = apply(unets[base], controlnexts[family], picture(3, images))
    results = []
    for host in (loaded.patcher.offload_device, ELSEWHERE):
        loaded.features.clear()
        loaded.features.host = host
        for run in range(2):
            timesteps.clear()
            results.append(sample(model, *conds(model, base), latent(base, images), cfg=3.0, steps=2))
            assert bool(timesteps) == (run == 0)
    loaded.features.host = loaded.patcher.offload_device
    loaded.features.clear()
    assert torch.isfinite(results[0]).all()
    assert all(torch.equal(result, results[0]) for result in results)


def test_what_finds_no_room_on_the_host_is_given_all_the_same_and_not_kept(cache_of, monkeypatch):
    def full(tensor):
        raise RuntimeError("CUDA error: out of memory")
    monkeypatch.setattr(comfy.model_management, "pin_memory", full)
    cache = cache_of(10 ** 6, torch.device("cpu", 1))
    for _ in range(2):
        tensor, = cache.get("key", lambda: (torch.ones(4),))
        assert torch.equal(tensor, torch.ones(4))
    assert cache.size == 0 and not cache.holds("key")


def test_a_next_step_that_finds_no_room_beside_the_present_one_is_fetched_when_its_turn_comes(cache_of, monkeypatch):
    cache = cache_of(10 ** 6, torch.device("cpu", 1))
    for step in range(2):
        cache.get(step, lambda step=step: (torch.full((4,), float(step)),), step=step)
    cache.end_run()
    cast, room = comfy.model_management.cast_to, [True, False, True]

    def fetch(*args, **settings):
        if not room.pop(0):
            raise RuntimeError("CUDA error: out of memory")
        return cast(*args, **settings)
    monkeypatch.setattr(comfy.model_management, "cast_to", fetch)
    got = [cache.get(step, lambda: pytest.fail("computed again"), step=step)[0] for step in range(2)]
    assert [float(tensor[0]) for tensor in got] == [0.0, 1.0] and not room
