"""GPUs by the names that their drivers give."""

import pytest

from deepspeed_sdp.estimate.gpu import gpu_of_device


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100-PCIE-40GB", "a100-40"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("Tesla V100-SXM2-32GB", "v100"),
        ("NVIDIA B200", "b200"),
    ],
)
def test_a_device_is_found_by_its_own_name(said, name):
    assert gpu_of_device(said).name == name


@pytest.mark.parametrize("said", ["NVIDIA GeForce GTX 1080", "AMD Instinct MI300X", "", "cpu"])
def test_what_the_table_lacks_is_not_guessed(said):
    assert gpu_of_device(said) is None
