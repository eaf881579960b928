"""Keys from the settings and from a file: rights, limits, reloading, and what is refused."""

from __future__ import annotations

import logging
from hashlib import sha256
from pathlib import Path

import pytest

from tracer.config import Settings
from tracer.errors import SettingsError
from tracer.keys import KeyRing

SECRET = "horse battery staple"


def keys_file(path: Path, text: str) -> Settings:
    path.write_text(text)
    path.chmod(0o600)
    return Settings(keys_file=str(path))


def test_the_settings_own_keys_have_one_right_each() -> None:
    ring = KeyRing(Settings(capture_key="c", read_key="r"))
    found = [(secret, right) for secret in "cr" for right in ("capture", "read") if ring.find(secret, right)]
    assert found == [("c", "capture"), ("r", "read")]
    assert ring.find("", "capture") is None
    assert not KeyRing(Settings()).has("capture")


def test_a_file_names_keys(tmp_path: Path) -> None:
    ring = KeyRing(keys_file(tmp_path / "keys.toml", f"""
        [alice]
        sha256 = "{sha256(SECRET.encode()).hexdigest()}"
        reads = "own"
        captures_per_minute = 60
        capture_mb_per_hour = 0.5
        [viewer]
        key = "look"
        may = ["read"]
    """))  # fmt: skip
    alice, viewer = ring.find(SECRET, "capture"), ring.find("look", "read")
    assert alice is not None
    assert (alice.name, alice.only_own) == ("alice", True)
    assert (alice.captures_per_minute, alice.capture_mb_per_hour) == (60, 0.5)
    assert viewer is not None
    assert (viewer.name, viewer.only_own) == ("viewer", False)
    assert ring.find("look", "capture") is None
    assert ring.find(SECRET + " ", "capture") is None
    assert SECRET not in repr(alice)


def test_a_changed_file_counts_at_once_and_a_broken_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.toml"
    ring = KeyRing(keys_file(path, '[a]\nkey = "one"'))
    keys_file(path, '[a]\nkey = "two two"')
    assert ring.find("one", "capture") is None
    assert ring.find("two two", "capture") is not None
    keys_file(path, '[a]\nkey = "three three')
    with caplog.at_level(logging.ERROR):
        assert ring.find("two two", "capture") is not None
        assert ring.find("two two", "capture") is not None
    assert [record.getMessage().count("stay") for record in caplog.records] == [1]
    path.unlink()
    assert ring.find("two two", "capture") is not None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[a]", "either `key`"),
        ('[a]\nkey = ""', "either `key`"),
        ('[a]\nkey = "x"\nsha256 = "' + "0" * 64 + '"', "either `key`"),
        ('[a]\nsha256 = "abc"', "64 hexadecimal"),
        ('[a]\nkey = "x"\nmay = ["write"]', "`may` lists capture and read"),
        ('[a]\nkey = "x"\nmay = "read"', "`may` lists"),
        ('[a]\nkey = "x"\nreads = "some"', "`reads` is"),
        ('[a]\nkey = "x"\ncaptures_per_minute = -1', "are numbers"),
        ('[a]\nkey = "x"\ncaptures_per_minute = true', "are numbers"),
        ('[a]\nkey = "x"\ncapture_mb_per_hour = inf', "are numbers"),
        ('[a]\nkey = "x"\nlimit = 3', "a key has only"),
        ('a = "secretive"', "a key has only"),
        ('["a b"]\nkey = "x"', "a key's name"),
        ('[default]\nkey = "x"', "a key's name"),
        ('[a]\nkey = "secretive', "not TOML"),
    ],
)
def test_what_a_file_may_not_say(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=words) as error:
        KeyRing(keys_file(tmp_path / "keys.toml", text))
    assert "secretive" not in str(error.value)
    assert error.value.__cause__ is None


def test_a_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    settings = keys_file(tmp_path / "keys.toml", '[a]\nkey = "x"')
    (tmp_path / "keys.toml").chmod(0o640)
    with pytest.raises(SettingsError, match="chmod 600"):
        KeyRing(settings)
    with pytest.raises(SettingsError, match="No such file"):
        KeyRing(Settings(keys_file=str(tmp_path / "none")))


def test_every_key_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of an answer does not tell which key, or whether any, was near."""
    text = "\n".join(f'[k{number}]\nkey = "{number}"' for number in range(5))
    ring, seen = KeyRing(keys_file(tmp_path / "keys.toml", text)), []

    def compare(given: bytes, known: bytes) -> bool:
        seen.append(known)
        return given == known

    monkeypatch.setattr("tracer.keys.hmac.compare_digest", compare)
    for secret in ("0", "4", "none"):
        ring.find(secret, "capture")
    assert len(seen) == 15
