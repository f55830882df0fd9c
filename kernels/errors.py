"""What a caller can get wrong about an op's arguments. Owns no kernel."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, dtype


class ShapeError(ValueError):
    """A tensor's shape, dtype, stride or device breaks an op's contract.

    Attributes:
        argument: name of the argument at fault.
        rule: what was expected of it.
    """

    def __init__(self, argument: str, rule: str, value: object) -> None:
        super().__init__(f"{argument}: expected {rule}, got {value}")
        self.argument = argument
        self.rule = rule


class TritonMissing(RuntimeError):
    """A GPU op was called, but Triton is not installed."""


def check_matrix(argument: str, tensor: Tensor, dtypes: tuple[dtype, ...]) -> None:
    """Require two axes, the last one contiguous, and one of ``dtypes``."""
    if tensor.dim() != 2:
        raise ShapeError(argument, "2 axes", tuple(tensor.shape))
    if tensor.dtype not in dtypes:
        raise ShapeError(argument, f"a dtype of {dtypes}", tensor.dtype)
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise ShapeError(argument, "a contiguous last axis", f"strides {tensor.stride()}")


def check_vector(
    argument: str, tensor: Tensor, dtypes: tuple[dtype, ...], length: int | None
) -> None:
    """Require one contiguous axis of ``length`` (any when None) and one of ``dtypes``."""
    if tensor.dim() != 1 or (length is not None and tensor.shape[0] != length):
        raise ShapeError(
            argument, f"shape ({'any' if length is None else length},)", tuple(tensor.shape)
        )
    if tensor.dtype not in dtypes:
        raise ShapeError(argument, f"a dtype of {dtypes}", tensor.dtype)
    if tensor.shape[0] > 1 and tensor.stride(0) != 1:
        raise ShapeError(argument, "a contiguous axis", f"stride {tensor.stride(0)}")


def check_devices(tensors: Mapping[str, Tensor | None]) -> None:
    """Require all tensors on the device of the first one."""
    present = [(name, tensor) for name, tensor in tensors.items() if tensor is not None]
    first_name, first = present[0]
    for name, tensor in present[1:]:
        if tensor.device != first.device:
            raise ShapeError(name, f"the device of {first_name}, {first.device}", tensor.device)
