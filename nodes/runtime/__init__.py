"""The way of a control into a sampling: from a loaded CONTROLNEXT to the features added in the denoiser."""
