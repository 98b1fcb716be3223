from __future__ import annotations

from support.dht_fakes import FakeNode, context

from hyperseaport.transport.dht.context import MAX_OFFERS
from hyperseaport.transport.dht.messages import Firewall, NoisePayload, UdxInfo
from hyperseaport.transport.transmit import Address

RELAYS: tuple[Address, ...] = (("5.0.0.1", 1), ("5.0.0.2", 2))


def test_an_offer_is_the_payload_with_the_stream() -> None:
    shared = context(FakeNode())
    for stream_id in (1, 252, 253, 0xFFFF, 0x10000, 0xFFFFFFFF):
        for relays in (None, RELAYS):
            payload = NoisePayload(
                addresses4=shared.addresses(),
                udx=UdxInfo(stream_id, reusable_socket=True),
                secret_stream=True,
                relay_addresses=relays,
            )
            assert shared.offer(stream_id, relays) == payload.encode()


def test_an_offer_follows_the_public_address() -> None:
    node = FakeNode()
    shared = context(node)
    assert NoisePayload.decode(shared.offer(7)).firewall == Firewall.UNKNOWN
    for host in ("7.0.0.1", "7.0.0.2"):
        node.public = (host, 49737)
        payload = NoisePayload.decode(shared.offer(7))
        assert payload.firewall == Firewall.OPEN
        assert payload.addresses4[0] == node.public
    node.public = None
    assert NoisePayload.decode(shared.offer(7)).firewall == Firewall.UNKNOWN


def test_few_offers_are_kept() -> None:
    shared = context(FakeNode())
    for port in range(3 * MAX_OFFERS):
        shared.offer(7, (("5.0.0.1", port),))
        assert len(shared._offers) <= MAX_OFFERS
