from __future__ import annotations

import os
import pickle
import pwd
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from prefork.config import KEYS, Settings, load, usable_cores
from prefork.errors import ConfigError, PreforkError
from prefork.values import Queues, duration, queue_name

APP = "app = shop.tasks:app\n"
ALL_KEYS = (
    "the keys are app, broker, broker_password_file, queues, concurrency, shutdown_timeout, timeout, "
    "max_tasks_per_child, max_memory_per_child, max_memory, lease, durability, log_level, log_format, prefix, "
    "directory, pidfile, user, max_crashes, max_takeovers, dead_max, dead_ttl, signing_keys, signing_keys_file"
)


@pytest.fixture
def conf(tmp_path):
    return tmp_path / "myapp.conf"


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def complaint(path: Path | None, overrides: dict[str, str] | None = None, **how: bool) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides or {}, **how)
    return str(caught.value)


# What is right


def test_only_the_app_must_be_given(conf):
    settings = load(written(conf, "[prefork]\n" + APP))
    assert settings == Settings(
        app="shop.tasks:app",
        broker=None,
        queues=Queues(("default",), None),
        concurrency=usable_cores(),
        shutdown_timeout_s=8.0,
        timeout_s=None,
        max_tasks_per_child=None,
        lease_s=10.0,
        durability=None,
        log_level="INFO",
        log_format="text",
        prefix=None,
        directory=conf.parent,
        max_crashes=3,
        max_takeovers=10,
        dead_max=10_000,
        dead_ttl_s=180 * 86_400.0,
        max_memory_per_child_bytes=None,
        max_memory_bytes=None,
        pidfile=None,
        user=None,
        signing_keys=None,
        signing_keys_file=None,
        broker_password_file=None,
    )


GOOD = [
    ("max_memory_per_child", "none", None),
    ("max_memory", "2GiB", 2 << 30),
    ("max_memory", "1.5TB", 15 * 10**11),
    ("max_memory", "1PiB", 1 << 50),
    ("max_takeovers", "1", 1),
    ("durability", "fsync", "fsync"),
    ("durability", "replicas:2", "replicas:2"),
    ("max_memory_per_child", "200MB", 200_000_000),
    ("max_memory_per_child", "1.5 gib", 3 << 29),
    ("max_memory_per_child", "1048576", 1 << 20),
    ("pidfile", "/run/shop.pid", Path("/run/shop.pid")),
    ("user", "root", "root"),
    ("user", "root:root", "root:root"),
    ("app", "app:app", "app:app"),
    ("app", "a.b_2.c:make", "a.b_2.c:make"),
    ("broker", "redis://:p#s;w=x%(y)s@host:6379/0?a=b", "redis://:p#s;w=x%(y)s@host:6379/0?a=b"),
    ("queues", "mail", Queues(("mail",))),
    ("queues", "mail, default", Queues(("mail", "default"))),
    ("queues", "mail:3,default:1000", Queues(("mail", "default"), (3, 1000))),
    ("queues", "mail : 3 , é-1.x/y : 1", Queues(("mail", "é-1.x/y"), (3, 1))),
    ("queues", "q" * 100, Queues(("q" * 100,))),
    ("concurrency", "1", 1),
    ("concurrency", "1000", 1000),
    ("shutdown_timeout", "0", 0.0),
    ("shutdown_timeout", "1d", 86_400.0),
    ("timeout", "none", None),
    ("timeout", "None", None),
    ("timeout", "1ms", 0.001),
    ("timeout", "5m", 300.0),
    ("max_tasks_per_child", "none", None),
    ("max_tasks_per_child", "1", 1),
    ("lease", "1", 1.0),
    ("lease", "3600", 3600.0),
    ("lease", "2.5 s", 2.5),
    ("log_level", "debug", "DEBUG"),
    ("log_level", "Warning", "WARNING"),
    ("log_level", "CRITICAL", "CRITICAL"),
    ("log_format", "json", "json"),
    ("prefix", "shop:live", "shop:live"),
    ("max_crashes", "1", 1),
    ("dead_max", "0", 0),
    ("dead_ttl", "2h", 7200.0),
    ("signing_keys", f"{'a' * 32}, {'b' * 32}", ("a" * 32, "b" * 32)),
    ("signing_keys_file", "/etc/shop/signing.keys", Path("/etc/shop/signing.keys")),
    ("broker_password_file", "/etc/shop/broker.password", Path("/etc/shop/broker.password")),
]


