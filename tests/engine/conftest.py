"""Of the long sweeps the quick suite takes a part; all of them run behind the marker ``slow``."""

import itertools

import pytest

# Name of a test -> how many of its first rows are quick, and of the others each how many-th.
THINNED = {
    "test_training_equals_the_simulation": (12, 6),
    "test_units_train_like_the_simulation": (6, 6),
    "test_the_forward_pass_is_the_full_models_to_the_bit": (2, 3),
    "test_costs_are_those_of_the_design": (2, 3),
    "test_client_groups_train_as_the_full_model": (4, 3),
    "test_bf16_is_close_to_the_fp32_simulation": (4, 3),
    "test_the_same_layout_goes_on_to_the_bit": (4, 6),
    "test_any_layout_goes_to_any_other": (4, 6),
    "test_bytes_sent_and_held_are_the_real_ones": (6, 3),
    "test_a_bad_gradient_is_named": (2, 3),
    "test_activation_checkpointing": (2, 3),
    "test_unusual_passes_at_stage_3_are_those_of_stage_1": (2, 2),
    "test_own_accumulation": (3, 2),
    "test_an_unusable_job_is_refused": (12, 6),
    "test_one_rank_that_differs_is_named_on_all": (6, 3),
    "test_another_optimizer_or_scheduler_of_one_rank_is_named_on_all": (8, 3),
    "test_the_same_optimizer_and_scheduler_on_all_ranks_are_taken": (1, 3),
    "test_what_groups_keep_of_their_own_comes_back": (2, 2),
    "test_damage_is_found_named_and_another_offered": (2, 2),
    "test_a_subnetwork_is_a_smaller_model": (2, 3),
    "test_a_subnetwork_that_a_config_cannot_say_is_refused": (2, 3),
    "test_a_huggingface_folder_is_a_start": (1, 2),
    "test_saved_beside_training_is_what_was_there_when_it_began": (1, 2),
    "test_no_hang_with_random_delays": (3, 3),
    "test_gradients_are_averaged_in_whatever_order_they_come": (12, 3),
    "test_the_gradient_is_unbiased": (2, 4),
    "test_a_file_that_cannot_grow": (1, 2),
    "test_k_minus_1_workers_may_be_lost_and_the_run_goes_on_to_the_bit": (3, 3),
    "test_full_coverage_is_deepspeed": (4, 3),
    "test_the_folder_loads_without_the_package": (2, 4),
    "test_an_infinite_gradient_on_one_rank_skips_the_step_everywhere": (2, 3),
    "test_client_groups_of_a_meta_model": (1, 3),
    "test_a_forward_pass_around_the_engine": (2, 2),
    "test_fp16_scales_the_loss_on_all_ranks_alike": (2, 2),
    "test_training_from_meta_equals_the_simulation": (2, 2),
    "test_the_full_model_is_scaled_and_training_is_not": (1, 2),
    "test_a_checkpoint_keeps_the_full_model": (1, 2),
}


def pytest_collection_modifyitems(items):
    quick = [item for item in items if "tests/engine/" in item.path.as_posix() and not item.get_closest_marker("slow")]
    of_test = itertools.groupby(quick, key=lambda item: (item.path, item.originalname))
    for (_, name), rows in of_test:
        first, every = THINNED.get(name, (None, 1))
        for number, item in enumerate(rows):
            if first is not None and number >= first and (number - first) % every:
                item.add_marker(pytest.mark.slow)
