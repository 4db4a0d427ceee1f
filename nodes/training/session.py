"""A MODEL under training: the control with gradients, the denoiser that carries it, one step, a preview."""

from contextlib import contextmanager

import comfy.k_diffusion.sampling
import comfy.model_management
import comfy.model_sampling
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from ...controlnext_core.bases import BASES
from ...controlnext_core.degradation import degraded
from ...controlnext_core.families import Family
from ...controlnext_core.features import control_features
from ...controlnext_core.losses import draw_levels, draw_sigmas, prediction_loss
from ...controlnext_core.sizes import halved
from ...controlnext_core.training import Training, draw_rows, drop_captions
from ...controlnext_core.unet_keys import Target
from ..runtime.control import images_of
from ..runtime.forward import Forward
from ..runtime.images import RESIZING
from ..runtime.places import Place, adds_in_place, blocks_of
from ..runtime.resolve import model_of
from ..runtime.run import Run, controls_in
from .data import Samples
from .teacher import Teacher

PREFIX = "diffusion_model."
PREVIEW_STEPS = 12
PREDICTIONS = ((comfy.model_sampling.CONST, "flow"), (comfy.model_sampling.V_PREDICTION, "v"),
               (comfy.model_sampling.EPS, "epsilon"))


class TrainingControl:
    """Serves the injection as a Control does, from a batch of images and with gradients; runs the module once a batch.

    Args:
        scale: for a module that learns none of its own.

    Attributes:
        place_name: of ``place``, in ``PLACES``.
        images: (B, 3, H, W), set before each forward: one a row, or the frames of its one video.
        acting: off, a forward goes without it and without the UNet differences that are trained with it.
    """

    sampling = None
    taken = False

    def __init__(self, module, family: Family, place: Place, place_name: str, scale: float):
        self.module, self.family, self.place, self.place_name = module, family, place, place_name
        self.scale = scale
        self.images: torch.Tensor | None = None
        self.acting = True

    def __call__(self, forward: Forward) -> tuple[torch.Tensor, torch.Tensor] | None:
        if not self.acting:
            return None
        images, size = self.images.to(forward.device, forward.dtype), halved(forward.size, self.place.halvings)

        def image_part(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.module.image_part(image, self.family.stem_padding, self.family.stem_pool)

        def features_of(*images: torch.Tensor) -> torch.Tensor:
            return control_features(self.module, self.family, map(image_part, images), forward.at, size)

        if forward.video:  # in the memory of one latent frame
            groups = [images[list(images_of(frame, self.place.images))].split(1) for frame in forward.frames]
            features = torch.cat([checkpoint(features_of, *group, use_reentrant=False) for group in groups], 2)
        else:
            features = features_of(images)
        gain, _ = self.family.gains(self.scale if self.module.scale is None else self.module.scale)
        return features[None], features.new_ones(1, 1, 1, 1, 1) * gain


def trainable_clone(model, control: TrainingControl, differences: dict[Target, torch.nn.Parameter], dtype: torch.dtype,
                    checkpointing: bool):
    """A clone of a MODEL that gradients can pass, with ``differences`` added where they belong while ``control`` acts.

    All of it goes through the patcher; the weights that the clone shares with the MODEL are not touched.
    """
    clone = model.clone(disable_dynamic=True)
    clone.model.requires_grad_(False)
    clone.set_model_compute_dtype(dtype)
    for key, weight in clone.model.named_parameters():
        if weight.is_inference():  # loaded by a node, which autograd cannot save; a copy it can
            if hasattr(comfy.utils.get_attr(clone.model, key.rpartition(".")[0]), "weight_function"):
                clone.add_weight_wrapper(key, torch.clone)
            else:  # a layer that is none of ComfyUI's own: SD3's norm of q and k
                clone.add_object_patch(key, torch.nn.Parameter(weight.clone(), requires_grad=False))
    for target, difference in differences.items():
        clone.add_weight_wrapper(PREFIX + target.key, _adder(control, target, difference))
    denoiser = clone.model.diffusion_model
    blocks, in_place = set(blocks_of(denoiser)), adds_in_place(denoiser)
    for name, layer in clone.model.named_modules():
        if layer in blocks:
            forward = _out_of_place(layer.forward) if in_place else layer.forward
            clone.add_object_patch(f"{name}.forward", _checkpointed(forward) if checkpointing else forward)
    return clone


def _adder(control: TrainingControl, target: Target, difference: torch.nn.Parameter):
    def add(weight: torch.Tensor) -> torch.Tensor:
        if not control.acting:
            return weight
        return (weight.float() + target.spread(difference, len(weight))).to(weight.dtype)
    return add


class OutOfPlace(TorchFunctionMode):
    """In it ``a += b`` makes another tensor: Flux's blocks add to what their norms need again for gradients."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.add_:  # PyTorch's name for it
            return torch.Tensor.add(*args, **(kwargs or {})).to(args[0].dtype)
        return func(*args, **(kwargs or {}))


def _out_of_place(forward):
    def run(*args, **kwargs):
        with OutOfPlace():
            return forward(*args, **kwargs)
    return run


def _checkpointed(forward):
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)


class Session:
    """Training steps on a loaded clone of a MODEL.

    Args:
        clone: from ``trainable_clone``, loaded.
        control: its module is that of ``training``.
        caption_dropout: share of captions that are replaced by the empty one.
        min_snr_gamma: of ``prediction_loss``.
        super_resolution: the samples' images are pictures, and control is what ``degraded`` makes of them.
        teacher: steps are then to be made inside ``taught``.

    Raises:
        ValueError: the MODEL predicts something unknown.
    """

    def __init__(self, clone, control: TrainingControl, training: Training, samples: Samples, batch_size: int,
                 caption_dropout: float, min_snr_gamma: float = 0.0, super_resolution: bool = False,
                 teacher: Teacher | None = None):
        self.base_model, self.device = clone.model, clone.load_device
        self.control, self.training, self.samples = control, training, samples
        self.batch_size, self.caption_dropout, self.min_snr_gamma = batch_size, caption_dropout, min_snr_gamma
        self.super_resolution, self.teacher = super_resolution, teacher
        self.buckets = samples.buckets()
        self.sampling = clone.get_model_object("model_sampling")
        self.prediction = next((name for kind, name in PREDICTIONS if isinstance(self.sampling, kind)), None)
        if self.prediction is None:
            raise ValueError("model: training knows models that predict epsilon, v or flow; the connected MODEL's "
                             f"sampling is {type(self.sampling).__mro__[2].__name__}.")
        model, options = model_of(clone), clone.model_options["transformer_options"]
        run = Run(model, {"trained": control, **controls_in(model, options)})
        self.options = {**run.enter({**options, "wrappers": clone.wrappers}), "cond_or_uncond": [0]}
        self.previewer = latent_preview.get_previewer(self.device, self.base_model.latent_format)

    @contextmanager
    def taught(self):
        """The teacher, if there is one, prepared for the loaded clone. ValueError: it does not fit the MODEL."""
        if self.teacher is None:
            yield
            return
        with self.teacher.at_work(self.base_model):
            self._try_teacher()
            yield

    def _try_teacher(self) -> None:
        """One forward under the teacher, since nothing else tells whether it fits."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.samples.batch_latents([0]).shape, generator=generator).to(self.device)
        sigma = self.sampling.sigmas[len(self.sampling.sigmas) // 2].to(self.device).expand(len(x))
        self.control.images = self.control_images([0], generator)
        alone = self.denoise_without_student(x, sigma, [0], [False])
        advice = "connect one that is made for the MODEL"
        try:
            taught = self.denoise_without_student(x, sigma, [0], [False], self.teacher)
        except (comfy.model_management.OOM_EXCEPTION, comfy.model_management.InterruptProcessingException):
            raise
        except Exception as error:
            what = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"teacher: the connected CONTROL_NET does not fit the connected MODEL, a "
                             f"{type(self.base_model).__name__} ({what}); {advice}.") from error
        if torch.equal(taught, alone):
            raise ValueError(f"teacher: the connected CONTROL_NET changes nothing in what the connected MODEL, a "
                             f"{type(self.base_model).__name__}, predicts; {advice}, at a teacher_strength above 0.")

    def step(self) -> float:
        """One update; its loss. Interrupted, it leaves the training as it was before."""
        return self.training.update(self.loss_of_batch)

    def loss_of_batch(self) -> torch.Tensor:
        """The mean loss of the next batch that the training's generator draws, with gradients."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        generator = self.training.generator
        rows = draw_rows(self.buckets, self.batch_size, generator)
        latents = self.base_model.process_latent_in(self.samples.batch_latents(rows).to(self.device))
        sigma = self._draw_sigmas(len(rows), generator).repeat_interleave(len(latents) // len(rows)).to(self.device)
        noise = torch.randn(latents.shape, generator=generator).to(self.device)
        dropped = drop_captions(len(rows), self.caption_dropout, generator)
        self.control.images = self.control_images(rows, generator)
        x = self.sampling.noise_scaling(sigma, noise, latents)
        # the teacher first, while no graph of the student's takes memory
        taught = self.denoise_without_student(x, sigma, rows, dropped, self.teacher) if self.teacher else None
        denoised = self.denoise(x, sigma, rows, dropped)
        loss = prediction_loss(denoised, latents, sigma, self.prediction, self.min_snr_gamma)
        if taught is not None:
            from_teacher = prediction_loss(denoised, taught, sigma, self.prediction, self.min_snr_gamma)
            loss = torch.lerp(loss, from_teacher, self.teacher.share)
        return loss.mean()

    def _draw_sigmas(self, rows: int, generator: torch.Generator) -> torch.Tensor:
        """The noise level of each sample of a batch, (rows,)."""
        sigmas, log_sigmas = self.sampling.sigmas.cpu(), BASES[self.control.family.base].log_sigmas
        if log_sigmas is not None:
            return draw_sigmas(rows, *log_sigmas, (float(sigmas[0]), float(sigmas[-1])), generator)
        return sigmas[draw_levels(rows, len(sigmas), self.prediction, generator)]

    def preview(self) -> tuple | None:
        """A picture sampled under the first sample's caption and control, as ComfyUI's progress bar takes it.

        Of a video it is the first frame.
        """
        if self.previewer is None:
            return None
        sigmas = comfy.samplers.calculate_sigmas(self.sampling, "simple", PREVIEW_STEPS).to(self.device)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(self.samples.batch_latents([0]).shape, generator=generator)
        self.control.images = self.control_images([0], generator)
        x = self.sampling.noise_scaling(sigmas[0], noise.to(self.device), torch.zeros_like(noise).to(self.device), True)
        x0 = comfy.k_diffusion.sampling.sample_euler(lambda x, sigma: self.denoise(x, sigma, [0], [False]), x, sigmas,
                                                     disable=True)
        return self.previewer.decode_latent_to_preview_image("JPEG", x0)

    def control_images(self, rows: list[int], generator: torch.Generator) -> torch.Tensor:
        """The control images of a batch, (B, 3, H, W), B its pictures or all frames of its videos."""
        images = self.samples.batch_images(rows)
        if not self.super_resolution:
            return images
        height, width = images.shape[-2:]
        pixels = (255 * images.movedim(1, -1)).round().clamp(0, 255).byte().contiguous().numpy()
        small = [torch.from_numpy(degraded(picture, generator))[None].movedim(-1, 1) / 255 for picture in pixels]
        return torch.cat([comfy.utils.common_upscale(one, width, height, RESIZING, "disabled") for one in small])

    def denoise_without_student(self, *args) -> torch.Tensor:
        """``denoise`` without the control that is trained, and without gradients."""
        self.control.acting = False
        try:
            with torch.no_grad():
                return self.denoise(*args)
        finally:
            self.control.acting = True

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor, rows: list[int], dropped: list[bool],
                teacher: Teacher | None = None) -> torch.Tensor:
        """``x`` at the noise levels ``sigma`` (B,), denoised under the captions of these samples and the control.

        Args:
            x: of the shape of ``Samples.batch_latents``.
            dropped: which rows take the empty caption.
            teacher: adds its own control, too.
        """
        conds, options = self.samples.batch_conds(self.base_model, rows, dropped, self.device), dict(self.options)
        control = teacher(self.control.images, x, sigma, conds, options) if teacher else None
        return self.base_model.apply_model(x, sigma, control=control, transformer_options=options, **conds)
