"""Parameters divided by a pattern, and joined."""

import pytest

from im3d_jax.params import join, split_params
from recon_torch.errors import UserError

PARAMS = {"a_temporal": {"kernel": 1}, "b": {"kernel": 2, "bias": 3}}


def test_parameters_are_divided_by_a_pattern_and_joined_again():
    trained, frozen = split_params(PARAMS, "temporal")
    assert (trained, frozen) == ({"a_temporal/kernel": 1}, {"b/kernel": 2, "b/bias": 3})
    assert join(frozen, trained) == PARAMS


def test_what_stands_for_temporal_layers_where_there_are_none_is_named(user_error):
    params = {"blocks_0": {"attn1": {"kernel": 1}}}
    with user_error("matches none .*; name some, such as blocks_0/attn1/kernel, or .* train a LoRA"):
        split_params(params, "temporal")


def test_a_pattern_that_matches_nothing_is_one_line():
    with pytest.raises(UserError, match="config.train.trainable: 'c/' matches none of the 3 parameters"):
        split_params(PARAMS, "c/")
