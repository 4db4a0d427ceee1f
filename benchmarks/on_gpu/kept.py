"""Features that a run keeps for the next: copied home and back beside the denoiser's work, plainly, or not at all."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from on_gpu import bases
from on_gpu.fast import SECOND, Bench, a_step
from on_gpu.figures import Work

AS_IT_IS, PLAIN, STAY = ("as it is: streams and prefetching", "a plain pinned copy in the computing stream",
                         "none at home: they stay on the device")
SIMPLEST_FIRST = (STAY, PLAIN, AS_IT_IS)
NEAR = 0.003  # of a step: so near to the best one, the simplest is kept
ROUNDS = 5


def ways(work: Work, name: str) -> None:
    """Second runs with each way to keep features, in turn."""
    case = bases.make(work, name)
    bench, loaded = Bench(work, case), case.controlnext.loaded
    caches = caches_of(work, loaded.features)
    found = {way: ([], []) for way in caches}

    for way, cache in caches.items():
        loaded.features = cache()
        fill_and_warm(bench)
        caches[way] = loaded.features
    for _ in range(1 if work.small else ROUNDS):
        for way, cache in caches.items():
            loaded.features = cache
            whole, own = zip(*bench.sample(SECOND), strict=True)
            found[way][0].append(a_step(whole))
            found[way][1].append(a_step(own))

    medians = {way: statistics.median(whole) for way, (whole, _) in found.items()}
    best = min(medians.values())
    for way, (whole, own) in found.items():
        work.note(f"{way}: a step", medians[way], unit="ms", brief=way.partition(":")[0], rounds=whole,
                  control=statistics.median(own))
        work.note(f"{way}: above the best, of a step", medians[way] / best - 1, unit="%")
    near = [way for way in SIMPLEST_FIRST if medians[way] / best - 1 <= NEAR]
    work.note("the simplest that is near to the best", near[0], brief="simplest:", bytes_kept=caches[STAY].size)


def caches_of(work: Work, cache) -> dict[str, Callable]:
    """{way: makes a cache of its own, with the limit and host of ``cache``}."""
    module = work.pack.module("nodes.runtime.feature_cache")

    class PlainlyKept(module.Kept):
        def fetch(self) -> None:
            if self.on_device is None:
                self.on_device = tuple(tensor.to(self.device, non_blocking=True) for tensor in self.on_host)

    class PlainCache(module.FeatureCache):
        def _keep(self, key, tensors: tuple[torch.Tensor, ...], step) -> None:
            kept = self._runs[-1][key] = PlainlyKept(tensors, self.host, step)
            self.size += kept.size
            self._fetch([kept])

        def _prefetch(self, entries) -> None:
            """Nothing comes before its step."""

    return {AS_IT_IS: lambda: module.FeatureCache(cache.limit, cache.host),
            PLAIN: lambda: PlainCache(cache.limit, cache.host),
            STAY: lambda: module.FeatureCache(cache.limit, None)}


def fill_and_warm(bench: Bench) -> None:
    """A run that fills the present cache, and one that takes from it."""
    for _ in range(2):
        bench.sample(SECOND)
