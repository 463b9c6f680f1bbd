"""The old name of `kdiff.ema`."""

from kdiff import deprecated

__all__ = []

_NAMES = {name: name for name in ("LONGEST", "Exponential", "Power", "Profile", "profiles_of")}
__getattr__ = deprecated.names(__name__, "kdiff.ema", Averages="EMA", **_NAMES)
