"""The caller's device and stream, as launchers use them."""

from saapindex.devices import current, device_of

__all__ = ["current", "device_of"]
