"""Train ControlNeXt."""

from statistics import mean
from types import SimpleNamespace

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch
from comfy_api.latest import io
from tqdm.auto import tqdm

from ..controlnext_core.bases import BASES
from ..controlnext_core.release_files import with_scale
from ..controlnext_core.sentences import quoted
from ..controlnext_core.training import Training
from ..controlnext_core.unet_keys import targets_of
from ..controlnext_core.unet_weights import match_weights
from .inputs import checked_inputs, inject_at_input
from .preview import node_id, show_text
from .runtime.base_weights import BaseWeights, add_unet_weights
from .runtime.files import fingerprint
from .runtime.loaded import ControlNeXt, ControlNeXtType, trained_controlnext
from .runtime.messages import send_text
from .runtime.places import images_a_frame
from .runtime.resolve import base_of_model, model_of
from .training.data import Samples
from .training.kept import ENDING, FOLDER, free_path, list_kept, name_of, path_of, read_kept, write_kept
from .training.session import Session, trainable_clone
from .training.start import WITH_UNET, start_control, start_differences
from .training.teacher import Teacher

NONE = "none"
TEXTS, MEAN_OF = 1000, 50  # texts in a training; losses in the mean that they tell
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class ControlNeXtTrain(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ControlNeXtTrain",
            display_name="Train ControlNeXt",
            category="ControlNeXt",
            description="Trains a ControlNeXt on pictures or videos and their control images, on top of a MODEL that "
                        "stays as it is. Interrupting it keeps what was trained.",
            search_aliases=["controlnext", "train controlnet", "train control", "training"],
            is_input_list=True,
            inputs=[
                io.Model.Input("model", tooltip="The MODEL to train for, of any base that ControlNeXt steers; it is "
                                                "not changed."),
                io.Latent.Input("latents", tooltip="The pictures, from Make Training Dataset, Resolution Bucket or VAE "
                                                   "Encode. Videos for SVD and, if you like, for Wan: each one "
                                                   "whole, its frames from VAE Encode."),
                io.Conditioning.Input("conditioning", tooltip="The captions, from the same node as the latents: one "
                                                              "for each picture or each LATENT, or one for all. For "
                                                              "SVD, the positive of SVD_img2vid_Conditioning for each "
                                                              "video."),
                io.Image.Input("images", tooltip="The control images: one for each picture, or each frame of a video, "
                                                 "in the same order and of the same size."),
                io.Int.Input("steps", default=1000, min=1, max=1000000,
                             tooltip="Steps in all, those of a training that is resumed included. A few hundred to a "
                                     "few thousand."),
                io.Int.Input("batch_size", default=1, min=1, max=1024,
                             tooltip="Pictures in a step, all of one size. More learn more steadily and take more "
                                     "memory. Videos follow each other, in the memory of one."),
                io.Float.Input("learning_rate", default=1e-4, min=0.0, max=1.0, step=1e-7, round=False,
                               tooltip="Of the ControlNeXt module."),
                io.Float.Input("unet_learning_rate", default=3e-5, min=0.0, max=1.0, step=1e-7, round=False,
                               tooltip="Of the UNet weights, if they are trained."),
                io.Combo.Input("trainable", options=["module", WITH_UNET], default=WITH_UNET,
                               tooltip="The module alone is small and gives weaker control. With some UNet weights, "
                                       "trained as differences to the MODEL's, control is as in the paper."),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=False,
                             tooltip="Of the module's first weights and of everything that is drawn in the training."),
                io.Combo.Input("training_dtype", options=list(DTYPES), default="bf16",
                               tooltip="What the MODEL computes in. What is trained is kept in fp32. On a CPU, fp32."),
                io.Boolean.Input("gradient_checkpointing", default=True,
                                 tooltip="Saves much memory and takes about a third more time."),
                io.Int.Input("save_every", default=0, min=0, max=1000000,
                             tooltip="Keeps the training every so many steps in output/controlnext_training, to "
                                     "resume from. 0: only when it is interrupted."),
                io.Int.Input("preview_every", default=100, min=0, max=1000000,
                             tooltip="Samples a picture under the first control image every so many steps. 0: never."),
                io.String.Input("filename_prefix", default="ControlNeXt",
                                tooltip="Name of the files in output/controlnext_training."),
                ControlNeXtType.Input("controlnext", optional=True,
                                      tooltip="Train this one further, its own UNet weights included, with a new "
                                              "optimizer. Without it, a new one is trained."),
                io.Combo.Input("resume_from", options=[NONE, *list_kept()], default=NONE, optional=True,
                               tooltip="Go on with a training that was interrupted or kept, as if it had never "
                                       "stopped. Press R to see new files."),
                io.Conditioning.Input("empty_conditioning", optional=True,
                                      tooltip="The conditioning of an empty prompt, for caption_dropout."),
                io.Float.Input("caption_dropout", default=0.0, min=0.0, max=1.0, step=0.01, optional=True,
                               tooltip="Share of captions that are replaced by the empty one, for control without a "
                                       "prompt. Often 0.1 to 0.2."),
                io.Float.Input("ema", default=0.0, min=0.0, max=0.99999, step=0.00001, round=False, optional=True,
                               advanced=True,
                               tooltip="Decay of a moving average, which is then the result: 0.999 for thousands of "
                                       "steps. 0 is off."),
                io.String.Input("unet_pattern", default="", optional=True, advanced=True,
                                tooltip="Which UNet weights to train: a regular expression found in their diffusers "
                                        "names. Empty is the reference's: to_out, on SDXL attn2.*to_out, on SVD "
                                        "to_out and to_v, to_out on SD3, and that of the first ten blocks on other "
                                        "transformers."),
                io.Float.Input("min_snr_gamma", default=0.0, min=0.0, max=1000.0, step=0.01, round=False, optional=True,
                               advanced=True,
                               tooltip="Min-SNR weighting: samples of little noise count no more than this. 5 is "
                                       "usual, less is for coarse structure. 0 is off, the reference's loss."),
                io.Int.Input("warmup_steps", default=0, min=0, max=1000000, optional=True, advanced=True,
                             tooltip="First steps, in which the learning rates rise to what they are set to."),
                io.Int.Input("grad_accumulation_steps", default=1, min=1, max=1024, optional=True, advanced=True,
                             tooltip="Batches in a step: learns as from a batch so many times as large, in the memory "
                                     "of one and so many times the time."),
                inject_at_input("Where control enters the UNet, or the tokens of a transformer such as SD3. auto is "
                                "where the connected CONTROLNEXT or the kept training does, and the reference's place "
                                "for a new one."),
                io.Boolean.Input("super_resolution", default=False, optional=True, advanced=True,
                                 tooltip="Trains to restore pictures: connect the pictures themselves to images. "
                                         "Whenever one comes up, control is a copy 2 to 8 times as small, with blur, "
                                         "noise or JPEG drawn anew."),
                io.ControlNet.Input("teacher", optional=True,
                                    tooltip="A ControlNet for this MODEL to learn from, or a T2I-Adapter or another "
                                            "ControlNeXt: what the MODEL predicts under it, from the same control "
                                            "images, is what is learned."),
                io.Float.Input("teacher_strength", default=1.0, min=0.0, max=10.0, step=0.01, optional=True,
                               advanced=True, tooltip="Strength of the teacher."),
                io.Float.Input("teacher_share", default=1.0, min=0.0, max=1.0, step=0.01, optional=True, advanced=True,
                               tooltip="How much of the loss is the teacher's: 1 learns from it alone, 0 from the "
                                       "pictures alone."),
                io.Vae.Input("teacher_vae", optional=True,
                             tooltip="For a teacher that takes control images as latents, as those for SD3 do: the "
                                     "MODEL's VAE."),
                io.Float.Input("scale_learning_rate", default=1e-3, min=0.0, max=1.0, step=1e-7, round=False,
                               optional=True, advanced=True,
                               tooltip="Of the scale, a number that control is multiplied by, learned with it and kept "
                                       "in its file. Ten times learning_rate is good. 0 leaves it as it is: 1, as in "
                                       "the reference's SD1.5 and SDXL files."),
            ],
            outputs=[
                ControlNeXtType.Output(display_name="controlnext", tooltip="For Apply ControlNeXt and Save ControlNeXt "
                                                                           "Model."),
                io.Custom("LOSS_MAP").Output(display_name="loss_map", tooltip="For Plot Loss Graph."),
                io.Int.Output(display_name="steps", tooltip="Steps that the result was trained for."),
                io.Model.Output(display_name="model", tooltip="The MODEL with the trained UNet weights, to sample "
                                                              "with."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, resume_from=(NONE,), **_) -> str | None:
        name = resume_from[0]  # None where it comes over a link
        return None if name in (NONE, None) else fingerprint(path_of(name))

    @classmethod
    def execute(cls, model, latents, conditioning, images, controlnext=None, empty_conditioning=None, teacher=None,
                teacher_vae=None, **settings) -> io.NodeOutput:
        optional = {"resume_from": NONE, "caption_dropout": 0.0, "ema": 0.0, "unet_pattern": "", "min_snr_gamma": 0.0,
                    "warmup_steps": 0, "grad_accumulation_steps": 1, "inject_at": "auto", "super_resolution": False,
                    "teacher_strength": 1.0, "teacher_share": 1.0, "scale_learning_rate": 1e-3}
        model = _first("model", model)
        given = checked_inputs(cls, **{name: _first(name, values) for name, values in settings.items()})
        settings = SimpleNamespace(**optional | given)
        if settings.caption_dropout and not empty_conditioning:
            raise ValueError("caption_dropout: there is no empty caption to put in place of others; connect an encoded "
                             "empty prompt to empty_conditioning or set caption_dropout to 0.")
        if settings.teacher_share != 1.0 and not teacher:
            raise ValueError("teacher_share: there is no teacher to share the loss with; connect a CONTROL_NET to "
                             "teacher or set teacher_share to 1.")
        learned_from = None
        if teacher and settings.teacher_share:
            learned_from = Teacher(teacher[0], settings.teacher_strength, settings.teacher_share,
                                   teacher_vae[0] if teacher_vae else None)
        rows_are_frames = BASES[base_of_model(model_of(model))].frames_in_rows
        latent_format = model.get_model_object("latent_format")
        samples = Samples(latents, conditioning, images, empty_conditioning[0] if empty_conditioning else None,
                          ratio=latent_format.spacial_downscale_ratio, rows_are_frames=rows_are_frames,
                          images_a_frame=images_a_frame(model_of(model).denoiser),
                          channels=latent_format.latent_channels)
        if samples.videos:  # one a forward: a step's others follow it, and its gradient is the same
            settings.grad_accumulation_steps *= settings.batch_size
            settings.batch_size = 1
        with torch.inference_mode(False), torch.enable_grad():
            return cls._train(model, controlnext[0] if controlnext else None, samples, learned_from, settings)

    @classmethod
    def _train(cls, model, controlnext: ControlNeXt | None, samples: Samples, teacher: Teacher | None,
               settings) -> io.NodeOutput:
        state, goes_on_from = None, "controlnext"
        if settings.resume_from != NONE:
            state, goes_on_from = read_kept(settings.resume_from), "resume_from"
            controlnext = trained_controlnext(with_scale(state["module"], state["scale"]), state["family"],
                                              settings.resume_from, state["differences"], state.get("place"))
        control = start_control(model, controlnext, settings.seed, settings.inject_at, settings.scale_learning_rate > 0,
                                goes_on_from)
        shapes = BaseWeights(model).shapes
        names = targets_of(shapes)
        differences = start_differences(model, names, shapes, controlnext, settings, goes_on_from)
        training = Training(control.module, differences, learning_rate=settings.learning_rate,
                            unet_learning_rate=settings.unet_learning_rate, ema=settings.ema, seed=settings.seed,
                            warmup_steps=settings.warmup_steps, accumulation=settings.grad_accumulation_steps,
                            scale_learning_rate=settings.scale_learning_rate)
        if state is not None:
            try:
                training.load_state_dict(state)
            except ValueError as error:
                raise ValueError(f"resume_from: {quoted(settings.resume_from)} was trained with other settings: "
                                 f"{error}; set trainable, unet_pattern, scale_learning_rate and ema as they "
                                 "were.") from None
        clone = trainable_clone(model, control, {names[name]: value for name, value in training.differences.items()},
                                DTYPES[settings.training_dtype], settings.gradient_checkpointing)
        session = Session(clone, control, training, samples, batch_size=settings.batch_size,
                          caption_dropout=settings.caption_dropout, min_snr_gamma=settings.min_snr_gamma,
                          super_resolution=settings.super_resolution, teacher=teacher)
        cls._loop(clone, session, settings)
        weights, differences = (_to_cpu(tensors) for tensors in training.weights())
        trained = trained_controlnext(with_scale(weights, control.scale), control.family.name,
                                      settings.filename_prefix, differences, control.place_name)
        if differences:
            matched = match_weights(differences, settings.filename_prefix, shapes)
            model = add_unet_weights(model, matched, "difference", 1.0)
        return io.NodeOutput(trained, {"loss": training.losses}, training.step, model)

    @classmethod
    def _loop(cls, clone, session: Session, settings) -> None:
        """Train to the last step. Whatever ends it early, what was trained is kept first."""
        training, control, steps = session.training, session.control, settings.steps
        first_part = free_path(settings.filename_prefix)

        def keep() -> str:
            """Keep the training, or say why not: the end of a sentence."""
            path = f"{first_part}_step_{training.step}{ENDING}"
            try:
                write_kept(path, training, control)
            except ValueError as error:
                return f"not kept; {error}"
            return f"kept in output/{FOLDER}; to go on, press R and choose {name_of(path)} in resume_from."

        first, progress, kept = training.step, comfy.utils.ProgressBar(steps), ""
        try:
            comfy.model_management.in_training = True
            models = [clone, *(session.teacher.models() if session.teacher else ())]
            comfy.model_management.load_models_gpu(models, memory_required=1e20, force_full_load=True)
            clone.pre_run()
            with session.taught(), tqdm(total=steps, initial=first, desc="Train ControlNeXt",
                                        disable=not comfy.utils.PROGRESS_BAR_ENABLED) as bar:
                while training.step < steps:
                    loss = session.step()
                    bar.set_postfix({"loss": f"{loss:.4f}"})
                    bar.update()
                    if training.step % max(steps // TEXTS, 1) == 0:
                        loss = mean(training.losses[-MEAN_OF:])
                        send_text(node_id(cls), f"step {training.step} of {steps}, loss {loss:.4f}\n{kept}")
                    shown = settings.preview_every and training.step % settings.preview_every == 0
                    progress.update_absolute(training.step, steps, session.preview() if shown else None)
                    if settings.save_every and training.step % settings.save_every == 0:
                        kept = f"step {training.step} is {keep()}"
                        show_text(cls, kept)
        except BaseException:
            if training.step > first:
                show_text(cls, f"stopped after step {training.step} of {steps} and {keep()}")
            raise
        finally:
            comfy.model_management.in_training = False
            clone.cleanup()
            # the MODEL shares its layers with the clone; ComfyUI takes additions off only when it loads them again
            comfy.model_management.unload_all_models()
            for layer in clone.model.modules():
                comfy.model_patcher.wipe_lowvram_weight(layer)


def _first(name: str, values: list):
    """The value of an input that is no list for this node. ValueError: a node gave an empty list."""
    if not values:
        raise ValueError(f"{name}: an empty list came in where one is expected; change what is linked to it.")
    return values[0]


def _to_cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.cpu() for name, value in tensors.items()}
