"""Which keys a run may change."""

from megatron_attn2d.config import keys, upstream_flags


def test_lists_of_keys_name_keys():
    named = {*keys.SCHEDULE, *keys.ORDER, *keys._FREE, *keys._FIXED, *(f"megatron_args.{n}" for n in keys.FIRST_START)}
    assert not [key for key in named if not keys.is_key(key)]
    groups = {option.group for option in upstream_flags.options().values()}
    assert keys._FREE_GROUPS | {keys._SCHEDULE_GROUP} <= groups


def test_an_argument_that_nobody_has_classified_is_compared():
    """By far the most of Megatron's arguments about model, data and loss."""
    compared = {
        flag
        for flag, option in upstream_flags.options().items()
        if option.group in {"network size", "regularization", "data and dataloader", "mla", "moe", "mixed precision"}
        and not keys._is_free(flag.removeprefix("--").replace("-", "_"))
    }
    assert len(compared) > 100
