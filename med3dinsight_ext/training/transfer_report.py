"""Report of a weight transfer: what was loaded, extended, skipped and unused."""

from __future__ import annotations

from dataclasses import dataclass, field

SHOWN = 12  # tensors that a printed report names


@dataclass
class TransferReport:
    """Tensors that were loaded into a network, and those that were not.

    Attributes:
        file: of the weights; "" for a start from scratch.
        network: class name of the network.
        loaded: tensors of the network that were set.
        extended: those of them that are larger than in the file, and how they are filled up.
        skipped: tensors of the network that were not set, with the reason.
        unused: tensors of the file that the network does not have.
        share: of the network's parameters (elements, not tensors) that were set, in [0, 1];
            extended tensors count whole.
        encoder_share: the same of its encoder; None if its parameters were not given.
    """

    file: str
    network: str
    loaded: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    share: float = 0.0
    encoder_share: float | None = None
    extended: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.file:
            return f"{self.network} starts from scratch: pretrained is not set"
        encoder = "" if self.encoder_share is None else f"; encoder {percent(self.encoder_share)}"
        total = len(self.loaded) + len(self.skipped)
        lines = [
            f"transfer {self.file} -> {self.network}",
            f"  loaded   {len(self.loaded)} of {total} tensors, "
            f"{percent(self.share)} of the parameters{encoder}",
        ]
        for title, rows in (
            ("extended", [f"{name}: {what}" for name, what in self.extended.items()]),
            ("skipped", [f"{name}: {reason}" for name, reason in self.skipped.items()]),
            ("unused", self.unused),
        ):
            lines += [f"  {title:<9}{row}" for row in rows[:SHOWN]]
            if len(rows) > SHOWN:
                lines += [f"  {title:<9}… and {len(rows) - SHOWN} more"]
        return "\n".join(lines)


def percent(share: float) -> str:
    """A share in per cent; 100 % only if nothing is missing."""
    return "100 %" if share == 1 else f"{min(100 * share, 99.99):.2f} %"
