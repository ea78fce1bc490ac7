"""How many candidates a part of a database is asked for."""

from retro_ray.index.search import Wanted


def test_no_part_is_asked_for_more_than_all_that_are_wanted_and_a_few_for_ties() -> None:
    assert [Wanted(50).of_part(share) for share in (1.0, 0.5, 0.25)] == [54, 54, 54]
    assert Wanted(50, widening=3).of_part(1.0) == 162


def test_small_parts_are_asked_for_their_share_and_what_chance_adds() -> None:
    """All 64 together for a few times as many as are wanted."""
    assert Wanted(400).of_part(1 / 64) < 60
    assert Wanted(400).of_part(1 / 64) > 400 / 64
