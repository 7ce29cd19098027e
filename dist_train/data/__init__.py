"""Images and labels: readers, the decoded cache, the global batch plan, augmentation, pixels on the device.

It knows no process group: where rank and world size are needed, they are numbers.
"""
