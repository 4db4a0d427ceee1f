"""What plugs a control into a sampling: from a loaded CONTROLNEXT to what is added in the denoiser."""
