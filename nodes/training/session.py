"""One training, from a MODEL, samples and settings to what is trained: its steps, previews and states."""

from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import comfy.k_diffusion.sampling
import comfy.model_management
import comfy.model_sampling
import comfy.samplers
import comfy.utils
import latent_preview
import torch

from ...controlnext_core.bases import BASES
from ...controlnext_core.degradation import degraded
from ...controlnext_core.losses import draw_levels, draw_sigmas, prediction_loss
from ...controlnext_core.ranks import Ranks
from ...controlnext_core.release_files import with_scale
from ...controlnext_core.sentences import quoted
from ...controlnext_core.sizes import as_bytes
from ...controlnext_core.training import Training, draw_rows, drop_captions
from ...controlnext_core.unet_keys import targets_of
from ...controlnext_core.unet_weights import match_weights
from ..runtime.base_weights import BaseWeights, add_unet_weights
from ..runtime.images import RESIZING
from ..runtime.loaded import ControlNeXt, trained_controlnext
from ..runtime.resolve import model_of
from ..runtime.run import Run, controls_in
from .data import Data, Sample, conds_of
from .denoiser import loaded_for_training, trainable_clone
from .kept import read_kept
from .settings import DTYPES, NONE, TrainSettings
from .start import start_control, start_differences
from .teacher import Teacher

PREVIEW_STEPS = 12
PREDICTIONS = ((comfy.model_sampling.CONST, "flow"), (comfy.model_sampling.V_PREDICTION, "v"),
               (comfy.model_sampling.EPS, "epsilon"))


@dataclass(frozen=True)
class Drawn:
    """The random part of one batch.

    Attributes:
        rows: of the samples.
        sigma: (B,) noise levels, on the denoiser's device.
        noise: as ``Data.batch_latents``.
        dropped: which rows take the empty caption.
        seed: begins the generator that makes worn control images.
    """

    rows: list[int]
    sigma: torch.Tensor
    noise: torch.Tensor
    dropped: list[bool]
    seed: int


