"""Parts of a sampling run: its times from one time on, or up to one; and where they turn."""

import numpy as np

__all__ = ["begun_at", "ended_at", "steps_onward"]


def begun_at(start: float, times: np.ndarray) -> np.ndarray:
    """The times from `start` on, which replaces the nearest one, and those above; the last time is kept.

    If `start` is not above the last there is no step, and the time is that of data, 0.
    """
    if np.float32(start) <= np.float32(times[-1]):
        return np.zeros(1)
    near = _nearest(times[times > times[-1]], start)
    later = times[1 + np.argmax(times == near) :]
    return _moving(np.append(start, np.where(later >= near, start, later)))


def ended_at(stop: float, times: np.ndarray) -> np.ndarray:
    """The times up to `stop`, which replaces the nearest one between the ends, and those below."""
    between = times[(times < times[0]) & (times > times[-1])]
    if not len(between):
        return np.append(times[0], stop)
    near = _nearest(between, stop)
    earlier = times[: np.flatnonzero(times == near)[-1]]
    return _moving(np.append(np.where(earlier <= near, stop, earlier), stop))


def _nearest(times: np.ndarray, time: float) -> float:
    """The one of the times that is nearest to this."""
    return times[np.argmin(np.abs(times - time))]


def _moving(times: np.ndarray) -> np.ndarray:
    """The times without repetitions of the one before."""
    return times[np.append(True, np.diff(times) != 0)]


def steps_onward(times: np.ndarray, index: int) -> int:
    """How many steps there are from here in one direction."""
    signs = np.sign(np.diff(times[index:], append=times[-1]))
    return int(np.argmax(signs != signs[0]))
