"""What a request is to be answered with: the base, an adapter, or a weighted sum of adapters.

Owns the rules of the field ``adapters``. Every name is looked up once, before anything else of the
request is done: what it means cannot change until the request has ended.
"""

from typing import TYPE_CHECKING

from shoal.adapters.blending import Blend, blended
from shoal.adapters.errors import AdapterNameInvalid, AdapterNotFound
from shoal.server.errors import InvalidRequest, ModelNotFound
from shoal.server.http.caller import Caller
from shoal.server.http.jobs import resolve
from shoal.server.http.schemas import Sampling
from shoal.server.http.services import Services

if TYPE_CHECKING:
    from shoal.adapters.library import AdapterInfo


async def resolve_asked(
    services: Services, caller: Caller, body: Sampling
) -> "AdapterInfo | Blend[AdapterInfo] | None":
    """What ``model`` and ``adapters`` mean to ``caller`` now; None for the base.

    Raises:
        InvalidRequest: both say something.
        ModelNotFound: an adapter does not exist; names it.
    """
    asked = body.adapters
    if asked is None:
        return await resolve(services, caller, body.model)
    if body.model != services.model_name:
        raise InvalidRequest(
            f"`model` is {body.model!r}: with `adapters` it must be the base,"
            f" {services.model_name!r}",
            param="model",
        )

    def look_up() -> "list[tuple[AdapterInfo, float]]":
        found = []
        for index, part in enumerate(asked):
            owner, reference = caller.acts_on(part.name)
            try:
                info = services.library.resolve(reference, owner=owner)
            except (AdapterNotFound, AdapterNameInvalid) as error:
                raise ModelNotFound(
                    f"no adapter {part.name!r}", param=f"adapters[{index}].name"
                ) from error
            found.append((info, part.weight))
        return found

    return blended(await services.lookup(look_up, owner=caller.owner))
