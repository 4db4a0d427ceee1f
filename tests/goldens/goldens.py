"""The goldens, read: for tests and for benchmarks on machines that have no pytest."""

import json
from pathlib import Path

import reference_weights
import torch
from safetensors import safe_open


class Goldens:
    """Numbers computed with the reference implementation, and the inputs and weights that they belong to."""

    folder = Path(__file__).resolve().parent
    weights = reference_weights

    def __init__(self):
        self.module = json.loads((self.folder / "module.json").read_text())["variants"]
        self.unet = json.loads((self.folder / "unet.json").read_text())["variants"]
        self.unet_shapes = json.loads((self.folder / "unet_shapes.json").read_text())
        self._state_dicts: dict[str, dict] = {}

    def state_dict(self, variant: str) -> dict:
        """The control module's weights, float32 torch tensors."""
        if variant not in self._state_dicts:
            filled = self.weights.fill_(self.module[variant]["state_dict_shapes"], 7)
            self._state_dicts[variant] = {key: torch.from_numpy(value) for key, value in filled.items()}
        return {key: value.clone() for key, value in self._state_dicts[variant].items()}

    def input(self, described: dict):
        """One input tensor from its description in the JSON files."""
        if described["kind"] == "given":
            return torch.tensor(described["value"])
        draw = getattr(self.weights, described["kind"])
        return torch.from_numpy(draw(described["seed"], described["key"], described["shape"]))

    def difference(self, file: str, saved: dict, output) -> float:
        """Largest difference of ``output`` from the saved one, as a share of that one's standard deviation."""
        with safe_open(self.folder / file, framework="pt") as tensors:
            reference = tensors.get_tensor(saved["tensor"])
        assert list(output.shape) == saved["shape"], f"shape {list(output.shape)} instead of {saved['shape']}"
        output = output if saved["stride"] == 1 else output.flatten()[::saved["stride"]]
        return float((output - reference).abs().max()) / saved["std"]
