"""The ControlNeXt method (arXiv 2408.06070), without ComfyUI: file -> family -> module -> features -> injection."""
