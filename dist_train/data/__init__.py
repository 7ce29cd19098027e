"""Images and labels: readers, the cache of decoded images, the batch plan, augmentation, and samples on the device.

This package knows no process group: rank and world size are passed as numbers where they are needed.
"""
