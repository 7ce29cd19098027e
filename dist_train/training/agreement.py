"""Whether all ranks hold the same weights and drew the same noise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from dist_train.cluster.communicator import Communicator, gather
from dist_train.optim.flat_weights import FlatWeights, digest
from dist_train.optim.noise import Noise
from dist_train.outcome import DisagreementError


def verify_agreement(comm: Communicator, weights: FlatWeights, noise: Noise, step: int) -> None:
    """Compare digests of the clean weights and of the noise of update `step`, just made, over all ranks.

    Raises:
        DisagreementError: they differ; the text names what differs and the ranks that are in the minority.
    """
    digests = gather(comm, [digest(weights.values), noise.digest(step)], "agreement")
    for index, what in enumerate(("weights", "noise")):
        odd = minority([row[index] for row in digests])
        if odd:
            names = ", ".join(map(str, odd))
            raise DisagreementError(
                f"after step {step + 1} the {what} of rank{'s' if len(odd) > 1 else ''} {names} "
                f"differ from those of the others"
            )


def minority(digests: Sequence[int]) -> list[int]:
    """Return the ranks whose digest is not the most frequent one; of equally frequent ones, rank 0's is right."""
    counts = Counter(digests)
    right = max(counts, key=lambda value: (counts[value], value == digests[0]))
    return [rank for rank, value in enumerate(digests) if value != right]
