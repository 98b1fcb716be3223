from __future__ import annotations

from hyperseaport.transport.udx.mtu import MtuSearch


def probed(search: MtuSearch) -> int | None:
    """Send the wanted probe; returns its IP size."""
    padding = search.padding(search.payload)
    if padding == 0:
        return None
    search.sent()
    return search.mtu + padding


def test_sizes_grow_by_steps_to_the_maximum() -> None:
    search = MtuSearch()
    assert probed(search) is None, "nothing before the path is known to be there"
    search.begin()
    sizes = []
    while (size := probed(search)) is not None:
        sizes.append(size)
        assert probed(search) is None, "one probe at a time"
        search.acknowledged()
    assert sizes == [*range(1232, 1489, 32), 1500]
    assert search.payload == 1452


def test_a_size_is_given_up_after_three_losses() -> None:
    search = MtuSearch()
    search.begin()
    probed(search)
    search.acknowledged()
    for _ in range(3):
        assert probed(search) == 1264
        search.lost()
    assert probed(search) is None
    assert search.mtu == 1232


def test_two_losses_are_forgotten_by_success() -> None:
    search = MtuSearch()
    search.begin()
    for _ in range(2):
        probed(search)
        search.lost()
    probed(search)
    search.acknowledged()
    for _ in range(2):
        probed(search)
        search.lost()
    assert probed(search) == 1264


def test_padding_has_to_fit_one_byte() -> None:
    search = MtuSearch()
    search.begin()
    assert search.padding(search.payload) == 32
    assert search.padding(search.payload - 223) == 255
    assert search.padding(search.payload - 224) == 0


def test_after_a_pause_the_size_that_worked_is_tried_first() -> None:
    search = MtuSearch()
    search.begin()
    while probed(search) is not None:
        search.acknowledged()
    search.begin_again()
    assert search.mtu == 1200
    assert probed(search) == 1455, "as much as padding can do"
    search.acknowledged()
    assert (search.mtu, probed(search)) == (1455, 1487)


def test_a_path_that_became_narrower_is_searched_from_the_base() -> None:
    search = MtuSearch()
    search.begin()
    while probed(search) is not None:
        search.acknowledged()
    search.begin_again()
    for _ in range(3):
        assert probed(search) == 1455
        search.lost()
    assert probed(search) == 1232
    search.acknowledged()
    assert search.mtu == 1232


def test_at_the_base_there_is_nothing_to_begin_again() -> None:
    search = MtuSearch()
    search.begin()
    probed(search)
    search.begin_again()
    assert probed(search) is None


def test_a_small_link_is_not_searched() -> None:
    for link in (0, 576, 1200):
        search = MtuSearch(link)
        search.begin()
        assert probed(search) is None
        assert search.mtu == 1200


def test_the_link_is_the_limit() -> None:
    search = MtuSearch(1220)
    search.begin()
    assert probed(search) == 1220
    search.acknowledged()
    assert probed(search) is None
    assert search.mtu == 1220


def test_beginning_twice_is_once() -> None:
    search = MtuSearch()
    search.begin()
    probed(search)
    search.begin()
    assert probed(search) is None