@pytest.mark.parametrize(("name", "raw", "value"), GOOD)
def test_a_good_value_is_read_alike_from_the_file_and_from_a_flag(conf, name, raw, value):
    app = "" if name == "app" else APP
    assert getattr(load(written(conf, f"[prefork]\n{app}{name} = {raw}\n")), KEYS[name].field) == value
    assert getattr(load(None, {"app": "shop.tasks:app", name: raw}), KEYS[name].field) == value


def test_every_key_has_a_good_example_here():
    assert {name for name, _, _ in GOOD} == set(KEYS) - {"directory"}


def test_the_table_and_the_settings_name_the_same_fields_in_the_same_order():
    assert [key.field for key in KEYS.values()] == [field.name for field in fields(Settings)]


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_every_default_and_doc_is_fit_for_a_documented_file(key):
    assert key.default is None or key.parse(key.default) is not ...
    assert key.doc.endswith(".")
    assert key.default is not None or "Required" in key.doc or "Default: " in key.doc
    assert {"": "", "s": "econds", "bytes": "Size"}[key.unit] in key.doc


def test_comments_spacing_and_the_sections_of_the_app_are_passed_over(conf):
    text = """\
# a comment
; another
[logging]
level: chatty
level: twice
no value
[open
many = lines [
    [prefork]
[DEFAULT]
lease = forever
[prefork]  # ours

app=shop.tasks:app ; inline
  # indented comment
broker   =   redis://:a#b@host/0\t# main ; other
queues = mail:2,  # first
    default:1
timeout = 5m #x
[theirs]
lease = never
[theirs]
"""
    settings = load(written(conf, text))
    assert settings.app == "shop.tasks:app"
    assert settings.broker == "redis://:a#b@host/0"
    assert settings.queues == Queues(("mail", "default"), (2, 1))
    assert settings.timeout_s == 300.0
    assert settings.lease_s == 10.0


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_any_newline_and_a_byte_order_mark_will_do(conf, newline):
    text = "\ufeff" + f"[prefork]\n{APP}lease = 20\n".replace("\n", newline)
    assert load(written(conf, text)).lease_s == 20.0


def test_all_keys_may_be_indented_alike(conf):
    assert load(written(conf, f"  [prefork]\n  {APP}  lease = 20\n")).lease_s == 20.0


def test_a_flag_wins_over_the_file_even_over_a_bad_value_there(conf):
    written(conf, f"[prefork]\n{APP}concurrency = four\nlease = 20\n")
    settings = load(conf, {"concurrency": " 4 "})
    assert (settings.concurrency, settings.lease_s) == (4, 20.0)


def test_the_operator_needs_no_app(conf):
    assert load(require_app=False).app is None
    assert load(written(conf, "[prefork]\nbroker = redis://host\n"), require_app=False).broker == "redis://host"


def test_settings_are_frozen_slotted_and_travel(conf):
    settings = load(None, {"app": "shop.tasks:app"})
    with pytest.raises(FrozenInstanceError):
        settings.lease_s = 1.0
    assert not hasattr(settings, "__dict__")
    assert pickle.loads(pickle.dumps(settings)) == settings


def test_settings_do_not_show_the_password():
    assert "secret" not in repr(load(None, {"broker": "redis://:secret@host"}, require_app=False))


def test_usable_cores_are_those_left_to_us(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 5, 7}, raising=False)
    assert usable_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores() == 1


# The directory


def test_a_directory_is_relative_to_the_file_but_from_a_flag_to_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "etc" / "code").mkdir(parents=True)
    (tmp_path / "here" / "code").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    conf = written(tmp_path / "etc" / "myapp.conf", f"[prefork]\n{APP}directory = code\n")
    assert load(conf).directory == tmp_path / "etc" / "code"
    assert load(conf, {"directory": "code"}).directory == tmp_path / "here" / "code"
    assert load(conf, {"directory": str(tmp_path)}).directory == tmp_path


def test_the_directory_of_a_relative_file_is_absolute(tmp_path, monkeypatch):
    written(tmp_path / "myapp.conf", "[prefork]\n" + APP)
    monkeypatch.chdir(tmp_path)
    assert load(Path("myapp.conf")).directory == tmp_path


