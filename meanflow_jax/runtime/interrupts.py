"""Ctrl-C and SIGTERM as a wish to stop, to be granted between two steps."""

import signal
import types


class StopRequest:
  """Notes SIGINT and SIGTERM instead of dying of them; a second Ctrl-C interrupts at once.

  Attributes:
    signal: the signal that came, or None.
  """

  def __init__(self):
    self.signal: signal.Signals | None = None
    self._previous: dict[signal.Signals, object] = {}

  def __enter__(self) -> "StopRequest":
    for number in (signal.SIGINT, signal.SIGTERM):
      self._previous[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _note(self, number: int, frame: types.FrameType | None) -> None:
    if self.signal is not None and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.signal = signal.Signals(number)

  @property
  def exit_status(self) -> int:
    """What a shell expects of a process that a signal ended: 128 + its number."""
    return 128 + self.signal if self.signal else 0
