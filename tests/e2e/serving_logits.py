"""What the whole engine makes of adapters, as logits, beside what their origins make of them.

Adapters are uploaded as their users have them; scheduler, slots, bank and runner are those of the
server. Only the sampler's choices are replaced, so that every sequence is known beforehand, and the
origin can say what the logits behind each token of it have to be.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.e2e.origins import Base, Case
from torch import Tensor

from shoal.adapters.blending import Blend, blended
from shoal.adapters.library import AdapterInfo
from shoal.adapters.spec import AdapterSpec
from shoal.server.assemble import assemble
from shoal.server.config import ServeConfig
from shoal.server.engine.request import Request, SamplingParams
from shoal.server.http.services import Services
from shoal.server.model.sampler import Sampler

# Allowed error of float32 serving, of the range of the logits.
TOLERANCE = 1e-4
# Requests without an adapter, first and last among those with one.
BASES = ("base", "base again")


@dataclass(frozen=True)
class Made:
    """An adapter's files, and what its origin gives for two sequences.

    Attributes:
        served: the format and the family that it has to have; None for the base and for blends.
        parts: of a blend, the others' names and their weights.
        alone, mixed: a sequence ``(positions,)`` and its logits ``(positions, vocab)`` float64.
    """

    served: tuple[str, str] | None
    files: Mapping[str, Path]
    alone: tuple[Tensor, Tensor]
    mixed: tuple[Tensor, Tensor]
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Served:
    """What one request got, and should have got: ``(positions, vocab)`` float64."""

    got: Tensor
    want: Tensor

    @property
    def error(self) -> float:
        """The largest difference, of the range of the origin's logits."""
        return float((self.got - self.want).abs().max() / (self.want.max() - self.want.min()))

    @property
    def rms(self) -> float:
        """The root of the mean square of the differences, of the deviation of the logits."""
        return float((self.got - self.want).square().mean().sqrt() / self.want.std())


def make_all(
    base: Base, cases: Sequence[Case], folder: Path, length: int, dtype: torch.dtype | None = None
) -> dict[str, Made]:
    """Write every adapter below ``folder``, its tensors rounded to ``dtype``, and ask its origin.

    Everything, the base too, gets two sequences of ``length`` tokens of its own.
    """
    rng = torch.Generator().manual_seed(1)

    def made(served: tuple[str, str] | None, origin: Any, files: Mapping[str, Path]) -> Made:
        ids = torch.randint(3, base.model.config.vocab_size, (2, length), generator=rng)
        logits = base.logits(origin, ids)
        return Made(served, files, (ids[0], logits[0]), (ids[1], logits[1]))

    everything = {BASES[0]: made(None, base.fresh(), {})}
    for case in cases:
        where = folder / case.name
        where.mkdir(parents=True)
        origin = case.make(base, where, dtype)
        files = {path.name: path for path in where.glob("adapter_*")}
        served = case.served
        if dtype is not None and case.explicit:
            served = (served[0], "lora")
        everything[case.name] = made(served, origin, files)
    return everything | {BASES[1]: made(None, base.fresh(), {})}


# What a request may run with.
Adapter = AdapterInfo | Blend[AdapterInfo]


