"""Cycles of a device that are launched before the one before them was read: see docs/device.md."""
