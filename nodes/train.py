"""Train ControlNeXt."""

import gc
from statistics import mean

import comfy.utils
from comfy_api.latest import io
from tqdm.auto import tqdm

from .inputs import DatasetType, checked_inputs, inject_at_input
from .preview import node_id, show_text
from .runtime.control import is_out_of_memory
from .runtime.files import fingerprint
from .runtime.images import checked_image
from .runtime.loaded import ControlNeXtType
from .runtime.messages import send_text
from .training.data import Data, Sample, samples_for
from .training.dataset import FolderData
from .training.kept import ENDING, FOLDER, free_path, list_kept, name_of, path_of, write_kept
from .training.log import Log
from .training.session import Session
from .training.settings import DTYPES, NONE, WITH_UNET, TrainSettings
from .training.teacher import Teacher

TEXTS, MEAN_OF = 1000, 50  # texts in a training; losses in the mean that they tell


class ControlNeXtTrain(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ControlNeXtTrain",
            display_name="Train ControlNeXt",
            category="ControlNeXt",
            description="Trains a ControlNeXt on pictures or videos and their control images, on top of a MODEL that "
                        "stays as it is. If you interrupt it, what was trained is saved.",
            search_aliases=["controlnext", "train controlnet", "train control", "training"],
            is_input_list=True,
            inputs=[
                io.Model.Input("model", tooltip="The MODEL to train for, of any base that ControlNeXt supports; it "
                                                "is not changed."),
                io.Latent.Input("latents", optional=True,
                                tooltip="The pictures, from Make Training Dataset, Resolution Bucket or VAE Encode. "
                                        "For SVD and, if you like, Wan and other video models, videos: one LATENT "
                                        "for each, with all its frames, from VAE Encode."),
                io.Conditioning.Input("conditioning", optional=True,
                                      tooltip="The captions, from the same node as the latents: one for each picture "
                                              "or each LATENT, or one for all. For SVD, the positive of "
                                              "SVD_img2vid_Conditioning for each video."),
                io.Image.Input("images", optional=True,
                               tooltip="The control images: one for each picture, or each frame of a video, in the "
                                       "same order and of the same size."),
                io.Int.Input("steps", default=TrainSettings.steps, min=1, max=1000000,
                             tooltip="Total number of steps; a resumed training counts those that it has done. A few "
                                     "hundred to a few thousand."),
                io.Int.Input("batch_size", default=TrainSettings.batch_size, min=1, max=1024,
                             tooltip="Pictures per step, all of one size. A larger batch learns more steadily and "
                                     "takes more memory. The videos of a step are computed one after the other, in "
                                     "the memory of one."),
                io.Float.Input("learning_rate", default=TrainSettings.learning_rate, min=0.0, max=1.0, step=1e-7,
                               round=False,
                               tooltip="Learning rate of the ControlNeXt module."),
                io.Float.Input("unet_learning_rate", default=TrainSettings.unet_learning_rate, min=0.0, max=1.0,
                               step=1e-7, round=False,
                               tooltip="Learning rate of the UNet weights, if they are trained."),
                io.Combo.Input("trainable", options=["module", WITH_UNET], default=TrainSettings.trainable,
                               tooltip="module trains only the ControlNeXt module: a small file and weaker control. "
                                       "With UNet weights, a part of the MODEL's weights is trained too, as "
                                       "differences: control as in the paper."),
                io.Int.Input("seed", default=TrainSettings.seed, min=0, max=0xFFFFFFFFFFFFFFFF,
                             control_after_generate=False,
                             tooltip="Decides the module's first weights and everything that is random in the "
                                     "training."),
                io.Combo.Input("training_dtype", options=list(DTYPES), default=TrainSettings.training_dtype,
                               tooltip="The precision in which the MODEL computes. The trained weights are kept in "
                                       "fp32. Choose fp32 on a CPU."),
                io.Boolean.Input("gradient_checkpointing", default=TrainSettings.gradient_checkpointing,
                                 tooltip="Saves much memory and takes about a third more time."),
                io.Int.Input("save_every", default=TrainSettings.save_every, min=0, max=1000000,
                             tooltip="Saves the training every this many steps to output/controlnext_training, so "
                                     "that it can be resumed. 0 saves it only when it is interrupted."),
                io.Int.Input("preview_every", default=TrainSettings.preview_every, min=0, max=1000000,
                             tooltip="Samples a preview with the first control image every this many steps. 0 "
                                     "samples none."),
                io.String.Input("filename_prefix", default=TrainSettings.filename_prefix,
                                tooltip="Name of the files in output/controlnext_training."),
                ControlNeXtType.Input("controlnext", optional=True,
                                      tooltip="Train this one further, its own UNet weights included, with a new "
                                              "optimizer. Without it, a new one is trained."),
                io.Combo.Input("resume_from", options=[NONE, *list_kept()], default=TrainSettings.resume_from,
                               optional=True,
                               tooltip="Go on with a training that was interrupted or saved, as if it had never "
                                       "stopped. Press R to see new files."),
                io.Conditioning.Input("empty_conditioning", optional=True,
                                      tooltip="The conditioning of an empty prompt, for caption_dropout."),
                io.Float.Input("caption_dropout", default=TrainSettings.caption_dropout, min=0.0, max=1.0, step=0.01,
                               optional=True,
                               tooltip="Share of captions that are replaced by the empty one, so that control also "
                                       "works without a prompt. Often 0.1 to 0.2."),
                io.Float.Input("ema", default=TrainSettings.ema, min=0.0, max=0.99999, step=0.00001, round=False,
                               optional=True, advanced=True,
                               tooltip="Decay of a moving average of the weights; the average is then the result. "
                                       "0.999 suits thousands of steps. 0 turns it off."),
                io.String.Input("unet_pattern", default=TrainSettings.unet_pattern, optional=True, advanced=True,
                                tooltip="Which UNet weights to train: a regular expression that is searched for in "
                                        "their diffusers names. Empty uses the base's default: to_out on SD1.5 and "
                                        "SD3, attn2.*to_out on SDXL, to_out and to_v on SVD, to_out of the first ten "
                                        "blocks on other transformers."),
                io.Float.Input("min_snr_gamma", default=TrainSettings.min_snr_gamma, min=0.0, max=1000.0, step=0.01,
                               round=False, optional=True, advanced=True,
                               tooltip="Min-SNR weighting: limits how much samples with little noise count in the "
                                       "loss. 5 is usual; less puts more weight on coarse structure. 0 turns it off, "
                                       "as in the authors' code."),
                io.Int.Input("warmup_steps", default=TrainSettings.warmup_steps, min=0, max=1000000, optional=True,
                             advanced=True,
                             tooltip="The learning rates rise from zero over this many steps at the beginning."),
                io.Int.Input("grad_accumulation_steps", default=TrainSettings.grad_accumulation_steps, min=1, max=1024,
                             optional=True, advanced=True,
                             tooltip="Averages this many batches per step: the effect of a larger batch without its "
                                     "memory, at proportionally more time."),
                inject_at_input("Layer at which control is added: a block of the UNet; in a transformer the image "
                                "tokens, before the first block or after one. auto uses the layer of the connected "
                                "CONTROLNEXT or of the resumed training, and the authors' layer for a new one."),
                io.Boolean.Input("super_resolution", default=TrainSettings.super_resolution, optional=True,
                                 advanced=True,
                                 tooltip="Trains control that restores pictures: connect the pictures themselves to "
                                         "images. Each time a picture is used, its control image is a copy 2 to 8 "
                                         "times smaller, with new random blur, noise or JPEG artifacts."),
                io.ControlNet.Input("teacher", optional=True,
                                    tooltip="A ControlNet for this MODEL to learn from, or a T2I-Adapter or another "
                                            "ControlNeXt. The ControlNeXt learns to change the MODEL's predictions "
                                            "as the teacher does with the same control images."),
                io.Float.Input("teacher_strength", default=TrainSettings.teacher_strength, min=0.0, max=10.0, step=0.01,
                               optional=True, advanced=True,
                               tooltip="Strength of the teacher's control."),
                io.Float.Input("teacher_share", default=TrainSettings.teacher_share, min=0.0, max=1.0, step=0.01,
                               optional=True, advanced=True,
                               tooltip="The teacher's share of the loss: 1 learns only from the teacher, 0 only from "
                                       "the pictures."),
                io.Vae.Input("teacher_vae", optional=True,
                             tooltip="The MODEL's VAE, for a teacher that takes its control images as latents, as "
                                     "those for SD3 do."),
                io.Float.Input("scale_learning_rate", default=TrainSettings.scale_learning_rate, min=0.0, max=1.0,
                               step=1e-7, round=False, optional=True, advanced=True,
                               tooltip="Learning rate of the scale, a number that control is multiplied by; it is "
                                       "learned with the module and kept in its file. Ten times learning_rate is good."
                                       " 0 keeps the scale at 1: the authors' code loads only such files, except those"
                                       " of the mid families."),
                io.Image.Input("validation_image", optional=True,
                               tooltip="Previews are sampled with this control image, one that is not trained on. "
                                       "Without it, with the first of images."),
                io.Conditioning.Input("validation_conditioning", optional=True,
                                      tooltip="The prompt of the previews. Without it, the first caption."),
                DatasetType.Input("dataset", optional=True,
                                  tooltip="Pictures of a folder, from ControlNeXt Dataset, instead of latents, "
                                          "conditioning and images: any number of them, in little memory."),
            ],
            outputs=[
                ControlNeXtType.Output(display_name="controlnext", tooltip="For Apply ControlNeXt and Save ControlNeXt "
                                                                           "Model."),
                io.Custom("LOSS_MAP").Output(display_name="loss_map", tooltip="For Plot Loss Graph."),
                io.Int.Output(display_name="steps", tooltip="Number of steps that the result was trained for."),
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
    def execute(cls, model, latents=None, conditioning=None, images=None, controlnext=None, empty_conditioning=None,
                teacher=None, teacher_vae=None, validation_image=None, validation_conditioning=None,
                dataset=None, **settings) -> io.NodeOutput:
        model = _first("model", model)
        settings = TrainSettings(**checked_inputs(cls, **{name: _first(name, values)
                                                          for name, values in settings.items()}))
        if settings.teacher_share != 1.0 and not teacher:
            raise ValueError("teacher_share: there is no teacher to share the loss with; connect a CONTROL_NET to "
                             "teacher or set teacher_share to 1.")

        empty = empty_conditioning[0] if empty_conditioning else None
        if dataset:
            data = FolderData(dataset[0], model, empty)
        else:
            data = samples_for(model, latents, conditioning, images, empty)
        if settings.caption_dropout and data.empty is None:
            raise ValueError("caption_dropout: there is no empty caption to put in place of others; connect an encoded "
                             "empty prompt to empty_conditioning or set caption_dropout to 0.")
        learned_from = None
        if teacher and settings.teacher_share:
            learned_from = Teacher(teacher[0], settings.teacher_strength, settings.teacher_share,
                                   teacher_vae[0] if teacher_vae else None)
        session = Session(model, data, settings, controlnext[0] if controlnext else None, learned_from,
                          _shown(data, validation_image, validation_conditioning))
        cls._train(session)
        trained, with_weights = session.result()
        return io.NodeOutput(trained, {"loss": session.training.losses}, session.training.step, with_weights)

    @classmethod
    def _train(cls, session: Session) -> None:
        """Train to the last step. Whatever ends it early, what was trained is kept first."""
        training, settings, leads = session.training, session.settings, session.ranks.leads
        first, steps, kept = training.step, settings.steps, ""
        first_part = free_path(settings.filename_prefix) if leads else None
        log, progress = Log(first_part), comfy.utils.ProgressBar(steps)

        def keep() -> str:
            """Keep the training, or say why not: the end of a sentence."""
            path = f"{first_part}_step_{training.step}{ENDING}"
            try:
                write_kept(path, session.state())
            except ValueError as error:
                return f"not saved; {error}"
            except Exception as error:  # a device that failed, host memory that ran out
                return f"not saved ({type(error).__name__}: {error})."
            return f"saved in output/{FOLDER}; to go on, press R and choose {name_of(path)} in resume_from."

        try:
            with session, log, tqdm(total=steps, initial=first, desc="Train ControlNeXt",
                                    disable=not (leads and comfy.utils.PROGRESS_BAR_ENABLED)) as bar:
                while training.step < steps:
                    loss = session.step()
                    if not leads:
                        continue

                    bar.set_postfix({"loss": f"{loss:.4f}"})
                    bar.update()
                    log.note_step(training)
                    if training.step % max(steps // TEXTS, 1) == 0:
                        loss = mean(training.losses[-MEAN_OF:])
                        send_text(node_id(cls), f"step {training.step} of {steps}, loss {loss:.4f}\n{kept}")

                    shown = settings.preview_every and training.step % settings.preview_every == 0
                    preview = session.preview() if shown else None
                    if preview is not None:
                        log.note_preview(training.step, preview[1])
                    progress.update_absolute(training.step, steps, preview)

                    if settings.save_every and training.step % settings.save_every == 0:
                        kept = f"step {training.step} is {keep()}"
                        show_text(cls, kept)
        except BaseException as error:
            if training.step > first and leads:
                if is_out_of_memory(error):
                    _let_go(error)
                show_text(cls, f"stopped after step {training.step} of {steps} and {keep()}")
            raise


def _let_go(error: BaseException | None) -> None:
    """Free what the frames of an error hold, such as all that the failed step took of a device."""
    while error is not None:
        error.__traceback__ = None
        error = error.__context__
    gc.collect()


def _first(name: str, values: list):
    """The value of an input that is no list for this node. ValueError: a node gave an empty list."""
    if not values:
        raise ValueError(f"{name}: an empty list came in where one is expected; change what is linked to it.")
    return values[0]


def _shown(data: Data, image: list | None, conditioning: list | None) -> Sample | None:
    """The sample under which previews are drawn, None for the first one of the training."""
    if not image and not conditioning:
        return None
    image = checked_image(image[0], "validation_image") if image else None
    if conditioning and not conditioning[0]:
        raise ValueError("validation_conditioning: it holds no caption; connect an encoded prompt.")
    return data.sample_for(image, conditioning[0][0] if conditioning else None)
