"""Ctrl-C, SIGTERM and preemption as a wish to stop, granted where all processes agree."""

import os
import signal
import types

import jax
from jax.experimental import multihost_utils


class StoppedError(Exception):
  """The wish to stop is granted here."""


class StopRequest:
  """Notes SIGINT and SIGTERM instead of dying of them; a second Ctrl-C interrupts at once.

  With several processes, the signal may come to any of them: the coordination service tells the
  others, and chooses at which of the next questions (`check`) all of them stop.

  Attributes:
    signal: the signal that came, or None.
  """

  def __init__(self):
    self.signal: signal.Signals | None = None
    self._previous: dict[signal.Signals, object] = {}
    self._asked = 0

  def __enter__(self) -> "StopRequest":
    # SIGTERM of several processes belongs to JAX, which passes it on.
    noted = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGINT, signal.SIGTERM)
    for number in noted:
      self._previous[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _note(self, number: int, frame: types.FrameType | None) -> None:
    if self.signal is not None and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.signal = signal.Signals(number)
    if jax.process_count() > 1:
      os.kill(os.getpid(), signal.SIGTERM)

  def check(self) -> None:
    """Grants the wish, if there is one; all processes must ask equally often.

    Raises:
      StoppedError: in all of them.
    """
    if jax.process_count() > 1:
      self._asked += 1
      if multihost_utils.reached_preemption_sync_point(self._asked):
        self.signal = self.signal or signal.SIGTERM
        raise StoppedError
    elif self.signal:
      raise StoppedError

  @property
  def exit_status(self) -> int:
    """What a shell expects of a process that a signal ended: 128 + its number."""
    return 128 + self.signal if self.signal else 0
