"""Distances of sets of pictures, against closed forms, scipy's matrix root and sums over every pair."""

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from im3d_jax.evaluate import distributions, jackknife

torch_fidelity = pytest.importorskip("torch_fidelity")


@pytest.fixture
def sets():
    """7 and 9 vectors of 5 numbers, of different distributions."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(7, 5)), rng.normal(size=(9, 5)) @ rng.normal(size=(5, 5)) + 0.3


def test_frechet_is_that_of_scipys_matrix_root(sets):
    made, reference = sets
    covariances = [np.cov(each, rowvar=False) for each in sets]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((made.mean(0) - reference.mean(0)) ** 2).sum() + np.trace(sum(covariances) - 2 * root)
    assert distributions.frechet(made, reference) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_axis_aligned_gaussians_has_a_closed_form():
    # Of variance 1, without covariance.
    signs = np.array(np.meshgrid(*[[-1, 1]] * 3)).reshape(3, -1).T * np.sqrt(7 / 8)
    sigmas, shift = np.array([[1.0, 2, 3], [4.0, 1, 0.5]]), np.array([0.5, -1, 2])
    expected = (shift**2).sum() + ((sigmas[0] - sigmas[1]) ** 2).sum()
    assert distributions.frechet(signs * sigmas[0] + shift, signs * sigmas[1]) == pytest.approx(expected)


def test_kernel_distance_is_the_unbiased_sum_over_pairs(sets):
    made, reference = sets
    made, reference = made, reference[:7]  # so that every subset is the whole set

    def k(x, y):
        return (sum(a * b for a, b in zip(x, y, strict=True)) / 5 + 1) ** 3

    n = 7
    within = sum(k(s[i], s[j]) for s in (made, reference) for i in range(n) for j in range(n) if i != j)
    between = sum(k(x, y) for x in made for y in reference)
    found = distributions.kernel(made, reference, seed=1)
    assert found.mean == pytest.approx(within / (n * (n - 1)) - 2 * between / n**2, rel=1e-9)
    assert found.std == pytest.approx(0, abs=1e-9) and found.subset_size == n


def test_cmmd_is_the_sum_over_pairs(sets, monkeypatch):
    made, reference = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in sets)

    def mean(one, other):
        return np.mean([np.exp(-sum((x - y) ** 2) / 200) for x in one for y in other])

    expected = 1000 * (mean(made, made) + mean(reference, reference) - 2 * mean(made, reference))
    assert distributions.cmmd(made, reference) == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr(distributions, "ROWS_AT_ONCE", 4)
    assert distributions.cmmd(made, reference) == pytest.approx(expected, rel=1e-9)


def test_frechet_by_singular_values_is_the_same_number(sets):
    made, reference = sets
    expected = distributions.frechet(made, reference)
    assert distributions.frechet_by_singular_values(made, reference) == pytest.approx(expected, rel=1e-9)
    wide = made @ np.ones((5, 20)) + np.random.default_rng(1).normal(size=(7, 20)), reference @ np.eye(5, 20)
    expected = distributions.frechet(*wide)  # fewer vectors than numbers
    assert distributions.frechet_by_singular_values(*wide) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("unbiased", [True, False])
def test_what_is_left_without_each_group_is_the_sum_over_pairs(sets, unbiased, monkeypatch):
    groups = np.array([0, 1, 2, 0, 1, 2, 0]), np.array([2, 0, 1, 2, 2, 0, 1, 0, 1])
    monkeypatch.setattr(jackknife, "ROWS_AT_ONCE", 4)
    found = jackknife.mmd_without_each(distributions.cubic_kernel, sets, groups, unbiased)
    for number, value in enumerate(found):
        made, reference = (each[of != number] for each, of in zip(sets, groups, strict=True))

        def mean(one, other, without_self):
            pairs = [
                (x, y)
                for i, x in enumerate(one)
                for j, y in enumerate(other)
                if not (without_self and i == j)
            ]
            return np.mean([(x @ y / 5 + 1) ** 3 for x, y in pairs])

        within = mean(made, made, unbiased) + mean(reference, reference, unbiased)
        assert value == pytest.approx(within - 2 * mean(made, reference, False), rel=1e-9)
    frechets = jackknife.without_each(distributions.frechet, sets, groups)
    assert frechets[1] == pytest.approx(
        distributions.frechet(sets[0][groups[0] != 1], sets[1][groups[1] != 1])
    )


def test_rows_of_one_name_are_left_out_together():
    made, reference = jackknife.groups_of(list("aabbcdefghijkl"), list("xyzaabcwvu"))
    assert made.tolist() == [0, 0, 1, 1, *range(2, 9), 0, 1, 2]
    assert reference.tolist() == [3, 4, 5, 0, 0, 1, 2, 2, 1, 0]  # u to z after those of both
    assert jackknife.groups_of(list("abcd"), list("abcdefgh")) is None


def test_the_interval_of_a_mean_is_that_of_student():
    values = np.random.default_rng(0).normal(size=10)
    without = np.array([np.delete(values, each).mean() for each in range(10)])
    low, high = jackknife.interval(values.mean(), without)
    expected = scipy.stats.t.interval(0.95, 9, values.mean(), scipy.stats.sem(values))
    assert (low, high) == pytest.approx(expected)
    assert jackknife.interval(0.1, without, least=0.0)[0] == 0


def test_intervals_of_distances_of_equal_distributions_are_narrow_beside_those_of_others():
    rng, names = np.random.default_rng(0), [str(number // 4) for number in range(80)]
    sets = [rng.normal(size=(80, 4)) + shift for shift in (0, 0, 1)]
    unit = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in sets]
    reference, alike, shifted = (
        distributions.Embedded(names, *both) for both in zip(sets, unit, strict=True)
    )
    near, far = (distributions.distances(each, reference, seed=0) for each in (alike, shifted))
    for name in ("fid", "kid", "cmmd"):
        (low, high), (far_low, far_high) = near["intervals"][name], far["intervals"][name]
        assert low <= near[name] <= high < far_low < far[name] < far_high
    few = distributions.distances(alike._replace(names=["a"] * 80), reference, seed=0)
    assert few["intervals"] == {} and few["fid"] == near["fid"]


def test_one_picture_is_refused(user_error):
    with user_error("ours: there is no more than 1 picture;"):
        distributions.embed([("mug", [np.zeros((8, 8, 3), np.uint8)])], None, None, "ours")


@pytest.mark.slow
def test_inception_has_the_weights_of_its_file(tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise AssertionError("nothing is fetched")

    module = torch_fidelity.feature_extractor_inceptionv3
    monkeypatch.setattr(module, "load_state_dict_from_url", no_network)
    states, path = {}, tmp_path / "inception.pth"
    with monkeypatch.context() as patch:
        patch.setattr(
            module.FeatureExtractorInceptionV3,
            "load_state_dict",
            lambda self, _: states.update(self.state_dict()),
        )
        torch.save({}, path)
        distributions.Inception(path)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: (torch.rand(each.shape, generator=generator) / 20).to(each.dtype)  # batches are counted
        for name, each in states.items()
    }
    torch.save(weights, path)
    inception = distributions.Inception(path)
    assert all(torch.equal(each, weights[name]) for name, each in inception.network.state_dict().items())
    picture = np.random.default_rng(0).integers(256, size=(40, 30, 3), dtype=np.uint8)
    found = inception.embed([picture, picture[:20, :20]])
    assert found.shape == (2, 2048) and found.dtype == np.float64
    together = inception.embed([picture[:20, :20], picture[20:, :20]])
    np.testing.assert_allclose(together[0], found[1], rtol=1e-4, atol=1e-6)


def test_weights_of_another_network_are_refused(tmp_path, user_error):
    path = tmp_path / "inception.pth"
    with user_error("Inception weights .* do not exist"):
        distributions.Inception(path)
    torch.save({"fc.weight": torch.zeros(2, 2)}, path)
    with user_error("not those of the Inception of FID"):
        distributions.Inception(path)
    torch.save([torch.zeros(2)], path)
    with user_error("are no tensors by name"):
        distributions.Inception(path)
