"""``LaneAdamW``: AdamW for several adapters at once, each with its own everything.

It is ``torch.optim.AdamW`` after ``clip_grad_norm_``, done for every lane apart: a learning rate, a
step number, a gradient norm and an "active" flag a lane. All values of all parameters lie in one
``(lanes, values)`` tensor, and so do both moments, so that an update is a dozen kernels however
many linears the model has; all gradients lie in one buffer, which processes reduce in one call.
Nothing is read back: an update can be recorded in a CUDA graph.

AdamW: Loshchilov and Hutter, arXiv 1711.05101.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class LaneAdamW:
    """AdamW over parameters whose first dimension is the lane.

    The parameters become views of ``values`` and keep their identity; with several lanes they are
    not contiguous. Their ``.grad`` are contiguous parts of ``grads``, to which ``backward()`` adds.

    Attributes:
        values: ``(lanes, n)`` float32, every trained value of a lane in a row.
        grads: ``(lanes · n,)`` float32, parameter after parameter, as ``backward`` left them.
        exp_avg: ``(lanes, n)`` float32, first moment.
        exp_avg_sq: ``(lanes, n)`` float32, second moment.
        lr: ``(lanes,)`` float64, to be written before a step.
        steps: ``(lanes,)`` int64, updates that each lane has had.
        active: ``(lanes,)`` bool; a lane that is not keeps its values and moments bit for bit.
        norm: ``(lanes,)`` float32, norm of the last step's gradients before clipping.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        weight_decay: float = 0.0,
        clip: float | None = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        """Take the parameters over.

        Args:
            parameters: ``(lanes, …)`` float32, all on one device, in a fixed order.
            weight_decay: decoupled, multiplied by the learning rate.
            clip: largest gradient norm of a lane; None clips nothing.
            betas: decay of the two moments.
            eps: added to the root of the second moment.
            rates: multiplies the learning rate of the parameters named; 1 for the others.

        Raises:
            ValueError: no parameters, or they differ in lanes, dtype or device.
        """
        first = next(iter(parameters.values()), None)
        if first is None:
            raise ValueError("there is nothing to train")
        alike = {(p.shape[0], p.dtype, p.device) for p in parameters.values()}
        if len(alike) > 1 or first.dtype != torch.float32:
            raise ValueError(f"parameters must be float32 with equal lanes and device, not {alike}")
        self.weight_decay, self.clip, self.betas, self.eps = weight_decay, clip, betas, eps
        lanes, device = first.shape[0], first.device
        self._shapes = {name: p.shape for name, p in parameters.items()}
        flat = [p.detach().reshape(lanes, -1) for p in parameters.values()]
        self.values = torch.cat(flat, dim=1)
        self.grads = torch.zeros(self.values.numel(), device=device)
        self._work = torch.empty_like(self.values)  # where `step` computes
        self.exp_avg = torch.zeros_like(self.values)
        self.exp_avg_sq = torch.zeros_like(self.values)
        self.lr = torch.zeros(lanes, dtype=torch.float64, device=device)
        self.steps = torch.zeros(lanes, dtype=torch.int64, device=device)
        self.active = torch.ones(lanes, dtype=torch.bool, device=device)
        self.norm = torch.zeros(lanes, device=device)
        self._rates = self._rate_vector(rates or {})
        views = self.named(self.values)
        for (name, parameter), grad in zip(parameters.items(), self._gradient_parts(), strict=True):
            parameter.data = views[name]
            parameter.grad = grad.view(parameter.shape)

    @property
    def lanes(self) -> int:
        """How many there are."""
        return self.values.shape[0]

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """``(lanes, n)`` as views with the parameters' names and shapes."""
        views, start = {}, 0
        for name, shape in self._shapes.items():
            size = shape[1:].numel()
            views[name] = flat[:, start : start + size].view(shape)
            start += size
        return views

    @torch.no_grad()
    def step(self, healthy: Tensor | None = None) -> None:
        """Clip each lane's gradient and update the lanes that are active; gradients stay.

        Args:
            healthy: ``(lanes,)`` bool. A lane for which it is False, or whose gradient is not
                finite, becomes inactive before anything of it has changed.
        """
        beta1, beta2 = self.betas
        work = self._work
        torch.cat([part.view(self.lanes, -1) for part in self._gradient_parts()], 1, out=work)
        torch.linalg.vector_norm(work, dim=1, out=self.norm)
        self.active &= torch.isfinite(self.norm)
        if healthy is not None:
            self.active &= healthy
        self.steps += self.active
        # Scalars of a lane in float64: 1 - 0.999 has only four good digits in float32.
        live = self.active.to(torch.float64)
        age = self.steps.clamp(min=1).to(torch.float64)
        lr = self.lr * live
        if self.clip is not None:
            work.mul_(_column(torch.clamp(self.clip / (self.norm + 1e-6), max=1.0)))
        # Not a product with `live`: what is not finite must go too.
        work.masked_fill_(~self.active[:, None], 0.0)
        self.exp_avg.mul_(_column(1 - (1 - beta1) * live)).add_(work, alpha=1 - beta1)
        self.exp_avg_sq.mul_(_column(1 - (1 - beta2) * live))
        self.exp_avg_sq.addcmul_(work, work, value=1 - beta2)
        torch.sqrt(self.exp_avg_sq, out=work)
        work.div_(_column((1 - beta2**age).sqrt())).add_(self.eps)
        torch.div(self.exp_avg, work, out=work)
        if self._rates is not None:
            work.mul_(self._rates)
        if self.weight_decay:
            self.values.mul_(self._kept(lr))
        self.values.addcmul_(work, _column(-lr / (1 - beta1**age)))

    def zero_grad(self) -> None:
        """Begin a new step."""
        self.grads.zero_()

    def _gradient_parts(self) -> list[Tensor]:
        """``grads`` parameter by parameter, each one-dimensional."""
        sizes = [shape.numel() for shape in self._shapes.values()]
        return list(torch.split(self.grads, sizes))

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds: values, moments by parameter; step and flag by lane."""
        tensors = {
            f"{kind}.{name}": view
            for kind, flat in self._flat().items()
            for name, view in self.named(flat).items()
        }
        return {**tensors, "lane.steps": self.steps, "lane.active": self.active}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take what ``state`` gave.

        Raises:
            KeyError: something is missing; nothing has changed.
        """
        wanted = self.state()
        found = {name: state[name] for name in wanted}
        for name, tensor in wanted.items():
            tensor.copy_(found[name])

    def _flat(self) -> dict[str, Tensor]:
        return {"value": self.values, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    def _kept(self, lr: Tensor) -> Tensor:
        """What weight decay leaves of a value, broadcast to ``(lanes, n)``."""
        lost = _column(lr * self.weight_decay)
        return 1 - (lost if self._rates is None else lost * self._rates)

    def _rate_vector(self, rates: Mapping[str, float]) -> Tensor | None:
        """``(1, n)``, or None when every rate is 1."""
        if all(rates.get(name, 1.0) == 1.0 for name in self._shapes):
            return None
        vector = torch.ones_like(self.values[:1])
        start = 0
        for name, shape in self._shapes.items():
            size = shape[1:].numel()
            vector[:, start : start + size] = rates.get(name, 1.0)
            start += size
        return vector


def _column(lanes: Tensor) -> Tensor:
    """``(lanes,)`` of any float -> ``(lanes, 1)`` float32."""
    return lanes.to(torch.float32)[:, None]
