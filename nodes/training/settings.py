"""The settings of a training."""

from dataclasses import dataclass

import torch

NONE = "none"
WITH_UNET = "module and UNet weights"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class TrainSettings:
    """The settings of a training; inputs of Train ControlNeXt have the same names and take their defaults from here.

    Attributes:
        steps: updates in all, those of a training that is resumed included.
        batch_size: samples in a forward, all of one size.
        learning_rate, unet_learning_rate, scale_learning_rate: AdamW's, for the module, the UNet differences and the
            learned scale; a scale_learning_rate of 0 leaves the scale as it is.
        trainable: ``module`` or ``WITH_UNET``.
        seed: begins the module's first weights and everything that is drawn.
        training_dtype: a key of ``DTYPES``, in which the MODEL computes.
        gradient_checkpointing: blocks keep only their inputs, and run again for the gradients.
        save_every, preview_every: steps between two kept states, between two previews; 0 for none.
        filename_prefix: begins the names of the files.
        resume_from: the name of a kept training to go on with, or ``NONE``.
        caption_dropout: share of captions that are replaced by the empty one.
        ema: decay of a moving average of all that is trained, 0 for none.
        unet_pattern: a regular expression that chooses the UNet weights; empty for the base's own.
        min_snr_gamma: of min-SNR weighting, 0 for none.
        warmup_steps: first steps, in which the learning rates rise to what they are.
        grad_accumulation_steps: batches whose mean gradient makes a step, in each process that trains.
        inject_at: name of the place where control enters, or auto.
        super_resolution: control images are made from the pictures, small and worn.
        teacher_strength, teacher_share: the teacher's strength, and its share of the loss.
    """

    steps: int = 1000
    batch_size: int = 1
    learning_rate: float = 1e-4
    unet_learning_rate: float = 3e-5
    trainable: str = WITH_UNET
    seed: int = 0
    training_dtype: str = "bf16"
    gradient_checkpointing: bool = True
    save_every: int = 0
    preview_every: int = 100
    filename_prefix: str = "ControlNeXt"
    resume_from: str = NONE
    caption_dropout: float = 0.0
    ema: float = 0.0
    unet_pattern: str = ""
    min_snr_gamma: float = 0.0
    warmup_steps: int = 0
    grad_accumulation_steps: int = 1
    inject_at: str = "auto"
    super_resolution: bool = False
    teacher_strength: float = 1.0
    teacher_share: float = 1.0
    scale_learning_rate: float = 1e-3
