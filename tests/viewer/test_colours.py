"""The heat map's colours for eyes that tell fewer colours apart, and its text upon them.

Simulations: Machado, Oliveira, Fernandes, "A Physiologically-based Model for Simulation of Color
Vision Deficiency", IEEE TVCG 15(6), 2009, table 1, severity 1.0; upon linear RGB.
"""

from __future__ import annotations

import re

import numpy as np
import pytest

from logitstore.display.notebook import _COLOURS
from logitstore_server.viewer.routes import STATIC

SIMULATIONS = {
    "common": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
WHITE = np.array([0.9505, 1.0, 1.089])


def linear(colour: str) -> np.ndarray:
    """Linear RGB of `#rgb` or `#rrggbb`."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
    value = np.array([int(digits[i : i + 2], 16) for i in (0, 2, 4)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    t = XYZ @ np.clip(rgb, 0, 1) / WHITE
    f = np.where(t > 216 / 24389, np.cbrt(t), (24389 / 27 * t + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def schemes() -> list[dict[str, str]]:
    """Variables of light, of dark as chosen, of dark as the system has it."""
    css = (STATIC / "viewer.css").read_text(encoding="utf-8")
    blocks = re.findall(r"color-scheme: (?:light|dark);(.*?)\}", css, re.DOTALL)
    return [dict(re.findall(r"(--[\w-]+): (#\w+)", block)) for block in blocks]


def test_there_are_two_schemes_and_the_notebook_has_the_light_one():
    light, chosen, system = schemes()
    assert chosen == system != light
    assert tuple(light[f"--l{level}"] for level in range(8)) == _COLOURS


@pytest.mark.parametrize("eyes", SIMULATIONS)
def test_a_stronger_level_is_further_from_the_ground_for_everybody(eyes):
    for scheme in schemes()[:2]:
        seen = np.array(
            [lab(np.array(SIMULATIONS[eyes]) @ linear(scheme[f"--l{n}"])) for n in range(8)]
        )
        steps = np.diff(seen[:, 0])
        assert (steps < -2).all() or (steps > 2).all()
        # A difference of 2.3 is just noticed.
        assert np.linalg.norm(np.diff(seen, axis=0), axis=1).min() > 3


def test_text_upon_every_level_has_the_contrast_of_wcag_aa():
    for scheme in schemes()[:2]:
        text = float(XYZ[1] @ linear(scheme["--text"]))
        for level in range(8):
            ground = float(XYZ[1] @ linear(scheme[f"--l{level}"]))
            high, low = max(text, ground), min(text, ground)
            assert (high + 0.05) / (low + 0.05) >= 4.5
