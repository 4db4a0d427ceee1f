"""What training takes at the sizes that people train at, and whether one that was interrupted goes on as it would."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import comfy.model_management
import folder_paths
import harness
import models
import sampling
import torch
from comfy.patcher_extension import WrappersMP
from on_gpu import bases, right
from on_gpu.device import CUDA, mark, seconds, wait
from on_gpu.figures import Work

SETTINGS = dict(sampling.TRAINING, learning_rate=1e-4, unet_learning_rate=3e-5)
WARM, TIMED = 3, 8  # steps
STOPPED_AT, STEPS = 2, 4
RESUMED = ("sd15", "sd3")
NEAR = 0.15  # of what benchmarks/training_memory.py counts
COUNTED = {  # {(row of RELEASED, dtype of the weights if it is another): its name there}
    ("sd15", None): "SD1.5, 512x512", ("sdxl", None): "SDXL, 1024x1024", ("sd35", None): "SD3.5 medium, 1024x1024",
    ("flux", None): "Flux.1 dev, 1024x1024, bf16", ("flux", "float8_e4m3fn"): "Flux.1 dev, 1024x1024, fp8",
    ("wan", None): "Wan 2.1 1.3B, 832x480, 33 frames",
}


class Steps:
    """An APPLY_MODEL wrapper that marks each forward of the denoiser, one a step, and does something at one of them."""

    def __init__(self, at: int = 0, act=None):
        self.marks, self.at, self.act = [], at, act

    def __call__(self, executor, *args, **kwargs):
        self.marks.append(mark())
        if len(self.marks) == self.at:
            self.act()
        return executor(*args, **kwargs)

    def seconds(self, warm: int) -> list[float]:
        """Of the steps after the first ``warm``, each from its forward to the next one's."""
        wait()
        return [seconds(start, end) for start, end in zip(self.marks[warm:], self.marks[warm + 1:], strict=False)]


def train(work: Work, model, data: dict, steps: int, watch: Steps, **settings) -> tuple:
    """The outputs of Train ControlNeXt, with every forward of the MODEL under a watch."""
    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "steps", watch)
    given = SETTINGS | settings | {"steps": steps}
    return work.pack.run("ControlNeXtTrain", model=[model], **data, **{name: [value] for name, value in given.items()})


def data_of(case: bases.Case) -> dict:
    """One picture or video with its control, as the node takes it."""
    latent = torch.randn(case.latent.shape, generator=torch.Generator().manual_seed(5))
    return {"latents": [{"samples": latent}], "conditioning": [case.conds[0]], "images": [case.image]}


def measured(work: Work, name: str, weights: str | None = None) -> None:
    """Seconds a step and peak memory of a training with batch 1, with and without gradient checkpointing.

    Args:
        weights: dtype of the MODEL's; None for that of its row.
    """
    for checkpointing in (True, False):
        with torch.inference_mode():  # as ComfyUI's loaders make weights
            case = bases.make(work, name, getattr(torch, weights) if weights and CUDA else None)
        if CUDA:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        what, watch = f"checkpointing {'on' if checkpointing else 'off'}", Steps()
        try:
            train(work, case.model, data_of(case), 2 if work.small else WARM + TIMED, watch,
                  gradient_checkpointing=checkpointing, training_dtype="bf16" if CUDA else "fp32",
                  filename_prefix=f"{name}_{checkpointing}")
            fits = True
        except torch.OutOfMemoryError as error:
            fits = str(error).splitlines()[0]
        found = watch.seconds(0 if work.small else WARM)
        work.note(f"{what}: fits", fits, total=torch.cuda.get_device_properties(0).total_memory if CUDA else None)
        work.note(f"{what}: a step", statistics.median(found) if found else None, unit="ms", brief=what, steps=found)
        peak = torch.cuda.max_memory_allocated() if CUDA else None
        work.note(f"{what}: peak memory", peak, unit="MB", brief="with",
                  reserved=torch.cuda.max_memory_reserved() if CUDA else None)
        counted = counted_bytes(name, weights)
        if checkpointing and peak and counted:
            work.note(f"{what}: peak memory, away from what is counted", abs(peak / counted - 1), unit="%", most=NEAR,
                      counted=counted)
        del case


def counted_bytes(name: str, weights: str | None) -> int | None:
    """What training_memory.py counts for a training with gradient checkpointing; None where it has not run."""
    file = harness.FOLDER / "results" / "training_memory.json"
    if not file.exists():
        return None
    return sum(json.loads(file.read_text())["bytes"][f"{COUNTED[name, weights]}, ControlNeXt"].values())


def resumed(work: Work) -> None:
    """A training that is interrupted and resumed, beside one that never was, and two of these beside each other."""
    for base in RESUMED[:1] if work.small else RESUMED:
        make_model = models.small_unet if base in models.UNETS else models.small_transformer
        model = make_model(base)
        latent = torch.randn(sampling.latent(base).shape, generator=torch.Generator().manual_seed(5))
        data = {"latents": [{"samples": latent}], "conditioning": [sampling.cond(model)],
                "images": [sampling.picture()]}
        settings = dict(training_dtype="bf16" if CUDA else "fp32", filename_prefix=f"resumed_{base}")
        whole, again = (train(work, model, data, STEPS, Steps(), **settings) for _ in range(2))
        stop = Steps(STOPPED_AT, comfy.model_management.interrupt_current_processing)
        try:
            train(work, model, data, STEPS, stop, **settings)
        except comfy.model_management.InterruptProcessingException:
            pass
        folder = Path(folder_paths.get_output_directory()) / "controlnext_training"
        kept = max(folder.glob(f"resumed_{base}_*.pt"))
        went_on = train(work, model, data, STEPS, Steps(), **settings, resume_from=kept.name)

        work.note(f"{base}: interrupted after step", int(kept.stem.rpartition("_")[2]))
        work.note(f"{base}: a second training from the same seed is bit-equal", same(again, whole))
        work.note(f"{base}: one that was interrupted and resumed is bit-equal", same(went_on, whole),
                  wanted=True if same(again, whole) else None, apart=largest_difference(went_on, whole),
                  apart_of_the_second=largest_difference(again, whole))


def trained(outputs: tuple) -> dict[str, torch.Tensor]:
    """All weights that a training changes."""
    controlnext = outputs[0]
    return {**controlnext.loaded.checkpoint.state_dict, **controlnext.unet_differences}


def same(found: tuple, expected: tuple) -> bool:
    pairs = zip(trained(found).values(), trained(expected).values(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def largest_difference(found: tuple, expected: tuple) -> float:
    """Of all tensors, relative L2."""
    other = trained(expected)
    return max(right.apart(value, other[name]) for name, value in trained(found).items() if other[name].any())
