"""The log of a training: a table of its losses, and TensorBoard's files where that is installed."""

import csv
import logging
import os

import numpy as np

from ...controlnext_core.training import Training

COLUMNS = ("loss", "learning_rate", "unet_learning_rate", "scale_learning_rate", "scale")


class Log:
    """``..._losses.csv`` and, with TensorBoard, the folder ``..._tensorboard`` beside the kept trainings.

    A context manager. A disk that refuses ends the log, which is told once, and not the training.

    Args:
        first_part: how the paths begin; None writes nothing.
    """

    def __init__(self, first_part: str | None):
        self._first_part = first_part
        self._file = self._table = self._board = None

    def __enter__(self) -> "Log":
        if self._first_part is None:
            return self
        try:
            os.makedirs(os.path.dirname(self._first_part), exist_ok=True)
            self._file = open(f"{self._first_part}_losses.csv", "w", newline="", buffering=1)
            self._table = csv.writer(self._file)
            self._table.writerow(["step", *COLUMNS])
            self._board = _tensorboard(f"{self._first_part}_tensorboard")
        except OSError as error:
            self._give_up(error)
        return self

    def __exit__(self, *raised) -> None:
        for one in (self._file, self._board):
            try:
                if one is not None:
                    one.close()
            except OSError as error:
                logging.warning("ControlNeXt: the log of the training is incomplete (%s).", error)
        self._file = self._table = self._board = None

    def note_step(self, training: Training) -> None:
        """Write what the last step gave."""
        numbers = {"loss": training.losses[-1], **training.rates_at(training.step - 1)}
        if training.module.scale is not None:
            numbers["scale"] = training.module.scale.item()
        try:
            if self._table is not None:
                self._table.writerow([training.step, *(numbers.get(name, "") for name in COLUMNS)])
            if self._board is not None:
                for name, number in numbers.items():
                    self._board.add_scalar(name, number, training.step)
        except OSError as error:
            self._give_up(error)

    def note_preview(self, step: int, picture) -> None:
        """Write a preview, a PIL picture."""
        if self._board is not None:
            self._board.add_image("preview", np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def _give_up(self, error: OSError) -> None:
        logging.warning("ControlNeXt: the losses of the training are not written any more (%s); make room on the disk.",
                        error.strerror)
        self.__exit__()


def _tensorboard(folder: str):
    """A writer of TensorBoard's files, None where the package is not installed, or cannot be imported."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # slow, and nobody needs it before a training
    except Exception:  # packages that do not fit each other raise all kinds
        return None
    return SummaryWriter(folder)
