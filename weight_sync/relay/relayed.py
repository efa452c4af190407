"""Which offers bring an engine that has nothing to the version that is current, out of what stagers hold."""

from __future__ import annotations

from weight_sync.transports.protocol import WHOLE, DeltaOffer, Offer, ShardedOffer, decode_offer


class Relayed:
    """The offers since the last whole version, in order."""

    def __init__(self) -> None:
        self._offers: list[tuple[int, bytes]] = []

    def add(self, offer: bytes) -> None:
        """An offer was made. Raises WeightTransferError if it is none."""
        decoded = decode_offer(offer)
        if _is_whole(decoded):
            self._offers = []
        self._offers.append((decoded.manifest.version, offer))

    def offers_of(self, version: int) -> list[bytes]:
        """What to fetch, one after the other, to hold ``version``; empty if it is not what was offered last."""
        if not self._offers or self._offers[-1][0] != version:
            return []
        return [offer for _, offer in self._offers]


def _is_whole(offer: Offer) -> bool:
    if isinstance(offer, ShardedOffer):
        return all(_is_whole(decode_offer(part)) for part in offer.parts)
    return not isinstance(offer, DeltaOffer) or offer.base == WHOLE