def test_without_a_file_the_directory_is_the_current_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load(require_app=False).directory == tmp_path


def test_a_tilde_is_the_home_and_symlinks_are_kept(conf, tmp_path, monkeypatch):
    (tmp_path / "release-7").mkdir()
    (tmp_path / "current").symlink_to("release-7")
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = load(written(conf, f"[prefork]\n{APP}directory = ~/current\n"))
    assert settings.directory == tmp_path / "current"


@pytest.mark.parametrize("raw", ["nowhere", "myapp.conf", "~nobody-of-that-name"])
def test_the_directory_must_be_a_folder(conf, raw):
    written(conf, f"[prefork]\n{APP}directory = {raw}\n")
    where = conf.parent / raw
    assert complaint(conf) == (f"{conf}:3: directory: there is no folder '{where}'; create it or correct the path")


def test_a_current_folder_that_is_gone_is_told(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert complaint(None, require_app=False).startswith("--directory: ")


def test_a_tilde_is_the_home_of_the_user_whom_the_worker_becomes(conf, monkeypatch):
    """Else it would be root's at the start and the user's own after a reload, and the pidfile another one."""
    user = next(entry for entry in pwd.getpwall() if Path(entry.pw_dir).is_dir() and entry.pw_uid != os.geteuid())
    broker, pidfile, directory = "embedded:~/broker", "~/it.pid", "~"
    settings = []
    for home in ("/root", "/elsewhere"):
        monkeypatch.setenv("HOME", home)
        text = (
            f"[prefork]\n{APP}broker = {broker}\npidfile = {pidfile}\ndirectory = {directory}\nuser = {user.pw_name}\n"
        )
        settings.append(load(written(conf, text)))
    assert settings[0] == settings[1]
    assert settings[0].pidfile == Path(user.pw_dir, "it.pid")
    assert settings[0].directory == Path(user.pw_dir)
    assert settings[0].broker == f"embedded:{user.pw_dir}/broker"


# The environment


@pytest.mark.parametrize("raw", ["%(ENV_LEASE)s", "%(ENV_L)s0", "2%(ENV_E)s"])
def test_a_variable_of_the_environment_stands_in_a_value(conf, monkeypatch, raw):
    for name, value in {"LEASE": "20", "L": "2", "E": "0"}.items():
        monkeypatch.setenv(name, value)
    assert load(written(conf, f"[prefork]\n{APP}lease = {raw} # %(ENV_NOWHERE)s\n")).lease_s == 20
    assert load(None, {"app": "a:b", "lease": raw}).lease_s == 20


def test_every_value_may_have_them_and_all_that_is_in_them_counts(conf, tmp_path, monkeypatch):
    monkeypatch.setenv("A", "shop.tasks")
    monkeypatch.setenv("PASSWORD", "p%40 #;=%(ENV_A)s%s")
    monkeypatch.setenv("NAMES", "mail:3, default:1")
    monkeypatch.setenv("RUN", str(tmp_path))
    settings = load(written(conf, "[prefork]\napp = %(ENV_A)s:app\nbroker = redis://:%(ENV_PASSWORD)s@host/0\n"
                                  "queues = %(ENV_NAMES)s\npidfile = %(ENV_RUN)s/it.pid\n"))  # fmt: skip
    assert settings.app == "shop.tasks:app"
    assert settings.broker == "redis://:p%40 #;=%(ENV_A)s%s@host/0"  # taken as it is, not looked through again
    assert settings.queues == Queues(("mail", "default"), (3, 1))
    assert settings.pidfile == tmp_path / "it.pid"


@pytest.mark.parametrize("raw", ["%40", "%%", "%(here)s", "%(ENV_X)", "%(env_HOME)s", "%(ENV_X)d", "100%"])
def test_any_other_percent_sign_is_itself(conf, raw):
    assert load(written(conf, f"[prefork]\n{APP}broker = redis://{raw}\n")).broker == f"redis://{raw}"


@pytest.mark.parametrize(
    ("name", "shown"),
    [("NO_SUCH", "'NO_SUCH'"), ("", "''"), ("a b", "'a b'"), ("\x1b[31m", r"'\x1b[31m'"), ("X" * 99, f"'{'X' * 59}…'")],
)
def test_a_variable_that_is_not_set_is_told_on_one_clean_line(conf, name, shown):
    text = f"broker: the environment has no {shown}; set it, or correct %(ENV_…)s"
    written(conf, f"[prefork]\n{APP}broker = redis://:secret@%(ENV_{name})s/0\n")
    assert complaint(conf) == f"{conf}:3: {text}"
    assert complaint(None, {"app": "a:b", "broker": f"redis://%(ENV_{name})s"}) == f"--{text}"


def test_an_empty_variable_is_no_value_and_what_cannot_be_seen_in_it_is_told(conf, monkeypatch):
    written(conf, f"[prefork]\n{APP}broker = %(ENV_B)s\n")
    monkeypatch.setenv("B", "")
    assert complaint(conf) == f"{conf}:3: broker: has no value; give it one or leave the key out"
    monkeypatch.setenv("B", "redis://:secret@host\n")  # as from a file with a secret
    assert complaint(conf) == rf"{conf}:3: broker: holds the character '\n', which cannot be seen; remove it"


# What is wrong: a value

TIME = "must be a time in seconds (or as 500ms, 5m, 2h, 1d) from"
NAME = "is not a queue name (1 to 100 characters without whitespace, '{', '}', ':' or ',')"
FORM = "must have the form module:attribute, as in shop.tasks:app, not"
PLAIN = "must be 1 to 100 characters without whitespace, '{' or '}', not"
WEIGHT = "must be a whole number from 1 to 1000, not"

SIZE = "must be a size from 1MiB to 1PiB, as 200MB, 1.5GB or 512MiB, or none, not"
SIZES = ("0", "-1", "1023KiB", "1", "1.5", "2000000GB", "200M", "5 EB", "1e9", ".5GB", "20%", "nan", "huge")

BAD = [
    *[("app", raw, f"{FORM} '{raw}'") for raw in ["shop", "shop:", ":app", "shop/tasks.py:app", "a..b:c", "a:b:c"]],
    *[("app", raw, f"{FORM} '{raw}'") for raw in [".a:b", "a.:b", "a:b.c", "a:2b", "a b:c", "a:b()"]],
    ("queues", ",", "has an empty name; remove the comma too many"),
    ("queues", "mail,", "has an empty name; remove the comma too many"),
    ("queues", "mail,,default", "has an empty name; remove the comma too many"),
    ("queues", ":3", f"'' {NAME}"),
    ("queues", "a b", f"'a b' {NAME}"),
    ("queues", "{mail}", f"'{{mail}}' {NAME}"),
    ("queues", "q" * 101, f"'{'q' * 59}…' {NAME}"),
    ("queues", "mail, default, mail", "names 'mail' twice; remove one"),
    ("queues", "mail:1, mail:2", "names 'mail' twice; remove one"),
    ("queues", "mail:3, low", "'low' has no weight but others have; give all of them one (mail:3) or none"),
    ("queues", "low, mail:3", "'low' has no weight but others have; give all of them one (mail:3) or none"),
    *[("queues", f"m:{raw}", f"the weight of 'm' {WEIGHT} '{raw}'") for raw in ["", "0", "1001", "-1", "1.5", "x"]],
    ("queues", "a:b:c", f"the weight of 'a' {WEIGHT} 'b:c'"),
    *[("concurrency", raw, f"{WEIGHT} '{raw}'") for raw in ["0", "-1", "1001", "four", "2.0", "1e2", "nan", "inf"]],
    *[("concurrency", raw, f"{WEIGHT} '{raw}'") for raw in ["none", "+4", "1_0", "٣", "0x2", "4 4", "4s"]],
    ("concurrency", "9" * 5000, f"{WEIGHT} '{'9' * 59}…'"),
    *[("shutdown_timeout", raw, f"{TIME} 0s to 1d, not '{raw}'") for raw in ["-1", "86400.1", "2d", "nan", "none"]],
    *[("timeout", raw, f"{TIME} 1ms to 365d or none, not '{raw}'") for raw in ["0", "0.0", "-5", "inf", "366d"]],
    *[("timeout", raw, f"{TIME} 1ms to 365d or none, not '{raw}'") for raw in ["5 min", "5M", ".5", "5.", "1e3"]],
    *[("lease", raw, f"{TIME} 1s to 1h, not '{raw}'") for raw in ["0", "0.9", "999ms", "3601", "61m", "none", "NaN"]],
    *[("dead_ttl", raw, f"{TIME} 1s to 3650d, not '{raw}'") for raw in ["0", "-180d", "3651d", "for ever", "s"]],
    ("max_tasks_per_child", "0", "must be a whole number from 1 to 1000000000 or none, not '0'"),
    ("max_tasks_per_child", "never", "must be a whole number from 1 to 1000000000 or none, not 'never'"),
    ("max_crashes", "0", "must be a whole number from 1 to 1000000000, not '0'"),
    ("max_crashes", "1000000001", "must be a whole number from 1 to 1000000000, not '1000000001'"),
    ("dead_max", "-1", "must be a whole number from 0 to 1000000000, not '-1'"),
    *[(key, raw, f"{SIZE} '{raw}'") for key in ("max_memory", "max_memory_per_child") for raw in SIZES],
    ("durability", "disk", "must be 'fsync' or 'replicas:N' with N from 1 to 99, not 'disk'"),
    ("durability", "replicas:0", "must be 'fsync' or 'replicas:N' with N from 1 to 99, not 'replicas:0'"),
    ("max_takeovers", "0", "must be a whole number from 1 to 1000000000, not '0'"),
    ("user", "nobody-there", "there is no user 'nobody-there' on this host"),
    ("user", "root:nobody-there", "there is no group 'nobody-there' on this host"),
    ("user", "root:", "there is no group '' on this host"),
    ("user", ":root", "there is no user '' on this host"),
    ("pidfile", "/", "'/' is a folder; name a file in it"),
    ("pidfile", "/" + "p" * 98, "has more than 98 bytes, too long for the status socket beside it"),
    ("pidfile", "/run/" + "é" * 47, "has more than 98 bytes, too long for the status socket beside it"),
    ("log_level", "loud", "must be one of debug, info, warning, error, critical, not 'loud'"),
    ("log_format", "xml", "must be one of text, json, not 'xml'"),
    ("prefix", "my app", f"{PLAIN} 'my app'"),
    ("prefix", "{shop}", f"{PLAIN} '{{shop}}'"),
    ("prefix", "p" * 101, f"{PLAIN} '{'p' * 59}…'"),
    ("broker", "redis://host\x00/0", r"holds the character '\x00', which cannot be seen; remove it"),
    ("broker", "redis://ho\u200bst/0", r"holds the character '\u200b', which cannot be seen; remove it"),
    ("directory", "~\x00", r"holds the character '\x00', which cannot be seen; remove it"),
    *[(name, "", "has no value; give it one or leave the key out") for name in KEYS],
]


@pytest.mark.parametrize(("name", "raw", "text"), BAD, ids=lambda value: value[:20])
def test_a_bad_value_is_told_alike_with_its_line_or_its_flag(conf, name, raw, text):
    app = "#\n" if name == "app" else APP
    written(conf, f"[prefork]\n{app}\n{name} = {raw} # comment\n")
    assert complaint(conf) == f"{conf}:4: {name}: {text}"
    assert complaint(None, {"app": "shop.tasks:app", name: raw}) == f"--{name.replace('_', '-')}: {text}"


def test_a_byte_of_a_flag_that_is_no_text_is_told():
    raw = os.fsdecode(b"redis://\xff")
    text = r"--broker: holds the character '\udcff', which cannot be seen; remove it"
    assert complaint(None, {"broker": raw}, require_app=False) == text


# What is wrong: the file

MALFORMED = "this line is not 'key = value'; write it so, with '='"
SPACES = "remove the spaces before a key"
CONTINUED = f"an indented line continues the one before; put the value of {{}} on one line, or {SPACES}"
NO_SECTION = "there is no section [prefork]"
NO_APP = "no app is named; give it as module:attribute: app = shop.tasks:app"

BROKEN = [
    ("", None, f"{NO_SECTION}; put [prefork] on a line above the settings"),
    ("# nothing\n[mail]\na = b\n", None, f"{NO_SECTION}; put [prefork] on a line above the settings"),
    ("[mail]\n[Prefork]\n", 2, f"{NO_SECTION}; did you mean it by '[Prefork]'?"),
    ("\n[ prefork ]\n", 2, f"{NO_SECTION}; did you mean it by '[ prefork ]'?"),
    ("[perfork]\n", 1, f"{NO_SECTION}; did you mean it by '[perfork]'?"),
    ("[pre-fork]\n", 1, f"{NO_SECTION}; did you mean it by '[pre-fork]'?"),
    ("[worker]\n", 1, f"{NO_SECTION}; did you mean it by '[worker]'?"),
    ("[prefork-worker]\n", 1, f"{NO_SECTION}; did you mean it by '[prefork-worker]'?"),
    (APP + "[prefork]\n", 1, "this line is in no section; put [prefork] above it"),
    ("\n\n{}\n", 3, "this line is in no section; put [prefork] above it"),
    ("[prefork]\n" + APP + "\nlease: 3\n", 4, MALFORMED),
    ("[prefork]\n" + APP + "broker: redis://:secret@host/0?a=b\n", 3, MALFORMED),
    ("[prefork]\n" + APP + "broker redis://:secret@host/0\n", 3, MALFORMED),
    ("[prefork]\n" + APP + "= 3\n", 3, MALFORMED),
    ("[prefork]\n" + APP + "[open\n", 3, MALFORMED),
    ("[prefork]\n" + APP + "\nlease = 3\nlease = 4\n", 5, "duplicate key, set on line 4 already; remove one"),
    ("[prefork]\n" + APP + "b:secret=3\nb:secret=4\n", 4, "duplicate key, set on line 3 already; remove one"),
    ("[prefork]\n[x]\n[prefork]\n", 3, "duplicate section 'prefork'; merge them"),
    ("  [prefork]\n  [prefork]\n", 2, "duplicate section 'prefork'; merge them"),
    ("[prefork]\n" + APP + "\nconcurency = 3\n", 4, "unknown key 'concurency'; did you mean 'concurrency'?"),
    ("[prefork]\nApp = a:b\n", 2, "unknown key 'App'; did you mean 'app'?"),
    ("[prefork]\nmax-crashes = 3\n", 2, "unknown key 'max-crashes'; did you mean 'max_crashes'?"),
    ("[prefork]\nzzz = 3\n", 2, f"unknown key 'zzz'; {ALL_KEYS}"),
    ("[prefork]\n" + "z" * 99 + " = 3\n", 2, f"unknown key '{'z' * 59}…'; {ALL_KEYS}"),
    ("[prefork]\n" + APP + "  lease = 3\n", 3, CONTINUED.format("app")),
    ("[prefork]\n" + APP + "broker =\n  redis://:secret@host\n", 4, CONTINUED.format("broker")),
    ("[prefork]\nqueues = mail,\n  lease = 3\n" + APP, 2, f"queues: 'lease = 3' {NAME}"),
    ("[prefork]\nlease = 3\n", None, NO_APP),
    ("[prefork]\r\n" + APP[:-1] + "\r\n\r\nlease = x\r\n", 4, f"lease: {TIME} 1s to 1h, not 'x'"),
    ("[prefork]\n# a\x0bb\x85c\u2028d\n" + APP + "lease = x\n", 4, f"lease: {TIME} 1s to 1h, not 'x'"),
    (b"[prefork]\r\n\r\n# caf\xe9\r\n", 3, "the byte 0xe9 is not UTF-8; save the file as UTF-8"),
    (b"\xff\xfe[\x00", 1, "the byte 0xff is not UTF-8; save the file as UTF-8"),
    (b"\xef\xbb\xbf\n\xff", 2, "the byte 0xff is not UTF-8; save the file as UTF-8"),
]


@pytest.mark.parametrize(("content", "line", "text"), BROKEN)
def test_a_broken_file_is_told_with_its_line(conf, content, line, text):
    where = f"{conf}:{line}" if line else str(conf)
    assert complaint(written(conf, content)) == f"{where}: {text}"


@pytest.mark.parametrize("content", [content for content, _, _ in BROKEN if "secret" in str(content)])
def test_an_error_never_shows_the_password(conf, content):
    assert "secret" not in complaint(written(conf, content))


def test_a_missing_file(conf):
    assert complaint(conf) == f"{conf}: there is no such file; create it or correct the path"


def test_a_folder_instead_of_a_file(tmp_path):
    assert complaint(tmp_path) == f"{tmp_path}: this is a folder; name the file in it"


def test_a_file_that_may_not_be_read(conf, monkeypatch):
    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert complaint(conf) == f"{conf}: cannot be read (Permission denied); give this user the right to"


def test_a_file_below_a_file(conf):
    written(conf, "")
    path = conf / "myapp.conf"
    assert complaint(path) == f"{path}: cannot be read (Not a directory); give this user the right to"


def test_no_app_without_a_file():
    assert complaint(None) == "--app: no app is named; give it as module:attribute: --app shop.tasks:app"


def test_an_unknown_flag():
    assert complaint(None, {"log_levle": "info"}) == "--log-levle: unknown key 'log_levle'; did you mean 'log_level'?"


def test_the_error_knows_its_place_and_is_one_of_ours(conf):
    with pytest.raises(PreforkError) as caught:
        load(written(conf, "[prefork]\nzzz = 3\n"))
    error = caught.value
    assert isinstance(error, ConfigError)
    assert (error.path, error.line) == (str(conf), 2)


# Any input


@given(st.integers(0, 10**9), st.sampled_from([("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000)]))
def test_a_whole_number_of_any_unit_is_that_many_seconds(number, unit):
    assert duration(f"{number}{unit[0]}") == number * unit[1] / 1000
    assert duration(f"{number}ms") == number / 1000
    assert duration(str(number)) == number


@given(st.decimals(0, 10**8, places=3))
def test_a_duration_comes_back_from_its_text(seconds):
    assert duration(f"{seconds:f}") == float(seconds)
    assert duration(f"{seconds * 1000:f}ms") == float(seconds)


@given(st.text(alphabet=st.sampled_from("0123456789. -+e_msdhnaif"), max_size=8))
def test_a_duration_is_finite_and_not_negative_or_refused(text):
    try:
        seconds = duration(text)
    except ValueError as error:
        assert str(error) == f"must be a time, as 10, 500ms, 30s, 5m, 2h or 180d, not {text!r}"  # noqa: PT017
    else:
        assert 0 <= seconds < float("inf")


@given(st.text(max_size=120))
def test_a_queue_name_is_itself_or_refused(text):
    try:
        assert queue_name(text) == text
        assert text
        assert not set(text) & set("{}:, \t\n\0")
        text.encode()
    except ValueError as error:
        assert str(error).endswith(NAME)  # noqa: PT017


MARKS = [
    "[prefork]",
    "[",
    "]",
    "[x]",
    "=",
    " = ",
    ":",
    ",",
    "#",
    " ;",
    "\n",
    "\n\n",
    "\r",
    "\n  ",
    "\t",
    "\0",
    "\x85",
    "~",
    "%(ENV_",
    ")s",
]
WORDS = ["none", "shop:app", "1", "9" * 20, "mail:3", "%(x)s", "é", "\u2028", "\ufeff", "DEFAULT", "[DEFAULT]"]
PIECES = st.sampled_from([*MARKS, *WORDS, *KEYS])
TEXTS = st.one_of(
    st.text(),
    st.lists(PIECES).map("".join),
    st.lists(PIECES).map(lambda pieces: f"[prefork]\n{APP}" + "".join(pieces)),
    st.lists(st.tuples(st.sampled_from(list(KEYS)), st.text(max_size=20))).map(
        lambda pairs: "[prefork]\n" + "".join(f"{name} = {raw}\n" for name, raw in pairs)
    ),
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "myapp.conf"


def settings_or_one_clear_line(path: Path | None, overrides: dict[str, str]) -> None:
    try:
        settings = load(path, overrides)
    except ConfigError as error:
        assert error.text.isprintable(), error.text  # noqa: PT017
        assert error.line is None or error.line >= 1  # noqa: PT017
    else:
        assert settings.directory.is_dir()


@given(text=TEXTS)
@example(text="[prefork]\nkey\n  continued\n")
@example(text="[prefork]\napp = a:b\ndirectory = " + "x" * 5000)
def test_no_text_whatever_raises_anything_but_config_error(scratch, text):
    settings_or_one_clear_line(written(scratch, text.encode(errors="surrogatepass")), {})


@given(data=st.one_of(st.binary(), st.binary().map(lambda data: f"[prefork]\n{APP}".encode() + data)))
def test_no_bytes_whatever_raise_anything_but_config_error(scratch, data):
    settings_or_one_clear_line(written(scratch, data), {})


@given(flags=st.dictionaries(st.one_of(st.sampled_from(list(KEYS)), st.text()), TEXTS))
def test_no_flags_whatever_raise_anything_but_config_error(flags):
    settings_or_one_clear_line(None, flags)
