from typing import TypeAlias

Geometry: TypeAlias = tuple[int, int, int, int, bool]
"""The rows of a group, the rows of all, the groups, the channels, and whether activations are bfloat16."""

def normalize(addresses: tuple[int, ...], epsilon: float, geometry: Geometry, relu: bool, threads: int, /) -> None: ...
def gradients(addresses: tuple[int, ...], geometry: Geometry, relu: bool, threads: int, /) -> None: ...
