"""DeepSpeed's own tools work: correct for what the rank owns, at every stage, or one error in words."""

import pytest
import torch

FORWARD = {"coverage": 0.5, "masking": "forward"}
BACKWARD = {"coverage": 0.5, "masking": "backward"}
CASES = [
    *({"stage": stage, "sdp": FORWARD, "bf16": bf16} for stage, bf16 in ((0, True), (1, False), (2, True), (3, False))),
    *({"stage": stage, "sdp": BACKWARD, "bf16": bf16} for stage, bf16 in ((0, False), (1, True), (2, False))),
    {"stage": 3, "sdp": FORWARD, "bf16": True},
]


def of_all(results, key):
    """Values of all ranks by fragment, which owners have alike to the bit."""
    found = {}
    for result in results:
        for fragment, value in result[key].values():
            assert torch.equal(found.setdefault(fragment, value), value), (key, fragment)
    return found


def part(full, fragment):
    whole = full[fragment.full_name]
    if fragment.dim is None:
        return whole
    return whole.narrow(fragment.dim, fragment.start, fragment.stop - fragment.start)


@pytest.fixture(scope="module")
def used(ranks4):
    ranks = ranks4.run("tests.engine.tool_cases:through_tools", cases=CASES, timeout=300)
    return [(case, [of_rank[number] for of_rank in ranks]) for number, case in enumerate(CASES)]


def test_what_is_got_is_what_is_trained(used):
    for case, results in used:
        dtype = torch.bfloat16 if case["bf16"] else torch.float32
        weights, grads, moments = (of_all(results, key) for key in ("weights", "grads", "moments"))
        full = results[0]["full"]
        for fragment, value in weights.items():
            assert value.dtype == torch.float32
            assert torch.equal(value.to(dtype).float(), part(full, fragment)), (case, fragment)
        for fragment, value in of_all(results, "gathered").items():
            assert value.dtype == dtype
            assert torch.equal(value, weights[fragment].to(dtype)), (case, fragment)
        norm = torch.stack([value.double().norm() for value in grads.values()]).norm()
        assert float(norm) == pytest.approx(results[0]["norm"], rel=1e-5)
        for fragment, value in moments.items():
            assert torch.allclose(value, 0.1 * grads[fragment], rtol=1e-5, atol=1e-12), (case, fragment)
        for result in results:
            assert result["local"]
            assert all(value is None for value in result["others"])
            assert "takes none before the first step" in result["early"]
            assert "between a backward pass" in result["late"]


def test_what_is_set_is_trained_on(used):
    for case, results in used:
        dtype = torch.bfloat16 if case["bf16"] else torch.float32
        weights, now = of_all(results, "weights"), of_all(results, "set")
        for fragment, value in now.items():
            assert torch.equal(value, 1.5 * weights[fragment])
        for fragment, value in of_all(results, "set_weights").items():
            assert torch.equal(value, now[fragment].to(dtype))
        if case["stage"] == 3:
            for fragment, value in of_all(results, "set_back").items():
                assert torch.equal(value, now[fragment] / 1.5)
        after = of_all(results, "moments_after")
        first, _ = next(iter(results[0]["moments_after"].values()))
        for fragment, value in after.items():
            assert torch.allclose(value, torch.full_like(value, 1.9 if fragment == first else 1.8)), (case, fragment)
        assert all((value == 3.0).all() for value in of_all(results, "moments_set").values())
        for result in results:
            assert "got a value of 3 elements; takes " in result["size"]
            assert case["sdp"] is FORWARD or "under backward masking" in result["refused"]


def test_gathered_parameters_are_changed_for_all_owners(used):
    for case, results in used:
        dtype = torch.bfloat16 if case["bf16"] else torch.float32
        before, now = of_all(results, "before_change"), of_all(results, "changed")
        for fragment, value in now.items():
            expected = before[fragment].clone().view(-1)
            expected[::2] = 2 * expected[::2].to(dtype).float()
            # What nobody changed keeps the digits that only the master weight has.
            assert torch.equal(value.view(-1), torch.where(expected == 0, value.view(-1), expected)), (case, fragment)
        for fragment, value in of_all(results, "changed_weights").items():
            assert torch.equal(value, now[fragment].to(dtype))
        for result in results:
            assert "modifier_rank: got" in result["no owner"]
            assert "takes one of its owners" in result["no owner"]
            assert all(loss == loss for loss in result["after"])


def test_the_module_says_what_it_holds(used):
    for case, results in used:
        for result in results:
            if case["stage"] == 3:
                assert "engine.gathered_weights(layer)" in result["state_dict"]
                assert "engine.full_state_dict()" in result["state_dict"]
            else:
                assert result["state_dict"] == "nothing"
                assert result["state_dict_holds"]
                assert result["pickled"]
            assert result["left"] == []
            assert result["patched"].startswith("deepspeed.")


def test_an_optimizer_goes_on_from_its_own_state_to_the_bit(ranks4):
    for of_rank in ranks4.run("tests.engine.tool_cases:resume", cases=CASES, timeout=300):
        for result in of_rank:
            assert result["first"] == result["again"] == result["then"]
            assert all("optimizer.load_state_dict: got" in words for words in result["words"])
            assert "rank is 7" in result["words"][1]
