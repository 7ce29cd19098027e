"""Images and labels: readers, the decoded cache, the global batch plan, augmentation, pixels on the device.

This room knows no ranks: where it needs them, rank and size are numbers.
"""
