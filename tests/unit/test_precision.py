"""What `auto` is on a device, and what a forward pass then computes in."""

import pytest
import torch

from retro_ray.errors import ConfigError
from retro_ray.precision import LEAST_INT8_WIDTH, arithmetic, resolve_precision

CPU = torch.device("cpu")


def test_auto_precision_asks_the_hardware(monkeypatch):
    for int8, bf16, wide, narrow in (
        (True, True, "int8", "bf16"),
        (False, True, "bf16", "bf16"),
        (False, False, "fp32", "fp32"),
    ):
        monkeypatch.setattr("retro_ray.precision.int8_is_fastest", lambda device, fast=int8: fast)
        monkeypatch.setattr("retro_ray.precision.bf16_is_fast", lambda device, fast=bf16: fast)
        assert resolve_precision("auto", CPU, LEAST_INT8_WIDTH) == wide
        assert resolve_precision("auto", CPU, LEAST_INT8_WIDTH - 1) == narrow
        assert resolve_precision("auto", CPU) == narrow
        assert resolve_precision("fp32", CPU, 1024) == "fp32"
    with pytest.raises(ConfigError, match="precision is int8, which is for CPUs; on cuda take bf16"):
        resolve_precision("int8", torch.device("cuda"))


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("int8", torch.bfloat16)]
)
def test_products_of_a_forward_pass_are_of_the_type_that_was_asked_for(precision, dtype):
    with arithmetic(precision, CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
