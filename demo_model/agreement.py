"""How well pictures follow their control: edges for Canny, the drawn region for mask."""

from __future__ import annotations

import cv2
import numpy as np

from controlnext_core.canny import canny

PAPER = 20  # how far in any channel a pixel may be from the paper's colour to count as paper


def edge_f1(edges: np.ndarray, control: np.ndarray) -> float:
    """F1 of two edge maps (H, W), bool, where an edge counts as found within one pixel of the other's.

    Precision is the share of `edges` near `control`, recall the share of `control` near `edges`.
    """
    near = np.ones((3, 3), np.uint8)
    precision, recall = (
        (a & cv2.dilate(b.astype(np.uint8), near).astype(bool)).sum() / max(a.sum(), 1)
        for a, b in ((edges, control), (control, edges))
    )
    return float(2 * precision * recall / max(precision + recall, 1e-9))


def iou(region: np.ndarray, control: np.ndarray) -> float:
    """Intersection over union of two regions (H, W), bool."""
    return float((region & control).sum() / max((region | control).sum(), 1))


def drawn_edges(rgb: np.ndarray) -> np.ndarray:
    """The edges (H, W) bool that ControlNeXt Canny, its thresholds on auto, finds in a picture (H, W, 3) uint8."""
    return canny(rgb)[..., 0] > 0


def drawn_region(rgb: np.ndarray) -> np.ndarray:
    """The region (H, W) bool of a picture (H, W, 3) uint8 that is not the paper around the drawing.

    The paper has the border's median colour; parts of that colour inside a drawing belong to the drawing.
    """
    border = np.concatenate([rgb[0], rgb[-1], rgb[:, 0], rgb[:, -1]])
    like_paper = np.abs(rgb - np.median(border, axis=0)).max(axis=2) <= PAPER

    paper = np.pad(like_paper.astype(np.uint8), 1, constant_values=1)
    cv2.floodFill(paper, None, (0, 0), 2)
    return paper[1:-1, 1:-1] != 2


def share_of_the_way(on: float, off: float, ceiling: float) -> float:
    """How far control goes from what the model does without it to the best that its VAE could show: 0 to 1."""
    return (on - off) / (ceiling - off)
