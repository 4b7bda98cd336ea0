"""Steps of a run against its dense baseline."""

from hypothesis import given
from hypothesis import strategies as st

from deepspeed_sdp.pretraining.length import make_length


@given(
    tokens=st.floats(1, 1e13),
    per_step=st.integers(1, 10**7),
    dense=st.floats(1e3, 1e13),
    share=st.floats(0.05, 1.0),
)
def test_it_spends_the_baselines_flops_or_tokens_to_half_a_step(tokens, per_step, dense, share):
    for match in ("tokens", "flops"):
        length = make_length(tokens, match, per_step, share * dense, dense)
        assert length.steps >= 1
        assert length.tokens == length.steps * per_step
        spent, budget, step = (
            (length.tokens, length.dense_tokens, per_step)
            if match == "tokens"
            else (length.flops, length.dense_flops, per_step * share * dense)
        )
        assert length.steps == 1 or abs(spent - budget) <= 0.5 * step * (1 + 1e-6)
        # The part of a step that is needed at least.
        assert length.steps > 1 or budget <= 1.5 * step * (1 + 1e-6)
