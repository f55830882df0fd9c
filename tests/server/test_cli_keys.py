"""``shoal keys``: what it prints, and what becomes of the keys."""

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from shoal.adapters.registry.database import Database
from shoal.adapters.registry.keys import ROLES, WEIGHT_MAX, Keys, Limits
from shoal.server.__main__ import main
from shoal.server.cli import keys as command
from shoal.server.engine import fairness


class Cli:
    """The command on one registry file, and the keys in it."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.url = f"sqlite:///{folder}/registry.db"
        self._capsys = capsys
        self.keys = Keys(Database(self.url))

    def __call__(self, *arguments: str, code: int = 0) -> tuple[str, str]:
        """Standard output and standard error of a call that ends with ``code``."""
        verb, *rest = arguments
        assert main(["keys", verb, "--registry", self.url, *rest]) == code
        captured = self._capsys.readouterr()
        return captured.out, captured.err

    def create(self, *arguments: str) -> tuple[str, str]:
        """Id and secret of a new key."""
        out, err = self("create", *arguments)
        found = re.fullmatch(r"(shoal_([0-9a-f]{16})_\S{43})\n", out)
        assert found is not None, "the secret, alone on its line"
        assert found[2] in err
        assert found[1] not in err
        return found[2], found[1]


@pytest.fixture
def cli(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    cli = Cli(tmp_path, capsys)
    yield cli
    cli.keys._database.close()


def test_a_created_key_is_what_was_asked_for(cli: Cli) -> None:
    limits = "--requests-per-minute 60 --tokens-per-minute 9 --concurrent-requests 0 --adapters 5"
    more = ["--bytes", "10GiB", "--weight", "7"]
    wanted = ["--role", "tenant", "--owner", "acme", "--label", "CI of Acme"]
    key_id, secret = cli.create(*wanted, *limits.split(), *more)
    key = cli.keys.verify(secret)
    assert key is not None
    assert (key.id, key.role, key.owner, key.label) == (key_id, "tenant", "acme", "CI of Acme")
    assert key.limits == Limits(60, 9, 0, 5, 10 << 30, 7)
    _, secret = cli.create("--role", "admin", "--bytes", "none")
    key = cli.keys.verify(secret)
    assert key is not None
    assert (key.owner, key.limits) == ("", Limits())


def test_the_list_shows_every_key_and_no_secret(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.adapters.registry.keys.PAGE_MAX", 2)
    assert cli("list") == ("", "no keys\n")
    made = [cli.create("--role", "read-only", "--owner", f"o{n}") for n in range(5)]
    made += [cli.create("--role", "tenant", "--owner", "o1", "--label", "two", "--adapters", "3")]
    cli("revoke", made[0][0])
    out, _ = cli("list")
    head, *rows = out.splitlines()
    assert head.split() == ["ID", "ROLE", "CREATED", "REVOKED", "OWNER", "LABEL", "LIMITS"]
    assert sorted(row.split()[0] for row in rows) == sorted(key_id for key_id, _ in made)
    for key_id, secret in made:
        assert secret.removeprefix(f"shoal_{key_id}_") not in out
    by_id = {row.split()[0]: row.split() for row in rows}
    assert by_id[made[0][0]].count("-") == 2, "revoked: a time, no label, no limits"
    assert by_id[made[5][0]][-3:] == ["o1", "two", "adapters=3"]
    out, _ = cli("list", "--owner", "o1")
    assert {row.split()[0] for row in out.splitlines()[1:]} == {made[1][0], made[5][0]}


def test_a_revoked_key_is_refused(cli: Cli) -> None:
    key_id, secret = cli.create("--role", "tenant", "--owner", "acme")
    assert cli("revoke", key_id)[0] == f"revoked key {key_id} (tenant of acme)\n"
    assert cli.keys.verify(secret) is None


def test_a_change_leaves_other_limits_as_they_are(cli: Cli) -> None:
    key_id, secret = cli.create("--role", "tenant", "--owner", "acme", "--adapters", "5")
    out, _ = cli("change", key_id, "--bytes", "1536KiB", "--weight", "2")
    assert out.endswith("now has adapters=5 bytes=1536KiB weight=2\n")
    out, _ = cli("change", key_id, "--adapters", "none")
    assert out.endswith("now has bytes=1536KiB weight=2\n")
    key = cli.keys.verify(secret)
    assert key is not None
    assert key.limits == Limits(bytes=1536 << 10, weight=2)


@pytest.mark.parametrize("count", [0, 1, 1000, 1024, 1536, 3 << 20, 5 << 40, (5 << 40) + 1])
def test_a_size_is_shown_as_it_can_be_given(count: int) -> None:
    assert command._bytes(command._size(count)) == count


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["create", "--role", "tenant"], 2, "needs an owner\nhint: --owner"),
        (["create", "--role", "tenant", "--owner", "Acme"], 1, "owner 'Acme': must be"),
        (["create", "--role", "admin", "--weight", "0"], 1, "limit weight: must be from 1"),
        (["create", "--role", "admin", "--label", "x" * 129], 1, "label"),
        (["revoke", "0123456789abcdef"], 1, "does not exist\nhint: `shoal keys list`"),
        (["change", "0123456789abcdef", "--adapters", "1"], 1, "does not exist\nhint: "),
        (["change", "0123456789abcdef"], 2, "nothing to change\nhint: one of --requests-per-"),
    ],
)
def test_a_mistake_is_explained_and_changes_nothing(
    cli: Cli, arguments: list[str], code: int, said: str
) -> None:
    out, err = cli(*arguments, code=code)
    assert out == ""
    assert err.startswith("error: ")
    assert said in err
    assert not cli.keys.exist()


@pytest.mark.parametrize(
    "wrong", [["--adapters", "-1"], ["--adapters", "1.5"], ["--bytes", "big"], ["--role", "root"]]
)
def test_what_is_no_value_is_refused_with_the_usage(
    cli: Cli, wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli("create", "--role", "admin", *wrong)
    assert ended.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_a_secret_given_for_an_id_is_not_repeated(cli: Cli) -> None:
    key_id, secret = cli.create("--role", "admin")
    out, err = cli("revoke", secret, code=2)
    assert key_id in err
    assert secret not in out + err
    assert cli.keys.verify(secret) is not None


def test_a_registry_that_cannot_be_opened_is_an_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["keys", "list", "--registry", "nosuch://"]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_the_command_knows_every_role_and_limit() -> None:
    assert command.ROLES == ROLES
    assert list(command.LIMITS) == [field.name for field in fields(Limits)]
    assert WEIGHT_MAX == fairness.WEIGHT_MAX
