"""The graph of a small training with the stock dataset nodes."""

import stand_in


def graph(**settings) -> dict:
    inputs = dict(steps=3, batch_size=1, learning_rate=1e-3, unet_learning_rate=1e-4, trainable="module", seed=1,
                  training_dtype="fp32", gradient_checkpointing=True, save_every=0, preview_every=1,
                  filename_prefix="server")
    return {
        "checkpoint": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": stand_in.CHECKPOINT}},
        "pictures": {"class_type": "LoadImageDataSetFromFolder", "inputs": {"folder": "training"}},
        "dataset": {"class_type": "MakeTrainingDataset", "inputs": {
            "images": ["pictures", 0], "vae": ["checkpoint", 2], "clip": ["checkpoint", 1]}},
        "edges": {"class_type": "ControlNeXtCanny", "inputs": {
            "image": ["pictures", 0], "threshold": "auto", "low_threshold": 100, "high_threshold": 200}},
        "train": {"class_type": "ControlNeXtTrain", "inputs": {
            "model": ["checkpoint", 0], "latents": ["dataset", 0], "conditioning": ["dataset", 1],
            "images": ["edges", 0], **inputs, **settings}},
        "save": {"class_type": "ControlNeXtSave", "inputs": {
            "controlnext": ["train", 0], "filename_prefix": "controlnext/server"}},
        "graph": {"class_type": "LossGraphNode", "inputs": {"loss": ["train", 1], "filename_prefix": "loss"}},
    }
