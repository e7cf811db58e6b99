"""Who may do what: the script tests do it all as each role (tests/process/test_acl.py); here, how it is read."""

from __future__ import annotations

import pytest

from prefork.broker import roles, verbs


def test_a_script_with_a_word_that_is_not_known_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a command would be missing from what `prefork acl` prints."""
    monkeypatch.setattr(roles, "_READING", roles._READING - {"MGET"})
    with pytest.raises(ValueError, match="which of these are commands, and do they only read\\? MGET"):
        roles.roles()


def test_each_role_may_do_what_its_scripts_do() -> None:
    by_name = {
        "worker": ("beat", "claim", "settle", "restore", "enqueue", "cancel", "inspect"),
        "producer": ("enqueue", "cancel", "inspect"),
        "admin": tuple(it.stem for it in verbs.SCRIPTS.glob("*.lua")),
        "dashboard": ("ask",),
    }
    for name, role in roles.roles().items():
        may = {command.upper() for command in role.commands}
        for script in by_name[name]:
            said = roles._WORD.findall(verbs.script(script).text.decode())
            assert {word for word in said if word not in roles._NO_COMMANDS} <= may, (name, script)
