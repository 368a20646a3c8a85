"""Films: frames to a GIF or an MP4, as a stream, so that length costs no memory."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np

FPS = 15  # a console shows 60 frames a second, of which an agent step is four

# ffmpeg's options per ending. Each frame of a GIF has its own palette, so that a film of any length
# is a stream; few colours mean that nothing is dithered.
_PALETTES = "split[a][b];[a]palettegen=stats_mode=single[p];[b][p]paletteuse=new=1:dither=none"
_ENCODERS = {
    ".gif": ("-filter_complex", _PALETTES, "-f", "gif"),
    ".mp4": ("-vcodec", "libx264", "-pix_fmt", "yuv420p", "-crf", "18", "-f", "mp4"),
}


class Film:
    """A file that ffmpeg encodes from frames; under its own name only when it is whole."""

    def __init__(self, path: Path):
        """Checks what can be checked before the first frame.

        Args:
          path: file to write, ending in `.gif` or `.mp4`.

        Raises:
          ValueError: another ending.
          ImportError: imageio-ffmpeg is not installed.
        """
        if path.suffix.lower() not in _ENCODERS:
            raise ValueError(f"a film ends in {' or '.join(_ENCODERS)}, found {path.name!r}")
        try:
            import imageio_ffmpeg
        except ImportError as error:
            message = "a film needs imageio-ffmpeg: pip install 'fourfold[rl]'"
            raise ImportError(message) from error
        self._program = imageio_ffmpeg.get_ffmpeg_exe()
        self._path = path
        self._draft = path.with_name(f".{path.name}.unfinished")
        self._encoder: subprocess.Popen | None = None

    def __enter__(self) -> Film:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        return self

    def write(self, frame: np.ndarray, times: int = 1) -> None:
        """Appends a frame, uint8 `(H, W, 3)`; all of one size, with even sides.

        Raises:
          OSError: the file can't be written; the message is ffmpeg's.
        """
        if self._encoder is None:
            size = f"{frame.shape[1]}x{frame.shape[0]}"
            source = f"-f rawvideo -pix_fmt rgb24 -s {size} -r {FPS} -i -".split()
            encode = [*_ENCODERS[self._path.suffix.lower()], str(self._draft)]
            self._encoder = subprocess.Popen(
                [self._program, "-loglevel", "error", "-y", *source, *encode],
                stdin=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        try:
            self._encoder.stdin.write(frame.tobytes() * times)  # pyright: ignore[reportOptionalMemberAccess]
        except BrokenPipeError:
            self._finish()
            raise

    def _finish(self) -> None:
        if self._encoder is not None:
            encoder, self._encoder = self._encoder, None
            _, said = encoder.communicate()
            if encoder.returncode:
                reason = said.decode(errors="replace").strip().partition("\n")[0]
                raise OSError(f"ffmpeg could not write {self._path}: {reason}")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._finish()
            if kind is None:
                self._draft.replace(self._path)
        finally:
            self._draft.unlink(missing_ok=True)
