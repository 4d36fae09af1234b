"""Laws of random views: shape, type and pictures kept, draws from the generator alone, and what each may do."""

import pytest
import torch

from luthier.data.augment import chain, lit, noisy, resized, shifted
from luthier.errors import InputError

VIEWS = {"shifted": shifted(2), "resized": resized(0.6), "lit": lit(0.3), "noisy": noisy(0.1)}
VIEWS["chain"] = chain(*VIEWS.values())


def pictures(count=6, side=8):
    return torch.rand(count, 3, side, side + 1, generator=torch.Generator().manual_seed(0))


def draw(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", VIEWS)
class TestLaws:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_shape_type_and_input_are_kept(self, name, dtype):
        given = pictures().to(dtype)
        before = given.clone()
        seen = VIEWS[name](given, draw(0))
        assert seen.shape == given.shape and seen.dtype == dtype and torch.equal(given, before)

    def test_equal_generators_give_equal_views_and_others_do_not(self, name):
        state = torch.get_rng_state()
        first, again, other = (VIEWS[name](pictures(), draw(seed)) for seed in (1, 1, 2))
        assert torch.equal(first, again) and not torch.equal(first, other)
        assert torch.equal(torch.get_rng_state(), state)

    def test_each_picture_draws_for_itself(self, name):
        same = pictures(1).expand(8, -1, -1, -1)
        seen = VIEWS[name](same, draw(3))
        assert any(not torch.equal(seen[0], one) for one in seen[1:])

    def test_what_is_no_batch_of_pictures_is_refused(self, name):
        with pytest.raises(InputError, match="expected pictures"):
            VIEWS[name](torch.zeros(8, 8), draw(0))
        with pytest.raises(InputError, match="expected pictures"):
            VIEWS[name](torch.zeros(1, 1, 8, 8, dtype=torch.uint8), draw(0))


@pytest.mark.parametrize("view", [shifted(0), resized(1.0), lit(0.0), noisy(0.0), chain()])
def test_no_width_is_the_picture_itself(view):
    torch.testing.assert_close(view(pictures(), draw(0)), pictures(), rtol=0, atol=1e-6)


def test_a_shift_moves_a_point_by_whole_pixels_within_bounds_and_reaches_all_of_them():
    point = torch.zeros(200, 1, 9, 9)
    point[:, 0, 4, 4] = 1
    seen = shifted(2)(point, draw(0))
    places = seen.flatten(1).argmax(1)
    assert torch.equal(seen.sum((1, 2, 3)), torch.ones(200)) and set(seen.unique().tolist()) == {0.0, 1.0}
    expected = {9 * row + column for row in range(2, 7) for column in range(2, 7)}
    assert set(places.tolist()) == expected


def test_a_shift_keeps_rows_and_channels_apart():
    """By the oracle of torch.roll on pictures with an empty border."""
    given = torch.zeros(30, 2, 8, 8)
    given[:, :, 2:6, 2:6] = torch.rand(30, 2, 4, 4, generator=draw(1))
    seen = shifted(1)(given, draw(2))
    rolled = [given.roll((down, right), (2, 3)) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    assert all(any(torch.equal(one, r[i]) for r in rolled) for i, one in enumerate(seen))


def test_a_crop_stays_between_lowest_and_highest_value():
    given = pictures()
    seen = resized(0.5)(given, draw(0))
    assert seen.min() >= given.min() - 1e-6 and seen.max() <= given.max() + 1e-6


def test_light_is_a_straight_line_of_the_pixels():
    given = pictures().double()
    seen = lit(0.4)(given, draw(0))
    for before, after in zip(given.flatten(1), seen.flatten(1), strict=True):
        slope = (after[1:] - after[:-1]) / (before[1:] - before[:-1])
        assert slope.std() < 1e-6 and 0.6 <= float(slope.mean()) <= 1.4
        assert abs(float(after.mean() - before.mean())) <= 0.4 * float(before.std(correction=0)) + 1e-9


def test_noise_has_the_spread_that_was_asked_for():
    seen = noisy(0.5)(torch.zeros(1, 1, 200, 200), draw(0))
    assert abs(float(seen.std()) - 0.5) < 0.01 and abs(float(seen.mean())) < 0.01  # 4 standard errors


@pytest.mark.parametrize("make", [lambda: shifted(-1), lambda: resized(0), lambda: lit(1.0), lambda: noisy(-0.1)])
def test_ranges_are_checked(make):
    with pytest.raises(InputError, match="expected a"):
        make()
