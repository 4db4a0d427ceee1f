"""A custom node for the tests' server, in place of SDPose and its 1 GB: poses from a file, one for each image."""

import json


class PosesFromFile:
    RETURN_TYPES = ("POSE_KEYPOINT",)
    FUNCTION = "read"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",), "file": ("STRING", {})}}

    def read(self, image, file):
        with open(file) as opened:
            frames = json.load(opened)
        height, width = image.shape[1:3]
        return [self.on_canvas(frames[index % len(frames)], width, height) for index in range(len(image))],

    @staticmethod
    def on_canvas(frame: dict, width: int, height: int) -> dict:
        """Stretched to the image, in pixels, as SDPose gives them."""
        scales = (width / frame["canvas_width"], height / frame["canvas_height"], 1)
        people = [{part: [value * scales[index % 3] for index, value in enumerate(numbers)]
                   for part, numbers in person.items() if numbers} for person in frame["people"]]
        return {"canvas_width": width, "canvas_height": height, "people": people}


NODE_CLASS_MAPPINGS = {"PosesFromFile": PosesFromFile}
