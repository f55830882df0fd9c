"""A server without keys: open to this machine's programs, closed to the pages in its browsers."""

import pytest
from tests.server.http.conftest import Harness, Serve

pytestmark = pytest.mark.anyio

FORM = {"Content-Type": "multipart/form-data; boundary=b"}
UPLOAD = (
    b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\nmine\r\n'
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n{}\r\n--b--\r\n'
)


async def upload(h: Harness, headers: dict[str, str]) -> int:
    """As a form of a page would, for which no browser asks first."""
    response = await h.client.post("/v1/adapters", content=UPLOAD, headers=FORM | headers)
    return response.status_code


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "http://192.0.2.7:8000", "http://localhost.evil.example", "null", "x"],
)
async def test_a_page_from_elsewhere_cannot_upload(serve: Serve, origin: str) -> None:
    async with serve() as h:
        assert await upload(h, {"Origin": origin}) == 403
        assert (await h.client.get("/v1/models")).json()["data"][1:] == []


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example:8000", "evil.example.", "["]
)
async def test_another_name_that_leads_here_is_not_answered(serve: Serve, host: str) -> None:
    async with serve() as h:
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            response = await h.client.get(path, headers={"Host": host})
            assert response.status_code == 403
            assert "shoal keys create" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "127.0.0.1:8000"},
        {"Host": "[::1]:8000"},
        {"Host": "LOCALHOST"},
        {"Host": "shoal.localhost"},
        {"Host": "llm"},
        {"Host": "box.example:8000"},  # what it was told to listen on
        {"Host": "10.0.0.7"},
        {"Origin": "http://localhost:3000"},
        {"Origin": "http://127.0.0.1:3000"},
        {"Origin": "http://[::1]"},
    ],
    ids=str,
)
async def test_this_machine_is_answered(serve: Serve, headers: dict[str, str]) -> None:
    async with serve(host="box.example") as h:
        assert await upload(h, headers) == 201


async def test_with_a_key_names_do_not_matter(serve: Serve) -> None:
    async with serve(api_key=("secret",)) as h:
        headers = {"Host": "llm.example", "Origin": "https://example"}
        assert await upload(h, headers) == 401
        assert await upload(h, headers | {"Authorization": "Bearer secret"}) == 201
