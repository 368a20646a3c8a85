"""The picture of an agent at play: the screen, and beside it what it expects of each action."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np


class Scene(NamedTuple):
    """What stays the same throughout a film.

    Attributes:
      game: its name.
      actions: their names.
      epsilon: probability of a random action.
      atoms: values of a distribution's atoms; None for plain action values.
      caption: what the values are.
    """

    game: str
    actions: tuple[str, ...]
    epsilon: float
    atoms: np.ndarray | None
    caption: str


class Panel:
    """Draws the frames of one film."""

    BACK, ROW, LINE = (16, 18, 24), (34, 38, 48), (62, 68, 82)
    TEXT, DIM = (232, 235, 242), (138, 146, 163)
    BAR, CHOSEN = (91, 134, 206), (255, 178, 66)
    MARGIN, TOP, BOTTOM = 28, 62, 70
    ZOOM = 2  # of the screen
    LABEL, PLOT, VALUE = 112, 408, 72  # widths of a row's parts; 51 atoms take 8 pixels each

    def __init__(self, scene: Scene):
        """Loads the fonts.

        Raises:
          ImportError: Pillow is not installed.
        """
        try:
            from PIL import Image, ImageDraw, ImageFont
        except ImportError as error:
            raise ImportError("a film needs Pillow: pip install 'fourfold[rl]'") from error
        self._image, self._draw = Image, ImageDraw.Draw
        self._font = functools.cache(ImageFont.load_default)
        self._scene = scene
        self._categorical = scene.atoms is not None
        self._limit = 0.0  # largest action value so far: the scale of plain values

    def draw(
        self, screen: np.ndarray, outputs: np.ndarray, chosen: int | None, score: float, step: int
    ) -> np.ndarray:
        """Returns one frame, uint8 `(H, W, 3)` with even sides.

        Args:
          screen: uint8 `(h, w, 3)`.
          outputs: logits `(A, atoms)` or values `(A,)`.
          chosen: the action taken; None at the end.
          score: return so far.
          step: agent steps so far.
        """
        height, width = (self.ZOOM * n for n in screen.shape[:2])
        left = 2 * self.MARGIN + width
        plot = left + self.LABEL
        size = (plot + self.PLOT + self.VALUE + self.MARGIN, self.TOP + height + self.BOTTOM)
        image = self._image.new("RGB", tuple(n + n % 2 for n in size), self.BACK)
        pen = self._draw(image)
        nearest = self._image.Resampling.NEAREST
        picture = self._image.fromarray(screen).resize((width, height), nearest)
        image.paste(picture, (self.MARGIN, self.TOP))
        end = self.MARGIN + width

        def write(x: int, y: int, text: str, size: int, colour: Any, anchor: str) -> None:
            pen.text((x, y), text, colour, self._font(size), anchor)

        base, foot = self.TOP - 16, self.TOP + height + 26
        write(self.MARGIN, base, self._scene.game, 26, self.TEXT, "ls")
        write(end, base, f"return {score:,.0f}", 22, self.TEXT, "rs")
        write(self.MARGIN, foot, f"step {step:,}", 15, self.DIM, "ls")
        write(end, foot, f"epsilon {self._scene.epsilon:g}", 15, self.DIM, "rs")
        what = "value distribution of each action" if self._categorical else "value of each action"
        write(plot, base, what, 18, self.TEXT, "ls")
        write(
            plot + self.PLOT + self.VALUE,
            base,
            "mean" if self._categorical else "",
            15,
            self.DIM,
            "rs",
        )

        values, heights, low, high = self._scaled(outputs)
        rows = len(values)
        tall = min(height // rows, 84)
        top = self.TOP + (height - rows * tall) // 2

        def across(value: float) -> int:
            inset = self._inset(heights)
            return round(plot + inset + (value - low) / (high - low) * (self.PLOT - 2 * inset))

        if chosen is not None:
            y = top + chosen * tall
            right = plot + self.PLOT + self.VALUE + 10
            pen.rounded_rectangle((left - 10, y, right, y + tall - 1), 6, self.ROW)
        for tick in np.linspace(low, high, 5):
            x = across(tick)
            pen.line((x, top, x, top + rows * tall), self.LINE)
            write(x, top + rows * tall + 10, f"{tick:g}", 14, self.DIM, "mt")
        write(
            plot + self.PLOT // 2, top + rows * tall + 36, self._scene.caption, 14, self.DIM, "mt"
        )
        small = min(17, tall - 8)
        for i, (name, value) in enumerate(zip(self._scene.actions, values, strict=True)):
            y, colour = top + i * tall, self.CHOSEN if i == chosen else self.BAR
            floor = y + tall - 4
            if heights is not None:
                for atom, share in enumerate(heights[i]):
                    x, up = plot + atom * self.PLOT // heights.shape[1], round(share * (tall - 10))
                    if up > 0:
                        wide = self.PLOT // heights.shape[1]
                        pen.rectangle((x, floor - up, x + max(wide - 2, 0), floor), colour)
                pen.line((plot, floor + 1, plot + self.PLOT - 1, floor + 1), self.LINE)
                pen.line((across(value), y + 4, across(value), floor), self.TEXT)
            else:
                xs = sorted((across(0.0), across(value)))
                pen.rectangle((xs[0], y + tall // 4, xs[1], y + 3 * tall // 4), colour)
            ink = self.TEXT if i == chosen else self.DIM
            write(left, y + tall // 2, name, small, ink, "lm")
            right = plot + self.PLOT + self.VALUE
            write(right, y + tall // 2, f"{value:.2f}", small, ink, "rm")
        return np.asarray(image)

    def _scaled(self, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray | None, float, float]:
        """Returns the values, the atoms' heights in 0..1 (or None), and the axis' ends."""
        if self._scene.atoms is None:
            self._limit = max(self._limit, float(np.abs(outputs).max()))
            limit = _round_up(self._limit)
            return outputs, None, -limit, limit
        low, high = float(self._scene.atoms[0]), float(self._scene.atoms[-1])
        probs = np.exp(outputs - outputs.max(axis=1, keepdims=True))
        probs /= probs.sum(axis=1, keepdims=True)
        values = probs @ self._scene.atoms
        return values, probs / probs.max(), low, high

    def _inset(self, heights: np.ndarray | None) -> int:
        """Half an atom's width: the first and last atom stand at the axis' ends."""
        return 0 if heights is None else self.PLOT // heights.shape[1] // 2


def _round_up(value: float) -> float:
    """Rounds up to 0.1, 0.2, 0.5, 1, 2, 5 and so on."""
    unit = 10.0 ** math.floor(math.log10(max(value, 0.1)))
    return next(unit * step for step in (1, 2, 5, 10) if value <= unit * step)