class Script:
    """Stands in for what the sampler chooses: requests go on with given tokens.

    Attributes:
        logits: of each request, what the model said at each position that was sampled.
        together: how many requests the largest step sampled for.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.logits: dict[str, list[Tensor]] = {}
        self.together = 0
        self._coming: dict[str, list[int]] = {}
        choose = Sampler.sample

        def sample(sampler: Sampler, logits: Tensor, rows: Sequence[Any]) -> Any:
            samples = choose(sampler, logits, rows)
            self.together = max(self.together, len(rows))
            for i, row in enumerate(rows):
                self.logits.setdefault(row.request_id, []).append(logits[i].clone())
                samples.token_ids[i] = self._coming[row.request_id][row.output_tokens]
            return samples

        monkeypatch.setattr(Sampler, "sample", sample)

    async def run(
        self,
        services: Services,
        info: Adapter | None,
        name: str,
        expected: tuple[Tensor, Tensor],
        prompt: int,
    ) -> Served:
        """Serve one sequence, the first ``prompt`` tokens of which are its prompt."""
        ids = expected[0].tolist()
        self._coming[name] = [*ids[prompt:], 0]
        spec = _stage(services, info)
        request = Request(
            id=name,
            prompt_ids=tuple(ids[:prompt]),
            sampling=SamplingParams(
                max_tokens=len(self._coming[name]),
                temperature=0.0,
                ignore_eos=True,
                logprobs=1,  # so that the device's runner asks the sampler, too
            ),
            adapter=spec,
        )
        async for event in services.engine.generate(request):
            assert event.error is None, (name, event.error)
        if spec:
            services.library.unstage(spec)
        return Served(torch.stack(self.logits[name]).double(), expected[1][prompt - 1 :])


def serve(
    config: ServeConfig,
    made: Mapping[str, Made],
    monkeypatch: pytest.MonkeyPatch,
    *,
    restart: bool = False,
) -> dict[str, Served]:
    """Upload everything, serve each adapter alone, and then all of them in one batch.

    Args:
        restart: whether another server takes over after the uploads, with what is on the disk.

    Returns:
        Of each name: ``<name> alone`` and ``<name> mixed``.
    """
    if not restart:
        with assemble(config) as services:
            infos = _upload(services, made)
            return _serve(services, _with_blends(infos, made), made, Script(monkeypatch))
    with assemble(config) as services:
        _upload(services, made)
    with assemble(config) as services:
        library = services.library
        infos = {name: library.resolve(name) if e.served else None for name, e in made.items()}
        return _serve(services, _with_blends(infos, made), made, Script(monkeypatch))


def _with_blends(
    infos: Mapping[str, AdapterInfo | None], made: Mapping[str, Made]
) -> dict[str, Adapter | None]:
    found: dict[str, Adapter | None] = dict(infos)
    for name, each in made.items():
        asked = [(infos[part], weight) for part, weight in each.parts.items()]
        if asked:
            found[name] = blended([(info, weight) for info, weight in asked if info is not None])
    return found


def _stage(services: Services, adapter: Adapter | None) -> AdapterSpec | None:
    if isinstance(adapter, Blend):
        return services.library.stage_blend(adapter)
    return None if adapter is None else services.library.stage(adapter)


def _upload(services: Services, made: Mapping[str, Made]) -> dict[str, AdapterInfo | None]:
    infos: dict[str, AdapterInfo | None] = {}
    for name, each in made.items():
        info = services.library.upload(name, each.files) if each.served else None
        assert info is None or (info.format, info.family) == each.served, name
        infos[name] = info
    return infos


def _serve(
    services: Services,
    infos: Mapping[str, Adapter | None],
    made: Mapping[str, Made],
    script: Script,
) -> dict[str, Served]:
    served: dict[str, Served] = {}

    async def alone() -> None:
        for name, each in made.items():
            most = 3 * len(each.alone[0]) // 4
            run = script.run(services, infos[name], f"{name} alone", each.alone, most)
            served[f"{name} alone"] = await run
        assert script.together == 1

    async def mixed() -> None:
        # Prompts of many lengths: those of one token, and those that the scheduler cuts up.
        runs = {
            f"{name} mixed": script.run(
                services,
                infos[name],
                f"{name} mixed",
                each.mixed,
                1 + number % (len(each.mixed[0]) // 2),
            )
            for number, (name, each) in enumerate(made.items())
        }
        results = await asyncio.gather(*runs.values())
        served.update(zip(runs, results, strict=True))
        assert script.together == len(made), "no step served everything at once"

    async def both() -> None:
        await services.engine.start()
        try:
            await alone()
            await mixed()
        finally:
            await services.engine.stop()

    asyncio.run(both())
    return served


def wrong(served: Mapping[str, Served]) -> dict[str, float]:
    """The errors that float32 does not explain."""
    errors = {name: each.error for name, each in served.items()}
    return {name: error for name, error in errors.items() if not error <= TOLERANCE}


def silent(base: Base, made: Mapping[str, Made], least: float) -> dict[str, float]:
    """Adapters that move no logit by ``least`` of their range: they would prove nothing."""
    served = {name: each for name, each in made.items() if each.served}
    plain = base.logits(base.fresh(), torch.stack([each.alone[0] for each in served.values()]))
    effects = {
        name: Served(logits, each.alone[1]).error
        for (name, each), logits in zip(served.items(), plain, strict=True)
    }
    return {name: effect for name, effect in effects.items() if not effect >= least}