class Session:
    """A training, to be used as a context manager: the MODEL is loaded for it from its beginning to its end.

        with Session(model, samples, TrainSettings(steps=100)) as session:
            while session.training.step < 100:
                session.step()
        controlnext, trained_model = session.result()

    Args:
        model: the MODEL (a ModelPatcher); it stays as it is.
        data: the samples.
        settings: those of the node.
        controlnext: the one to train further; None begins a new one.
        teacher: to learn from, beside the samples.
        shown: the sample under which previews are drawn; the first one if None.
        ranks: the processes that train together.

    Attributes:
        training: the state, with ``step`` and ``losses``.
        control: the trained control, as the denoiser gets it.

    Raises:
        ValueError: settings, control and MODEL do not fit each other; one sentence that names the input.
    """

    def __init__(self, model, data: Data, settings: TrainSettings, controlnext: ControlNeXt | None = None,
                 teacher: Teacher | None = None, shown: Sample | None = None, ranks: Ranks | None = None):
        if data.videos:  # one a forward: a step's others follow it, and its gradient is the same
            settings = replace(settings, batch_size=1,
                               grad_accumulation_steps=settings.grad_accumulation_steps * settings.batch_size)
        self.model, self.data, self.settings, self.teacher = model, data, settings, teacher
        self.ranks = ranks or Ranks()
        self.shown = shown
        self._wears = settings.super_resolution or data.worn
        self._buckets = data.buckets()
        self._resources = ExitStack()

        state, input_name = None, "controlnext"
        if settings.resume_from != NONE:
            state, input_name = read_kept(settings.resume_from), "resume_from"
            controlnext = trained_controlnext(with_scale(state["module"], state["scale"]), state["family"],
                                              settings.resume_from, state["differences"], state.get("place"))
        with torch.inference_mode(False), torch.enable_grad():
            self.control = start_control(model, controlnext, settings, input_name)
            self._shapes = BaseWeights(model).shapes
            targets = targets_of(self._shapes)
            differences = start_differences(model, targets, self._shapes, controlnext, settings, input_name)
            self.training = Training(
                self.control.module, differences, learning_rate=settings.learning_rate,
                unet_learning_rate=settings.unet_learning_rate, ema=settings.ema, seed=settings.seed,
                warmup_steps=settings.warmup_steps, accumulation=settings.grad_accumulation_steps,
                scale_learning_rate=settings.scale_learning_rate, ranks=self.ranks)
            if state is not None:
                self._go_on_from(state)
            added = {targets[name]: value for name, value in self.training.differences.items()}
            self.clone = trainable_clone(model, self.control, added, DTYPES[settings.training_dtype],
                                         settings.gradient_checkpointing)

    def _go_on_from(self, state: dict) -> None:
        try:
            self.training.load_state_dict(state)
        except ValueError as error:
            raise ValueError(f"resume_from: {quoted(self.settings.resume_from)} was trained with other settings: "
                             f"{error}; set trainable, unet_pattern, scale_learning_rate and ema as they "
                             "were.") from None

    def __enter__(self) -> "Session":
        with ExitStack() as entered:
            entered.enter_context(torch.inference_mode(False))
            entered.enter_context(torch.enable_grad())
            entered.enter_context(loaded_for_training(self.clone, self.teacher.models() if self.teacher else []))
            self._prepare()
            entered.enter_context(self._taught())
            if self.shown is not None and self.settings.preview_every:
                self._try_shown()
            self._resources = entered.pop_all()
        return self

    def __exit__(self, *raised) -> None:
        self._resources.__exit__(*raised)

    def close(self) -> None:
        """Take the training off the MODEL and free the device; what was trained stays."""
        self._resources.close()

    def _prepare(self) -> None:
        """Know of the loaded clone what every forward needs."""
        clone = self.clone
        self.base_model, self.device = clone.model, clone.load_device
        self.sampling = clone.get_model_object("model_sampling")
        self.prediction = next(name for kind, name in PREDICTIONS if isinstance(self.sampling, kind))
        model, options = model_of(clone), clone.model_options["transformer_options"]
        run = Run(model, {"trained": self.control, **controls_in(model, options, keeps=False)}, keeps=False)
        self.options = {**run.enter({**options, "wrappers": clone.wrappers}), "cond_or_uncond": [0]}
        self.previewer = latent_preview.get_previewer(self.device, self.base_model.latent_format)

    @contextmanager
    def _taught(self):
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
        x = torch.randn(self.data.latent_shape(0), generator=generator).to(self.device)
        sigma = self.sampling.sigmas[len(self.sampling.sigmas) // 2].to(self.device).expand(len(x))
        self.control.images = self._worn(self.data.batch_images([0]), 0)
        conds = self._conds([0], [False])
        untaught = self.denoise_without_student(x, sigma, conds)
        advice = "connect one that is made for the MODEL"
        with self._told_if_it_fails("teacher: the connected CONTROL_NET", advice):
            taught = self.denoise_without_student(x, sigma, conds, self.teacher)
        if torch.equal(taught, untaught):
            raise ValueError("teacher: the connected CONTROL_NET changes nothing in what the connected MODEL, which "
                             f"is {type(self.base_model).__name__}, predicts; {advice}, at a teacher_strength above "
                             "0.")

    def _try_shown(self) -> None:
        """One forward under the caption of the previews, so that none of them ends a training later."""
        sigma = self.sampling.sigmas[-1:].to(self.device).expand(len(self.shown.latent))
        with self._told_if_it_fails("validation_conditioning: the connected prompt", "encode it with the MODEL's CLIP"):
            conds = conds_of(self.base_model, [self.shown.caption], [self.shown.latent], self.device)
            self.denoise_without_student(self.shown.latent.float().to(self.device), sigma, conds)

    @contextmanager
    def _told_if_it_fails(self, what: str, advice: str):
        """A ValueError of one sentence for whatever goes wrong in the block, but for lack of memory."""
        try:
            yield
        except (comfy.model_management.OOM_EXCEPTION, comfy.model_management.InterruptProcessingException):
            raise
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{what} does not fit the connected MODEL, which is {type(self.base_model).__name__} "
                             f"({reason}); {advice}.") from error

    def step(self) -> float:
        """One update; its loss. Whatever ends it early leaves the training as it was before."""
        return self.training.update(self.loss_of_batch, lambda: self._draw(self.training.generator))

    def loss_of_batch(self) -> torch.Tensor:
        """The mean loss of the next batch that the training's generator draws, with gradients."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        drawn = self._draw(self.training.generator)
        latents = self.base_model.process_latent_in(self.data.batch_latents(drawn.rows).to(self.device))
        conds = self._conds(drawn.rows, drawn.dropped)
        counts = self.data.batch_weights(drawn.rows)
        counts = None if counts is None else counts.to(self.device)
        self.data.read_ahead(self._next_rows)

        noise = drawn.noise.to(self.device)
        x = self.sampling.noise_scaling(drawn.sigma, noise, latents)
        self.control.images = self._worn(self.data.batch_images(drawn.rows), drawn.seed)
        # the teacher first, while no graph of the student's takes memory
        taught = self.denoise_without_student(x, drawn.sigma, conds, self.teacher) if self.teacher else None
        denoised = self.denoise(x, drawn.sigma, conds)

        def loss_against(clean: torch.Tensor) -> torch.Tensor:
            return prediction_loss(denoised, clean, drawn.sigma, self.prediction, self.settings.min_snr_gamma, counts)

        loss = loss_against(latents)
        if taught is not None:
            loss = torch.lerp(loss, loss_against(taught), self.teacher.share)
        return loss.mean()

    def _draw(self, generator: torch.Generator) -> Drawn:
        rows = draw_rows(self._buckets, self.settings.batch_size, generator)
        shape = self.data.latent_shape(rows[0])
        frames = shape[0]  # 1, or those of a video in rows
        sigma = self._draw_sigmas(len(rows), generator).repeat_interleave(frames).to(self.device)
        noise = torch.randn((frames * len(rows), *shape[1:]), generator=generator)
        dropped = drop_captions(len(rows), self.settings.caption_dropout, generator)
        seed = int(torch.randint(2 ** 62, (), generator=generator)) if self._wears else 0
        return Drawn(rows, sigma, noise, dropped, seed)

    def _next_rows(self) -> list[int]:
        """The rows that this rank's next batch will draw."""
        generator = torch.Generator()
        generator.set_state(self.training.generator.get_state())
        for _ in range(self.ranks.count - 1):
            self._draw(generator)
        return draw_rows(self._buckets, self.settings.batch_size, generator)

    def _draw_sigmas(self, rows: int, generator: torch.Generator) -> torch.Tensor:
        """The noise level of each sample of a batch, (rows,)."""
        sigmas, log_sigmas = self.sampling.sigmas.cpu(), BASES[self.control.family.base].log_sigmas
        if log_sigmas is not None:
            return draw_sigmas(rows, *log_sigmas, (float(sigmas[0]), float(sigmas[-1])), generator)
        return sigmas[draw_levels(rows, len(sigmas), self.prediction, generator)]

    def preview(self) -> tuple | None:
        """A picture sampled under a caption and a control, as ComfyUI's progress bar takes it.

        Of a video it is the first frame.
        """
        if self.previewer is None:
            return None
        shown = self.shown or self.data.sample(0)
        sigmas = comfy.samplers.calculate_sigmas(self.sampling, "simple", PREVIEW_STEPS).to(self.device)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(shown.latent.shape, generator=generator).to(self.device)
        self.control.images = self._worn(self.data.images_of([shown]), 0)
        conds = conds_of(self.base_model, [shown.caption], [shown.latent], self.device)
        x = self.sampling.noise_scaling(sigmas[0], noise, torch.zeros_like(noise), True)
        x0 = comfy.k_diffusion.sampling.sample_euler(lambda x, sigma: self.denoise(x, sigma, conds), x, sigmas,
                                                     disable=True)
        return self.previewer.decode_latent_to_preview_image("JPEG", x0)

    def state(self) -> dict:
        """Everything that ``resume_from`` goes on from, on the host."""
        control = self.control
        return {**self.training.state_dict(), "family": control.family.name, "scale": control.scale,
                "place": control.place_name}

    def result(self) -> tuple:
        """(CONTROLNEXT, the MODEL with the trained UNet weights)."""
        weights, differences = self.training.weights()
        name = self.settings.filename_prefix
        controlnext = trained_controlnext(with_scale(weights, self.control.scale), self.control.family.name, name,
                                          differences, self.control.place_name)
        if not differences:
            return controlnext, self.model
        matched = match_weights(differences, name, self._shapes)
        return controlnext, add_unet_weights(self.model, matched, "difference", 1.0)

    def _conds(self, rows: Sequence[int], dropped: Sequence[bool]) -> dict[str, torch.Tensor]:
        return self.data.batch_conds(self.base_model, rows, dropped, self.device)

    def _worn(self, images: torch.Tensor, seed: int) -> torch.Tensor:
        """The images, or for super-resolution small worn copies of them, as large again."""
        if not self._wears:
            return images
        generator = torch.Generator().manual_seed(seed)
        height, width = images.shape[-2:]
        small = [torch.from_numpy(degraded(picture, generator))[None].movedim(-1, 1) / 255
                 for picture in as_bytes(images.movedim(1, -1))]
        return torch.cat([comfy.utils.common_upscale(one, width, height, RESIZING, "disabled") for one in small])

    def denoise_without_student(self, *args) -> torch.Tensor:
        """``denoise`` without the control that is trained, and without gradients."""
        self.control.acting = False
        try:
            with torch.no_grad():
                return self.denoise(*args)
        finally:
            self.control.acting = True

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor, conds: dict[str, torch.Tensor],
                teacher: Teacher | None = None) -> torch.Tensor:
        """``x`` at the noise levels ``sigma`` (B,), denoised under these conds and the control.

        Args:
            x: of the shape of ``Data.batch_latents``.
            conds: ``Data.batch_conds`` for it.
            teacher: adds its own control, too.
        """
        options = dict(self.options)
        control = teacher(self.control.images, x, sigma, conds, options) if teacher else None
        return self.base_model.apply_model(x, sigma, control=control, transformer_options=options, **conds)
