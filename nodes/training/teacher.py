"""A ControlNet as the teacher of a training: what the MODEL predicts under it is what is to be learned."""

from contextlib import contextmanager

import comfy.samplers
import torch
from comfy.controlnet import ControlBase


class Teacher:
    """One of ComfyUI's ControlNets, used as a sampler uses it; the connected object stays as it is.

    Args:
        control_net: with those before it, if it is one of a chain; all of them see the same images.
        strength: multiplies their own.
        share: of the loss, the rest is that of the pictures; above 0.
        vae: for ControlNets that take their images as latents.

    Raises:
        ValueError: one of them does, and there is no VAE.
    """

    def __init__(self, control_net: ControlBase, strength: float, share: float, vae=None):
        self.share = share
        self.chain = []  # the last one first, as they call each other
        while control_net is not None:
            if control_net.latent_format is not None and vae is None:
                raise ValueError("teacher_vae: the connected teacher takes control images as latents; connect the VAE "
                                 "that belongs to the MODEL.")
            # acts over the whole range: a batch is of many noise levels, and a ControlNet asks only for the first
            copy = control_net.copy().set_cond_hint(None, strength * control_net.strength, vae=vae)
            if self.chain:
                self.chain[-1].set_previous_controlnet(copy)
            self.chain.append(copy)
            control_net = control_net.previous_controlnet

    def models(self) -> list:
        """The ModelPatchers to load beside the MODEL."""
        return self.chain[0].get_models()

    @contextmanager
    def at_work(self, base_model):
        """Prepared for a loaded MODEL."""
        comfy.samplers.pre_run_control(base_model, [{"control": self.chain[0]}])
        try:
            yield
        finally:
            self.chain[0].cleanup()

    def __call__(self, images: torch.Tensor, x: torch.Tensor, sigma: torch.Tensor, conds: dict, options: dict):
        """The ``control`` of this batch for ``apply_model``; a ControlNeXt puts its own into ``options`` instead.

        Args:
            images: (B, 3, H, W) in [0, 1].
            x, sigma, conds, options: what ``apply_model`` gets; options must be its own.
        """
        for control in self.chain:
            control.cond_hint_original, control.cond_hint = images, None
        return self.chain[0].get_control(x, sigma, conds, 1, options)
